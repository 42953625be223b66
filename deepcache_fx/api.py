"""The public functions: optimize, restore, report, reset, optimized; begin, step and condition."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from deepcache_fx.artefacts.made_for import refusals
from deepcache_fx.artefacts.store import ProgramDirectory, options_of_text
from deepcache_fx.cards.choose import choose
from deepcache_fx.cards.family import facts_of
from deepcache_fx.controlnet.follow import PipelineFollower
from deepcache_fx.errors import DeepCacheError, OptionError
from deepcache_fx.graph.pass_order import check_disabled
from deepcache_fx.graph.signature import ExampleInputs, UnsupportedInput
from deepcache_fx.options import Forecast, Options
from deepcache_fx.runtime.attach import attach, bring_back, check_attachable, original_class, pause, runtime_of
from deepcache_fx.runtime.report import Report
from deepcache_fx.runtime.runtime import Runtime
from deepcache_fx.schedules.branch import Branch

__version__ = "0.1.0"

T = TypeVar("T")


def optimize(
    target: T,
    interval: int | None = None,
    branch: Branch | Sequence[int] | None = None,
    *,
    schedule: object = None,
    passes: Sequence[Callable[..., Any]] = (),
    disable: Sequence[str] | str = (),
    backend: str | Callable[..., Any] = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    cuda_graphs: bool | Literal["auto"] = "auto",
    forecast: Forecast | None = None,
    preset: Literal["fast", "balanced", "close"] | None = None,
    max_captures: int = 8,
    on_failure: Literal["raise", "uncached"] = "raise",
    ignore: Sequence[str] | str = (),
    dynamic: bool | Literal["auto"] = False,
    example_inputs: ExampleInputs | None = None,
    programs: str | Path | ProgramDirectory | None = None,
) -> T:
    """Make a UNet cache its deep feature from step to step (DeepCache, arXiv 2312.00858), as two static graphs.

    The UNet is captured at its first call, once per signature of its inputs, and split into a full and a shallow
    variant that share its weights. Calling `optimize` again with the same arguments changes nothing; with another
    schedule it keeps what is captured and compiled; with other arguments it starts over.

    Args:
        target: A UNet module, or a diffusers pipeline: its `.unet` is optimised, its `.scheduler` marks the steps, and
            a ControlNet of it (`.controlnet`, one or several) computes in a shallow step only the residuals that the
            UNet reads then. A ControlNet that cannot be captured runs as it is; `report` says why.
        interval: 1:N caching: the whole UNet runs at every N-th denoising step. 1 caches nothing. 3 where left out.
        branch: The skip connection to cut at: its number from the output (0, the shallowest and fastest, where left
            out), or the published (block, layer).
        schedule: Replaces `interval`: `Uniform(n)`, `Power(n, power, center)`, `Steps([...])`, `Window(start, end,
            inner)`, `Nested(inner, deeper)`, or a function of the step (and, if it takes two arguments, the number of
            steps) that is true where the step is full.
        passes: Extra graph passes, applied in order to the captured graph before the split; those that say
            `after_split = True`, as `FuseGroupNorm` does, to each variant after it.
        disable: Default passes to leave out, by name; "all" keeps the captured graph as it is.
        backend: "auto" (Inductor on CUDA; on a CPU OpenVINO where it is installed and the model is float32; else
            eager), "eager", "openvino", or any torch.compile backend. With OpenVINO programs hold copies of the weights
            and are made anew when a run begins after a change; changes through `parameter.data` in place are not seen.
            The first step of each program is checked against the same graph run by PyTorch, at the cost of one more
            step. Where "auto" finds that OpenVINO cannot take the model it warns, and runs eagerly.
        precision: Of OpenVINO's arithmetic: "bf16" computes a float32 model in bfloat16 where the processor can, and
            `report` says with what error; its inputs, outputs and weights stay float32. "fp32", and None for a float32
            or float16 model, compute in float32; bfloat16 models are computed in bfloat16.
        mode: Passed to torch.compile. The CUDA graphs that some modes of Inductor switch on are replaced by ours.
        options: Passed to torch.compile; to OpenVINO as properties, {"INFERENCE_NUM_THREADS": 8} for example (it takes
            as many threads as PyTorch where that is not given).
        cuda_graphs: Record both variants as CUDA graphs. "auto" does so on CUDA, except for the eager backend. Where a
            variant cannot be recorded it is called, and `report` says why.
        preset: "fast", "balanced" or "close": interval, branch and forecast of the card for the model's family, where
            they are not given. `report` says what was chosen and where it comes from.
        forecast: Degree of the polynomial through the last refreshes that a shallow step takes the cached feature from:
            1 is linear, 2 quadratic, and 0 repeats the last one, which is published DeepCache bit for bit. Keeps that
            many more refreshes. "auto", which is taken where it is left out, takes 1, but 0 in runs whose scheduler
            draws noise or takes few uneven steps (docs/fidelity.md); a UNet without its pipeline cannot tell: take 0
            for LCM. `report` says what was taken.
        max_captures: How many signatures are kept; the least recently used goes first.
        on_failure: What happens to calls for which there can be no programs (`torch.export` cannot follow the model,
            it has no such skip connection, a pass failed): "raise", or "uncached": the model runs as it is, with one
            warning, and `report` says why.
        ignore: Arguments that never matter to the result, by name, or by a dotted path where an argument is a
            dictionary: "transformer_options.uuids". Another value there is no new capture: the graph goes on with what
            it was captured with. Tensors there are inputs as ever.
        dynamic: One capture for many sizes: True captures height, width and batch as symbols, "auto" does so at the
            second size, False captures each size by itself. Sizes for which the model takes another way (odd ones, a
            batch of 1) get a capture of their own; a model that cannot be captured so goes on as with False, and
            `report` says why. Backends other than eager still compile each size. A change of size within a run is a
            full step.
        example_inputs: Arguments of a UNet call, by name or position: capture now instead of at the first call.
        programs: A directory of programs (see `save`): those that fit are loaded instead of made, and what is new is
            added. It is trusted: name only one that nobody else can write to. With a key, a `ProgramDirectory`.

    Returns:
        The same object, changed in place: `optimize(pipe.unet)` and `pipe.unet = optimize(pipe.unet)` both work.

    Raises:
        DeepCacheError: naming the value, the range and the remedy; the model is then as it was. What only a captured
            graph can tell (a branch out of range, no skip connection, a model `torch.export` cannot follow) is raised
            by the first call, or here if `example_inputs` is given.

    Example:
        >>> pipe = StableDiffusionPipeline.from_pretrained("...").to("cuda")
        >>> deepcache_fx.optimize(pipe, interval=3)
        >>> image = pipe("a photo of an astronaut").images[0]
        >>> print(deepcache_fx.report(pipe))
    """
    module, pipeline = _resolve(target)
    choice: dict[str, Any] = {"interval": interval, "branch": branch, "forecast": forecast, "schedule": schedule}
    chosen = choose(preset, facts_of(module, pipeline), **choice) if preset is not None else None
    choice = {name: value for name, value in (chosen.options if chosen else choice).items() if value is not None}
    wanted = Options.make(
        **choice,
        passes=passes,
        disable=disable,
        backend=backend,
        precision=precision,
        mode=mode,
        options=options,
        cuda_graphs=cuda_graphs,
        preset=chosen.description if chosen else None,
        max_captures=max_captures,
        on_failure=on_failure,
        ignore=ignore,
        dynamic=dynamic,
    )
    check_attachable(module)
    check_disabled(wanted)
    wanted.schedule.check(module, getattr(pipeline, "scheduler", None))
    before = runtime_of(module)
    unchanged = before if before is not None and before.options == wanted else None
    runtime = unchanged or _replace(module, before, wanted)
    if pipeline is not None and not any(pipeline is follower.pipeline() for follower in runtime.followers()):
        runtime.follow(PipelineFollower(pipeline, runtime))
    kept_before = runtime.store
    store = ProgramDirectory(programs) if isinstance(programs, (str, Path)) else programs
    runtime.keep_programs(module, store)
    if example_inputs is not None:
        try:
            runtime.prepare(module, runtime.reader.read_example(module, example_inputs))
        except BaseException:
            runtime.store = kept_before
            _bring_back(module, before)
            raise
    if before is not None and not runtime.shares_programs(before) and not before.kept_by:
        before.release()
    return target


def save(target: object, directory: str | Path, *, key: bytes | None = None) -> None:
    """Write the programs of every signature that was captured: graphs as text, without weights (docs: "Cold start").

    Args:
        target: A UNet or pipeline that `optimize` was called on, and that has been called since.
        directory: Made where it is not there; what it holds for other models or calls stays.
        key: Signs the manifest (HMAC-SHA-256), so that `load` with the same key notices who has changed it.

    Raises:
        DeepCacheError: nothing was captured yet, or something cannot be written; says what.
    """
    module, _ = _resolve(target)
    runtime, store = _runtime(target), ProgramDirectory(directory, key=key)
    found = runtime.made(module)
    if not found:
        raise DeepCacheError("nothing was captured yet: call the model first, or give optimize example_inputs")
    for wanted, entry in found:
        store.write(wanted, entry)


def load(target: T, directory: str | Path, *, key: bytes | None = None) -> T:
    """Optimise with the options and the programs of a directory that `save` wrote: known signatures are not captured.

    Every file is compared with the manifest first. A call that no program was made for is captured, with a warning that
    says in what the nearest one differs.

    Raises:
        DeepCacheError: the directory is missing, damaged, not signed with this key, or made for other versions, another
            device or another model; says what differs.
    """
    store = ProgramDirectory(directory, key=key, adds=False)
    manifest = store.check()
    if not manifest.programs:
        raise DeepCacheError(f"{directory} holds no programs")
    module, _ = _resolve(target)
    program = next((item for item in manifest.programs if not refusals(item.made_for, module)), None)
    if program is None:
        nearest = min((refusals(item.made_for, module) for item in manifest.programs), key=len)
        raise DeepCacheError(
            f"the programs in {directory} do not fit: {'; '.join(nearest)}. Make them anew with save, or pass "
            "programs= to optimize, which does"
        )
    return optimize(target, **options_of_text(program.options), programs=store)


def _replace(module: torch.nn.Module, before: Runtime | None, wanted: Options) -> Runtime:
    """Attach a new runtime in place of the one before; it follows the same pipelines, and keeps programs that fit."""
    try:
        runtime = Runtime(original_class(module), wanted)
    except UnsupportedInput as error:
        raise DeepCacheError(f"{type(module).__name__} cannot be optimised: {error}") from error
    runtime.on_first_failure = restore
    followers = before.followers() if before is not None else []
    pause(module)
    adopts = before is not None and before.options.same_programs(wanted)
    if before is not None and adopts:
        runtime.adopt(before)
    elif before is not None and before.device is not None and not runtime.model_state.are_moved(before.device):
        before.undo_layout()
    attach(module, runtime)
    for follower in followers:
        known = follower if adopts and isinstance(follower, PipelineFollower) else None
        runtime.follow(PipelineFollower(follower.pipeline(), runtime, known))
    return runtime


def _bring_back(module: torch.nn.Module, before: Runtime | None) -> None:
    """Attach the runtime that was there before, or none."""
    runtime = runtime_of(module)
    if runtime is not before:
        pause(module)
        if runtime is not None and (before is None or not runtime.shares_programs(before)):
            runtime.release()
        if before is not None:
            bring_back(module, before)


def restore(target: T) -> T:
    """Undo `optimize` exactly, on a UNet or a pipeline and its ControlNet; nothing where there is nothing to undo.

    What programs, recorded graphs and cached features held on the device is free when this returns.
    """
    module, _ = _resolve(target)
    runtime = pause(module)
    if runtime is not None:
        runtime.release()
    return target


def report(target: object) -> Report:
    """What has happened since `optimize`: captures, full and shallow calls, why a step was forced full.

    Raises:
        DeepCacheError: the target is not optimised.
    """
    return _runtime(target).report()


def reset(target: object) -> None:
    """Forget the current run of this thread, and free its cache: the next UNet call begins a new run.

    Runs are recognised without it. Call it where a layer or a parameter of the model is replaced within a run, or
    between unrelated UNet calls that no scheduler announces: bare falling timesteps look like one run.

    Raises:
        DeepCacheError: the target is not optimised.
    """
    _runtime(target).reset()


def begin(target: object, num_steps: int | None = None, *, may_forecast: bool = True) -> None:
    """Announce a run of this thread: its first denoising step begins now, and `step` ends each.

    For samplers of one's own, where no diffusers scheduler tells the steps and timesteps tell them badly (second-order
    samplers, sigmas). From here to the next run only these announcements count: all UNet calls between two `step`s
    belong to one step, whatever their timesteps are. Schedules that depend on the number of steps take `num_steps`.

    Args:
        target: A UNet or pipeline that `optimize` was called on.
        num_steps: How many steps the run is going to have, if known; at least 1.
        may_forecast: False where the sampler draws noise at its steps (ancestral, SDE, LCM), or takes few steps of very
            different lengths: `forecast="auto"` then repeats the cached feature.

    Raises:
        DeepCacheError: the target is not optimised, or `num_steps` is no positive integer.

    Example:
        >>> deepcache_fx.begin(unet, len(sigmas) - 1)
        >>> for sigma in sigmas[:-1]:
        ...     x = sampler_step(unet, x, sigma)  # one UNet call, or several
        ...     deepcache_fx.step(unet)
    """
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
        raise OptionError(f"num_steps must be an integer of at least 1, or None, got {num_steps!r}")
    _runtime(target).run_announced(num_steps, by_caller=True, may_forecast=may_forecast)


def step(target: object) -> None:
    """Announce that a denoising step of the run that `begin` announced is over (see there).

    Raises:
        DeepCacheError: the target is not optimised.
    """
    _runtime(target).step_ended()


def condition(target: object, key: Hashable) -> None:
    """Say what this thread's next UNet call is conditioned on: any hashable value, equal for equal conditioning.

    A cached feature belongs to what it was conditioned on. That is found out from the tensors of a call; a caller who
    knows (by a prompt's id, say) decides with this, and spares the comparison. A key that the last full step did not
    have makes the call full. Of several calls with one key in a step each has a feature of its own, by order.

    Raises:
        DeepCacheError: the target is not optimised, or the key cannot be hashed.
    """
    try:
        hash(key)
    except TypeError as error:
        raise OptionError(f"a condition must be hashable, got {key!r:.80}") from error
    _runtime(target).condition(key)


@contextmanager
def optimized(target: T, *args: Any, **kwargs: Any) -> Iterator[T]:
    """`optimize` for the length of a with block; takes the same arguments. What was there before comes back."""
    module, _ = _resolve(target)
    before = runtime_of(module)
    if before is not None:
        before.kept_by += 1
    try:
        optimize(target, *args, **kwargs)
        yield target
    finally:
        if before is not None:
            before.kept_by -= 1
        _bring_back(module, before)


def _resolve(target: Any) -> tuple[torch.nn.Module, Any]:
    """(UNet, pipeline or None) of what the user passed."""
    if isinstance(target, torch.nn.Module):
        return target, None
    unet = getattr(target, "unet", None)
    if isinstance(unet, torch.nn.Module):
        return unet, target
    raise DeepCacheError(
        f"optimize takes a UNet (torch.nn.Module) or a diffusers pipeline with a .unet, got {type(target).__name__}"
    )


def _runtime(target: object) -> Runtime:
    module, _ = _resolve(target)
    runtime = runtime_of(module)
    if runtime is None:
        raise DeepCacheError(f"this {type(module).__name__} is not optimised: call deepcache_fx.optimize on it first")
    return runtime
