"""The profiles that `benchmarks.profile --json benchmarks/results/profile-NAME.json` kept, as part of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_profiles(results: Path) -> list[dict[str, Any]]:
    """All of them, by file name."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("profile-*.json"))]


def profiles_section(profiles: Sequence[dict[str, Any]]) -> str:
    """Markdown: for every profile, where the time of its step goes, by category of kernel or operator."""
    return "\n\n".join(part for profile in profiles for part in _one(profile))


def _one(profile: dict[str, Any]) -> list[str]:
    case, calls, environment = profile["case"], profile["calls"], profile["environment"]
    total = sum(entry["seconds"] for entry in profile["categories"].values())
    rows = [
        f"| {name} | {entry['count']} | {entry['seconds'] * 1e3:.3g} | {entry['seconds'] / total:.1%} |"
        for name, entry in profile["categories"].items()
    ]
    return [
        f"### {profile['step'].capitalize()} step of {case['model']} {case['height']}x{case['width']}, batch "
        f"{case['batch']}, {case['dtype']}, {case['arm']} on {environment['device_name']}",
        f"{profile['unprofiled_ms']:.4g} ms; under the profiler {calls['span'] * 1e3:.4g} ms, of which gaps "
        f"{profile['gaps'] * 1e3:.3g} ms; {calls['count']} kernels (on a CPU: operators), {calls['launches']} launches",
        "\n".join(["| where | calls | ms | share |", "| --- | --- | --- | --- |", *rows]),
        f"torch {environment['torch']}, commit {environment['commit']}, {environment['date']}; "
        f"`{environment['command']}`",
    ]
