"""Kills the processes of a service that this process started; shared by tests and benchmarks."""

import asyncio
import random
import time

import psutil

# As Ray names the processes.
TITLES = {
    "ingress": "ray::ServeReplica:mgie:Ingress",
    "mllm": "ray::ServeReplica:mgie:MLLMStage",
    "diffusion": "ray::ServeReplica:mgie:DiffusionStage",
    "board": "ray::ServeReplica:mgie:CancelBoard",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
GONE_S = 300.0  # against a hang alone
POLL_S = 0.02


def processes(kind: str) -> list[psutil.Process]:
    """Those of this process's own cluster that live.

    Args:
        kind: Key of `TITLES`.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            # A new process has its title before it is ready, and a dead one until somebody asked for its status.
            title = " ".join(process.cmdline())
            if title.startswith(TITLES[kind]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def kill(kind: str) -> None:
    """Kills one at random by SIGKILL; returns when it is gone.

    Raises:
        LookupError: There is none.
        TimeoutError: It lives on.
    """
    found = processes(kind)
    if not found:
        raise LookupError(f"no {kind} runs")
    victim = random.choice(found)
    victim.kill()
    deadline = time.monotonic() + GONE_S
    while victim in processes(kind):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{kind} {victim.pid} survived SIGKILL for {GONE_S:g} s")
        await asyncio.sleep(POLL_S)
