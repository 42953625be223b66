"""The programs of one signature of a ControlNet: all of its residuals, or the few that a shallow step reads.

    graph(x, t, text, picture) -> r_0, ..., r_n     prompt(text, picture)      -> k       once per prompt
                                              ->    full(x, t, ..., k)         -> r_0, ..., r_n
                                                    shallow(x, t, ..., k)      -> r_0

Both steps take what depends on the prompt and the picture alone from one stage before them: the layers that bring the
picture down to the size of the latent run once per picture.
"""

from __future__ import annotations

import time
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from deepcache_fx.controlnet.conditioning import multiply_in_float32
from deepcache_fx.execution.assemble import Compiled, compiled_variants, prompt_stage, why_not_recorded
from deepcache_fx.execution.cuda_graphs import Recorder
from deepcache_fx.execution.programs import Programs, PromptStage, Values
from deepcache_fx.graph.capture import CAPTURE_LOCK, Captured
from deepcache_fx.graph.macs import total_macs
from deepcache_fx.graph.pass_order import apply_passes, post_split_passes, run_on_step
from deepcache_fx.graph.signature import Call
from deepcache_fx.graph.split import Variant, Variants, in_stages, keep_outputs
from deepcache_fx.graph.weights import Binding, let_go_of_weights
from deepcache_fx.options import Options
from passes import PassRecord


@dataclass
class Step:
    """One program: which outputs it gives, by number, and what it costs."""

    outputs: tuple[int, ...]
    graph: fx.GraphModule
    compiled: Compiled
    programs: Programs
    macs: int

    def __call__(self, tensors: Sequence[torch.Tensor], prompt: Values) -> Sequence[Any]:
        return self.programs.full(0, tensors, prompt)[0] if self.outputs else ()

    def renewed(self, others: Collection[torch.Tensor]) -> Step:
        """The same over other weights, which the graph holds already (see `Entry.renewed`)."""
        compiled, programs = self.compiled.renewed(others)
        return replace(self, compiled=compiled, programs=programs)


@dataclass
class ControlNetEntry:
    """One signature of a ControlNet."""

    captured: Captured
    device: torch.device
    why_not_recorded: str | None
    options: Options
    recorders: MutableMapping[torch.device, Recorder]
    variant: Variant
    """Before the last passes."""
    stage: PromptStage | None
    passes: tuple[PassRecord, ...]
    inputs: str
    full: Step = field(init=False)
    shallow: dict[frozenset[int], Step] = field(default_factory=dict)
    seconds: float = 0.0
    binding: Binding | None = None
    weights: int = -1
    source: str | None = None
    """As those of an `Entry`."""

    @property
    def staged(self) -> fx.GraphModule:
        """All outputs, from the inputs and the prompt values, before the last passes."""
        return self.variant.step

    @property
    def prompt_macs(self) -> int:
        return self.variant.prompt_macs.total

    @property
    def count(self) -> int:
        """Of the outputs."""
        return len(self.captured.graph.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def plain_macs(self) -> int:
        """Of a call that computes everything."""
        return self.prompt_macs + self.full.macs

    def step_for(self, read: frozenset[int]) -> Step:
        """The program that computes these outputs alone."""
        step = self.shallow.get(read)
        if step is None:
            with CAPTURE_LOCK:
                step = self.shallow.get(read) or self._step(tuple(sorted(read)), "shallow")
                self.shallow[read] = step
        return step

    def graphs(self) -> list[fx.GraphModule]:
        """All that hold weights."""
        prompt = [self.variant.prompt] if self.variant.prompt is not None else []
        steps = (self.full, *self.shallow.values())
        return [self.captured.graph, self.variant.step, *prompt, *(step.graph for step in steps)]

    def copies_weights(self) -> bool:
        """True where something else than these graphs may hold the values of weights."""
        return self.full.compiled.copies_weights

    def renewed(self, others: Collection[torch.Tensor]) -> ControlNetEntry:
        """The entry of the same graphs over other weights (see `Entry.renewed`)."""
        renewed = replace(self, stage=prompt_stage(self.variant))
        renewed.full = self.full.renewed(others)
        renewed.shallow = {read: step.renewed(others) for read, step in self.shallow.items()}
        return renewed

    def at(self, call: Call) -> ControlNetEntry | None:
        """None: a ControlNet is captured for each size. The picture that it is given has sizes of its own, and all of
        its programs together are a fraction of the UNet's."""

    def release(self) -> None:
        for step in (self.full, *self.shallow.values()):
            step.programs.release()

    def _step(self, outputs: tuple[int, ...], name: str) -> Step:
        started = time.perf_counter()
        graph, records = run_on_step(name, keep_outputs(self.staged, outputs), post_split_passes(self.options))
        self.passes += records
        macs = total_macs(graph.graph.nodes)
        alone = Variants(Variant(graph, macs), (), len(outputs))
        compiled = compiled_variants(alone, self.options, self.device, self.why_not_recorded, self.recorders)
        step = Step(outputs, graph, compiled, compiled.record(compiled.called), macs.total)
        if self.binding is not None:
            self.binding.add(graph)
        let_go_of_weights(graph)
        self.seconds += time.perf_counter() - started
        return step


def assemble_controlnet(
    captured: Captured, call: Call, options: Options, recorders: MutableMapping[torch.device, Recorder]
) -> ControlNetEntry:
    """Make the programs of a captured call of a ControlNet. The user's passes are for the UNet: they are left out.

    Raises:
        DeepCacheError: a pass failed, or the backend is unknown.
    """
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    multiply_in_float32(captured.graph.graph, [placeholders[index] for index in call.numbers])
    captured.graph.recompile()
    options = replace(options, passes=())
    captured, records = apply_passes(captured, options)
    variant = in_stages(captured.graph, call.prompt_inputs if options.uses("prompt_rate") else ())
    inputs = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in call.tensors)
    entry = ControlNetEntry(
        captured=captured,
        device=call.sample.device,
        why_not_recorded=why_not_recorded(options, call),
        options=options,
        recorders=recorders,
        variant=variant,
        stage=prompt_stage(variant),
        passes=records,
        inputs=inputs,
    )
    entry.full = entry._step(tuple(range(entry.count)), "full")
    return entry
