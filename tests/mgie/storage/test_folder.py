import pickle
import re
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgie.data.ledger import images_root, read_manifest, write_images_root
from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Entry, Folder, open_folder
from mgie.storage.retry import is_absent, is_store_fault, with_retries
from mgie.storage.s3 import open_s3
from mgie.storage.s3_settings import s3_settings


@pytest.mark.parametrize("name", ["x", "a/b/c.txt", "with space/ü%20#?&+.jpg"])
def test_what_is_written_is_read(folder: Folder, name: str) -> None:
    folder.write(name, b"one")
    folder.write(name, b"two")
    assert folder.read(name) == b"two"
    assert folder.exists(name)
    assert folder.num_bytes(name) == 3


def test_what_is_not_there_is_absent(folder: Folder) -> None:
    assert not folder.exists("x")
    assert folder.num_bytes("x") is None
    assert folder.list() == []
    assert folder.list("deeper", is_recursive=True) == []
    with pytest.raises(FileNotFoundError) as caught:
        folder.read("x")
    assert is_absent(caught.value)
    assert not is_store_fault(caught.value)
    folder.delete("x")


def test_a_folder_is_no_file(folder: Folder) -> None:
    folder.write("a/b", b"x")
    assert not folder.exists("a")
    with pytest.raises(OSError, match=r"directory|not exist") as caught:
        folder.read("a")
    assert is_absent(caught.value)


def test_listing_is_sorted_relative_and_leaves_out_hidden_names(folder: Folder) -> None:
    for name in ("b", "a/2", "a/1", ".hidden", ".h/x", "a/.y"):
        folder.write(name, b"xy")
    assert folder.list() == [Entry("a", True, 0), Entry("b", False, 2)]
    assert [entry.name for entry in folder.list("a")] == ["1", "2"]
    assert [entry.name for entry in folder.list(is_recursive=True)] == ["a", "a/1", "a/2", "b"]
    assert [entry.name for entry in folder.child("a").list()] == ["1", "2"]


