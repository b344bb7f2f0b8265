"""Memory and time of `mgie convert` on a LLaVA of LLaMA-7B's layer sizes, against loading it as a whole.

    python benchmarks/convert.py [--layers 6] [--repeats 3] [--folder /var/tmp]

Writes a seeded fp16 checkpoint in two `.bin` shards (2.4 GB with 6 of the 32 layers) to a temporary folder and
converts it in fresh processes: by `mgie.bundle.convert`, and by the plain way (read all shards into one dictionary, build
the model, save it). Both write the same bundle, checksums included; its tensors are compared. The page cache is
emptied of the source before each run. Everything is removed afterwards.

Memory is counted above what the imports take. Two figures, because mapped pages of the source count as resident but
can be dropped by the kernel at any time: anonymous memory (RssAnon, sampled every 5 ms) is what a machine must have;
peak resident memory (VmHWM, reset after the imports) includes the mapped pages. Linux only.

The last line is JSON: peak anonymous memory, ours and the plain way's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mgie.bundle.convert import convert
from mgie.bundle.untrained import build_tokenizer
from mgie.bundle.writer import BundleWriter
from mgie.config import BundleConfig, Provenance, Sources
from mgie.model.tokens import Tokenizer

HIDDEN, INTERMEDIATE, HEADS = 4096, 11008, 32  # LLaMA-7B
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 224, "patch_size": 14}  # fmt: skip
CLIP_PIXELS = {"size": 224, "crop_size": 224, "do_resize": True, "do_center_crop": True, "do_normalize": True,
               "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}  # fmt: skip
PROJECTOR = "model.mm_projector."


def write_sources(root: Path, num_layers: int) -> int:
    """Writes `llava/` and `clip/`; returns the bytes of LLaVA's two shards."""
    llava, clip = root / "llava", root / "clip"
    llava.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save(llava)
    llama = {"vocab_size": tokenizer.vocab_size, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
             "num_hidden_layers": num_layers, "num_attention_heads": HEADS, "max_position_embeddings": 2048}  # fmt: skip
    (llava / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_select_layer": -2, **llama}))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(LlamaConfig(**llama)).state_dict().items()}
    shapes |= {
        PROJECTOR + "weight": torch.Size((HIDDEN, CLIP["hidden_size"])),
        PROJECTOR + "bias": torch.Size((HIDDEN,)),
    }
    names = list(shapes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save(
            {name: torch.rand(shapes[name], generator=generator, dtype=torch.float16) for name in part}, llava / file
        )
        weight_map |= dict.fromkeys(part, file)
    (llava / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(clip)
    (clip / "preprocessor_config.json").write_text(json.dumps(CLIP_PIXELS))
    return sum(path.stat().st_size for path in llava.glob("*.bin"))


def convert_plainly(out: Path, root: Path) -> None:
    """The reference: the whole checkpoint in memory, then the model, then saved."""
    llava = root / "llava"
    tensors = {}
    for path in sorted(llava.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    projector = {name: tensors.pop(PROJECTOR + name) for name in ("weight", "bias")}
    config = json.loads((llava / "config.json").read_text())
    llama = {key: value for key, value in config.items() if not key.startswith(("mm_", "model_"))}
    with torch.device("meta"):  # no random weights that would be thrown away: the plain way at its best
        llm = LlamaForCausalLM(LlamaConfig(**llama))
    llm.load_state_dict(tensors, assign=True)
    bundle = BundleConfig(
        name="plain",
        parts=("tokenizer", "vision", "projector", "llm"),
        trained=True,
        provenance=Provenance(made_by="benchmark"),
    )
    with BundleWriter(out, bundle) as writer:
        writer.add_tokenizer(Tokenizer.load(llava))
        writer.add_pretrained("vision", CLIPVisionModel.from_pretrained(root / "clip"))
        writer.add_clip_pixels(CLIP_PIXELS)
        writer.add_projector(projector)
        writer.add_pretrained("llm", llm)


def read_status(pid: int | str) -> dict[str, int]:
    """Memory of a process, bytes; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith(("Rss", "Vm"))
    }


def run_one(way: str, root: Path, out: Path) -> None:
    """In the child: one conversion, its figures as a JSON line."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = read_status("self")
    print(json.dumps(before), flush=True)
    start = time.perf_counter()
    if way == "ours":
        convert(out, Sources(llava=root / "llava", clip=root / "clip"))
    else:
        convert_plainly(out, root)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "resident": read_status("self")["VmHWM"] - before["VmRSS"]}), flush=True)


def measure(way: str, root: Path, out: Path) -> dict[str, float]:
    """One conversion in a fresh process: seconds, peak anonymous and peak resident bytes above the imports."""
    for path in (root / "llava").glob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--run", way, str(root), str(out)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        before = json.loads(child.stdout.readline())
        peak = 0
        while child.poll() is None:
            peak = max(peak, read_status(child.pid).get("RssAnon", 0))
            time.sleep(0.005)
        if child.returncode:
            sys.exit(f"{way} ended with status {child.returncode}")
        figures: dict[str, float] = json.loads(child.stdout.read())
    return figures | {"anonymous": peak - before["RssAnon"]}


def tensors_of(folder: Path) -> dict[str, Path]:
    """Names of the tensors, and the file that holds each."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def assert_same(a: Path, b: Path) -> None:
    """Both bundles hold the same LLM, compared tensor by tensor."""
    ours, plain = tensors_of(a / "llm"), tensors_of(b / "llm")
    assert ours.keys() == plain.keys()
    for name, path in ours.items():
        with safe_open(path, "pt") as one, safe_open(plain[name], "pt") as other:
            assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name


def show(way: str, runs: list[Mapping[str, float]]) -> None:
    """One line: seconds and memory of one way."""
    seconds = [run["seconds"] for run in runs]
    anonymous, resident = (max(run[key] for run in runs) / 2**20 for key in ("anonymous", "resident"))
    print(
        f"{way:6} {statistics.median(seconds):6.1f} s (of {', '.join(f'{s:.1f}' for s in seconds)})   "
        f"peak above imports: anonymous {anonymous:7.0f} MiB, resident with mapped pages {resident:7.0f} MiB"
    )


def main() -> None:
    """Parses the arguments, runs both ways, prints the figures."""
    parser = argparse.ArgumentParser(description="Memory and time of mgie convert.")
    parser.add_argument("--layers", type=int, default=6, help="LLaMA layers, 0.4 GB each (the 7B model has 32)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; needs three times the checkpoint's size"
    )
    parser.add_argument("--run", nargs=3, metavar=("WAY", "SOURCES", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_one(arguments.run[0], Path(arguments.run[1]), Path(arguments.run[2]))
        return
    needed = (arguments.layers * 3 + 2) * 0.41e9
    free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if free < needed:
        sys.exit(
            f"{free / 1e9:.1f} GB are free; {needed / 1e9:.1f} GB are needed: choose another --folder or fewer --layers"
        )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        size = write_sources(root, arguments.layers)
        os.sync()  # else the pages stay dirty and cannot be dropped
        print(f"checkpoint: {size / 1e9:.2f} GB in two shards, {os.cpu_count()} CPUs, one thread")
        runs: dict[str, list[Mapping[str, float]]] = {"ours": [], "plain": []}
        for i in range(arguments.repeats):
            for way, done in runs.items():
                out = root / way
                shutil.rmtree(out, ignore_errors=True)
                done.append(measure(way, root, out))
            if i == 0:
                assert_same(root / "ours", root / "plain")
                print("both wrote the same tensors")
        for way, done in runs.items():
            show(way, done)
    ours, plain = (max(run["anonymous"] for run in runs[way]) / 2**20 for way in ("ours", "plain"))
    unit = "MiB of anonymous memory at peak, above the imports"
    print(
        json.dumps(
            {
                "name": "convert",
                "unit": unit,
                "ours": round(ours, 1),
                "reference": round(plain, 1),
                "ratio": round(plain / ours, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
