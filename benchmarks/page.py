"""The page on a cold load, by Chromium's own clocks: first paint, interaction, weight and requests.

Every load has an empty cache. The service is in this process, on this machine: what is measured is the page, not a
network. Weight is what crosses the wire, headers included. The last line is JSON.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, for what is shared with the tests

from tests.browser.chromium import find_chromium, open_browser
from tests.live import api_over, listening, open_backend

LOOK = """async () => {
    const of = (type) => performance.getEntriesByType(type);
    const observed = (type, more) => new Promise((done) => {
        new PerformanceObserver((list) => done(list.getEntries())).observe({type, buffered: true, ...more});
        setTimeout(() => done([]), 1000);
    });
    const [page] = of("navigation");
    const files = of("resource").filter(({name}) => !new URL(name).pathname.startsWith("/v1/"));
    const largest = (await observed("largest-contentful-paint")).at(-1);
    const inputs = await observed("event", {durationThreshold: 16});
    const [first] = of("first-input");
    return {
        first_contentful_paint_ms: of("paint").find(({name}) => name === "first-contentful-paint").startTime,
        largest_contentful_paint_ms: largest.startTime,
        dom_interactive_ms: page.domInteractive,
        load_ms: page.loadEventEnd,
        first_input_delay_ms: first.processingStart - first.startTime,
        slowest_interaction_ms: Math.max(16, ...inputs.filter((one) => one.interactionId).map((one) => one.duration)),
        bytes: page.transferSize + files.reduce((sum, file) => sum + file.transferSize, 0),
        requests: 1 + of("resource").length,
        hosts: new Set(of("resource").map(({name}) => new URL(name).host)).size,
    };
}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to measure."""

    num_loads: int = 5
    "cold loads; the median counts"
    cpu_slowdown: float = 1.0
    "Chromium works that many times slower; 4 is about a phone of the middle class"


def main(config: BenchmarkConfig) -> None:
    """Loads the page again and again, and prints medians."""
    if find_chromium() is None:
        print(json.dumps({"name": "page", "skipped": "no Chromium on this machine"}))
        return
    loads: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_backend("tiny") as backend,
        listening(api_over(backend, Path(folder))) as address,
        open_browser() as browser,
    ):
        for _ in range(config.num_loads):
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            page = context.new_page()
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": config.cpu_slowdown})
            page.goto(address)
            page.click("#theme")  # the first that anybody could press
            page.click("#sample")
            page.fill("#prompt", "make it night")
            page.press("#prompt", "x")
            page.click("#zoom-in")
            loads.append(page.evaluate(LOOK))
            context.close()
    medians = {name: statistics.median(load[name] for load in loads) for name in loads[0]}
    print(f"{config.num_loads} cold loads, CPU slowed down {config.cpu_slowdown:g} times; medians:")
    for name, value in medians.items():
        print(f"  {name:28} {value:,.0f}")
    print(json.dumps({"name": "page", "cpu_slowdown": config.cpu_slowdown, **medians}))


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
