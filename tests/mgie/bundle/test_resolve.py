import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from huggingface_hub import constants
from moto.server import ThreadedMotoServer

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.bundle.record import CONFIG_FILE
from mgie.bundle.writer import BundleWriter
from mgie.config import BundleConfig, Provenance
from mgie.errors import BundleError
from mgie.model.edit_head import EditHead

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUCKET = "models"


# ---- local


def test_an_embedded_name_is_a_bundle(random_bundle: Bundle) -> None:
    assert open_bundle("random").identity == random_bundle.identity
    assert open_bundle("random-summarizer").config.parts == ("summarizer",)


def test_a_folder_is_a_bundle_by_string_or_path(random_folder: Path, random_bundle: Bundle) -> None:
    assert open_bundle(random_folder).identity == open_bundle(str(random_folder)).identity == random_bundle.identity


def test_a_folder_that_has_an_embedded_name_is_meant_only_when_written_as_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_bundle: Bundle
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_bundle("random").identity == random_bundle.identity
    for path in ("./tiny", Path("tiny")):
        with pytest.raises(BundleError, match="is not a bundle"):
            open_bundle(path)


@pytest.mark.parametrize("where", ["nonsense", "/no/such/folder", "./no/such", "~/x", "a/b/c", Path("a/b")])
def test_nonsense_is_refused_with_what_is_allowed(where: str | Path) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(where)
    for allowed in ("folder", "tiny", "hub id (org/name)", "s3://bucket/prefix"):
        assert allowed in str(caught.value)
    assert "does not exist" in str(caught.value)


def test_a_home_folder_is_found_and_a_file_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, random_folder: Path, random_bundle: Bundle
) -> None:
    monkeypatch.setenv("HOME", str(random_folder.parent))
    assert open_bundle(f"~/{random_folder.name}").identity == random_bundle.identity
    with pytest.raises(BundleError, match="is a file; give a folder"):
        open_bundle(random_folder / CONFIG_FILE)


# ---- Hugging Face hub


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_folder: Path) -> Path:
    """The hub's own cache layout, with the tiny bundle as acme/tiny on branch main."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--acme--tiny"
    shutil.copytree(random_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


@pytest.mark.parametrize("where", ["acme/tiny", "acme/tiny@main", f"acme/tiny@{COMMIT}"])
def test_a_hub_id_is_a_bundle(hub_cache: Path, random_bundle: Bundle, where: str) -> None:
    bundle = open_bundle(where)
    assert bundle.root == hub_cache / "snapshots" / COMMIT
    assert bundle.identity == random_bundle.identity
    bundle.verify()
    bundle.load_edit_head()


def test_parts_come_from_the_commit_of_the_configuration_when_the_branch_moves(hub_cache: Path) -> None:
    bundle = open_bundle("acme/tiny")
    (hub_cache / "refs" / "main").write_text(COMMIT[::-1])  # a commit that is not in the cache
    bundle.load_edit_head()
    with pytest.raises(BundleError, match="is no folder here, and as a hub id: the hub cannot be reached"):
        open_bundle("acme/tiny")


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("acme/other", "the hub cannot be reached, and its cache holds no copy"),
        ("acme/tiny@gone", "the hub cannot be reached, and its cache holds no copy"),
        *[(where, "it is no hub id") for where in ("acme/bad..name", "s3:/x", "acme/-")],
    ],
)
def test_an_unknown_hub_id_is_a_bundle_error(hub_cache: Path, where: str, reason: str) -> None:
    with pytest.raises(BundleError, match=f"bundle '{where}' is no folder here, and as a hub id: {reason}"):
        open_bundle(where)


def test_an_incomplete_snapshot_names_the_file_that_lacks(hub_cache: Path) -> None:
    (hub_cache / "snapshots" / COMMIT / "edit_head" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"lacks edit_head/config\.json"):
        open_bundle("acme/tiny").load_edit_head()


# ---- S3


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few kilobytes: what takes the time in these tests is copying."""
    out = tmp_path_factory.mktemp("bundles") / "small"
    head = EditHead(llm_dim=8, condition_dim=8, width=8, num_queries=2, num_layers=1, feedforward_dim=8)
    config = BundleConfig(
        name="small",
        parts=("projector", "edit_head", "scheduler"),
        trained=False,
        provenance=Provenance(made_by="test"),
    )
    with BundleWriter(out, config) as writer:
        writer.add_projector(torch.nn.Linear(8, 8).state_dict())
        writer.add_edit_head(head.config, head.state_dict())
        writer.add_scheduler({"num_train_timesteps": 1000, "timestep_spacing": "linspace"})
    return out