def test_deleting_takes_a_folder_with_all_in_it(folder: Folder) -> None:
    folder.write("a/b/c", b"x")
    folder.write("d", b"x")
    folder.delete("a")
    assert [entry.name for entry in folder.list(is_recursive=True)] == ["d"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_names_do_not_lead_out(folder: Folder, name: str) -> None:
    for use in (folder.read, folder.exists, folder.child, folder.list, folder.delete):
        with pytest.raises(DataError, match="relative path"):
            use(name)
    with pytest.raises(DataError, match="relative path"):
        folder.write(name, b"")


def test_a_published_file_appears_when_its_block_ends(folder: Folder) -> None:
    with folder.publish("a/x.bin") as path:
        path.write_bytes(b"12345")
        assert not folder.exists("a/x.bin")
    assert folder.read("a/x.bin") == b"12345"


def test_a_block_that_fails_publishes_nothing_and_leaves_nothing(folder: Folder) -> None:
    folder.write("a/x", b"before")

    def fail() -> None:
        with folder.publish("a/x") as path, pq.ParquetWriter(path, pa.schema([("n", pa.int64())])) as writer:
            writer.write_table(pa.table({"n": [1]}))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folder.read("a/x") == b"before"
    if folder.is_local:
        assert [path.name for path in Path(folder.at("a")).iterdir()] == ["x"]


@pytest.mark.parametrize("num_bytes", [0, 5, 25])
def test_a_file_is_downloaded_in_blocks(
    folder: Folder, tmp_path: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgie.storage.folder._COPY_BYTES", 5)
    folder.write("a/x", bytes(range(num_bytes)))
    folder.download("a/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(range(num_bytes))
    with pytest.raises(FileNotFoundError):
        folder.download("a/y", tmp_path / "copy")


def test_a_folder_travels_to_other_processes(folder: Folder) -> None:
    folder.write("x", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("x") == b"1"


def test_manifests_are_read_through_a_folder(folder: Folder) -> None:
    from mgie.data.ledger import MANIFEST_SCHEMA, to_table

    row = {
        "id": 1,
        "dataset": "d",
        "split": "train",
        "source": "s",
        "goal": "g",
        "instruction": "i",
        "provenance": "{}",
    }
    with folder.publish("manifest/part-00000.parquet") as path:
        pq.write_table(to_table([row], MANIFEST_SCHEMA), path)
    write_images_root(folder.child("manifest"), "..")
    (batch,) = read_manifest(folder.child("manifest"))
    assert batch.to_pylist()[0]["instruction"] == "i"
    assert images_root(folder.child("manifest")) == folder.url


# ---- URLs


def test_urls_of_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_folder("x/y/").url == str(tmp_path / "x" / "y")
    assert open_folder("~/x").url == str(tmp_path / "home" / "x")
    assert open_folder("file:///a%20b/c").url == "/a b/c"
    assert open_folder(Path("z")).path == str(tmp_path / "z")
    assert list(tmp_path.iterdir()) == []  # opening makes nothing


@pytest.mark.parametrize("url", ["", "s3://", "https://example.org/x", "s3://bucket/../x", Path("s3://bucket/x")])
def test_other_urls_are_refused(url: str | Path) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_folder(url)


@pytest.mark.parametrize(
    ("url", "kind", "path"),
    [
        ("gs://bucket/a b/?x#/", "gcs", "bucket/a b/?x#"),
        ("az://container/a", "abfs", "container/a"),
        ("abfs://container@account.dfs.core.windows.net", "abfs", "container"),
        ("abfss://container@account.dfs.core.windows.net/a/b", "abfs", "container/a/b"),
        ("hf://datasets/org/name@main/data", "py::fsspec+hf", "datasets/org/name@main/data"),
    ],
)
def test_urls_of_other_stores_name_their_file_system_without_a_connection(
    url: str, kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    folder = pickle.loads(pickle.dumps(open_folder(url)))
    assert (folder.filesystem.type_name, folder.path, folder.url) == (kind, path, url.rstrip("/"))
    assert folder.child("deeper").at("x") == f"{path}/deeper/x"
    assert folder.child("deeper").url == f"{url.rstrip('/')}/deeper"
    assert not folder.is_local


def test_azure_needs_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(ConfigError, match="container@account or AZURE_STORAGE_ACCOUNT"):
        open_folder("az://container/a")


def test_trouble_of_the_hub_is_trouble_of_a_store() -> None:
    """Without a network, or with an id that it refuses."""
    folder = open_folder("hf://nonsense")
    for use in (folder.exists, folder.read, folder.list):
        with pytest.raises(OSError, match="Hub Error") as caught:
            use("x")
        assert is_store_fault(caught.value)


def test_an_explicit_endpoint_wins_over_the_environment(
    s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    folder = open_folder(f"{s3}/prefix/", endpoint=s3_server)
    folder.write("x", b"1")
    assert folder.url == f"{s3}/prefix"
    assert open_folder(s3, endpoint=s3_server).read("prefix/x") == b"1"


def _serve(handle: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            handle(self)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_store_that_fails_now_and_then_is_asked_again(s3: str) -> None:  # for its credentials
    """Every other answer is a 503."""
    answers: list[int] = []

    def handle(request: BaseHTTPRequestHandler) -> None:
        answers.append(503 if len(answers) % 2 == 0 else 200)
        request.send_response(answers[-1])
        request.send_header("Content-Length", "5")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(b"hello")

    server = _serve(handle)
    try:
        folder = open_folder("s3://bucket", endpoint=f"http://127.0.0.1:{server.server_address[1]}")
        assert folder.read("x") == b"hello"
    finally:
        server.shutdown()
        server.server_close()
    assert 503 in answers


def test_a_store_that_refuses_is_a_fault_of_the_store_and_not_of_the_row(s3: str) -> None:
    def handle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(403)
        request.send_header("Content-Length", "0")
        request.end_headers()

    server = _serve(handle)
    try:
        folder = open_folder("s3://bucket", endpoint=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(OSError, match="ACCESS_DENIED") as caught:
            folder.read("x")
    finally:
        server.shutdown()
        server.server_close()
    assert is_store_fault(caught.value)
    assert not is_absent(caught.value)


@pytest.mark.parametrize(
    ("message", "num_tries"),
    [
        ("AWS Error INTERNAL_FAILURE during GetObject operation", 5),
        ("google::cloud::Status(INTERNAL: try later)", 5),
        ("GetProperties failed. Azure Error: [ServerBusy] try later", 5),
        ("AWS Error ACCESS_DENIED during GetObject operation", 1),
        ("AWS Error NETWORK_CONNECTION during GetObject operation", 1),  # tried for long enough below
        ("google::cloud::Status(PERMISSION_DENIED: no)", 1),
        ("Azure Error: [AuthenticationFailed] no", 1),
        ("Hub Error: 401 Client Error", 1),
        ("Corrupt snappy compressed data", 1),
    ],
)
def test_only_trouble_that_passes_is_waited_for(message: str, num_tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgie.storage.retry._PAUSES_S", (0.0,) * 4)
    tries = []

    def work() -> None:
        tries.append(1)
        raise OSError(message)

    with pytest.raises(OSError, match=re.escape(message)):
        with_retries(work)
    assert len(tries) == num_tries
    assert is_store_fault(OSError(message)) == ("Corrupt" not in message)


def test_both_clients_of_s3_are_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://one",
        "AWS_MAX_ATTEMPTS": "3",
        "AWS_REGION": "",
        "AWS_DEFAULT_REGION": "",
    }.items():
        monkeypatch.setenv(name, value)
    assert (s3_settings().endpoint, s3_settings().region, s3_settings().attempts) == ("http://one", "us-east-1", 3)
    assert s3_settings("http://two", attempts=7) == replace(s3_settings(), endpoint="http://two", attempts=7)
    for bad in ("0", "many"):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", bad)
        with pytest.raises(ConfigError, match=f"AWS_MAX_ATTEMPTS is '{bad}'"):
            s3_settings()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    config = open_s3("http://two").meta
    assert (config.endpoint_url, config.region_name) == ("http://two", "us-east-1")
    assert (config.config.retries["total_max_attempts"], config.config.read_timeout) == (3, 30)


def test_damaged_content_is_no_fault_of_the_store() -> None:
    assert not is_store_fault(OSError("Corrupt snappy compressed data."))
    assert is_store_fault(OSError(5, "Input/output error"))
    assert is_store_fault(PermissionError(13, "Permission denied"))


def test_a_failed_write_leaves_neither_file_nor_remains(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("sub/x", b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: a write ends halfway
    try:
        with pytest.raises(OSError, match="too large"):
            folder.write("sub/x", b"second" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x"]
    assert (tmp_path / "sub" / "x").read_bytes() == b"first"
