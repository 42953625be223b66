"""What a measurement depends on beside the code: device, driver, versions, commit, command line."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "diffusers", "DeepCache", "openvino", "pruna")


def environment(device: str) -> dict[str, Any]:
    """Facts for every row of results. No host names, no absolute paths."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command(),
        "device_name": device_name(device),
        "python": platform.python_version(),
    }
    installed = importlib.metadata.packages_distributions()
    facts |= {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    facts["torch"] = torch.__version__
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "device_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def device_name(device: str) -> str:
    """The product's name, as the driver or the kernel gives it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The short hash of what is checked out; "+" and a hash of the changes where the code was changed since."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    where = ("--", "deepcache_fx", "passes", "benchmarks/*.py")
    changes = _output("git", "status", "--porcelain", *where) + _output("git", "diff", "HEAD", *where)
    return found + ("+" + hashlib.sha1(changes.encode()).hexdigest()[:6] if changes else "")


def command() -> str:
    """How this process was started, with paths cut down to the last name."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    start = f"python -m {spec.name}" if spec is not None else f"python {Path(sys.argv[0]).name}"
    return " ".join([start, *(re.sub(r"(?<![^=])/\S*/", "", argument) for argument in sys.argv[1:])])


def _output(*arguments: str) -> str:
    """What a program prints; "" where it cannot be run."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
