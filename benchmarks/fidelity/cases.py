"""What is compared: cases, scores, rows, and the file that rows are kept in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Quantiles
from benchmarks.speed.store import from_dict
from deepcache_fx.files.writing import write_json


@dataclass(frozen=True)
class Case:
    """A set of images made in one way: image i has prompt i (in turn) and starts from seed + i."""

    model: str
    weights: str
    """A fingerprint: rows of one model before and after more training are different rows."""
    sampler: str
    steps: int
    """Of the uncached run. An arm may take fewer."""
    images: int
    seed: int
    branch: int
    dtype: str
    device: str
    arm: str
    interval: int
    """1:N caching; 1 for an arm that has no interval."""

    @property
    def group(self) -> Case:
        """The uncached case: equal for all cases whose images are compared with one another."""
        return dataclasses.replace(self, arm="uncached", interval=1)

    @property
    def key(self) -> str:
        """Equal for equal cases; what a resumed run goes by."""
        return "/".join(str(value) for value in dataclasses.astuple(self))


@dataclass(frozen=True)
class Scores:
    """How good the images are. None where it was not measured, or is infinite: see `identical`."""

    fid: float | None = None
    """Frechet distance to the reference images, in the judge's feature space."""
    precision: float | None = None
    recall: float | None = None
    """Kynkaanniemi et al. 2019, arXiv 1904.06991, in that feature space."""
    agreement: float | None = None
    """The share of images in which a classifier sees what was asked for."""
    clip_score: float | None = None
    psnr: float | None = None
    """To the uncached images of the same seeds, in dB, of all pixels of all images together."""
    psnr_median: float | None = None
    """Of each image by itself, the median: a few images that come out as others do not count for more than they are."""
    ssim: float | None = None
    lpips: float | None = None
    identical: float | None = None
    """The share of images that equal the uncached one to the last bit."""


@dataclass(frozen=True)
class Outcome:
    """What a case cost and what came of it."""

    calls: str
    """The UNet calls of one run, F full and s shallow."""
    macs: float
    """Multiply-accumulates of the UNet, for one image."""
    macs_share: float
    """Of those of the uncached run."""
    scores: Scores
    seconds: float | None = None
    """Of all UNet calls, for one image: the median call of each kind, times how many there were."""
    full_call: Quantiles | None = None
    shallow_call: Quantiles | None = None
    """Seconds of one call for one image, over all calls of all batches."""
    time_share: float | None = None
    """`seconds` over what this very run's full calls would take uncached: drift between runs cancels."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a results file."""

    case: Case
    status: str
    """measured | absent (does not apply) | failed."""
    reason: str = ""
    outcome: Outcome | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        return self.outcome.scores if self.outcome is not None else Scores()


class RowsFile:
    """A JSON file of rows, rewritten whole at every change: a broken run loses nothing, a new one goes on from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {row.case.key: row for row in read_rows(path)} if path.exists() else {}

    def done(self, case: Case) -> bool:
        """True where this case need not be tried again. What is absent may come with the library: that is tried."""
        row = self.rows.get(case.key)
        return row is not None and row.status == "measured"

    def forget(self, cases: Iterable[Case]) -> None:
        """Leave these cases out, here and in what is written next."""
        for case in cases:
            self.rows.pop(case.key, None)

    def put(self, row: Row) -> None:
        """Add a row in place of that of the same case."""
        self.rows[row.case.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, _to_plain(self.rows.values()))


def _to_plain(rows: Iterable[Row]) -> dict[str, Any]:
    """Environments apart, each once: there are a few, and hundreds of rows."""
    environments: list[dict[str, Any]] = []
    plain = []
    for row in rows:
        if row.environment not in environments:
            environments.append(row.environment)
        values = _without_none(dataclasses.asdict(row))
        plain.append({**values, "environment": environments.index(row.environment)})
    return {"kind": "fidelity", "environments": environments, "rows": plain}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def is_rows_file(path: Path) -> bool:
    """True for a file that a `RowsFile` wrote; other results may lie beside it."""
    data = json.loads(path.read_text())
    return isinstance(data, dict) and data.get("kind") == "fidelity"


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, in the order they were measured."""
    data = json.loads(path.read_text())
    environments = data["environments"]
    return [from_dict(Row, {**row, "environment": environments[row["environment"]]}) for row in data["rows"]]
