"""The node beside ComfyUI's own EasyCache and LazyCache, on one workflow: `COMFYUI=path python -m benchmarks.comfyui`.

Prints a table: what each computes, how long it takes, and how far its latents are from the uncached ones. The model's
weights are random: what is compared is arithmetic and time; of quality on trained weights it says little.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.comfyui.server import Done, Server, prepare
from tests.comfyui.workflows import Workflow

Arm = Callable[[Workflow], object]

ARMS: dict[str, Arm] = {
    "uncached": lambda workflow: None,
    "DeepCache FX, 1:2": lambda workflow: workflow.cache(interval=2, forecast="auto"),
    "DeepCache FX, 1:3": lambda workflow: workflow.cache(interval=3, forecast="auto"),
    "DeepCache FX, 1:5": lambda workflow: workflow.cache(interval=5, forecast="auto"),
    **{
        f"{kind}, {threshold}": lambda workflow, kind=kind, threshold=threshold: workflow.patch(  # type: ignore[misc]
            kind, reuse_threshold=threshold, start_percent=0.15, end_percent=0.95, verbose=False
        )
        for kind in ("EasyCache", "LazyCache")
        for threshold in (0.05, 0.1, 0.2, 0.4)
    },
}


def run(server: Server, arm: Arm, steps: int, number: int) -> tuple[Done, float]:
    """One run, and the share of the uncached arithmetic that it computed."""
    workflow = Workflow()
    arm(workflow)
    workflow.sample(steps=steps, seed=1, cfg=3.0 + number * 1e-9)  # else ComfyUI has the result already
    if any(node["class_type"] == "DeepCacheFX" for node in workflow.values()):
        workflow.report()
    before = len(server.text())
    done = server.run(workflow)
    if done.error is not None:
        raise RuntimeError(done.error)
    skipped = re.search(r"skipped (\d+)/(\d+) steps", server.text()[before:])
    bound = re.search(r"arithmetic: ([\d.]+)", done.texts[0]) if done.texts else None
    if bound:
        return done, 1 / float(bound[1])
    return done, 1 - int(skipped[1]) / int(skipped[2]) if skipped else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        prepare(base)
        server = Server(base)
        try:
            table(server, options.steps, options.rounds)
        finally:
            server.stop()


def table(server: Server, steps: int, rounds: int) -> None:
    """Every arm once to warm up, then in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    costs, latents = dict[str, float](), dict[str, torch.Tensor]()
    for number in range(rounds + 1):
        for name, arm in ARMS.items():
            done, costs[name] = run(server, arm, steps, number)
            latents[name] = done.latents[0]
            if number or not rounds:
                seconds[name].append(done.seconds)
    plain = latents["uncached"]
    print(
        f"| {steps} steps, euler, 64 x 64 | computed | speed | distance to the uncached latents |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    for name in sorted(ARMS, key=lambda name: -costs[name]):
        ratio = statistics.median(a / b for a, b in zip(seconds["uncached"], seconds[name], strict=True))
        distance = float((latents[name] - plain).norm() / plain.norm())
        print(f"| {name} | {costs[name]:.0%} | {ratio:.2f} | {distance:.3f} |", flush=True)


if __name__ == "__main__":
    main()
