"""What programs were made for: versions, device, model, settings, code, options and call, each as text to compare.

Equal text means that a capture in this process would give the same graph. What cannot be told between processes (an
object with no readable state) is refused: such programs are not written.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from deepcache_fx.artefacts.graph_text import Unreadable
from deepcache_fx.execution.compile import name_of, pick_backend
from deepcache_fx.graph.identity import Same
from deepcache_fx.guards.fingerprint import NOT_STATE
from deepcache_fx.guards.numerics import SWITCHES, read, settled
from deepcache_fx.guards.reached_code import Reached
from deepcache_fx.options import Options
from deepcache_fx.runtime.runtime import Wanted

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchao", "triton", "xformers", "openvino")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, range)
_NOT_OF_PROGRAMS = (
    *("schedule", "passes", "options", "max_captures", "on_failure", "ignore", "disable", "branch"),
    *("dynamic", "preset"),
)
"""Options that are told in another form, and those that change no program of one size."""
_MOST_VALUES = 2**16
_UNTOLD = ("__dict__", "__weakref__", "__doc__", "__slotnames__")
"""Attributes of classes that say nothing of what they do; the last is put there by `copy`."""


def made_for(wanted: Wanted) -> dict[str, str]:
    """By name, text that must be equal where the programs are to be used.

    Raises:
        Unreadable: something cannot be told between processes; says what.
    """
    structure = wanted.model_state.structure()
    if structure is None:
        raise Unreadable("its forward was seen to write into objects, which programs from a file would not")
    objects = wanted.model_state.objects()
    modules = {id(sub): name for name, sub in wanted.module.named_modules()}
    call, device = wanted.call, wanted.call.sample.device
    reached = Reached([], objects, NOT_STATE)
    code = [_class_text(kind) for kind in _classes([wanted.model_class, *map(type, objects)])]
    code += sorted(_code_digest(item) for item in reached.codes)
    code += sorted(
        f"{space.label}: {json.dumps({str(k): _loose(v) for k, v in space.items().items()}, sort_keys=True)}"
        for space in reached.namespaces
        if not space.label.startswith("the class ")
    )
    return {
        "package deepcache-fx": _own_digest(),
        **versions(),
        "device": device_text(device),
        "switches of PyTorch": repr(settled(map(read, SWITCHES))),
        "default dtype": str(torch.get_default_dtype()),
        "model class": _name(wanted.model_class),
        "model configuration": _config_text(wanted.module),
        "weights' names, shapes and dtypes": _weights_text(wanted.module),
        "model settings": _digest(repr(_strict([_told(part) for part in structure.parts], modules))),
        "code of the model": _digest("\n".join(code)),
        "options": json.dumps(program_options(wanted.options, device), sort_keys=True),
        "call": repr(_strict(call.key, modules)),
    }


def _told(part: object) -> object:
    """Without what diffusers notes in a configuration of how it came about: its path, and defaults in a set's order."""
    if isinstance(part, tuple) and len(part) == 2 and part[0] == "_internal_dict" and isinstance(part[1], tuple):
        return (part[0], tuple(item for item in part[1] if not _is_note(item)))
    return part


def _is_note(item: object) -> bool:
    return isinstance(item, tuple) and bool(item) and isinstance(item[0], str) and item[0].startswith("_")


