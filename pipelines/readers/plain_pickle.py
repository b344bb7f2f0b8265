"""Reading pickles that hold nothing but plain data, without unpickling.

A pickle is a program, and running a stranger's can do anything. This reads the opcodes that build dicts, lists,
tuples, text, bytes, numbers, booleans and None, and refuses every other one: nothing is ever imported or called.
"""

import pickletools
from typing import Any

from mgie.errors import DataError

_VALUES = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING", "BINSTRING",
    "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read_plain_pickle(data: bytes) -> Any:
    """What a pickle of plain data holds.

    Raises:
        DataError: It holds anything else, or is damaged.
    """
    try:
        return _run(data)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"pickle is damaged: {error!r}") from error


def _run(data: bytes) -> Any:
    """The stack machine of the format. Source: the documentation in Python's `pickletools`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        values = stack[start + 1 :]
        del stack[start:]
        return values

    for opcode, argument, position in pickletools.genops(data):
        match opcode.name:
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _TUPLES:
                count = _TUPLES[name]
                values = stack[len(stack) - count :]
                del stack[len(stack) - count :]
                stack.append(tuple(values))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "LIST":
                stack.append(since_mark())
            case "DICT":
                values = since_mark()
                stack.append(dict(zip(values[::2], values[1::2], strict=True)))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = since_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                values = since_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(str(argument))] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[int(str(argument))])
            case "POP":
                stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise DataError(
                    f"pickle holds {name} at byte {position}; only plain data (dict, list, text, numbers) is read"
                )
    raise ValueError("no STOP")
