"""The ways to run a UNet that are compared: each arm sets one up over the subject's weights, or says why it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

import deepcache_fx
from benchmarks.speed.cases import Case
from benchmarks.speed.pipelines import Stage
from deepcache_fx.execution import openvino
from deepcache_fx.graph.pass_order import default_names
from deepcache_fx.schedules.schedule import Schedule
from passes import FuseGroupNorm


class Adjustable(Schedule):
    """Uniform, with an interval that can be changed between runs: the compiled variants serve all intervals."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def is_full(self, step: int, num_steps: int | None) -> bool:
        return step % self.interval == 0


@dataclass
class Prepared:
    """An arm set up: what the loop calls, and what else can be asked of it."""

    unet: Any
    scheduler: Any
    pipeline: Any
    """The real pipeline around `unet`, where there is one; its scheduler is `scheduler`."""
    set_interval: Callable[[int], None]
    caches: bool
    report: Callable[[], deepcache_fx.Report] | None = None
    close: Callable[[], None] = lambda: None

    def kinds(self, steps: int, interval: int) -> str:
        """The UNet calls of the last run: as reported where there is a report, else as the arm defines them."""
        if self.report is not None:
            return self.report().last_run
        return "".join("F" if not self.caches or step % interval == 0 else "s" for step in range(steps))

    def notes(self) -> tuple[str, ...]:
        """What did not go as planned."""
        if self.report is None:
            return ()
        report = self.report()
        reasons = {f"forced full: {reason}": count for reason, count in report.forced_full.items()}
        reasons |= {f"uncached: {reason}": count for reason, count in report.original_reasons.items()}
        if report.captures > 1:
            reasons["captures"] = report.captures
        if report.timestep_syncs:
            reasons["timesteps read back from the device"] = report.timestep_syncs
        return tuple(f"{count} x {reason}" for reason, count in reasons.items())


@dataclass(frozen=True)
class Arm:
    """One way to run a UNet."""

    name: str
    about: str
    prepare: Callable[[Stage, int], Prepared]
    """(stage, interval of the first run) -> what to call."""
    refuse: Callable[[Case], str | None] = lambda case: None
    """Why this arm does not apply to a case, or None."""
    caches: bool = True
    """False where every step is full: there is one row, at interval 1."""
    one_interval: bool = False
    """Measured at one interval alone: another would need another set-up, or tell nothing more."""
    compiles: bool = False
    """True where a second set-up may find compiled code on disk."""
    same_as: str | None = None
    """The arm that this one runs, with as many steps as cost the MACs of a cached run."""


