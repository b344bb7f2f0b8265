"""One private Ray cluster with Ray Serve for all tests of a run, and the service on it."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import ray
from ray import serve

from serving.app import app
from serving.args import ServingArgs
from serving.local_cluster import free_port, local_cluster
from tests import rough_check
from tests.waiting import until

NAME = "mgie"
KEY = "mgie-canarykey-0123456789"
HEADERS = {"authorization": f"Bearer {KEY}"}
STAGES = ("MLLMStage", "DiffusionStage")
NUM_CPUS = 4  # that Ray gives out, however many the machine has: room for two versions of the service


class ServiceHost:
    """The private cluster, and the one service that runs on it at a time.

    What most tests ask for is `usual`: a service with the random bundle that needs a key, and whose stages sleep until
    the first edit. Each of its processes costs seconds, so all tests that kill nothing share it.

    Args:
        address: Of the service.
        folder: Of the cluster.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        keys = folder / "keys.toml"
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        keys.write_text(f'[[keys]]\nname = "alice"\nsha256 = "{digest}"\n')
        self.usual = ServingArgs(
            bundle="random",
            device="cpu",
            mllm_min_replicas=0,
            mllm_max_replicas=1,
            diffusion_min_replicas=0,
            diffusion_max_replicas=1,
            ingress_replicas=2,
            max_steps=1000,
            timeout_s=1800,  # no edit is late because the machine is slow
            upscale_delay_s=0.5,
            downscale_delay_s=10_000,  # woken once, they stay awake for all tests
            look_back_period_s=2,
            keys_file=str(keys),
            keep_results=True,
            safety_check=f"{rough_check.__name__}:{rough_check.check.__name__}",
        )
        self._args: ServingArgs | None = None
        self._num_services = 0

    def serve(self, args: ServingArgs) -> str:
        """The address of the service with these arguments, which runs already if the last test asked for the same."""
        if args != self._args:
            self.stop()
            self._num_services += 1  # with results and jobs of its own
            self.roll_out(args)
        return self.address

    def serve_asleep(self) -> str:
        """The address of the usual service, whose stages sleep."""
        if self._args != self.usual or self.num_replicas().total():
            self.stop()
        return self.serve(self.usual)

    def serve_awake(self) -> str:
        """The address of the usual service, whose stages answer."""
        address = self.serve(self.usual)
        # While they wake, or when a test before has killed one, the answer is a 503.
        until(lambda: httpx2.get(f"{address}/v1/models", headers=HEADERS, timeout=None).status_code == 200)
        return address

    def roll_out(self, args: ServingArgs) -> None:
        """Puts a service with these arguments in the place of the one that runs, without a break."""
        self._args = None  # until it is there
        serve.run(app(args.model_copy(update={"artifacts": str(self.results)})), name=NAME)
        self._args = args

    def stop(self) -> None:
        """Ends the service; the cluster stays."""
        if self._args is not None:
            self._args = None
            serve.delete(NAME)

    @property
    def results(self) -> Path:
        """Where the service keeps what it made."""
        return self.folder / f"results-{self._num_services}"

    def num_replicas(self) -> Counter[str]:
        """Of each stage, those that run or are on their way."""
        deployments: Any = serve.status().applications[NAME].deployments
        return Counter({name: sum(deployments[name].replica_states.values()) for name in STAGES})

    def environment(self) -> dict[str, str]:
        """Variables with which another process joins the cluster."""
        found = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
        return found | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


# Ray's own patience with its processes, which on a slow machine take longer to start and to answer.
PATIENCE = {
    "RAY_agent_register_timeout_ms": "900000",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_failure_threshold": "100",
}
_STARTS = 5


@contextlib.contextmanager
def open_service_host() -> Iterator[ServiceHost]:
    """Starts the cluster, and ends it with all that runs on it."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        for number in range(_STARTS):
            cluster = local_cluster(port=free_port(prefer_usual=False), num_cpus=NUM_CPUS)
            try:
                address, folder = stack.enter_context(cluster)
                break
            except Exception as error:  # Ray has no class for it: a node gets half a minute to start
                if "timed out during startup" not in str(error) or number == _STARTS - 1:
                    raise
        yield ServiceHost(address, folder)
