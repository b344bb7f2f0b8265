"""The file of keys: what may be in it, how it is followed, and who is found."""

import asyncio
import hashlib
import logging
import tomllib
import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mgie.errors import ConfigError
from serving.access import keys as module
from serving.access.__main__ import app
from serving.access.keys import KeyRing, new_key, read_keys
from serving.errors import LimitError, UnknownKeyError
from tests.waiting import until_async

HASH = hashlib.sha256(b"mgie-a").hexdigest()


def entry(key: str, name: str, /, **fields: object) -> str:
    lines = [f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    lines += [f"{field} = {value}" for field, value in fields.items()]
    return "\n".join(["[[keys]]", *lines, ""])


def test_a_new_key_is_random_long_and_found_by_its_hash() -> None:
    made = [new_key() for _ in range(20)]
    assert len({key for key, _ in made}) == 20
    for key, digest in made:
        assert key.startswith("mgie-")
        assert len(key) == 5 + 43  # 32 bytes
        ring = KeyRing(text=f'[[keys]]\nname = "a"\nsha256 = "{digest}"')
        assert ring.find(key).key.name == "a"
        for other in (key[:-1], key + "a", key.upper(), "", digest, "mgie-\udcff"):
            with pytest.raises(UnknownKeyError, match="not valid"):
                ring.find(other)


def test_each_key_is_found_with_its_own_limits() -> None:
    text = entry("k1", "one", requests_per_minute=1) + entry("k2", "two", priority='"batch"')
    ring = KeyRing(text=text)
    assert [ring.find(key).key.name for key in ("k1", "k2")] == ["one", "two"]
    assert (ring.find("k1").key.priority, ring.find("k2").key.priority) == (None, "batch")
    ring.find("k1").allowance.request()
    with pytest.raises(LimitError):
        ring.find("k1").allowance.request()
    ring.find("k2").allowance.request()


def test_a_key_is_valid_until_it_expires() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    text = entry("k", "a", expires="2030-01-01T01:00:00+01:00") + entry("l", "b", expires="2030-01-01T00:00:01Z")
    ring = KeyRing(text=text, now=lambda: now)
    assert ring.find("l").key.name == "b"
    with pytest.raises(UnknownKeyError, match="expired"):
        ring.find("k")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys = [", "FILE is no TOML"),
        ("", "FILE holds nothing; it must hold one"),
        ("keys = []", "FILE holds keys"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n[other]', "FILE holds keys, other"),
        (f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n' * 2, "key 2: name is 'a', as that of another"),
        (entry("k", "a") + entry("k", "b"), "key 2: sha256 is that of 'a'"),
        (f'[[keys]]\nsha256 = "{HASH}"', "FILE, key 1: name is missing"),
        ('[[keys]]\nname = "a"', r"key 1 \(a\): sha256 is missing"),
        ('[[keys]]\nname = "A b"\nsha256 = "x"', "key 1: name must be 1 to 64 of a-z"),
        ('[[keys]]\nname = "a"\nsha256 = "mgie-SECRET"', r"key 1 \(a\): sha256 must be the 64 hexadecimal"),
        (entry("k", "a", key='"mgie-SECRET"'), r"key 1 \(a\): key is no field of a key; these are: .*name, sha256"),
        (entry("k", "a", requests_per_minute=0), "requests_per_minute must be greater than or equal to 1"),
        (entry("k", "a", requests_per_minute='"6"'), "requests_per_minute must be a valid integer"),
        (entry("k", "a", max_concurrent=1.0), "max_concurrent must be a valid integer"),
        (entry("k", "a", pixel_steps_per_minute=-1), "pixel_steps_per_minute must be greater"),
        (entry("k", "a", priority='"urgent"'), "priority must be 'interactive' or 'batch'"),
        (entry("k", "a", expires="2030-01-01T00:00:00"), "expires must be a time with its zone"),
        (entry("k", "a", expires="2030-01-01"), "expires must be a time with its zone"),
        ('keys = ["mgie-SECRET"]', "FILE, key 1: entry"),
    ],
)
def test_a_bad_file_names_entry_and_field_and_quotes_no_secret(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(text, where="FILE")
    assert "SECRET" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))  # as a log would have it
    assert "SECRET" not in shown


def test_keys_of_the_file_and_of_the_environment_are_one_ring(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("k1", "one"))
    ring = KeyRing(file, entry("k2", "two"))
    assert [ring.find(key).key.name for key in ("k1", "k2")] == ["one", "two"]
    for text in (entry("k2", "one"), entry("k1", "two")):
        with pytest.raises(ConfigError, match=r"'one' is in keys_file .* and in MGIE_API_KEYS"):
            KeyRing(file, text)
    with pytest.raises(ConfigError, match=r"keys_file .*absent\.toml cannot be read"):
        KeyRing(tmp_path / "absent.toml")


def test_the_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "WATCH_EVERY_S", 0.01)
    file = tmp_path / "keys.toml"
    file.write_text(entry("old", "a", requests_per_minute=2))
    ring = KeyRing(file, clock=lambda: 0.0)  # no share is refilled
    state, looks = ring._state, list[object]()
    monkeypatch.setattr(ring, "_state", lambda: looks.append(None) or state())

    def replace(text: str | None) -> None:
        """In one move, as a careful operator does."""
        if text is None:
            file.unlink()
            return
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    def is_valid(key: str) -> bool:
        try:
            return ring.find(key) is not None
        except UnknownKeyError:
            return False

    def num_errors() -> int:
        return sum(record.levelno == logging.ERROR for record in caplog.records)

    async def main() -> None:
        monitoring = asyncio.create_task(ring.watch())
        ring.find("old").allowance.request()
        for broken in ("nonsense", None):
            before = num_errors()
            replace(broken)
            await until_async(lambda before=before: num_errors() > before)
            looks.clear()
            await until_async(lambda: len(looks) > 2)
            assert num_errors() == before + 1  # told of once, not every time that it is looked at
            assert is_valid("old")
        # The same key with another: what was used stays used.
        replace(entry("old", "a", requests_per_minute=2) + entry("new", "b"))
        await until_async(lambda: is_valid("new"))
        ring.find("old").allowance.request()
        with pytest.raises(LimitError):
            ring.find("old").allowance.request()
        replace(entry("new", "b"))
        await until_async(lambda: not is_valid("old"))
        assert is_valid("new")
        monitoring.cancel()

    asyncio.run(main())
    assert "the keys stay as they were" in caplog.text


def test_the_command_makes_a_key_and_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app.cli(args=["new", "alice", "--requests-per-minute", "60", "--priority", "batch"])
    made = capsys.readouterr()
    key, text = made.err.split()[-1], made.out
    assert key not in text
    (content,) = tomllib.loads(text)["keys"]
    assert content == {
        "name": "alice",
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "requests_per_minute": 60,
        "priority": "batch",
    }
    file = tmp_path / "keys.toml"
    file.write_text(text)
    assert KeyRing(file).find(key).key.name == "alice"
    app.cli(args=["check", str(file)])
    assert capsys.readouterr().out == "alice requests_per_minute=60 priority=batch\n"
    with pytest.raises(ConfigError, match="max_concurrent must be greater"):
        app.cli(args=["new", "alice", "--max-concurrent", "0"])
    assert capsys.readouterr().out == ""
