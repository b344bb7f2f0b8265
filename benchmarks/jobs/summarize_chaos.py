"""Kills the summarize job again and again, resumes it, and counts what is missing, repeated, lost or different.

    python benchmarks/jobs/summarize_chaos.py                      2,000 rows, a describing endpoint that counts its questions
    python benchmarks/jobs/summarize_chaos.py --describe tiny      the same with the tiny LLaVA, against an undisturbed run
    python benchmarks/jobs/summarize_chaos.py --s3 --rows 600      on an object store that fails 5 % of its requests

Five SIGKILLs of the driver at random points, then one of the worker process of a describing and of a summarising actor; each is
asserted to have hit a running job. Exits with an error unless nothing is missing and nothing repeated.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3

from mgie.data.ledger import count_ledger
from mgie.model.prompts import DATA_SUFFIX, QUESTION
from mgie.storage.folder import Folder, open_folder
from pipelines.stages.summarize import PRESETS
from pipelines.stages.summarizer import Summarizer
from tests.pipelines.chaos import (
    Cluster,
    Endpoint,
    Job,
    answer,
    ledger_rows,
    private_cluster,
    run_with_kills,
    write_manifest,
)
from tests.pipelines.fault_proxy import FaultProxy

TITLES = [
    "ray::MapWorker(MapBatches(_Describe))",
    "ray::MapWorker(MapBatches(_SummarizeAndCommit))",
]


@contextlib.contextmanager
def faulty_store(share: float) -> Iterator[tuple[str, FaultProxy]]:
    """URL of an empty bucket on loopback, and the proxy that leads there."""
    from moto.server import ThreadedMotoServer

    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="chaos")
    try:
        with FaultProxy(address, share=share, seed=0) as proxy:
            yield "s3://chaos", proxy
    finally:
        server.stop()


def undisturbed(command: list[str], cluster: Cluster, out: Folder, cwd: Path) -> dict[int, tuple[str, str, str]]:
    """Texts and status by id of a run that nobody kills."""
    with Job([*command, "--out", out.url], cluster.env, cwd=cwd) as job:
        status, output = job.finish(1200)
    assert status == 0, output
    return contents(out)


def contents(out: Folder) -> dict[int, tuple[str, str, str]]:
    """What must be equal, by id."""
    return {row_id: (row["status"], row["verbose"], row["expressive"]) for row_id, row in ledger_rows(out).items()}


def expected_of_endpoint(rows: dict[int, dict[str, str]]) -> dict[int, tuple[str, str, str]]:
    """What plain stages make of the endpoint's answers; rejected rows as they are."""
    summarizer = Summarizer("random-summarizer", PRESETS["fast"])
    expected = {}
    for row_id, row in rows.items():
        if row["status"] == "ok":
            verbose = answer(QUESTION.format(instruction=row["instruction"]) + DATA_SUFFIX)
            [(expressive, _, _)] = summarizer.summarize([verbose])
            expected[row_id] = ("ok", verbose, expressive)
        else:
            expected[row_id] = (row["status"], row["verbose"], row["expressive"])
    return expected


def main() -> None:
    """Runs, prints, asserts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--rows-per-commit", type=int, default=16)
    parser.add_argument("--max-rows-in-flight", type=int, default=64)
    parser.add_argument("--describe", choices=("endpoint", "tiny"), default="endpoint")
    parser.add_argument("--service-s", type=float, default=0.02, help="of the endpoint, per question")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        cwd = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mgie-chaos-")))
        where, flags, proxy = str(cwd), [], None
        if args.s3:
            where, proxy = stack.enter_context(faulty_store(0.05))
            flags = ["--endpoint", proxy.url]
        manifest, out = (
            open_folder(f"{where}/{name}", endpoint=proxy and proxy.url) for name in ("manifest", "ledger")
        )
        num_good = write_manifest(manifest, args.rows)
        endpoint = stack.enter_context(Endpoint(args.service_s)) if args.describe == "endpoint" else None
        cluster = stack.enter_context(private_cluster(num_cpus=4))
        flags += [
            "--manifest",
            manifest.url,
            "--preset",
            "fast",
            "--rows-per-commit",
            str(args.rows_per_commit),
            "--max-rejected",
            "0.2",
        ]
        flags += ["--summarize-model", "random-summarizer"]
        flags += ["--max-rows-in-flight", str(args.max_rows_in_flight)]
        if endpoint:
            flags += ["--backend", "openai", "--base-url", endpoint.url, "--describe-model", "counting"]
        else:
            flags += ["--describe-max-new-tokens", "16", "--describe.batch-size", "16"]
        started = time.monotonic()
        chaos = run_with_kills(
            [*flags, "--out", out.url],
            cluster,
            out,
            num_good=num_good,
            driver_kills=args.driver_kills,
            worker_titles=TITLES,
            seed=args.seed,
            cwd=cwd,
            endpoint=endpoint,
        )
        seconds = time.monotonic() - started
        rows, counts, found = ledger_rows(out), count_ledger(out), contents(out)
        if endpoint:
            expected = expected_of_endpoint(rows)
        else:
            expected = undisturbed(flags, cluster, open_folder(cwd / "undisturbed"), cwd)
    missing, repeated = args.rows - len(rows), counts.num_rows - counts.num_ids
    different = [row_id for row_id in expected if found.get(row_id) != expected[row_id]]
    print(f"{args.rows} rows in {seconds:.0f} s; {len(chaos.killed)} kills: {', '.join(chaos.killed)}")
    if endpoint:
        print(
            f"rows of work lost per kill of the driver: {chaos.lost_per_driver_kill}, allowed {args.max_rows_in_flight}; "
            f"by all {len(chaos.killed)} kills: {chaos.num_asked - num_good}"
        )
    if proxy:
        print(f"{proxy.num_requests} requests to the store, of which failed: {dict(proxy.faults)}")
    print(f"missing {missing}, repeated {repeated}, different {len(different)} of {len(expected)}")
    assert missing == repeated == 0
    assert not endpoint or max(chaos.lost_per_driver_kill) <= args.max_rows_in_flight
    result = {
        "name": f"summarize, {len(chaos.killed)} kills: rows that are there and right",
        "unit": "rows",
        "ours": len(rows) - len(different),
        "reference": args.rows,
        "ratio": (len(rows) - len(different)) / args.rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped then, too
    main()
