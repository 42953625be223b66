"""One signature's programs, from a captured call: passes, split, passes on each variant, compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import fx

from deepcache_fx.errors import CaptureError
from deepcache_fx.execution.compile import compile_variants, copies_weights, pick_backend
from deepcache_fx.execution.cuda_graph_programs import CudaGraphPrograms
from deepcache_fx.execution.cuda_graphs import RECORDERS, Recorder
from deepcache_fx.execution.programs import DirectPrograms, Programs, PromptStage, ShallowProgram
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.only import Only
from deepcache_fx.graph.pass_order import apply_passes, finish
from deepcache_fx.graph.signature import Call
from deepcache_fx.graph.sizes import Sizes, at, fixed
from deepcache_fx.graph.skips import pick_branches, require_skip_connections
from deepcache_fx.graph.split import RATES, Variant, Variants, copied, split
from deepcache_fx.graph.weights import Binding, is_aligned, let_go_of_weights, unwrapped
from deepcache_fx.options import Options
from deepcache_fx.schedules.branch import Branch
from passes import Pass, PassRecord


@dataclass
class Compiled:
    """The steps of one signature as programs, to be called or recorded."""

    called: DirectPrograms
    record: Callable[[DirectPrograms], Programs]
    """Around what is to be called; the weights are those that the graphs hold at that moment."""
    compile: Callable[[], DirectPrograms]
    """Makes them again."""
    copies_weights: bool
    """False where they read the graphs' weights at every call."""

    def renewed(self, others: Collection[torch.Tensor]) -> tuple[Compiled, Programs]:
        """The same over other weights, which the graphs hold already."""
        again = self.copies_weights or not all(map(is_aligned, others))
        renewed = replace(self, called=self.compile()) if again else self
        return renewed, renewed.record(renewed.called)


@dataclass
class Entry:
    """One signature: its captured graph, split and compiled."""

    captured: Captured
    variants: Variants
    cuts: Mapping[Branch | None, int]
    """Which cut the schedule means by a branch; None is that of `optimize`."""
    prompts: Mapping[str, PromptStage]
    """By variant, where it has such a stage."""
    programs: Programs
    passes: tuple[PassRecord, ...]
    inputs: str
    compiled: Compiled
    again: Callable[[], Entry] | None = None
    """Makes it again of what was captured, where passes may have taken values from the weights."""
    raw: fx.GraphModule | None = None
    """What `again` begins with."""
    binding: Binding | None = None
    weights: int = -1
    """The number of the weights that it is bound to (see `fingerprint.Settings`)."""
    seconds: float = 0.0
    """Of all that made it, the capture included."""
    source: str | None = None
    """Where it was loaded from; None where it was captured."""
    why_not_saved: str | None = None
    """Why another process cannot have it."""
    many: ManySizes | None = None
    """What it is one size of, where the capture serves many."""

    def __post_init__(self) -> None:
        self.names = tuple(self.variants.named())[1:]
        """Of the shallow variants, by cut."""
        self.reads = tuple(cut.reads() for cut in self.variants.cuts)
        """Which inputs, by number, the shallow variants read, by cut."""

    def release(self) -> None:
        """Give recorded graphs back."""
        self.programs.release()

    def graphs(self) -> list[fx.GraphModule]:
        """All that hold weights."""
        variants = self.variants.named().values()
        stages = [variant.prompt for variant in variants if variant.prompt is not None]
        raw = [self.raw] if self.raw is not None else []
        raw += self.many.graphs() if self.many is not None else []
        return [self.captured.graph, *(variant.step for variant in variants), *stages, *raw]

    def at(self, call: Call) -> Entry | None:
        """The entry of the same capture for a call of other sizes; None where the capture does not serve those.

        It has programs, buffers and recorded graphs of its own, and shares the graphs that were captured.
        """
        return None if self.many is None else self.many.entry(call)

    def copies_weights(self) -> bool:
        """True where something else than these graphs may hold the values of weights, or what follows from them."""
        return self.again is not None or self.compiled.copies_weights

    def renewed(self, others: Collection[torch.Tensor]) -> Entry:
        """The entry of the same graphs over other weights, which they hold already.

        It is another object, so that nobody takes a deep feature or prompt values of the
        weights before for those of these.
        """
        if self.again is not None:
            return replace(self.again(), seconds=self.seconds)
        compiled, programs = self.compiled.renewed(others)
        return replace(self, programs=programs, compiled=compiled, prompts=_prompt_stages(self.variants))


