"""What the processes cost that hold no model: resident memory of the service's, seconds and memory of the command.

Starts the service, makes one edit and reads each process's memory and whether torch is mapped into it. The reference is
what each would hold if it loaded torch, transformers and diffusers, as all did before they were told apart: a fresh
process that imports the same module and then these. The last line is JSON: megabytes of an ingress replica.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time

import psutil
import tyro

from serving.args import ServingArgs
from serving.demo import draw_landscape
from serving.local_cluster import free_port, local_service, send_edit

HEAVY = "import torch, transformers, diffusers; transformers.CLIPModel; diffusers.UNet2DConditionModel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    bundle: str = "random"
    "as `mgie.bundle.resolve.locate_bundle` takes it"


def fresh(code: str) -> tuple[float, float]:
    """Seconds and megabytes, at most, of a process that runs the code."""
    # Not the usage that the kernel hands to parents: it begins with what the forking parent had.
    program = f"{code}\nprint([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(done.stdout.split()[-1]) / 1024


def holds_torch(pid: int) -> bool:
    """Whether torch's library is mapped into a process."""
    return any("libtorch" in place.path for place in psutil.Process(pid).memory_maps())


def main(config: BenchmarkConfig) -> None:
    """Prints a table and the figures."""
    args = ServingArgs(bundle=config.bundle, device="cpu", mllm_max_replicas=1, diffusion_max_replicas=1)
    replicas: dict[str, tuple[float, bool]] = {}
    with local_service(args, port=free_port(prefer_usual=False)) as address:
        send_edit(address, draw_landscape(256, 180), "make it night", seed=1)
        for process in psutil.process_iter(["cmdline", "memory_info"]):
            command = " ".join(process.info["cmdline"] or ())
            if found := re.match(r"ray::ServeReplica:\w+:(\w+)", command):
                replicas[found[1]] = process.info["memory_info"].rss / 2**20, holds_torch(process.pid)
    for name, (megabytes, has_torch) in replicas.items():
        print(f"{name:16} {megabytes:6.0f} MB resident, {'with' if has_torch else 'without'} torch")
    plain, loaded = fresh("import serving.app"), fresh(f"import serving.app; {HEAVY}")
    shown = fresh("import sys, mgie.cli\nsys.argv[1:] = ['--help']\ntry: mgie.cli.main()\nexcept SystemExit: pass")
    editing = fresh("import mgie.cli, mgie.editor")
    task, heavy_task = fresh("import pipelines.stages.fetch"), fresh(f"import pipelines.stages.fetch; {HEAVY}")
    for name, (ours, other) in {
        "import serving.app": (plain, loaded),
        "mgie --help": (shown, editing),
        "fetch task": (task, heavy_task),
    }.items():
        print(f"{name:20} {ours[0]:5.1f} s {ours[1]:5.0f} MB; with torch {other[0]:5.1f} s {other[1]:5.0f} MB")
    ingress = replicas["Ingress"][0]
    reference = ingress + loaded[1] - plain[1]
    print(
        json.dumps(
            {
                "name": "resident memory of an ingress replica",
                "unit": "MB",
                "ours": round(ingress, 1),
                "reference": round(reference, 1),
                "ratio": round(reference / ingress, 2),
                "replicas": {name: {"mb": round(mb, 1), "torch": has} for name, (mb, has) in replicas.items()},
                "help_s": [round(shown[0], 2), round(editing[0], 2)],
                "help_mb": [round(shown[1], 1), round(editing[1], 1)],
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, description=__doc__))
