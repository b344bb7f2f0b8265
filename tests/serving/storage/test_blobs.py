from collections.abc import Iterator
from pathlib import Path

import pytest

import serving.storage.s3_blobs
from mgie.errors import ConfigError
from serving.errors import StoreError
from serving.storage.artifacts import open_blobs
from serving.storage.blobs import Blobs
from tests.serving.s3_store import Fault, S3Store

pytestmark = pytest.mark.slow


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    with S3Store(monkeypatch) as store:
        yield store
        store.always, store.ignores_conditions = None, False
        store.faults.clear()


@pytest.fixture(params=["local", "s3", "s3 without prefix"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """The same claims hold for both stores."""
    if request.param == "local":
        return open_blobs(str(tmp_path / "a" / "b"))
    s3: S3Store = request.getfixturevalue("s3")
    return open_blobs(f"s3://{s3.bucket}/some/prefix/" if request.param == "s3" else f"s3://{s3.bucket}")


def test_what_is_written_is_read_until_it_is_deleted(blobs: Blobs) -> None:
    assert blobs.read("a/x") is None
    for data in (b"one", b""):
        blobs.write("a/x", data, content_type="image/png", expires_s=2e9)
        found = blobs.read("a/x")
        assert found is not None
        assert found.data == data
    blobs.delete("a/x")
    blobs.delete("a/x")
    assert blobs.read("a/x") is None


def test_a_condition_lets_one_of_two_write(blobs: Blobs) -> None:
    first = blobs.write_if("a/x", b"first", version=None)
    assert first is not None
    assert blobs.write_if("a/x", b"also first", version=None) is None
    second = blobs.write_if("a/x", b"second", version=first)
    assert blobs.write_if("a/x", b"also second", version=first) is None
    found = blobs.read("a/x")
    assert found is not None
    assert (found.data, found.version) == (b"second", second)
    blobs.delete("a/x", version=first)
    assert blobs.read("a/x") == found
    blobs.delete("a/x", version=second)
    assert blobs.read("a/x") is None
    assert blobs.write_if("a/x", b"third", version=second) is None
    blobs.delete("a/x", version=second)


def test_a_listing_is_sorted_and_goes_on_where_it_is_told(blobs: Blobs) -> None:
    assert list(blobs.list("a/")) == []
    for key in ("a/y.3", "a/x.2", "b/x.9", "a/x.1", "a/x.10"):
        blobs.write(key, b"", content_type="image/png", expires_s=2e9)
    assert [entry.key for entry in blobs.list("a/")] == ["a/x.1", "a/x.10", "a/x.2", "a/y.3"]
    assert [entry.key for entry in blobs.list("a/x.")] == ["a/x.1", "a/x.10", "a/x.2"]
    assert [entry.key for entry in blobs.list("a/", after="a/x.10")] == ["a/x.2", "a/y.3"]


@pytest.mark.parametrize("url", ["", "s3://", "s3:///x", "http://host/x", "gs://bucket/x"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_blobs(url)


# ---- S3 in trouble


@pytest.mark.parametrize(
    "fault", [(500, "InternalError"), (503, "SlowDown"), (409, "ConditionalRequestConflict"), "lost"]
)
def test_one_fault_neither_fails_nor_doubles_a_conditional_write(s3: S3Store, fault: Fault) -> None:
    blobs = open_blobs(f"s3://{s3.bucket}/p")
    version: str | None = None
    for data in (b"created", b"replaced"):
        s3.faults.append(("PUT", fault))
        num_before = s3.requests["PUT"]
        version = blobs.write_if("a/x", data, version=version)
        assert s3.requests["PUT"] > num_before + 1
        found = blobs.read("a/x")
        assert found is not None
        assert (found.data, found.version) == (data, version)
    assert not s3.faults


def test_a_body_that_is_cut_off_is_read_again(s3: S3Store) -> None:
    blobs = open_blobs(f"s3://{s3.bucket}/p")
    blobs.write("a/x", bytes(1000), content_type="image/png", expires_s=2e9)
    s3.faults += [("GET", "cut"), ("GET", "cut")]
    found = blobs.read("a/x")
    assert found is not None
    assert found.data == bytes(1000)
    assert not s3.faults


@pytest.mark.parametrize(("fault", "num_tries"), [((403, "AccessDenied"), 1), ((503, "SlowDown"), 2)])
def test_lasting_trouble_is_told_with_its_reason(
    s3: S3Store, fault: tuple[int, str], num_tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.storage.s3_blobs, "S3_ATTEMPTS", 2)
    blobs = open_blobs(f"s3://{s3.bucket}/p")
    s3.always = fault
    s3.requests.clear()
    for act in (
        lambda: blobs.read("a/x"),
        lambda: blobs.write("a/x", b"", content_type="image/png", expires_s=2e9),
        lambda: blobs.write_if("a/x", b"", version=None),
        lambda: blobs.delete("a/x"),
        lambda: list(blobs.list("a/")),
    ):
        with pytest.raises(StoreError, match=rf"store s3://{s3.bucket}/p cannot be .*{fault[1]}"):
            act()
    assert s3.requests == {"GET": 2 * num_tries, "PUT": 2 * num_tries, "DELETE": num_tries}


def test_a_missing_bucket_is_no_missing_key(s3: S3Store) -> None:
    blobs = open_blobs("s3://nowhere")
    for act in (
        lambda: blobs.read("a/x"),
        lambda: blobs.write_if("a/x", b"", version=None),
        lambda: blobs.write_if("a/x", b"", version='"0"'),
        lambda: blobs.delete("a/x", version='"0"'),
    ):
        with pytest.raises(StoreError, match="NoSuchBucket"):
            act()


def test_an_unreachable_store_is_told(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.storage.s3_blobs, "S3_ATTEMPTS", 1)
    blobs = open_blobs("s3://shop", endpoint="http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        blobs.read("a/x")
    with pytest.raises(StoreError, match="nonsense"):
        open_blobs("s3://shop", endpoint="nonsense")
