"""Pretend that there is a CUDA device, so that fake tensors on it go through PyTorch and Inductor. Nothing can run.

What is replaced, and what happens where it is not:

    a guard for CUDA devices                "PyTorch is not linked with support for cuda devices"
    the layout that cuDNN would choose      convolutions come out contiguous, silently
    device properties, count and number     Inductor fails
    availability, for Inductor alone        Inductor takes it that there is no Triton; had all of PyTorch it, it would
                                            read the state of the random numbers
    Triton's driver                         "0 active drivers"; generated sources cannot be imported

The guard stays for as long as the process lives, so programs are compiled in a process of their own. Where there is a
device none of this is needed, and nothing should be concluded from it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.codegen.devices import Device

_GUARD = Path(__file__).with_name("guard.cpp")


class CannotPretendError(RuntimeError):
    """There is no Triton, or no C++ compiler, or PyTorch is built for CUDA."""


def why_not() -> str | None:
    """What is missing here, or None."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this PyTorch is built for a GPU, whose guard cannot be replaced: use the CPU build"
    if _compiler() is None:
        return "there is no C++ compiler (g++, clang++ or $CXX)"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX", "g++"), "g++", "clang++") if (found := shutil.which(name))), None
    )


@functools.cache
def load_guard() -> None:
    """Compile the guard, once for a version of PyTorch, and register it in this process.

    Raises:
        CannotPretendError: see `why_not`; or the compiler fails.
    """
    reason = why_not()
    if reason is not None:
        raise CannotPretendError(reason)
    key = hashlib.sha256(_GUARD.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"deepcache_fx-guard-{os.getuid()}-{key}.so"
    if not library.exists():
        torch_folder = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "guard.so"
            command = [
                str(_compiler()), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                str(_GUARD), f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(made),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CannotPretendError(f"the guard cannot be compiled: {done.stderr[-2000:]}")
            made.replace(library)
    torch.ops.load_library(str(library))


@contextmanager
def pretended(device: Device) -> Iterator[None]:
    """In the block, fake tensors may lie on `cuda`, and Inductor compiles for that device.

    Raises:
        CannotPretendError: see `why_not`.
    """
    load_guard()
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.runtime import driver

    def nothing() -> None: ...

    DeviceProperties.create.cache_clear()
    replaced: list[tuple[Any, str, Any]] = [
        (torch._C, "_conv_determine_backend_memory_format", _memory_format),
        (torch.cuda, "get_device_properties", lambda which=None: device.properties()),
        (torch.cuda, "get_device_capability", lambda which=None: device.capability),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "get_device_properties", staticmethod(lambda which=None: device.properties())),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda which=None: device.properties())),
        (CudaInterface, "get_compute_capability", staticmethod(lambda which=None: device.number)),
        (triton_helpers, "set_driver_to_gpu", nothing),
    ]
    active = getattr(driver, "_active", None)
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        driver.set_active(_Driver(triton.backends.compiler.GPUTarget("cuda", device.number, 32)))
        try:
            yield
        finally:
            driver._active = active
            DeviceProperties.create.cache_clear()


def _memory_format(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.memory_format:
    """What cuDNN computes in: channels-last where an operand has it."""
    if x.ndim == 4 and any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight)
    ):
        return torch.channels_last
    return torch.contiguous_format


class _Driver:
    """As much of a driver as Triton asks for while it compiles."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0
