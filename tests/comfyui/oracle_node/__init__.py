"""Nodes of the tests alone: the oracle, which replaces the deep operand in the model's own forward, and odd patches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

_spec = importlib.util.spec_from_file_location("oracles", Path(__file__).resolve().parents[2] / "oracles.py")
assert _spec is not None  # by its file, for ComfyUI has a package called tests too
assert _spec.loader is not None
_oracles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_oracles)
CatOracle = _oracles.CatOracle


class Oracle:
    """As `DeepCacheFX` with `repeat`, by the model's own forward: a feature for each conditioning and shape."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "interval": ("INT", {"default": 3}), "branch": ("INT", {"default": 0})}
        }

    def attach(self, model: Any, interval: int, branch: int) -> tuple[Any]:
        cached = model.clone()
        number, calls, oracles = -1, 0, {}

        def outer_sample(executor: Any, *args: Any) -> Any:
            nonlocal number
            number = -1
            oracles.clear()
            return executor(*args)

        def predict_noise(executor: Any, *args: Any) -> Any:
            nonlocal number, calls
            number, calls = number + 1, 0
            return executor(*args)

        def diffusion_model(executor: Any, *args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            options = args[5]
            has_control = args[4] is not None
            who = (tuple(options["uuids"]), args[0].shape, has_control, calls if "repeated" in options else 0)
            refresh = number // interval
            is_full = number % interval == 0
            if who not in oracles or oracles[who][1] != refresh:
                is_full = True
            oracle = oracles[who][0] if who in oracles else CatOracle(lambda run: run(), branch)
            oracles[who] = (oracle, refresh)
            control = args[4]

            def run() -> Any:  # the model takes residuals out of the lists, and the oracle runs it twice
                own = None if control is None else {name: list(values) for name, values in control.items()}
                return executor(*args[:4], own, options, **named)

            return oracle(is_full, run)

        cached.add_wrapper_with_key("outer_sample", "oracle", outer_sample)
        cached.add_wrapper_with_key("predict_noise", "oracle", predict_noise)
        cached.add_wrapper_with_key("diffusion_model", "oracle", diffusion_model)
        return (cached,)


class AttentionPatch:
    """Attention patches in the manner of adapters for pictures: one more term for the conditioned half of a batch."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "reads": (["cond_or_uncond", "sigmas", "sample_sigmas", "keeps"],)}}

    def attach(self, model: Any, reads: str) -> tuple[Any]:
        from comfy.ldm.modules.attention import optimized_attention

        seen: list[torch.Tensor] = []

        def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
            out = optimized_attention(q, k, v, extra_options["n_heads"])
            if reads == "sigmas" and extra_options["sigmas"].detach().cpu()[0].item() < 3:
                return out
            if reads == "sample_sigmas" and len(extra_options["sample_sigmas"]) < 3:
                return out
            if reads == "keeps":
                seen[:] = [out]
            rows = [0.5 if kind == 0 else 0.0 for kind in extra_options["cond_or_uncond"]]
            share = torch.tensor(rows, dtype=out.dtype).repeat_interleave(out.shape[0] // len(rows))[:, None, None]
            return out + share * optimized_attention(q, k.flip(1), v, extra_options["n_heads"])

        patched = model.clone()
        patched.set_model_attn2_replace(patch, "middle", 0)
        patched.set_model_attn2_replace(patch, "input", 1)
        return (patched,)


class SplitCalls:
    """Every conditioning in a call of its own, as where memory is short, or in turns: `alternately`."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "alternately": ("BOOLEAN", {"default": False})}}

    def attach(self, model: Any, alternately: bool) -> tuple[Any]:
        import comfy.samplers

        steps = 0

        def conditions(args: dict[str, Any]) -> Any:
            nonlocal steps
            steps += 1
            conds, x, sigma, options = args["conds"], args["input"], args["sigma"], dict(args["model_options"])
            options.pop("sampler_calc_cond_batch_function")
            order = [0, 1] if steps % 2 or not alternately else [1, 0]
            found = {
                number: comfy.samplers.calc_cond_batch(args["model"], [conds[number]], x, sigma, options)[0]
                for number in order
            }
            return [found[0], found[1]]

        split = model.clone()
        split.set_model_sampler_calc_cond_batch_function(conditions)
        return (split,)


class Interrupting:
    """A sampler's model that interrupts itself at a step, the first time."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "step": ("INT", {"default": 2})}}

    def attach(self, model: Any, step: int) -> tuple[Any]:
        import comfy.model_management

        seen = 0

        def predict_noise(executor: Any, *args: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == step:
                raise comfy.model_management.InterruptProcessingException
            return executor(*args)

        interrupting = model.clone()
        interrupting.add_wrapper_with_key("predict_noise", "interrupting", predict_noise)
        return (interrupting,)


NODE_CLASS_MAPPINGS = {
    "TestOracle": Oracle,
    "TestAttentionPatch": AttentionPatch,
    "TestSplitCalls": SplitCalls,
    "TestInterrupting": Interrupting,
}