def versions() -> dict[str, str]:
    """Of Python and of the packages that take part in a graph."""
    return {"python": platform.python_version(), **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[f"package {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            found[f"package {name}"] = "none"
    found["package torch"] = torch.__version__
    return found


def device_text(device: torch.device) -> str:
    """The kind of a device, and what it can do."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} {torch.cuda.get_device_name(device)} {major}.{minor} CUDA {torch.version.cuda}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def program_options(options: Options, device: torch.device) -> dict[str, Any]:
    """Those that programs depend on, as plain values.

    Raises:
        Unreadable: there are passes, or a backend, that cannot be named.
    """
    if options.passes:
        raise Unreadable(f"passes={list(options.passes)!r:.80}: what a pass does in another process cannot be told")
    if not isinstance(options.backend, str):
        raise Unreadable(f"backend {name_of(options.backend)} is a function, which cannot be named in a file")
    try:
        more = json.loads(json.dumps(dict(options.options or {}), sort_keys=True))
    except TypeError as error:
        raise Unreadable(f"options={options.options!r:.80} are no plain values") from error
    fields = {name: getattr(options, name) for name in options.__dataclass_fields__ if name not in _NOT_OF_PROGRAMS}
    return {
        **fields,
        "options": more,
        "branch": options.branch if isinstance(options.branch, int) else list(options.branch),
        "branches": sorted(map(repr, options.schedule.branches)),
        "disable": sorted(options.disable),
        "ignore": sorted(options.ignore),
        "runs by": name_of(pick_backend(options, device)),
    }


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """In what two differ, for a person."""
    found = []
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = theirs.get(key, "none"), ours.get(key, "none")
        if one != other:
            short = max(len(one), len(other)) <= 100 and not key.startswith(
                ("model conf", "model set", "weights", "code")
            )
            found.append(f"{key}: made for {one}, here {other}" if short else f"{key} is another")
    return found


def refusals(theirs: Mapping[str, str], module: torch.nn.Module) -> list[str]:
    """In what these programs differ from this process and this model, as far as that is known before a call."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    kind = next(base for base in type(module).__mro__ if "_deepcache_fx" not in vars(base))
    ours = {
        "package deepcache-fx": _own_digest(),
        **versions(),
        "device": device_text(device),
        "model class": _name(kind),
        "model configuration": _config_text(module),
        "weights' names, shapes and dtypes": _weights_text(module),
    }
    return differences({name: theirs.get(name, "none") for name in ours}, ours)


def _config_text(module: torch.nn.Module) -> str:
    config = getattr(module, "config", None)
    known = {k: v for k, v in config.items() if not str(k).startswith("_")} if isinstance(config, Mapping) else {}
    return _digest(json.dumps(known, sort_keys=True, default=repr))  # a file's lists are the same as tuples


def _weights_text(module: torch.nn.Module) -> str:
    weights = [
        (name, tuple(t.shape), str(t.dtype), t.device.type)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    return _digest(repr(weights))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _own_digest() -> str:
    """Of this library's code: a version says too little while it is worked on."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in ("deepcache_fx", "passes"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _classes(kinds: Iterable[type]) -> list[type]:
    found = {base: None for kind in kinds for base in kind.__mro__ if base is not object}
    return sorted((kind for kind in found if "_deepcache_fx" not in vars(kind)), key=_name)


def _class_text(kind: type) -> str:
    items = {name: _loose(value) for name, value in vars(kind).items() if name not in _UNTOLD}
    return f"{_name(kind)} {json.dumps(items, sort_keys=True)}"


def _code_digest(code: types.CodeType) -> str:
    constants = [
        _code_digest(item)
        if isinstance(item, types.CodeType)
        else repr(sorted(map(repr, item)))
        if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]
    return hashlib.sha256(
        repr((code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)).encode()
    ).hexdigest()


def _function(value: types.FunctionType, depth: int) -> str:
    held = []
    for cell in value.__closure__ or ():
        try:
            held.append(_loose(cell.cell_contents, depth - 1))
        except ValueError:  # noqa: PERF203
            held.append("empty")
    given = [_loose(item, depth - 1) for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())]
    return f"{value.__module__}.{value.__qualname__} {_code_digest(value.__code__)} {held} {given}"


def _loose(value: Any, depth: int = 4) -> str:
    """Text of a value; of an object that has no such, its class."""
    if isinstance(value, types.FunctionType):
        return _function(value, depth) if depth > 0 else _code_digest(value.__code__)
    if isinstance(value, (staticmethod, classmethod)):
        return _loose(value.__func__, depth)
    if isinstance(value, property):
        return str([_loose(item, depth) for item in (value.fget, value.fset, value.fdel)])
    if isinstance(value, (dict, list, tuple, set, frozenset)) and depth > 0 and len(value) <= 1000:
        items = value.items() if isinstance(value, dict) else value
        texts = [_loose(item, depth - 1) for item in items]
        return str(sorted(texts) if isinstance(value, (set, frozenset)) else texts)
    try:
        return repr(_strict(value, {}))
    except Unreadable:
        return _name(type(value))


def _strict(value: Any, modules: Mapping[int, str]) -> Any:
    """Plain values that are equal where, in another process, the same is meant.

    Raises:
        Unreadable: that cannot be told.
    """
    if value is None or value is Ellipsis:
        return repr(value)
    if isinstance(value, Same):
        return _strict(value.value, modules)
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if type(value) in _PLAIN or isinstance(value, (torch.dtype, torch.device)):
        return (type(value).__name__, repr(value))
    if isinstance(value, type):
        return ("class", _name(value))
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if isinstance(value, tuple):
        return tuple([_strict(item, modules) for item in value])
    if isinstance(value, list):
        return ["list", *[_strict(item, modules) for item in value]]
    if isinstance(value, dict):
        return ("dict", *[(_strict(key, modules), _strict(item, modules)) for key, item in value.items()])
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted(repr(_strict(item, modules)) for item in value))
    if isinstance(value, types.BuiltinFunctionType):
        return ("builtin", str(value.__module__), value.__qualname__)
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return ("function", _function(value, 4))
    if isinstance(value, torch.nn.Module) and id(value) in modules:
        return ("part", modules[id(value)])
    is_plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
    if is_plain and value.numel() <= _MOST_VALUES:
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return ("tensor", tuple(value.shape), str(value.dtype), hashlib.sha256(data).hexdigest())
    raise Unreadable(f"what a {_name(type(value))} stands for in another process cannot be told")
