"""Shared set-up: one thread a process, quiet libraries, slow modules first, GPU tests skipped where there is no GPU.

"auto" means eager on the CPU, also where OpenVINO is installed, unless a test takes the fixture `auto_finds_openvino`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import diffusers
import pytest
import torch
import transformers
from hypothesis import settings

from deepcache_fx.cli.loading import IMPORTED_UNUSED
from deepcache_fx.execution import openvino

for name in IMPORTED_UNUSED:
    logging.getLogger(name).setLevel(logging.ERROR)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # all tensors are tiny: a second thread is waited for, on a busy machine for long

# Few examples, the same ones every time; `make test-all` asks for the other profile.
settings.register_profile("quick", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None)
settings.load_profile("quick")

SLOWEST_FIRST = (
    "test_codegen",
    "test_compile",
    "test_oracle",
    "test_kernels",
    "test_presets",
    "test_stacking",
    "test_pipelines",
    "test_reliability",
    "test_controlnet_runtime",
    "test_speed",
    "test_calibrate",
    "test_lora",
    "test_nested",
    "test_changed_weights",
    "test_fidelity",
    "test_follow",
    "test_pass_orders",
    "test_unets",
)
"""Modules with the longest tests; the others follow in their own order. An idle worker takes tests from the end of
another's list, so nothing long may lie there."""


@pytest.fixture(autouse=True, scope="session")
def _auto_is_eager() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "is_available", lambda: False)
        yield


@pytest.fixture
def auto_finds_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr(openvino, "is_available", lambda: True)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
