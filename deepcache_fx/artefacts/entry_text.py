"""The programs of one signature as plain values and constants, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses import FakeTensorMode

from deepcache_fx.artefacts.graph_text import Unreadable, decode, encode
from deepcache_fx.execution.assemble import Divided, Entry, compiled_entry
from deepcache_fx.execution.cuda_graphs import Recorder
from deepcache_fx.graph.capture import Captured
from deepcache_fx.graph.macs import Macs
from deepcache_fx.graph.signature import Call
from deepcache_fx.graph.skips import SkipConnection
from deepcache_fx.graph.split import Cost, Cut, Variant, Variants
from deepcache_fx.options import Options
from passes import PassRecord


def named_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, also by those that share one."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def entry_to_text(entry: Entry, module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The entry as plain values, and the constants that its graphs hold besides the model's weights.

    Raises:
        Unreadable: something of it is not written to files; says what.
    """
    if entry.why_not_saved is not None:
        raise Unreadable(entry.why_not_saved)
    if entry.many is not None:
        raise Unreadable("it was captured for many sizes: with dynamic=False each size is written")
    if entry.raw is not None:
        raise Unreadable("a pass of your own has made it, which may have read values of weights")
    names = {id(tensor): name for name, tensor in named_weights(module).items()}
    constants: dict[str, torch.Tensor] = {}
    variants = entry.variants

    def variant(item: Variant) -> dict[str, Any]:
        return {
            "step": encode(item.step, names, constants),
            "macs": asdict(item.macs),
            "prompt": None if item.prompt is None else encode(item.prompt, names, constants),
            "prompt_inputs": list(item.prompt_inputs),
            "prompt_macs": asdict(item.prompt_macs),
        }

    def cut(item: Cut) -> dict[str, Any]:
        branch = item.branch
        return {
            "branch": [branch.index, branch.block, branch.layer],
            "shallow": variant(item.shallow),
            "plain": {"macs": asdict(item.plain.macs), "cache_bytes": item.plain.cache_bytes},
            "refreshed": item.refreshed,
            "cached": len(item.cache),
        }

    try:
        out_spec = pytree.treespec_dumps(entry.captured.out_spec)
        is_read_back = pytree.treespec_loads(out_spec) == entry.captured.out_spec
    except Exception as error:
        raise Unreadable(f"what the model returns is not written to files: {error}") from error
    if not is_read_back:
        raise Unreadable("what the model returns is not read back from files")
    text = {
        "out_spec": out_spec,
        "full": variant(variants.full),
        "cuts": [cut(item) for item in variants.cuts],
        "num_outputs": variants.num_outputs,
        "chosen": [[_branch_text(branch), number] for branch, number in entry.cuts.items()],
        "passes": [asdict(record) for record in entry.passes],
    }
    return text, {name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()}


def entry_of_text(
    text: Any,
    constants: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    call: Call,
    options: Options,
    recorders: MutableMapping[torch.device, Recorder],
) -> Entry:
    """The entry of such values, over the module's weights.

    Raises:
        Unreadable: they are none of an entry for this call.
        CompileError: the backend cannot take the graphs.
    """
    weights = named_weights(module)
    here = {name: tensor.to(call.sample.device) for name, tensor in constants.items()}
    mode = FakeTensorMode()

    def graph(item: Any) -> fx.GraphModule:
        return decode(item, weights, here, mode)

    def variant(item: Any) -> Variant:
        return Variant(
            step=graph(item["step"]),
            macs=Macs(**item["macs"]),
            prompt=None if item["prompt"] is None else graph(item["prompt"]),
            prompt_inputs=tuple(item["prompt_inputs"]),
            prompt_macs=Macs(**item["prompt_macs"]),
        )

    try:
        stub = _no_graph()
        deep, _, cat, *_ = stub.graph.nodes
        full = variant(text["full"])
        outputs: Any = full.step.graph.output_node().args[0]
        leaves = iter([node.meta["val"] for node in outputs[text["num_outputs"] :]])
        cuts = []
        for item in text["cuts"]:
            shallow = variant(item["shallow"])
            cache = tuple(islice(leaves, item["cached"]))
            plain = Cost(Macs(**item["plain"]["macs"]), item["plain"]["cache_bytes"])
            index, block, layer = item["branch"]
            branch = SkipConnection(index, block, layer, cat, deep)
            cuts.append(Cut(branch, shallow, cache, plain, item["refreshed"]))
        variants = Variants(full, tuple(cuts), text["num_outputs"])
        chosen = {_branch_of(branch): number for branch, number in text["chosen"]}
        records = tuple(PassRecord(**{**item, "declined": tuple(item["declined"])}) for item in text["passes"])
        captured = Captured(stub, pytree.treespec_loads(text["out_spec"]))
        placeholders = full.step.graph.find_nodes(op="placeholder")[: len(call.tensors)]
        for node, tensor in zip(placeholders, call.tensors, strict=True):
            like = node.meta["val"]
            if (like.shape, like.stride(), like.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
                raise Unreadable(f"its input {node.name} is of another shape than the call's")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"this is no program: {type(error).__name__}: {error}") from error
    return compiled_entry(Divided(captured, variants, chosen, records), call, options, recorders)


def _branch_text(branch: Any) -> Any:
    return list(branch) if isinstance(branch, tuple) else branch


def _branch_of(text: Any) -> Any:
    return tuple(text) if isinstance(text, list) else text


def _no_graph() -> fx.GraphModule:
    """In the place of the captured graph, which nothing runs: one skip connection."""
    graph = fx.Graph()
    deep, skip = graph.placeholder("deep"), graph.placeholder("skip")
    graph.call_function(torch.ops.aten.cat.default, ([deep, skip], 1))
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph)


def to_bytes(text: Mapping[str, Any]) -> bytes:
    return json.dumps(text, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