@pytest.fixture(scope="module")
def small_bundle(small_folder: Path) -> Bundle:
    return Bundle(small_folder)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, s3_server: str, tmp_path: Path, small_folder: Path) -> Iterator[Any]:
    """A client of a store that holds the small bundle at s3://models/v1/small; an empty local cache."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MGIE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    upload(client, small_folder)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


def upload(client: Any, folder: Path, prefix: str = "v1/small/") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=prefix + path.relative_to(folder).as_posix(), Body=path.read_bytes())


def cached(tmp_path: Path) -> set[str]:
    """The part folders and files in the cache, whichever version they are of."""
    return {path.name for root in (tmp_path / "cache/s3/models/v1/small").glob("*") for path in root.iterdir()}


@pytest.mark.parametrize("url", ["s3://models/v1/small", "s3://models/v1/small/"])
def test_a_bundle_in_s3_is_fetched_part_by_part(s3: Any, tmp_path: Path, small_bundle: Bundle, url: str) -> None:
    bundle = open_bundle(url)
    assert bundle.identity == small_bundle.identity
    assert cached(tmp_path) == {CONFIG_FILE}
    bundle.load_edit_head()
    assert cached(tmp_path) == {CONFIG_FILE, "edit_head"}
    bundle.verify()
    assert cached(tmp_path) == {CONFIG_FILE, *small_bundle.config.parts}
    assert not list((tmp_path / "cache").rglob(".*"))  # nothing half fetched is left


def test_a_bucket_may_be_a_bundle_itself(s3: Any, small_folder: Path, small_bundle: Bundle) -> None:
    upload(s3, small_folder, prefix="")
    bundle = open_bundle("s3://models")
    assert bundle.scheduler_config() == small_bundle.scheduler_config()


def test_what_was_fetched_once_is_not_fetched_again(s3: Any) -> None:
    open_bundle("s3://models/v1/small").load_edit_head()
    s3.delete_object(Bucket=BUCKET, Key="v1/small/edit_head/model.safetensors")
    open_bundle("s3://models/v1/small").load_edit_head()


def test_a_bundle_that_changed_at_its_url_is_not_mixed_with_the_old_one(
    s3: Any, tmp_path: Path, small_folder: Path
) -> None:
    old = open_bundle("s3://models/v1/small")
    old.load_edit_head()
    content = (small_folder / "scheduler/scheduler_config.json").read_bytes()
    changed = content.replace(b'"linspace"', b'"trailing"')  # of the same size: only its checksum tells
    assert len(changed) == len(content)
    assert changed != content
    newer = Path(shutil.copytree(small_folder, tmp_path / "newer"))
    (newer / "scheduler/scheduler_config.json").write_bytes(changed)
    old.scheduler_config()
    data = json.loads((newer / CONFIG_FILE).read_text())
    data["files"]["scheduler/scheduler_config.json"]["sha256"] = hashlib.sha256(changed).hexdigest()
    (newer / CONFIG_FILE).write_text(json.dumps(data))
    upload(s3, newer)

    new = open_bundle("s3://models/v1/small")
    assert new.identity != old.identity
    assert new.root != old.root
    assert new.scheduler_config()["timestep_spacing"] == "trailing"
    assert old.scheduler_config()["timestep_spacing"] == "linspace"
    # The old one does not take files of the new: it says that they are not its own.
    s3.put_object(Bucket=BUCKET, Key="v1/small/projector/model.safetensors", Body=b"")
    with pytest.raises(BundleError, match="does not have the sha256"):
        old.verify(["projector"])


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_corrupted_object_is_refused_and_not_kept(s3: Any, tmp_path: Path, small_folder: Path, damage: str) -> None:
    content = (small_folder / "edit_head/model.safetensors").read_bytes()
    corrupted = content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[:-1]
    key = "v1/small/edit_head/model.safetensors"
    s3.put_object(Bucket=BUCKET, Key=key, Body=corrupted)
    bundle = open_bundle("s3://models/v1/small")
    with pytest.raises(BundleError, match=r"edit_head/model\.safetensors does not have the sha256"):
        bundle.load_edit_head()
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    assert not list((tmp_path / "cache").rglob(".*"))
    s3.put_object(Bucket=BUCKET, Key=key, Body=content)
    bundle.load_edit_head()


@pytest.mark.parametrize(
    "url",
    ["s3://no-such-bucket/x", "s3://models/no/such", "s3://", "s3:///x", "s3://models/../../x", "s3://UPPER_case!"],
)
def test_an_s3_url_without_a_bundle_is_a_bundle_error(s3: Any, tmp_path: Path, url: str) -> None:
    with pytest.raises(BundleError, match="s3://"):
        open_bundle(url)
    assert not list(tmp_path.rglob(CONFIG_FILE))


def test_an_object_that_is_missing_is_named(s3: Any) -> None:
    s3.delete_object(Bucket=BUCKET, Key="v1/small/projector/model.safetensors")
    with pytest.raises(BundleError, match=r"s3://models/v1/small/projector/model\.safetensors cannot be fetched"):
        open_bundle("s3://models/v1/small").verify(["projector"])


def test_a_store_that_does_not_answer_is_a_bundle_error(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for endpoint in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(BundleError, match="cannot be fetched"):
            open_bundle("s3://models/v1/small")


def test_an_s3_cache_that_cannot_be_written_is_a_bundle_error(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MGIE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BundleError, match="set MGIE_CACHE to a writable folder"):
        open_bundle("s3://models/v1/small")
