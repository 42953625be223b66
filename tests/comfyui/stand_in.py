"""A stand-in for the parts of ComfyUI that the node touches, after their contract: executor, patcher, guider, sampler.

Wrappers of a kind are called in the order they were added, each with an executor: calling that runs the next one, or
what is wrapped. An executor tells `class_obj`, all `wrappers` and its own place `idx` among them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.comfy import ComfyUNet

Wrappers = dict[str, dict[str, list[Callable[..., Any]]]]


class Executor:
    """Of a function and its wrappers, at one of them."""

    def __init__(self, original: Callable[..., Any], owner: object, wrappers: Sequence[Any], idx: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.idx = original, owner, list(wrappers), idx

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)


def of_kind(wrappers: Wrappers, kind: str) -> list[Callable[..., Any]]:
    return [wrapper for added in wrappers.get(kind, {}).values() for wrapper in added]


class UNet(ComfyUNet):
    """Runs its wrappers where ComfyUI's does; `_forward` is past them."""

    def forward(self, x: Any, timesteps: Any, context: Any = None, y: Any = None, control: Any = None,
                transformer_options: Any = None, **extra: Any) -> Any:  # fmt: skip
        wrappers = of_kind(transformer_options["wrappers"], "diffusion_model")
        arguments = (x, timesteps, context, y, control, transformer_options)
        return Executor(self._forward, self, wrappers).execute(*arguments, **extra)

    def _forward(self, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: Any) -> Any:
        return super()._forward(x, timesteps, context, control, options)


class Sampling:
    """Sigmas from 10 to 0, linear in the time."""

    @staticmethod
    def percent_to_sigma(percent: float) -> float:
        return 10 * (1 - percent)

    @staticmethod
    def timestep(sigma: torch.Tensor) -> torch.Tensor:
        return sigma * 100


class Model(torch.nn.Module):
    """What all clones of a patcher share."""

    def __init__(self, unet: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.diffusion_model = unet or UNet()
        self.model_sampling = Sampling()


class Patcher:
    """A MODEL."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.wrappers: Wrappers = {}
        self.attachments: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.hook_patches: dict[str, Any] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.wrappers = {kind: {key: [*all_] for key, all_ in keys.items()} for kind, keys in self.wrappers.items()}
        other.attachments, other.options = dict(self.attachments), dict(self.options)
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, value: Any) -> None:
        self.attachments[key] = value


class Condition:
    """A prompt: its embedding, and what ComfyUI calls it."""

    def __init__(self, seed: int) -> None:
        self.uuid = uuid.UUID(int=seed)
        self.context = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(seed))


Calls = Callable[[int], Sequence[Sequence[Condition]]]
"""By evaluation, the calls that the UNet is made, each of so many conditions."""

PROMPT, NEGATIVE = Condition(1), Condition(2)


def euler(*_: Any) -> None: ...


def sample_euler_ancestral(*_: Any) -> None: ...


def sample(
    patcher: Patcher,
    steps: int = 6,
    *,
    calls: Calls = lambda _: [[PROMPT, NEGATIVE]],
    sampler: object = SimpleNamespace(sampler_function=euler, extra_options={}),
    size: int = 8,
    sigmas: Sequence[float] | None = None,
    evaluations_per_step: int = 1,
    interrupted_at: int | None = None,
    options: dict[str, Any] | None = None,
    control: Callable[[int], Any] = lambda _: None,
) -> torch.Tensor:
    """A run, as a guider makes it: the last sample. `sigmas` end with 0."""
    sigma_values = torch.tensor(sigmas or [10 * (1 - step / steps) for step in range(steps + 1)])
    every = {**patcher.options, **(options or {}), "wrappers": patcher.wrappers}
    guider = SimpleNamespace(model_patcher=patcher, model_options={"transformer_options": every})
    number = -1

    def predict(x: torch.Tensor, sigma: torch.Tensor, model_options: Any, seed: int) -> torch.Tensor:
        found = []
        for conditions in calls(number):
            call = {
                **model_options["transformer_options"],
                "cond_or_uncond": [0 if condition is PROMPT else 1 for condition in conditions],
                "uuids": [condition.uuid for condition in conditions],
                "sigmas": sigma,
                "sample_sigmas": sigma_values,
            }
            batch = torch.cat([x] * len(conditions))
            context = torch.cat([condition.context for condition in conditions])
            unet = patcher.model.diffusion_model
            found += unet(batch, sigma.expand(len(batch)) * 100, context, None, control(number), call).chunk(
                len(conditions)
            )
        result: torch.Tensor = 3 * found[0] - 2 * found[-1]
        return result

    def outer(noise: torch.Tensor, latent: Any, sampler: Any, sigmas: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal number
        x = noise
        for sigma in sigmas[:-1]:
            for _ in range(evaluations_per_step):
                number += 1
                if number == interrupted_at:
                    raise InterruptedError
                predicted = Executor(predict, guider, of_kind(patcher.wrappers, "predict_noise")).execute(
                    x, sigma.expand(1), guider.model_options, 0
                )
                x = x - 0.05 * predicted
        return x

    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    wrapped = Executor(outer, guider, of_kind(patcher.wrappers, "outer_sample"))
    with torch.inference_mode():
        result: torch.Tensor = wrapped.execute(
            noise, torch.zeros_like(noise), sampler, sigma_values, None, None, True, 0
        )
    return result