def all_arms(backend: str = "inductor") -> dict[str, Arm]:
    """Every arm by name, in the order they are set up. `backend` is torch.compile's wherever an arm compiles."""

    def compiled(mode: str | None = None) -> dict[str, Any]:
        return dict(backend=backend, **({"mode": mode} if mode is not None and backend == "inductor" else {}))

    def ours(**options: Any) -> Callable[[Stage, int], Prepared]:
        return lambda stage, interval: prepare_ours(stage, interval, **options)

    arms = [
        Arm("eager", "the model as it is", _plain, caches=False),
        Arm("ours-eager", "deepcache_fx, backend eager", ours(backend="eager")),
        Arm("helper", "DeepCacheSDHelper", _helper, _refuse_helper),
        Arm(
            "ours-compile",
            "deepcache_fx, Inductor, no CUDA graphs",
            ours(backend=backend, cuda_graphs=False),
            compiles=True,
        ),
        Arm(
            "ours-cuda-graphs",
            "deepcache_fx, Inductor and CUDA graphs",
            ours(backend=backend, cuda_graphs=True),
            _refuse_cuda_graphs,
            compiles=True,
        ),
        Arm(
            "ours-uncached",
            "deepcache_fx with every step full: Inductor, and CUDA graphs on a GPU",
            ours(backend=backend),
            caches=False,
            compiles=True,
        ),
        Arm(
            "ours-eager-cuda-graphs",
            "deepcache_fx, backend eager, recorded as CUDA graphs: nothing is compiled",
            ours(backend="eager", cuda_graphs=True),
            _refuse_cuda_graphs,
            one_interval=True,
        ),
        Arm("ours-openvino", "deepcache_fx, OpenVINO", ours(backend="openvino"), _refuse_openvino),
        Arm(
            "ours-openvino-bf16",
            "deepcache_fx, OpenVINO, the float32 model computed in bfloat16",
            ours(backend="openvino", precision="bf16"),
            _refuse_openvino_bf16,
        ),
        Arm(
            "openvino",
            "OpenVINO without caching: deepcache_fx with every step full",
            ours(backend="openvino"),
            _refuse_openvino,
            caches=False,
        ),
        Arm(
            "eager-bf16",
            "the float32 model cast to bfloat16",
            lambda s, n: _plain(s, n, in_bf16=True),
            _refuse_cast,
            caches=False,
        ),
        Arm(
            "helper-bf16",
            "DeepCacheSDHelper on the float32 model cast to bfloat16",
            lambda s, n: _helper(s, n, in_bf16=True),
            lambda case: _refuse_helper(case) or _refuse_cast(case),
        ),
        Arm("compile", "torch.compile", lambda s, n: _plain(s, n, compiled()), caches=False, compiles=True),
        Arm(
            "eager-fewer-steps",
            "the model as it is, at as many steps as cost the MACs of the cached run",
            _plain,
            same_as="eager",
        ),
        Arm(
            "compile-freezing",
            "torch.compile with frozen weights",
            lambda s, n: _plain(s, n, compiled() | ({"options": {"freezing": True}} if backend == "inductor" else {})),
            _refuse_freezing,
            caches=False,
            compiles=True,
        ),
        Arm("compile-fewer-steps", "torch.compile, likewise", _plain, same_as="compile"),
        Arm(
            "eager-channels-last",
            "the model with channels-last weights",
            lambda s, n: _plain(s, n, None, True),
            caches=False,
        ),
        Arm(
            "helper-compile",
            "DeepCacheSDHelper under torch.compile",
            lambda s, n: _helper(s, n, compiled()),
            _refuse_helper,
            one_interval=True,
            compiles=True,
        ),
        Arm(
            "compile-max-autotune",
            "torch.compile, max-autotune, channels-last weights: the recipe of diffusers' guide",
            lambda s, n: _plain(s, n, compiled("max-autotune"), True),
            caches=False,
            compiles=True,
        ),
        Arm(
            "ours-max-autotune",
            "deepcache_fx, Inductor with max-autotune, and CUDA graphs on a GPU",
            ours(backend=backend, **({"mode": "max-autotune"} if backend == "inductor" else {})),
            one_interval=True,
            compiles=True,
        ),
        Arm(
            "ours-forecast",
            "ours-cuda-graphs (on a CPU: ours-eager) with a linear forecast",
            lambda s, n: _fastest(s, n, backend, forecast=1),
            one_interval=True,
        ),
        Arm(
            "ours-fuse-group-norm",
            "ours-cuda-graphs with the pass FuseGroupNorm: GroupNorm and SiLU as one Triton kernel",
            lambda s, n: _fastest(s, n, backend, passes=(FuseGroupNorm(cat=False),)),
            _refuse_triton,
            one_interval=True,
            compiles=True,
        ),
        Arm("pruna", "Pruna's deepcache and torch_compile", _pruna, _refuse_pruna, one_interval=True, compiles=True),
        *(_without(name, backend) for name in default_names()),
    ]
    return {arm.name: arm for arm in arms}


# Baselines.


def _plain(
    stage: Stage,
    interval: int,
    compile_options: dict[str, Any] | None = None,
    channels_last: bool = False,
    in_bf16: bool = False,
) -> Prepared:
    unet = _clone(stage, in_bf16)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if compile_options is not None:
        unet = torch.compile(unet, fullgraph=True, **compile_options)
    pipe = stage.pipeline(unet)
    return Prepared(unet, _scheduler(stage, pipe), pipe, lambda interval: None, caches=False)


