"""The ways to make the same images for less that are compared, and the controls they have to beat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

import deepcache_fx
from benchmarks.fidelity.cases import Case
from benchmarks.fidelity.setting import Arm, Setting, uniform_calls
from benchmarks.fidelity.variations import variations

ORDERS = (1, 2)
"""Of the forecast of the cached feature. Order 0 is repeating it."""
NESTED_BRANCH = 3
"""The first skip connection of the second resolution, in UNets with three layers a block."""
CALIBRATION_IMAGES = 16
CALIBRATION_TRIALS = 40
"""Schedules tried: about what 15 uncached runs of those images take at 1:3."""


@contextmanager
def _plain(setting: Setting) -> Iterator[None]:
    yield


def _ours(arguments: Callable[[Setting], Mapping[str, Any]]) -> Callable[[Setting], AbstractContextManager[Any]]:
    def applied(setting: Setting) -> AbstractContextManager[Any]:
        return deepcache_fx.optimized(setting.model.pipe, branch=setting.case.branch, **arguments(setting))

    return applied


def all_arms() -> dict[str, Arm]:
    """Every arm by name, in the order they are run: the uncached images come first."""
    arms = [
        Arm("uncached", "every step full", _plain, cached=False, intervals=False),
        Arm(
            "repeat",
            "published DeepCache, uniform 1:N",
            _ours(lambda s: dict(interval=s.case.interval, forecast=0)),
            order=0,
        ),
        Arm(
            "power",
            "published DeepCache, non-uniform 1:N",
            _ours(lambda s: dict(schedule=power(s.case), forecast=0)),
            order=0,
        ),
        *(_forecast(order) for order in ORDERS),
        Arm(
            "nested",
            f"full at every 2N-th step, from branch {NESTED_BRANCH} on at every other N-th, forecast (linear)",
            _ours(lambda s: dict(schedule=nested(s.case.interval), forecast=1)),
        ),
        Arm(
            "calibrated",
            "full steps and order of the forecast calibrated, as many full steps as 1:N has",
            functools.partial(_calibrated, trials=CALIBRATION_TRIALS),
        ),
        Arm(
            "calibrated-nested",
            f"calibrated, with steps from branch {NESTED_BRANCH} on in place of full ones, at the cost of 1:N at most",
            functools.partial(_calibrated, trials=2 * CALIBRATION_TRIALS, deeper=NESTED_BRANCH),
        ),
        Arm(
            "fewer-steps",
            "the honest control: uncached, at as many steps as cost the MACs of uniform 1:N",
            _plain,
            cached=False,
            steps=equal_macs_steps,
        ),
        Arm(
            "zeroed",
            "the negative control: uniform 1:N with zeros in place of the cached feature",
            _zeroed,
            cached=False,
            timed=False,
            calls=lambda s, calls: uniform_calls(len(calls), s.case.interval),
        ),
        *variations(),
    ]
    return {arm.name: arm for arm in arms}


def nested(interval: int) -> deepcache_fx.Nested:
    """As many refreshes of the shallowest cache as uniform 1:N has, half of them from a deeper skip connection."""
    return deepcache_fx.Nested(2 * interval, {NESTED_BRANCH: interval})


def power(case: Case) -> deepcache_fx.Power:
    """The published setting for 50 steps (power 1.4 around step 15), its center in proportion."""
    return deepcache_fx.Power(case.interval, power=1.4, center=round(0.3 * case.steps))


def equal_macs_steps(setting: Setting) -> int:
    """How many full steps have the MACs of a uniform 1:N run; rounded, at least one."""
    calls = uniform_calls(setting.case.steps, setting.case.interval)
    return max(1, round(setting.cost.of(calls) / setting.cost.full))


def _forecast(order: int) -> Arm:
    name = {1: "linear", 2: "quadratic"}[order]
    arguments = _ours(lambda s: dict(interval=s.case.interval, forecast=order))
    return Arm(f"forecast-{order}", f"uniform 1:N, the cached feature forecast ({name})", arguments, order=order)


def _calibrated(setting: Setting, trials: int, deeper: int | None = None) -> AbstractContextManager[Any]:
    """Calibrated to as many full steps as uniform 1:N has, on seeds that the judged images do not use."""
    case, model = setting.case, setting.model
    setting.work.mkdir(parents=True, exist_ok=True)
    name = case.key.replace("/", "-").replace(" ", "-")
    found = deepcache_fx.calibrate(
        model.pipe,
        model.prompts_of(range(CALIBRATION_IMAGES)),
        budget=uniform_calls(case.steps, case.interval).count("F"),
        steps=case.steps,
        branch=case.branch,
        deeper=deeper,
        seed=case.seed + case.images,
        trials=trials,
        out=setting.work / f"{name}.json",
        **model.call,
    )
    return deepcache_fx.optimized(model.pipe, **found.options)


# The negative control.


@contextmanager
def _zeroed(setting: Setting) -> Iterator[None]:
    """Zeros where a shallow step reads the cache: put there by hooks, without `deepcache_fx`.

    The rest of the UNet runs, and is thrown away: the images are those of a cache that holds nothing.
    """
    unet, cost, interval = setting.model.pipe.unet, setting.cost, setting.case.interval
    up = unet.up_blocks[-1 - cost.block]
    position = len(up.resnets) - 1 - cost.layer
    deep = _deep_channels(unet, cost.block, position)
    timesteps: list[float] = []

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        if timesteps and timestep > timesteps[-1]:
            timesteps.clear()  # time runs backwards: this is another run
        timesteps.append(timestep)

    def blank(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        if (len(timesteps) - 1) % interval == 0:
            return None
        joined = args[0].clone()
        joined[:, :deep] = 0
        return (joined, *args[1:])

    hooks = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        up.resnets[position].register_forward_pre_hook(blank),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _deep_channels(unet: Any, block: int, position: int) -> int:
    """Of the deep feature that is joined with a skip connection at this residual block of an up block."""
    if position > 0:
        return int(unet.up_blocks[-1 - block].resnets[position - 1].out_channels)
    if block + 1 < len(unet.up_blocks):
        return int(unet.up_blocks[-2 - block].resnets[-1].out_channels)
    return int(unet.config.block_out_channels[-1])


def select(names: Sequence[str], intervals: Sequence[int], group: Case, arms: Mapping[str, Arm]) -> Iterator[Case]:
    """The cases of one group, the uncached one first."""
    yield group
    for name in names:
        if name != "uncached":
            for interval in intervals if arms[name].intervals else [1]:
                yield replace(group, arm=name, interval=interval)
