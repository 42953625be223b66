"""The options of `optimize`, validated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deepcache_fx.errors import OptionError
from deepcache_fx.schedules.branch import Branch, check_branch
from deepcache_fx.schedules.patterns import Uniform, as_schedule
from deepcache_fx.schedules.schedule import Schedule

Forecast = int | Literal["auto"]
"""What `optimize(forecast=)` takes: 0, 1, 2 or "auto"."""

AUTO_ORDER = 1
"""The highest order of `forecast="auto"`; its programs keep as many refreshes as that needs."""

PRECISIONS = (None, "fp32", "bf16")
"""What `optimize(precision=)` takes."""


@dataclass(frozen=True)
class Options:
    """What `optimize` was asked for. `schedule` holds the interval too: `interval=3` is `Uniform(3)`."""

    schedule: Schedule = field(default_factory=lambda: Uniform(3))
    branch: Branch = 0
    passes: tuple[Callable[..., Any], ...] = ()
    disable: tuple[str, ...] = ()
    backend: str | Callable[..., Any] = "auto"
    precision: str | None = None
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    cuda_graphs: bool | Literal["auto"] = "auto"
    forecast: Forecast = "auto"
    max_captures: int = 8
    on_failure: Literal["raise", "uncached"] = "raise"
    ignore: tuple[str, ...] = ()
    dynamic: bool | Literal["auto"] = False
    preset: str | None = None
    """What was chosen by `optimize(preset=)`, in words."""

    def __post_init__(self) -> None:
        """Validate, for `make`.

        Raises:
            OptionError: (always also a ValueError) naming the value, the range and the remedy.
        """
        if self.mode is not None and self.options is not None:
            raise OptionError("torch.compile takes mode or options, not both: leave one out")
        if (self.options or {}).get("triton.cudagraphs"):
            raise OptionError(
                "options['triton.cudagraphs'] would have cached features overwritten: leave it out, cuda_graphs=True "
                "records the programs as CUDA graphs"
            )
        if not (isinstance(self.backend, str) or callable(self.backend)):
            raise OptionError(f"backend must be a name or a torch.compile backend function, got {self.backend!r}")
        if self.precision not in PRECISIONS:
            raise OptionError(f'precision must be "fp32", "bf16" or None, got {self.precision!r}')
        if self.precision == "bf16" and self.backend not in ("auto", "openvino"):
            raise OptionError(
                f"precision='bf16' is for backend='openvino', not for {self.backend!r}: PyTorch computes in the types "
                "that the model has, so cast it with .to(torch.bfloat16)"
            )
        if self.mode is not None and self.backend == "openvino":
            raise OptionError(f"mode is torch.compile's, and backend='openvino' has none: leave {self.mode!r} out")
        if not isinstance(self.cuda_graphs, bool) and self.cuda_graphs != "auto":
            raise OptionError(f'cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if not isinstance(self.dynamic, bool) and self.dynamic != "auto":
            raise OptionError(f'dynamic must be "auto", True or False, got {self.dynamic!r}')
        if isinstance(self.forecast, bool) or self.forecast not in ("auto", 0, 1, 2):
            raise OptionError(f'forecast must be "auto", 0 (repeat the cached feature), 1 or 2, got {self.forecast!r}')
        if isinstance(self.max_captures, bool) or not isinstance(self.max_captures, int) or self.max_captures < 1:
            raise OptionError(f"max_captures must be an integer of at least 1, got {self.max_captures!r}")
        if self.on_failure not in ("raise", "uncached"):
            raise OptionError(f'on_failure must be "raise" or "uncached", got {self.on_failure!r}')
        for item in self.passes:
            if not callable(item):
                raise OptionError(f"passes takes PassBase objects or functions of a GraphModule, got {item!r}")

    @property
    def order(self) -> int:
        """Of the forecast that programs are made for; a run may use a lower one."""
        return AUTO_ORDER if self.forecast == "auto" else self.forecast

    def uses(self, name: str) -> bool:
        """False where `disable` leaves out the default pass, or the rate, of this name."""
        return "all" not in self.disable and name not in self.disable

    def same_programs(self, other: Options) -> bool:
        """True where the other options need the same captured and compiled programs: only the steps differ."""
        return replace(self, schedule=other.schedule, preset=other.preset) == other and (
            set(self.schedule.branches) == set(other.schedule.branches)
        )

    @staticmethod
    def make(
        *,
        interval: int = 3,
        branch: Branch | Sequence[int] = 0,
        schedule: object = None,
        passes: Sequence[Callable[..., Any]] = (),
        disable: Sequence[str] | str = (),
        ignore: Sequence[str] | str = (),
        **others: Any,
    ) -> Options:
        """Of the keyword arguments of `optimize`: those named here may have several forms, and are brought into one.

        Raises:
            DeepCacheError: (always also a ValueError) naming the value, the range and the remedy.
        """
        return Options(
            schedule=Uniform(interval) if schedule is None else as_schedule(schedule),
            branch=check_branch(branch),
            passes=tuple(passes),
            disable=(disable,) if isinstance(disable, str) else tuple(disable),
            ignore=_check_ignore(ignore),
            **others,
        )


def _check_ignore(ignore: object) -> tuple[str, ...]:
    paths = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(paths, (list, tuple, set, frozenset)):
        raise OptionError(f"ignore must be names of arguments, or dotted paths into them, got {ignore!r}")
    for path in paths:
        if not isinstance(path, str) or not all(path.split(".")):
            raise OptionError(f"ignore takes names of arguments, or dotted paths such as 'options.uuids', got {path!r}")
    return tuple(sorted(set(paths)))