def _clone(stage: Stage, in_bf16: bool) -> Any:
    """The model; asked for, in bfloat16, taking and giving what it did. Timesteps stay as they are."""
    unet = stage.subject.clone()
    if not in_bf16:
        return unet
    forward = unet.to(torch.bfloat16).forward

    def cast(values: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, values)

    def cast_forward(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = cast((args, kwargs), torch.bfloat16)
        return cast(forward(sample.to(torch.bfloat16), timestep, *args, **kwargs), sample.dtype)

    unet.forward = cast_forward
    return unet


def _refuse_cast(case: Case) -> str | None:
    return None if case.dtype == "fp32" else f"the model is cast from fp32, and this one is {case.dtype}"


def _refuse_freezing(case: Case) -> str | None:
    return None if torch.device(case.device).type == "cpu" else "freezing is measured on the CPU"


def _scheduler(stage: Stage, pipe: Any) -> Any:
    return pipe.scheduler if pipe is not None else stage.subject.kind.scheduler()


def _helper(
    stage: Stage, interval: int, compile_options: dict[str, Any] | None = None, in_bf16: bool = False
) -> Prepared:
    from DeepCache import DeepCacheSDHelper  # type: ignore[import-untyped]

    unet = _clone(stage, in_bf16)
    pipe = stage.pipeline(unet)
    scheduler = _scheduler(stage, pipe)
    helper = DeepCacheSDHelper(pipe=pipe if pipe is not None else SimpleNamespace(unet=unet, scheduler=scheduler))
    branch = stage.subject.case.branch

    def set_interval(interval: int) -> None:
        helper.set_params(cache_interval=interval, cache_branch_id=branch)

    set_interval(interval)
    helper.enable()
    called = unet
    if compile_options is not None:
        called = torch.compile(unet, **compile_options)
        if pipe is not None:
            pipe.unet = called
    return Prepared(called, scheduler, pipe, set_interval, caches=True)


def _refuse_helper(case: Case) -> str | None:
    return "DeepCache is not installed" if importlib.util.find_spec("DeepCache") is None else None


def _pruna(stage: Stage, interval: int) -> Prepared:
    from pruna import SmashConfig, smash  # type: ignore[import-not-found]

    config = SmashConfig(["deepcache", "torch_compile"], device=stage.subject.device.type)
    config["deepcache_interval"] = interval
    smashed = smash(model=stage.pipeline(stage.subject.clone()), smash_config=config)
    pipe = getattr(smashed, "model", smashed)
    return Prepared(pipe.unet, pipe.scheduler, pipe, lambda interval: None, caches=True)


def _refuse_pruna(case: Case) -> str | None:
    if importlib.util.find_spec("pruna") is None:
        return "pruna is not installed"
    if case.branch != 0:
        return "pruna caches at branch 0 only"
    if case.interval > 5:
        return "pruna's interval is at most 5"
    return None


# Ours.


def prepare_ours(stage: Stage, interval: int, *, forecast: int = 0, **options: Any) -> Prepared:
    """deepcache_fx; the cached feature is repeated unless asked otherwise, as by what it is compared with."""
    schedule = Adjustable(interval)
    unet = stage.subject.clone()
    pipe = stage.pipeline(unet)
    scheduler = _scheduler(stage, pipe)
    target = pipe if pipe is not None else unet
    deepcache_fx.optimize(target, schedule=schedule, branch=stage.subject.case.branch, forecast=forecast, **options)

    def set_interval(interval: int) -> None:
        schedule.interval = interval

    return Prepared(
        unet,
        scheduler,
        pipe,
        set_interval,
        caches=True,
        report=lambda: deepcache_fx.report(target),
        close=lambda: _restore(target),
    )


def _restore(target: Any) -> None:
    deepcache_fx.restore(target)


def _fastest(stage: Stage, interval: int, backend: str, **options: Any) -> Prepared:
    """The fastest way of ours for the device, with further options."""
    return prepare_ours(stage, interval, backend=backend if stage.subject.device.type == "cuda" else "eager", **options)


def _without(name: str, backend: str) -> Arm:
    return Arm(
        f"ours-without-{name.replace('_', '-')}",
        f"ours-cuda-graphs (on a CPU: ours-eager) without {name}",
        lambda stage, interval: _fastest(stage, interval, backend, disable=(name,)),
        one_interval=True,
    )


def _refuse_openvino(case: Case) -> str | None:
    if torch.device(case.device).type != "cpu":
        return "OpenVINO is used on the CPU alone"
    return None if openvino.is_available() else "openvino is not installed"


def _refuse_openvino_bf16(case: Case) -> str | None:
    reason = _refuse_openvino(case) or _refuse_cast(case)
    return reason or (None if openvino.has_bf16() else "this processor has no bfloat16 arithmetic")


def _refuse_triton(case: Case) -> str | None:
    if torch.device(case.device).type != "cuda":
        return "Triton kernels need a CUDA device"
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def _refuse_cuda_graphs(case: Case) -> str | None:
    return "CUDA graphs need a CUDA device" if torch.device(case.device).type != "cuda" else None
