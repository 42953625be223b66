"""The devices that programs are compiled for, by architecture: what Inductor asks of one, and what its roof is."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class Device:
    """One device of an architecture, by its data sheet."""

    name: str
    arch: str
    capability: tuple[int, int]
    processors: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Bytes per block, opted in."""
    bytes_per_second: float
    flop_per_second: float
    """Of float16 with sums in float32, dense."""

    @property
    def number(self) -> int:
        """As Triton writes an architecture: 90."""
        major, minor = self.capability
        return 10 * major + minor

    def properties(self) -> SimpleNamespace:
        """What `torch.cuda.get_device_properties` would return, as far as Inductor and our kernels read it."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name, major=major, minor=minor, multi_processor_count=self.processors, warp_size=32,
            total_memory=80 * 2**30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
            max_threads_per_block=1024, shared_memory_per_block=48 * 2**10,
            shared_memory_per_block_optin=self.shared_memory, gcnArchName="", L2_cache_size=50 * 2**20,
        )  # fmt: skip


_ALL = (
    Device("A100 80 GB", "sm_80", (8, 0), 108, 163 * 1024, 2.04e12, 312e12),
    Device("H200", "sm_90", (9, 0), 132, 227 * 1024, 4.8e12, 989e12),
    Device("B200", "sm_100", (10, 0), 148, 227 * 1024, 8.0e12, 2250e12),
)

DEVICES = {device.arch: device for device in _ALL}
"""By architecture."""

LAUNCH_SECONDS = 2e-6
"""What the floor charges a launch at the least, also from a recorded graph."""