def assemble(
    captured: Captured,
    call: Call,
    options: Options,
    *,
    name: str,
    recorders: MutableMapping[torch.device, Recorder],
) -> Entry:
    """Make the programs of a captured call. `name` is the model's, for errors; recorders are shared, one a device.

    Raises:
        DeepCacheError: a pass failed, there is no such branch, or the backend is unknown.
    """
    raw = copied(captured.graph) if any(map(_may_read_weights, options.passes)) else None
    again: Callable[[], Entry] | None = None
    if raw is not None:
        like = _without_values(call, raw)
        again = partial(assemble, captured.with_graph(raw), like, options, name=name, recorders=recorders)
    parts = divided(captured, call, options, name)
    if parts.captured.sizes is not None:
        let_go_of_weights(parts.captured.graph)
        entry = ManySizes(parts, parts.captured.sizes, options, recorders).entry(call)
        if entry is None:
            raise CaptureError(f"{name} was captured for many sizes, and not for those of the call itself")
        return entry
    made = compiled_entry(parts.finished(options), call, options, recorders)
    let_go_of_weights(parts.captured.graph)
    return replace(made, again=again, raw=raw)


@dataclass(frozen=True)
class Divided:
    """A captured call after the passes on it, split, and not yet compiled."""

    captured: Captured
    variants: Variants
    cuts: Mapping[Branch | None, int]
    """As of `Entry`."""
    passes: tuple[PassRecord, ...]

    def finished(self, options: Options) -> Divided:
        """After the passes on each variant, too."""
        variants, more = finish(self.variants, options)
        return replace(self, variants=variants, passes=(*self.passes, *more))


def divided(captured: Captured, call: Call, options: Options, name: str) -> Divided:
    """Run the passes on a captured call, and split it. `name` is the model's.

    Raises:
        DeepCacheError: a pass failed, or there is no such branch.
    """
    captured, records = apply_passes(captured, options)
    skips = require_skip_connections(captured.graph.graph, name)
    branches = pick_branches(skips, options.branch, options.schedule.branches, name)
    rates = [name for name in RATES if options.uses(name)]
    chosen = list(dict.fromkeys(branches.values()))
    variants = split(captured, chosen, rates=rates, prompt_inputs=call.prompt_inputs, forecast=options.order)
    cuts = {branch: chosen.index(found) for branch, found in branches.items()}
    return Divided(captured, variants, cuts, tuple(records))


def compiled_entry(
    parts: Divided, call: Call, options: Options, recorders: MutableMapping[torch.device, Recorder]
) -> Entry:
    """The entry of finished variants.

    Raises:
        CompileError: see `compile_variants`.
    """
    device = call.sample.device
    compiled = compiled_variants(parts.variants, options, device, why_not_recorded(options, call), recorders)
    return Entry(
        parts.captured,
        parts.variants,
        parts.cuts,
        _prompt_stages(parts.variants),
        compiled.record(compiled.called),
        parts.passes,
        ", ".join("x".join(map(str, t.shape)) or "scalar" for t in call.tensors),
        compiled,
    )


@dataclass(frozen=True)
class ManySizes:
    """A capture whose batch, height and width are symbols: an entry for each size that is met.

    The graphs' own operators run for any size; compilers are given the graphs with the numbers of one size in them, so
    that a step is the one that it would be had each size been captured by itself.
    """

    parts: Divided
    sizes: Sizes
    options: Options
    recorders: MutableMapping[torch.device, Recorder]

    def graphs(self) -> list[fx.GraphModule]:
        """All that hold weights."""
        return [graph for item in self.parts.variants.named().values() for graph in (item.step, item.prompt) if graph]

    def entry(self, call: Call) -> Entry | None:
        """The entry for the sizes of this call; None where the capture does not serve them."""
        started = time.perf_counter()
        values = self.sizes.values(call.tensors)
        if values is None:
            return None
        size = at(values)
        variants = self.parts.variants.at(size, self.parts.captured.graph.graph)
        if pick_backend(self.options, call.sample.device) != "eager":
            variants = variants.with_steps({k: fixed(v.step, size) for k, v in variants.named().items()})
        parts = replace(self.parts, variants=variants).finished(self.options)
        entry = compiled_entry(parts, call, self.options, self.recorders)
        return replace(entry, many=self, seconds=time.perf_counter() - started)


