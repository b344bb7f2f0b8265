"""Weight files of published checkpoints: reading them safely, writing safetensors as a stream.

`.safetensors` or torch pickles, whole or in shards. Pickles are read with `weights_only`, so nothing in them
runs. Tensors go from file to file one by one, so the anonymous memory needed is about one tensor (one shard
for pickles older than torch 1.6, which cannot be mapped). Knows nothing of what the weights mean.
"""

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mgie.bundle.record import read_json
from mgie.errors import BundleError, ConversionError

Report = Callable[[int], None]
"called with the bytes written since the last call"

_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file is, without its values."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The tensors in the files of one checkpoint, by name.

    Raises:
        ConversionError: A file cannot be read, or two of them hold the same tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        first = files[0]
        self.label = f"{first.parent.name}/{first.name}" if len(files) == 1 else first.parent.name
        self.specs: dict[str, TensorSpec] = {}
        for file in files:
            for key, tensor in read_weights(file).items():
                if key in self.specs:
                    raise ConversionError(f"{key} is in both {self.specs[key].file.name} and {file.name}")
                self.specs[key] = TensorSpec(key, file, tuple(tensor.shape), tensor.dtype)

    @classmethod
    def find(cls, folder: Path, *, prefix: str = "") -> "Weights":
        """The weights of a transformers or diffusers folder; safetensors first, which need no unpickling.

        Args:
            folder: Folder with weights under one of the usual names, whole or in shards.
            prefix: Put before every name if no name has it: transformers 5 saves CLIP's towers without.
        """
        names = [
            f"{stem}.{suffix}"
            for stem, suffix in (
                ("model", "safetensors"),
                ("diffusion_pytorch_model", "safetensors"),
                ("pytorch_model", "bin"),
                ("diffusion_pytorch_model", "bin"),
            )
        ]
        for name in names:
            index = folder / f"{name}.index.json"
            if (folder / name).is_file() or index.is_file():
                weights = cls([folder / name] if (folder / name).is_file() else _shard_files(index))
                if not any(key.startswith(prefix) for key in weights.specs):
                    weights.rename(lambda key: prefix + key)
                return weights
        raise ConversionError(f"{folder} has no weights; looked for {', '.join(names)}, whole or with .index.json")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor; () if there is none of that name."""
        return self.specs[key].shape if key in self.specs else ()

    def rename(self, rule: Callable[[str], str]) -> None:
        """Gives every tensor another name."""
        self.specs = {rule(key): spec for key, spec in self.specs.items()}


def _shard_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index, ConversionError)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} has no weight_map") from error
    if bad := [name for name in names if Path(name).name != name]:
        raise ConversionError(f"{index} lists {bad[0]!r}; shards must lie beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ConversionError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists")
    return [index.parent / name for name in names]


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or a torch pickle; mapped, so that values are read when used.

    Raises:
        ConversionError: It is missing or damaged, or a pickle that holds anything but tensors.
    """
    label = f"{file.parent.name}/{file.name}"
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Pickles that torch wrote before 1.6 are no zip archives; they can only be read as a whole.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError as error:
        raise ConversionError(f"{file} is missing") from error
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConversionError(f"{label} is refused: its pickle calls {name[1]}, which is no tensor") from error
        raise ConversionError(f"{label} is damaged or no weight file: it cannot be unpickled") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, SafetensorError) as error:
        raise ConversionError(f"{label} is damaged or no weight file: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{label} is not a plain state dict: every value must be a tensor")
    return content


def first_line(error: Exception) -> str:
    """What libraries say, without the stack trace or advice that some add; the class if they say nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written, and where its values come from."""

    name: str
    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its values as written."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, tensor: Tensor) -> Tensor:
        """`tensor` in the dtype to be written.

        Raises:
            ConversionError: A value does not fit into it.
        """
        return cast_in_range(self.name, tensor, self.dtype)


def cast_in_range(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, called `name`, in another dtype.

    Raises:
        ConversionError: A value does not fit into it.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
        raise ConversionError(f"{name} has values that are too large for {dtype}: choose another dtype")
    return cast


def write_sharded(folder: Path, tensors: Sequence[TensorPlan], max_shard_bytes: int | None, report: Report) -> None:
    """Writes `model.safetensors`, or `model-0000x-of-0000n.safetensors` and an index, as transformers reads them."""
    shards: list[list[TensorPlan]] = [[]]
    limit = math.inf if max_shard_bytes is None else max_shard_bytes
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], report)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, report)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[TensorPlan], report: Report) -> None:
    """One safetensors file, tensor by tensor; only one source file is open (mapped) at a time.

    The format: length of the header (8 bytes, little endian), JSON header padded with spaces to a multiple of
    8 bytes, values. The library's own writer takes all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    opened: Path | None = None
    content: dict[str, Tensor] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors:
            if tensor.file != opened:
                content = {}  # unmapped before the next is opened
                content, opened = read_weights(tensor.file), tensor.file
            value = content[tensor.key]
            value = tensor.cast(value if tensor.change is None else tensor.change(value))
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            report(tensor.num_bytes)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Loads `weights` into `module`.

    Raises:
        BundleError: Keys are missing or unexpected, or sizes differ; all are listed.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if problems := list_misfits(expected, {key: tuple(value.shape) for key, value in weights.items()}):
        raise BundleError(f"weights of {name} do not fit: {'; '.join(problems)}")
    module.load_state_dict(dict(weights))


def list_misfits(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of the `given` shapes from standing in for the `expected` ones, by name."""
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in expected]
    problems += [
        f"{key} has shape {given[key]}, not {shape}"
        for key, shape in expected.items()
        if given.get(key, shape) != shape
    ]
    return problems


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
