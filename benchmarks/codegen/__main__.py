"""Compile CUDA programs where there is no device: `python -m benchmarks.codegen --model sd15 --step shallow`.

Prints, and writes with --json, the launches of a step by kind, with bytes, FLOP, hidden copies, and the roof and floor
of their time by data sheet; with --compile also registers, spills and shared memory of every kernel. Nothing runs: the
code is Inductor's and the registers are ptxas's own, but every microsecond is modelled.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.codegen import results
from benchmarks.codegen.cases import own_cases
from benchmarks.codegen.devices import DEVICES
from benchmarks.codegen.launches import generate
from benchmarks.codegen.machine import AMD, Compiled, compile_generated, compile_own
from benchmarks.codegen.pretend import CannotPretendError, pretended
from benchmarks.codegen.programs import programs
from benchmarks.environment import environment
from benchmarks.speed.subjects import DTYPES, KINDS
from deepcache_fx.graph.only import Only
from passes import FuseGroupNorm, Pass

PASSES: dict[str, Pass] = {
    "fuse-group-norm": FuseGroupNorm(cat=False),
    "fuse-group-norm-shallow": Only("shallow", FuseGroupNorm(cat=False)),
    "fuse-group-norm-cat": FuseGroupNorm(),
}
"""By their names on the command line."""


def model_step(
    model: str, step: str, archs: list[str], passes: list[str], dtype: str, compiles: bool, **options: Any
) -> tuple[results.Step, dict[str, str], str]:
    """One step; its code is generated for the first architecture and compiled for all. Also its kernels and source."""
    with pretended(DEVICES[archs[0]]):
        [program] = programs(
            model, [step], dtype=DTYPES[dtype], passes=[PASSES[name] for name in passes], forecast=1, **options
        )
        generated = generate(program.graph, program.inputs)
        compiled = tuple(compile_generated(generated.kernels, archs)) if compiles else ()
    size = "x".join(map(str, program.inputs[0].shape))
    made = results.Step(
        model, step, archs[0], tuple(passes), size, dtype, generated.launches, program.macs, compiled
    )  # fmt: skip
    return made, generated.kernels, generated.source


def _names(text: str, known: Any, what: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in known:
            raise typer.BadParameter(f"no such {what}: {name}; there are: {', '.join(known)}")
    return found


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}; empty for none.")] = "tiny",
    step: Annotated[str, typer.Option(help="shallow, full, or both separated by a comma.")] = "shallow,full",
    arch: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}; code is generated for the first.")] = "sm_90",
    passes: Annotated[str, typer.Option(help=f"Extra passes: {', '.join(PASSES)}.")] = "",
    disable: Annotated[str, typer.Option(help="Default passes to leave out.")] = "",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp16",
    compile: Annotated[bool, typer.Option(help="Compile every Triton kernel to machine code.")] = True,
    own: Annotated[bool, typer.Option(help=f"Compile the library's own kernels, for {AMD} too.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
    source: Annotated[Path | None, typer.Option(help="Write the generated modules into this folder.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the bars here (svg, png).")] = None,
) -> None:
    """Compile the CUDA programs of a model, and the library's own kernels, without a device."""
    archs = _names(arch, DEVICES, "architecture") or ["sm_90"]
    chosen = _names(passes, PASSES, "pass")
    steps: list[results.Step] = []
    kernels: list[Compiled] = []
    try:
        for one in _names(model, KINDS, "model"):
            for kind in _names(step, ("shallow", "full"), "step"):
                without = tuple(part for part in disable.split(",") if part)
                made, _, code = model_step(one, kind, archs, chosen, dtype, compile, disable=without)
                steps.append(made)
                if source is not None:
                    source.mkdir(parents=True, exist_ok=True)
                    (source / f"{one}-{kind}-{archs[0]}.py").write_text(code)
        if own:
            kernels = list(compile_own(own_cases(), [*archs, AMD]))
    except CannotPretendError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console(width=200)
    if steps:
        console.print(results.table(steps))
    if own:
        spilling = sum(one.spilled_bytes > 0 for one in kernels)
        console.print(f"own kernels: {len(kernels)} compiled, {spilling} spill")
    if json_path is not None:
        facts = {"environment": environment("cpu"), "own": [asdict(one) for one in kernels]}
        results.write(steps, facts, json_path)
    if chart is not None and steps:
        results.draw(steps, chart)


if __name__ == "__main__":
    typer.run(main)