def _may_read_weights(item: Pass) -> bool:
    """True for a pass that is none of this library's: those rewrite the graph, whatever the values of the weights."""
    item = item.item if isinstance(item, Only) else item
    return not getattr(item, "__module__", type(item).__module__).startswith("passes.")


def _without_values(call: Call, graph: fx.GraphModule) -> Call:
    """A call like this one that keeps none of its tensors alive."""
    tensors = tuple(node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
    sample = next(like for like, given in zip(tensors, call.tensors, strict=True) if given is call.sample)
    return replace(call, arguments={}, tensors=tensors, timestep=None, sample=sample)


def prompt_stage(variant: Variant) -> PromptStage | None:
    """What runs once per prompt, before a variant's steps."""
    if variant.prompt is None:
        return None
    return PromptStage(variant.prompt.forward, variant.prompt_inputs, _weights(variant.prompt))


def _prompt_stages(variants: Variants) -> dict[str, PromptStage]:
    stages = {name: prompt_stage(variant) for name, variant in variants.named().items()}
    return {name: stage for name, stage in stages.items() if stage is not None}


def compiled_variants(
    variants: Variants,
    options: Options,
    device: torch.device,
    why_not: str | None,
    recorders: MutableMapping[torch.device, Recorder],
) -> Compiled:
    """The steps of all variants, compiled and, unless there is a reason why not, to be recorded."""
    steps = {name: variant.step for name, variant in variants.named().items()}

    def compile_all() -> DirectPrograms:
        compilation = compile_variants(steps, variants.num_outputs, options, device)
        full, *shallow = compilation.programs.values()
        return DirectPrograms(
            full_program=full,
            cuts=tuple(
                ShallowProgram(name, program, len(cut.cache), cut.refreshed)
                for name, program, cut in zip(list(steps)[1:], shallow, variants.cuts, strict=True)
            ),
            num_outputs=variants.num_outputs,
            compilation=compilation,
            order=options.order if variants.cuts else 0,
            why_not_recorded=why_not or "off",
        )

    def record(called: DirectPrograms) -> Programs:
        if why_not is not None:
            return called
        weights = {name: _weights(step) for name, step in steps.items()}
        return CudaGraphPrograms(
            called, _recorder(device, recorders), weights, [cut.cache for cut in variants.cuts], device
        )

    return Compiled(compile_all(), record, compile_all, copies_weights(options, device))


def _recorder(device: torch.device, recorders: MutableMapping[torch.device, Recorder]) -> Recorder:
    if device not in recorders:
        recorders[device] = RECORDERS[device.type](device)
    return recorders[device]


def _weights(graph: fx.GraphModule) -> tuple[torch.Tensor, ...]:
    """What a graph reads, quantised weights as the plain tensors inside them."""
    return tuple(chain.from_iterable(map(unwrapped, (*graph.parameters(), *graph.buffers()))))


def why_not_recorded(options: Options, call: Call) -> str | None:
    """Why a call's programs are not to be recorded as CUDA graphs, or None."""
    device = call.sample.device
    if options.cuda_graphs is False:
        return "off: cuda_graphs=False"
    if device.type not in RECORDERS:
        return f"off: the model runs on {device}"
    if options.cuda_graphs == "auto" and pick_backend(options, device) == "eager":
        return "off: the backend is eager (cuda_graphs=True records it all the same)"
    elsewhere = [t.device for t in call.tensors if t.device != device]
    return f"off: an input lies on {elsewhere[0]}, the sample on {device}" if elsewhere else None
