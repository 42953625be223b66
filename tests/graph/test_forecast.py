"""Forecasting the cached feature: against polynomials, a plain eager reference, and itself in every way of running."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepcache_fx
from deepcache_fx import DeepCacheError, Steps
from deepcache_fx.execution import cuda_graphs
from deepcache_fx.graph.forecast import coefficients
from deepcache_fx.options import Options
from deepcache_fx.runtime.attach import runtime_of
from tests import models, small
from tests.compvis import CompVisUNet, denoise
from tests.fake_graphs import FakeRecorder
from tests.families import examples, family, thorough
from tests.oracles import TO_THE_BIT, CatOracle, published

TIMESTEPS = torch.arange(950, -1, -50)


@examples(30)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True),
    st.integers(1, 30),
    st.lists(st.floats(-4, 4), min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_a_polynomial_of_the_degree_is_met_exactly(
    steps: list[int], ahead: int, polynomial: list[float], order: int
) -> None:
    refreshes = tuple(sorted(steps, reverse=True))
    degree = min(order, len(refreshes) - 1)

    def value(step: int) -> float:
        return sum(factor * (step / 60) ** power for power, factor in enumerate(polynomial[: degree + 1]))

    step = refreshes[0] + ahead
    weights = coefficients(step, refreshes, order)
    assert len(weights) == order + 1
    forecast = sum(w * value(point) for w, point in zip(weights, refreshes, strict=False))
    assert forecast == pytest.approx(value(step), rel=1e-6, abs=1e-6 * sum(abs(w) for w in weights))


def test_until_there_are_enough_refreshes_the_degree_is_lower() -> None:
    assert coefficients(2, (0,), 2) == (1.0, 0.0, 0.0)
    assert coefficients(5, (3, 0), 2) == (pytest.approx(5 / 3), pytest.approx(-2 / 3), 0.0)
    assert sum(coefficients(8, (6, 3, 0), 2)) == pytest.approx(1)


class ForecastOracle(CatOracle):
    """Replaces the operand by the polynomial through those of the last full steps, written out by Newton's formula."""

    def __init__(self, forward: Any, branch: int, order: int) -> None:
        super().__init__(forward, branch)
        self.order = order
        self.history: list[tuple[int, torch.Tensor]] = []

    def step(self, number: int, full: bool, *args: Any, **kwargs: Any) -> Any:
        if full:
            result = self(True, *args, **kwargs)
            assert self.cached is not None
            self.history = [(number, self.cached), *self.history][: self.order + 1]
            return result
        points = self.history
        table = [value for _, value in points]
        self.cached = table[0].clone()
        distance = 1.0
        for degree in range(1, len(points)):
            table = [(table[i] - table[i + 1]) / (points[i][0] - points[i + degree][0]) for i in range(len(table) - 1)]
            distance *= number - points[degree - 1][0]
            self.cached = self.cached + distance * table[0]
        return self(False, *args, **kwargs)


@torch.no_grad()
def reference(order: int, full: set[int], branch: int = 0) -> torch.Tensor:
    unet = CompVisUNet()
    oracle = ForecastOracle(unet.forward, branch, order)
    number = -1

    def call(*args: Any) -> Any:
        nonlocal number
        number += 1
        return oracle.step(number, number in full, *args)

    return denoise(call, TIMESTEPS)  # type: ignore[arg-type]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("branch", family([0, 2], 2))
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("full", [set(range(0, 20, 3)), {0, 2, 3, 9, 10, 17}], ids=["uniform", "not uniform"])
def test_equals_the_operand_forecast_in_plain_eager_code(order: int, full: set[int], branch: int) -> None:
    unet = deepcache_fx.optimize(
        CompVisUNet(), schedule=Steps(full), branch=branch, **{**TO_THE_BIT, "forecast": order}
    )
    assert close(denoise(unet, TIMESTEPS), reference(order, full, branch))
    assert set(deepcache_fx.report(unet).last_run) == {"F", "s"}


def test_unless_told_otherwise_the_forecast_is_linear() -> None:
    assert Options().forecast == Options.make().forecast == "auto"
    default = inspect.signature(deepcache_fx.optimize).parameters["forecast"].default
    assert default is None, "that of the preset, or auto"
    unet = deepcache_fx.optimize(CompVisUNet(), interval=3, backend="eager", disable="all")
    actual = denoise(unet, TIMESTEPS)
    full = set(range(0, 20, 3))
    assert close(actual, reference(1, full))
    assert not close(actual, reference(0, full), 1e-3)


def test_order_zero_is_the_published_method_to_the_bit() -> None:
    pipe = models.sd_pipeline()
    with published(pipe, 3, 0):
        expected = models.generate(pipe, 10)
    with deepcache_fx.optimized(pipe, interval=3, **TO_THE_BIT):
        assert torch.equal(models.generate(pipe, 10), expected)


