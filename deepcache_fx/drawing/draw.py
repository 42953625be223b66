"""Draw a UNet as a person thinks of it, with what caching makes of it: `draw(target, "unet.svg")`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from deepcache_fx.drawing.anatomy import Anatomy
from deepcache_fx.drawing.dissect import dissect
from deepcache_fx.errors import DeepCacheError
from deepcache_fx.files import writing as files
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.pass_order import apply_passes
from deepcache_fx.graph.signature import Call, CallReader, ExampleInputs
from deepcache_fx.graph.skips import pick_branch, require_skip_connections
from deepcache_fx.graph.split import RATES, split
from deepcache_fx.options import Options
from deepcache_fx.planning.example_inputs import example_inputs as make_example_inputs
from deepcache_fx.planning.plan import input_shapes as shapes
from deepcache_fx.runtime.attach import original_class, runtime_of
from deepcache_fx.schedules.branch import Branch


def draw(
    target: object,
    path: str | os.PathLike[str],
    *,
    branch: Branch | None = None,
    example_inputs: ExampleInputs | None = None,
    batch: int = 2,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Write a picture of a UNet and its cut as an SVG file, from one captured call. Runs and changes nothing.

    The way down on the left, the way up on the right, a box for every resolution; skip connections as arcs; cells
    coloured by how often they are computed, with their MACs; the cut across, with what is cached there. Needs no
    weights: a model on the meta device will do. One that is optimised already is drawn as its options split it.

    Args:
        target: A UNet module, or a diffusers pipeline with a `.unet`.
        path: The file to write; its name ends in .svg.
        branch: The skip connection to cut at, as for `optimize`. Where left out, that of an optimised target, else 0.
        example_inputs: Arguments of a UNet call, by name or position; made up from the UNet's configuration where left
            out, with the three sizes below.
        batch: Samples in a call; 2 is one image with classifier-free guidance.
        height: In latent pixels; from the configuration where left out.
        width: In latent pixels; from the configuration where left out.

    Raises:
        DeepCacheError: the file cannot be written, no inputs can be made up, they do not fit, or the model cannot be
            captured.
        BranchError: the model has no such skip connection, or none at all.

    Example:
        >>> with torch.device("meta"):
        ...     unet = UNet2DConditionModel.from_config(config)
        >>> draw(unet, "unet.svg", branch=1)
    """
    from deepcache_fx.drawing.paint import paint  # which needs an XML writer: not at every import of the package

    path = check_path(path)
    unet = target if isinstance(target, torch.nn.Module) else getattr(target, "unet", None)
    if not isinstance(unet, torch.nn.Module):
        raise DeepCacheError(f"draw takes a UNet or a diffusers pipeline with a .unet, got {type(target).__name__}")
    if example_inputs is None:
        example_inputs = make_example_inputs(unet, batch=batch, height=height, width=width)
    facts, call = _examine(unet, example_inputs, branch)
    dtype = str(call.sample.dtype).removeprefix("torch.")
    title = f"{original_class(unet).__name__}, cut at branch {facts.branch}"
    inputs = ", ".join(item.replace(" ", "\xa0") for item in shapes(call.arguments))
    picture = paint(facts, title, f"one call in {dtype}: {inputs}")
    with files.replacing(path) as file:
        file.write(picture)


def check_path(path: str | os.PathLike[str]) -> Path:
    """Raise a DeepCacheError, before any work is done, where the picture could not be written there."""
    found = Path(path)
    if found.suffix.lower() != ".svg":
        raise DeepCacheError(f"the picture is an SVG: give a file name that ends in .svg, not {found.name!r}")
    files.check_writable(found)
    return found


def _examine(unet: torch.nn.Module, inputs: ExampleInputs, branch: Branch | None) -> tuple[Anatomy, Call]:
    model_class = original_class(unet)
    runtime = runtime_of(unet)
    options = Options() if runtime is None else runtime.options
    chosen = Options.make(branch=branch).branch if branch is not None else options.branch
    reader = CallReader(model_class.forward)
    call = reader.read_example(unet, inputs)
    captured, _ = apply_passes(capture(unet, call, reader, model_class), options)
    skips = require_skip_connections(captured.graph.graph, model_class.__name__)
    rates = [name for name in RATES if options.uses(name)]
    cut = pick_branch(skips, chosen, model_class.__name__)
    variants = split(captured, cut, rates=rates, prompt_inputs=call.prompt_inputs)
    sample = next(index for index, tensor in enumerate(call.tensors) if tensor is call.sample)
    return dissect(captured, skips, variants, sample=sample), call
