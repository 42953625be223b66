"""How fast a step could be: the rates this device reaches, and the work that a step cannot avoid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import fx

from benchmarks.speed.cases import Work
from benchmarks.speed.measure import synchronize
from benchmarks.speed.subjects import DTYPES, Subject
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.macs import node_macs
from deepcache_fx.graph.signature import CallReader
from deepcache_fx.graph.skips import pick_branch, require_skip_connections
from deepcache_fx.graph.split import split


@dataclass(frozen=True)
class Rates:
    """The best that was measured, not the data sheet's."""

    macs_per_second: float
    """Of one large matrix product."""
    bytes_per_second: float
    """Of one large copy within the device's memory, read and written bytes both counted."""


@lru_cache(maxsize=16)
def measure_rates(device: str, dtype: str) -> Rates:
    """Measure both rates; about a second on either kind of device. Random numbers: zeros run faster than real data."""
    where, kind = torch.device(device), DTYPES[dtype]
    size, count = (8192, 2**29) if where.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(size, size, device=where, dtype=kind) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(count // 4, device=where).view(torch.uint8)
    target = torch.empty_like(source)
    return Rates(
        macs_per_second=size**3 / _best(lambda: torch.mm(a, b, out=product), where),
        bytes_per_second=2 * count / _best(lambda: target.copy_(source), where),
    )


def _best(function: Callable[[], object], device: torch.device, repeats: int = 8, batch: int = 2) -> float:
    function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(batch):
            function()
        synchronize(device)
        times.append((time.perf_counter() - started) / batch)
    return min(times)


@dataclass(frozen=True)
class Contraction:
    """A convolution, linear layer, matrix product or attention: MACs, and the bytes of its operands and result."""

    macs: int
    bytes: int

    def floor(self, rates: Rates) -> float:
        return max(self.macs / rates.macs_per_second, self.bytes / rates.bytes_per_second)


def contractions(nodes: Iterable[fx.Node]) -> tuple[Contraction, ...]:
    """Those of a graph whose nodes say what they produce. Everything else could be fused into one of them."""
    found = []
    for node in nodes:
        macs = node_macs(node).total
        if macs:
            tensors = [item.meta.get("val") for item in {node, *node.all_input_nodes}]
            sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
            found.append(Contraction(macs, sum(sizes)))
    return tuple(found)


def count_work(subject: Subject, branch: int, rates: Rates) -> Work:
    """What full and shallow steps of the model as captured (no passes) must do."""
    unet = subject.unet
    reader = CallReader(type(unet).forward)
    captured = capture(unet, reader.read(unet, (), subject.example_call()), reader)
    name = type(unet).__name__
    connection = pick_branch(require_skip_connections(captured.graph.graph, name), branch, name)
    variants = split(captured, connection)
    full, shallow = (contractions(_with_values(graph)) for graph in (variants.full.step, variants.cuts[0].shallow.step))
    return Work(
        macs_full=sum(item.macs for item in full),
        macs_shallow=sum(item.macs for item in shallow),
        bytes_full=sum(item.bytes for item in full),
        bytes_shallow=sum(item.bytes for item in shallow),
        floor_full=sum(item.floor(rates) for item in full),
        floor_shallow=sum(item.floor(rates) for item in shallow),
        macs_per_second=rates.macs_per_second,
        bytes_per_second=rates.bytes_per_second,
    )


def _with_values(module: fx.GraphModule) -> Iterable[fx.Node]:
    """The graph's nodes; parameters get the metadata that an exported graph may leave out."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = _attribute(module, str(node.target))
        yield node


def _attribute(module: torch.nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)
