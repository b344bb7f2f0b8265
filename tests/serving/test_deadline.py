"""Giving up what takes too long."""

import asyncio

import pytest

from mgie.errors import DeadlineError
from serving.deadline import within


def test_what_takes_longer_raises_the_error_that_was_given() -> None:
    late = DeadlineError("too long")

    async def main() -> None:
        async with within(0.001, late):
            await asyncio.Event().wait()

    with pytest.raises(DeadlineError) as caught:
        asyncio.run(main())
    assert caught.value is late


@pytest.mark.parametrize("left_s", [60.0, None])
@pytest.mark.parametrize("inside", [TimeoutError("of a socket"), DeadlineError("of another"), ValueError("bad")])
def test_errors_of_anything_else_pass_as_they_are(left_s: float | None, inside: Exception) -> None:
    async def main() -> None:
        async with within(left_s, DeadlineError("too long")):
            raise inside

    with pytest.raises(type(inside)) as caught:
        asyncio.run(main())
    assert caught.value is inside


def test_what_is_over_before_it_begins_is_given_up_at_its_first_wait() -> None:
    async def main() -> None:
        async with within(-1.0, DeadlineError("too long")):
            await asyncio.sleep(0)
            await asyncio.Event().wait()

    with pytest.raises(DeadlineError):
        asyncio.run(main())
