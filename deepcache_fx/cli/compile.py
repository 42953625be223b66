"""What `deepcache-fx compile` does: run a pipeline for two steps at each size and batch, and keep its programs."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from deepcache_fx.api import optimized
from deepcache_fx.api import report as report_of
from deepcache_fx.artefacts.store import ProgramDirectory
from deepcache_fx.cli import options as option
from deepcache_fx.cli.compare import DEFAULT_PROMPT
from deepcache_fx.cli.inspect import key_of_environment, print_programs
from deepcache_fx.cli.progress import load_pipeline, progress_bar
from deepcache_fx.comparing import loading
from deepcache_fx.comparing.job import parameters_of, require_parameters
from deepcache_fx.errors import DeepCacheError

STEPS = 2
"""A full step and a shallow one: programs are checked and compiled at their first call."""


@dataclass(frozen=True)
class Shape:
    """Of one generation: pixels, or the pipeline's own size where None, and images at a time."""

    size: tuple[int, int] | None
    batch: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size)) if self.size else 'its own size'}, batch {self.batch}"


def compile_command(
    model: option.Pipeline,
    out: Annotated[Path, typer.Option(help="The directory of programs; what it holds and what fits is kept.")],
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT in pixels; repeat it. The pipeline's own if not given.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time; repeat it. [default: 1]")] = None,
    interval: Annotated[int, typer.Option(min=2, help="1:N caching; other intervals use the same programs.")] = 3,
    branch: option.Branch = "0",
    forecast: Annotated[str, typer.Option(help="Of the cached feature: auto, 0, 1 or 2, as in optimize.")] = "auto",
    scheduler: option.Scheduler = None,
    dtype: option.Dtype = None,
    variant: option.Variant = None,
    device: Annotated[
        str | None, typer.Option("--on", "--device", help="cpu or cuda. Default: cuda where there is one.")
    ] = None,
    backend: option.Backend = "auto",
    precision: option.Precision = None,
    guidance_scale: option.GuidanceScale = None,
) -> None:
    """Make programs ahead of time, for several sizes: optimize(pipe, programs=OUT) then captures nothing.

    The later call of optimize must have the same branch, forecast, backend and precision. With guidance a UNet sees
    each image twice: give the --guidance-scale that will be used, or 1 for none. A key in the variable
    DEEPCACHE_FX_KEY signs the directory.
    """
    where, order = option.read_branch(branch), option.read_forecast(forecast)
    sizes = tuple(map(read_size, size)) if size else (None,)
    shapes = [Shape(*each) for each in itertools.product(sizes, batch or [1])]
    if scheduler is not None:
        loading.check_scheduler(scheduler)
    if out.exists() and not out.is_dir():
        raise DeepCacheError(f"{out} is a file: programs are kept in a directory")
    local = loading.check_model(model)
    at = loading.pick_device(device)
    kind = loading.pick_dtype(None if dtype is None else dtype.value, at)
    console = Console(stderr=True)
    with loading.quiet(keep_download_bars=not local):
        pipe = load_pipeline(console, model, dtype=kind, device=at, variant=variant, scheduler=scheduler)
        options = {"branch": where, "forecast": order, "backend": backend, "precision": precision}
        prompts = loading.read_prompts(model) or (DEFAULT_PROMPT,)
        with progress_bar(console, time_stages=False) as progress:
            remarks = compile_programs(
                pipe,
                shapes,
                out,
                optimize_arguments={"interval": interval, **options},
                prompts=prompts,
                guidance_scale=guidance_scale,
                progress=progress,
            )
    output = Console()
    print_programs(out, key=key_of_environment(), console=output)
    for remark in remarks:
        output.print(f"note: {remark}", markup=False, highlight=False)


def compile_programs(
    pipe: Any,
    shapes: Sequence[Shape],
    out: Path,
    *,
    optimize_arguments: Mapping[str, Any],
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
    guidance_scale: float | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[str]:
    """Run `pipe` for two steps at each shape, so that its programs are in `out`.

    Args:
        pipe: A diffusers pipeline with a UNet, plain: it is plain again afterwards.
        shapes: Sizes and batches, in this order.
        out: The directory of programs.
        optimize_arguments: As for `optimize`.
        prompts: Are repeated, or cut off, to fill a batch.
        guidance_scale: The pipeline's own where None.
        progress: Called as (what is being made, shapes done, shapes in all).

    Returns:
        What the library warned of, such as programs that are not written.

    Raises:
        DeepCacheError: the pipeline takes no size or no batch, refuses one, or nothing could be written.
    """
    calls = [_arguments(pipe, shape, prompts, guidance_scale) for shape in shapes]
    programs = ProgramDirectory(out, key=key_of_environment())
    with ExitStack() as stack:
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(optimized(pipe, **optimize_arguments, programs=programs))
        for index, (shape, arguments) in enumerate(zip(shapes, calls, strict=True)):
            progress(str(shape), index, len(shapes))
            with loading.one_line_errors("a smaller --size or --batch"):
                pipe(**arguments, num_inference_steps=STEPS, output_type="latent")
        progress("done", len(shapes), len(shapes))
        report = report_of(pipe)
    here = str(Path(__file__).parents[1])
    said = [*report.original_reasons, *(str(item.message) for item in heard if item.filename.startswith(here))]
    remarks = list(dict.fromkeys(said))
    if not report.signatures or not programs.manifest().programs:
        raise DeepCacheError(f"no programs were made: {'; '.join(remarks) or 'the pipeline did not call its UNet'}")
    return remarks


def read_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels, as 768x512 says it."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no width and height in pixels, as 768x512", param_hint="--size")
    return int(found[1]), int(found[2])


def _arguments(pipe: Any, shape: Shape, prompts: Sequence[str], guidance_scale: float | None) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if "prompt" in parameters_of(pipe):
        wanted["prompt"] = list(itertools.islice(itertools.cycle(prompts), shape.batch))
    else:
        wanted["batch_size"] = shape.batch
    if shape.size is not None:
        wanted["width"], wanted["height"] = shape.size
    if guidance_scale is not None:
        wanted["guidance_scale"] = guidance_scale
    wanted["generator"] = [torch.Generator().manual_seed(index) for index in range(shape.batch)]
    require_parameters(pipe, {"num_inference_steps", *wanted})
    return wanted
