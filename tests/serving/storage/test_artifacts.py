import contextlib
import multiprocessing
import os
import re
import resource
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from mgie.errors import ConfigError
from serving.errors import DamagedError, NotFoundError, StoreError
from serving.storage.artifacts import Artifact, ArtifactStore, EditFacts
from serving.storage.blobs import Blob, LocalBlobs
from tests.pipelines.fault_proxy import FaultProxy
from tests.serving.s3_store import S3Store

pytestmark = pytest.mark.slow

TTL_S = 3600.0
FACTS = EditFacts(seed=7, settings={"steps": 20, "guidance_scale": 7.5}, expressive="A dark sky. ü", bundle="tiny@1")


class Clock:
    """Begins at the real time, since stores date their files by it."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


class Shop:
    """One place with a store in it that any number of replicas may open."""

    def __init__(self, url: str, list_keys: Callable[[], list[str]]) -> None:
        self.url, self.keys, self.clock = url, list_keys, Clock()

    def open(self, *, ttl_s: float = TTL_S, endpoint: str | None = None) -> ArtifactStore:
        return ArtifactStore.open(self.url, ttl_s=ttl_s, endpoint=endpoint, clock=self.clock)


@pytest.fixture
def local(tmp_path: Path) -> Shop:
    folder = tmp_path / "shop"

    def keys() -> list[str]:
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if path.name != "lock")

    return Shop(str(folder), keys)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    with S3Store(monkeypatch) as store:
        yield store


@pytest.fixture(params=["local", "s3"])
def shop(request: pytest.FixtureRequest) -> Shop:
    """The same claims hold for both stores."""
    if request.param == "local":
        found: Shop = request.getfixturevalue("local")
        return found
    s3: S3Store = request.getfixturevalue("s3")
    return Shop(f"s3://{s3.bucket}/pre/fix", s3.keys)


def put(store: ArtifactStore, data: bytes = b"pixels", edit: EditFacts | None = FACTS) -> Artifact:
    return store.put(data, content_type="image/png", width=4, height=3, edit=edit)


# ---- images


def test_any_replica_answers_for_any_result(shop: Shop) -> None:
    data = os.urandom(100_000)
    photo = put(shop.open(), b"photo", edit=None)
    result = put(shop.open(), data, edit=FACTS)
    other = shop.open()
    assert other.read(result.id) == (result, data)
    assert other.get(result.id) == result
    assert result.edit is not None
    assert other.read(photo.id) == (photo, b"photo")
    assert (result.num_bytes, result.width, result.height, result.edit.seed) == (100_000, 4, 3, 7)
    shop.open().delete(result.id)
    with pytest.raises(NotFoundError):
        other.read(result.id)
    assert len(shop.keys()) == 2


def test_what_has_expired_is_absent_at_once_and_swept(shop: Shop) -> None:
    store = shop.open()
    old = put(store)
    shop.clock.now_s += TTL_S / 2
    young = put(store)
    assert store.sweep() == 0
    shop.clock.now_s = old.expires_s - 0.01
    assert store.read(old.id) == (old, b"pixels")
    shop.clock.now_s = old.expires_s
    for act in (store.get, store.read, store.delete, lambda artifact_id: store.url(artifact_id, "http://h")):
        with pytest.raises(NotFoundError, match="3600 s"):
            act(old.id)
    assert len(shop.keys()) == 4
    assert store.sweep() == 2
    assert [key.split("/")[-1] for key in sorted(shop.keys())] == [f"{young.id}.image", f"{young.id}.json"]
    assert store.read(young.id) == (young, b"pixels")


def test_a_sweep_does_no_more_than_it_is_allowed(shop: Shop) -> None:
    store = shop.open()
    for i in range(3):
        put(store)
        store.create("jobs", f"old-{i}", {})
    shop.clock.now_s += 2 * TTL_S
    put(store)
    for i in range(2):  # sorted before the old ones: the sweep must go on behind them
        store.create("jobs", f"new-{i}", {})
    counts = [store.sweep(limit=2) for _ in range(6)]
    assert max(counts) <= 4
    assert sum(counts) == 9
    assert list(store.names("jobs")) == ["new-0", "new-1"]
    assert len(shop.keys()) == 4


HOSTILE = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a" * 39,
    "a" * 41,
    "f" * 40 + "\n",
    "F" * 40,
    "\uff10" * 40,
    "f" * 39 + "\0",
]


@given(text=st.text() | st.text("0123456789abcdefABCDEF/.\n", max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="0" * 40)
def test_what_is_no_id_opens_nothing(text: str, local: Shop) -> None:
    assume(text.startswith("0") or not re.fullmatch("[0-9a-f]{40}", text))
    store = local.open()
    for candidate in (text, *HOSTILE):
        for act in (store.get, store.read, store.delete, lambda artifact_id: store.url(artifact_id, "http://h")):
            with pytest.raises(NotFoundError):
                act(candidate)
    with pytest.raises(NotFoundError):  # an id, but nobody's
        store.read("f" * 40)


def test_no_id_leads_out_of_the_store(local: Shop) -> None:
    store = local.open()
    artifact = put(store)
    outside = Path(local.url).parent
    (outside / "x.json").write_text(artifact.model_copy(update={"id": "../../x"}).model_dump_json())
    (outside / "x.image").write_bytes(b"pixels")
    with pytest.raises(NotFoundError):
        store.read("../../x")
    with pytest.raises(NotFoundError):
        store.delete("../../x")
    assert (outside / "x.image").exists()


@given(now_s=st.floats(0, 4e9), ttl_s=st.floats(60, 1e8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_id_lasts_for_the_time_promised(now_s: float, ttl_s: float, tmp_path: Path) -> None:
    store = ArtifactStore(LocalBlobs(tmp_path), ttl_s=ttl_s, clock=lambda: now_s)
    artifact_id = store.new_id()
    assert re.fullmatch("[0-9a-f]{40}", artifact_id)
    assert 0 <= int(artifact_id[:8], 16) - (now_s + ttl_s) <= 1 + 1e-6


def test_ids_share_nothing_but_their_time(local: Shop) -> None:
    ids = [local.open().new_id() for _ in range(500)]
    assert len({artifact_id[:8] for artifact_id in ids}) == 1
    for place in range(8, 40):  # 128 bits: every place takes every value
        assert len({artifact_id[place] for artifact_id in ids}) == 16


def test_the_address_in_a_folder_is_that_of_the_service(local: Shop) -> None:
    artifact = put(local.open())
    assert local.open().url(artifact.id, "https://host/base/") == f"https://host/base/v1/images/files/{artifact.id}"


def test_the_address_in_s3_is_signed_and_needs_no_key(s3: S3Store) -> None:
    shop = Shop(f"s3://{s3.bucket}/p", s3.keys)
    store = shop.open()
    artifact = put(store, b"signed")
    shop.clock.now_s += 600
    url = store.url(artifact.id, "http://unused")
    query = parse_qs(urlparse(url).query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert TTL_S - 602 <= int(query["X-Amz-Expires"][0]) <= TTL_S - 599
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"signed"
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["expires"] == time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(artifact.expires_s))
    long = shop.open(ttl_s=30 * 86_400)
    assert "X-Amz-Expires=604800" in long.url(put(long).id, "http://unused")


def test_what_the_store_did_not_write_is_reported_without_its_words(local: Shop) -> None:
    store = local.open()
    artifact = put(store)
    document = store.create("jobs", "a", {"prompt": "canary"})
    assert document is not None
    record = Path(local.url, "artifacts", f"{artifact.id}.json")
    image = record.with_suffix(".image")
    envelope = Path(local.url, "documents", "jobs.a")
    whole = record.read_text()
    for text in (
        whole[:-9],
        whole.replace('"seed":7', '"seed":"canary"'),
        whole.replace('"seed"', '"canary":1,"seed"'),
    ):
        record.write_text(text)
        with pytest.raises(DamagedError, match="damaged") as caught:
            store.read(artifact.id)
        assert "dark sky" not in str(caught.value)
    record.write_text(whole.replace(artifact.id, "f" * 40))
    with pytest.raises(DamagedError, match="another"):
        store.read(artifact.id)
    record.write_text(whole)
    image.write_bytes(b"pix")
    with pytest.raises(DamagedError, match="3 bytes, not 6"):
        store.read(artifact.id)
    envelope.write_text('{"content": {"prompt": "canary"}}')
    with pytest.raises(DamagedError, match="expires_s") as caught:
        store.find("jobs", "a")
    assert "canary" not in str(caught.value)


def test_foreign_files_do_not_stop_a_sweep(local: Shop) -> None:
    store = local.open()
    put(store)
    store.create("jobs", "z", {})
    for name in ("artifacts/.DS_Store", "artifacts/readme", "documents/.nfs01", "documents/jobs.a"):
        Path(local.url, name).write_text("not ours")
    local.clock.now_s += 2 * TTL_S
    assert store.sweep() == 3
    assert local.keys() == ["artifacts/.DS_Store", "artifacts/readme", "documents/.nfs01", "documents/jobs.a"]


@pytest.mark.parametrize("ttl_s", [0, 59.9, -1, float("nan")])
def test_a_time_too_short_is_refused(ttl_s: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 60"):
        ArtifactStore.open(str(tmp_path), ttl_s=ttl_s)


# ---- documents


def test_a_document_is_changed_by_those_who_know_it(shop: Shop) -> None:
    store, other = shop.open(), shop.open()
    assert store.find("jobs", "a") is None
    first = store.create("jobs", "a", {"state": "queued", "words": ["ü", None]})
    assert first is not None
    assert other.create("jobs", "a", {"state": "other"}) is None
    assert other.create("keys", "a", {}) is not None
    assert other.find("jobs", "a") == first
    same = other.replace(first, first.content)
    assert same is not None
    assert store.replace(first, {"state": "lost"}) is None  # though the content is what it was
    store.remove(first)
    assert store.find("jobs", "a") == same
    assert dict(same.content) == {"state": "queued", "words": ["ü", None]}
    store.remove(same)
    assert store.find("jobs", "a") is None
    assert store.replace(same, {}) is None
    assert list(store.names("jobs")) == []


def test_a_document_lives_on_with_each_write(shop: Shop) -> None:
    store = shop.open()
    kept, lapsed = store.create("jobs", "kept", {"n": 0}), store.create("jobs", "lapsed", {"n": 0})
    assert kept is not None
    assert lapsed is not None
    shop.clock.now_s += TTL_S - 1
    assert store.replace(kept, {"n": 1})
    shop.clock.now_s += 1
    assert store.find("jobs", "lapsed") is None
    assert store.find("jobs", "kept") is not None
    again = store.create("jobs", "lapsed", {"n": 2})
    assert again is not None
    assert shop.open().find("jobs", "lapsed") == again
    assert store.sweep() == 0
    assert sorted(store.names("jobs")) == ["kept", "lapsed"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("jobs", ""), ("jobs", "../x"), ("jobs", "A"), ("jobs", "a\n"), ("a.b", "x"), ("", "x"), ("jobs", "a" * 129)],
)
def test_a_name_is_plain(kind: str, name: str, local: Shop) -> None:
    store = local.open()
    with pytest.raises(ConfigError, match="of a document is"):
        store.create(kind, name, {})
    with pytest.raises(ConfigError, match="of a document is"):
        store.find(kind, name)


def _count_up(shop: Shop) -> None:
    """Adds to one number, trying again whenever somebody else was quicker; then tries to be the first."""
    store = shop.open()
    for _ in range(3):
        while True:
            document = store.find("jobs", "counter")
            assert document is not None
            if store.replace(document, {"n": document.content["n"] + 1}):
                break
    if store.create("jobs", "first", {}):
        store.create("wins", store.new_id(), {})


def test_of_writers_at_the_same_time_none_is_lost(shop: Shop) -> None:
    store = shop.open()
    store.create("jobs", "counter", {"n": 0})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_count_up, [shop] * 4))
    document = store.find("jobs", "counter")
    assert document is not None
    assert document.content["n"] == 12
    assert len(list(store.names("wins"))) == 1


class _Interrupted(LocalBlobs):
    """A folder in which something happens right after the next reading."""

    then: Callable[[], object] | None = None

    def read(self, key: str) -> Blob | None:
        found = super().read(key)
        then, self.then = self.then, None
        if then is not None:
            then()
        return found


def test_a_sweep_spares_what_was_made_in_the_place_of_the_expired(local: Shop) -> None:
    local.open().create("jobs", "a", {"n": 0})
    local.clock.now_s += 2 * TTL_S
    blobs = _Interrupted(Path(local.url))
    blobs.then = lambda: local.open().create("jobs", "a", {"n": 1})
    ArtifactStore(blobs, ttl_s=TTL_S, clock=local.clock).sweep()
    assert blobs.then is None
    document = local.open().find("jobs", "a")
    assert document is not None
    assert document.content == {"n": 1}


# ---- trouble


def _signalled_at(move: int, number: signal.Signals, act: Callable[[], object]) -> Any:
    """A process that sends itself a signal when it is about to move a file into place for the `move`-th time."""

    def body() -> None:
        really, num_moves = Path.replace, 0

        def replace(self: Path, target: Path) -> Path:
            nonlocal num_moves
            num_moves += 1
            if num_moves == move:
                os.kill(os.getpid(), number)
            return really(self, target)

        Path.replace = replace  # type: ignore[method-assign, assignment]
        act()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def _die_at(move: int, act: Callable[[], object]) -> None:
    process = _signalled_at(move, signal.SIGKILL, act)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_writer_waits_for_one_in_another_process(local: Shop) -> None:
    store = local.open()
    document = store.create("jobs", "a", {"n": 0})
    assert document is not None
    process = _signalled_at(1, signal.SIGSTOP, lambda: store.replace(document, {"n": 1}))
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(store.replace, document, {"n": 2})
        time.sleep(0.3)
        has_waited = not late.done()
        os.kill(process.pid, signal.SIGCONT)
        assert late.result() is None
    assert has_waited
    process.join()
    found = store.find("jobs", "a")
    assert found is not None
    assert found.content == {"n": 1}


@pytest.mark.parametrize("move", [1, 2])
def test_a_writer_that_is_killed_leaves_nothing_to_be_seen(move: int, local: Shop) -> None:
    store = local.open()
    whole = put(store)
    before = local.keys()
    _die_at(move, lambda: put(store, bytes(100_000)))
    left = sorted(set(local.keys()) - set(before))
    assert len(left) == move  # what it was about to move, and after the first move the image
    assert not any(name.endswith(".json") for name in left)
    assert store.read(whole.id) == (whole, b"pixels")
    for path in Path(local.url, "tmp").iterdir():
        os.utime(path, (0, 0))
    local.clock.now_s += 2 * TTL_S
    assert local.open().sweep() == 2 + move - 1
    assert local.keys() == []


def test_a_writer_that_is_killed_holds_no_lock_and_changes_no_document(local: Shop) -> None:
    store = local.open()
    document = store.create("jobs", "a", {"n": 0})
    assert document is not None
    _die_at(1, lambda: store.replace(document, {"n": 1}))
    assert store.find("jobs", "a") == document
    assert store.replace(document, {"n": 2}) is not None


def test_a_disk_that_takes_no_more_is_told_and_nothing_stays(local: Shop) -> None:
    """By the limit on the size of files: the kernel refuses the write half-way, as it does when a disk is full."""
    store = local.open()
    whole = put(store)
    before = local.keys()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot be written to: .*File too large"):
            put(store, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert local.keys() == before
    assert store.read(whole.id) == (whole, b"pixels")


@contextlib.contextmanager
def _without_permission(folder: Path) -> Iterator[None]:
    folder.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:  # to whom everything is permitted
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_a_missing_permission_is_told(local: Shop, tmp_path: Path) -> None:
    store = local.open()
    with _without_permission(Path(local.url, "tmp")):
        for act in (lambda: put(store), store.check, lambda: ArtifactStore.open(str(tmp_path / "new" / "x"), ttl_s=60)):
            with pytest.raises(StoreError, match="Permission denied"):
                act()
            if os.geteuid() != 65534:
                break  # the folder above is one's own


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be opened: .*Not a directory"):
        ArtifactStore.open(str(tmp_path / "file" / "x"), ttl_s=60)


def test_a_check_leaves_nothing_and_sees_a_store_without_conditions(shop: Shop, request: pytest.FixtureRequest) -> None:
    shop.open().check()
    assert shop.keys() == []
    if shop.url.startswith("s3"):
        s3: S3Store = request.getfixturevalue("s3")
        s3.ignores_conditions = True
        with pytest.raises(ConfigError, match="If-None-Match"):
            shop.open().check()


@pytest.mark.slow
def test_requests_that_fail_now_and_then_are_made_again(s3: S3Store) -> None:
    shop = Shop(f"s3://{s3.bucket}", s3.keys)
    with FaultProxy(s3.url, share=0.15, seed=0) as proxy:
        store = shop.open(endpoint=proxy.url)
        document = store.create("jobs", "a", {"n": 0})
        for n in range(1, 11):
            artifact = put(store, os.urandom(1000))
            assert store.get(artifact.id) == artifact
            assert document is not None
            document = store.replace(document, {"n": n})
        assert sum(proxy.faults.values()) >= 3
    assert len(shop.keys()) == 21
    assert document is not None
    assert dict(document.content) == {"n": 10}