@thorough
def test_a_forecast_is_closer_to_the_uncached_result() -> None:
    plain = denoise(CompVisUNet(), TIMESTEPS)
    errors = []
    for order in (0, 1, 2):
        unet = deepcache_fx.optimize(CompVisUNet(), interval=3, forecast=order, backend="eager")
        errors.append(float((denoise(unet, TIMESTEPS) - plain).norm()))
    assert errors[1] < 0.6 * errors[0]


def test_hoisted_sums_are_forecast_nearly_as_the_feature_is() -> None:
    """What is cached is then past a norm and a convolution: not the same polynomial, but close."""
    whole = denoise(deepcache_fx.optimize(CompVisUNet(), **{**TO_THE_BIT, "forecast": 1}), TIMESTEPS)
    hoisted = denoise(deepcache_fx.optimize(CompVisUNet(), forecast=1, backend="eager"), TIMESTEPS)
    assert close(hoisted, whole, 1e-2)
    assert not close(hoisted, whole, 1e-6)


@thorough
@pytest.mark.parametrize("order", [1, 2])
def test_recorded_and_compiled_steps_forecast_alike(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    expected = [
        denoise(deepcache_fx.optimize(CompVisUNet(), forecast=order, backend="eager", cuda_graphs=False), TIMESTEPS, s)
        for s in (0, 1)
    ]
    for backend, recorded in ("eager", True), ("aot_eager", True), ("aot_eager", False):
        unet = deepcache_fx.optimize(CompVisUNet(), forecast=order, backend=backend, cuda_graphs=recorded)
        for seed in (0, 1, 0):
            assert close(denoise(unet, TIMESTEPS, seed), expected[seed], 1e-6)
        assert (deepcache_fx.report(unet).signatures[0].cuda_graphs == "recorded") == recorded


@torch.no_grad()
def guided(unet: Any, together: bool) -> torch.Tensor:
    """Guidance as one call of two samples, or as two calls."""
    torch.manual_seed(0)
    x, contexts = torch.randn(1, 4, 8, 8), [torch.randn(1, 3, 6) for _ in range(2)]
    for t in TIMESTEPS:
        if together:
            first, second = unet(x.repeat(2, 1, 1, 1), t.expand(2), torch.cat(contexts)).chunk(2)
        else:
            first, second = (unet(x, t.expand(1), context) for context in contexts)
        x = x - 0.1 * (2 * second - first)
    return x


@pytest.mark.parametrize("graphs", family([True, False], True))
def test_two_calls_a_step_keep_their_own_refreshes(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", FakeRecorder)
    options: dict[str, Any] = {"forecast": 2, "backend": "eager", "cuda_graphs": graphs}
    together = guided(deepcache_fx.optimize(CompVisUNet(), **options), together=True)
    apart = guided(deepcache_fx.optimize(CompVisUNet(), **options), together=False)
    assert close(apart, together)


def test_a_new_run_forgets_the_refreshes_of_the_last() -> None:
    unet = deepcache_fx.optimize(CompVisUNet(), forecast=2, backend="eager")
    first = denoise(unet, TIMESTEPS)
    denoise(unet, TIMESTEPS, seed=5, stop=11)
    assert torch.equal(denoise(unet, TIMESTEPS), first)


def test_half_precision_is_summed_in_single() -> None:
    unet = small.pipeline().unet.to(torch.bfloat16)
    deepcache_fx.optimize(unet, forecast=1, backend="eager")
    text = torch.randn(2, 5, models.TEXT).bfloat16()
    with torch.no_grad():
        outputs = [unet(torch.ones(2, 4, 8, 8).bfloat16(), t, text).sample for t in TIMESTEPS[:5]]
    assert deepcache_fx.report(unet).last_run == "FssFs"
    assert outputs[-1].dtype == torch.bfloat16
    assert (outputs[-1].float() - outputs[-2].float()).norm() < 0.1 * outputs[-2].float().norm()
    runtime = runtime_of(unet)
    assert runtime is not None
    [entry] = runtime._entries.values()
    sums = entry.variants.cuts[0].shallow.step.graph.find_nodes(
        op="call_function", target=torch.ops.aten.addcmul.default
    )
    assert sums
    assert {node.meta["val"].dtype for node in sums} == {torch.float32}


@pytest.mark.parametrize("order", [-1, 3, True, 1.5, "linear"])
def test_other_orders_are_refused(order: Any) -> None:
    with pytest.raises(DeepCacheError, match=r'forecast must be "auto", 0 \(repeat the cached feature\), 1 or 2, got'):
        deepcache_fx.optimize(CompVisUNet(), forecast=order)
