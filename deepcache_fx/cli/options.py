"""The options that several commands take, each written once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from deepcache_fx.options import Forecast
from deepcache_fx.schedules import branch


class DtypeName(str, enum.Enum):
    """Floating-point types of the weights, by their torch names."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


# Of the commands that run a pipeline.

Pipeline: TypeAlias = Annotated[str, typer.Option(help="A pipeline: a directory, or a name on the Hugging Face Hub.")]
Branch: TypeAlias = Annotated[str, typer.Option(help="The skip connection: its number, or block,layer.")]
Scheduler: TypeAlias = Annotated[
    str | None, typer.Option(help="ddim, pndm, euler, dpm++, unipc, lcm, ...; the model's own if not given.")
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Prompt number i starts from the noise of seed + i.")]
Dtype: TypeAlias = Annotated[
    DtypeName | None, typer.Option(help="Default: float16 on CUDA, float32 elsewhere.", show_default=False)
]
Variant: TypeAlias = Annotated[str | None, typer.Option(help='Which weights to load, as in "fp16".')]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")]
Backend: TypeAlias = Annotated[
    str, typer.Option(help="auto, eager, inductor, openvino, or another torch.compile backend.")
]
Precision: TypeAlias = Annotated[
    str | None, typer.Option(help="Of OpenVINO's arithmetic: fp32, or bf16 for a model of float32.", show_default=False)
]
GuidanceScale: TypeAlias = Annotated[float | None, typer.Option(help="The pipeline's own if not given.")]
Pixels: TypeAlias = Annotated[int | None, typer.Option(min=1, help="In pixels.")]

# Of the commands that need no weights.

Model: TypeAlias = Annotated[
    str, typer.Option(help="A preset, the directory of a pipeline or UNet, or a name on the Hub.")
]
Batch: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Samples in one UNet call; guidance doubles them.")]
CacheDtype: TypeAlias = Annotated[DtypeName, typer.Option(help="Decides the size of the cache.")]

# Of either kind.

Json: TypeAlias = Annotated[Path | None, typer.Option(help="Also write every number to this file.")]


def read_forecast(text: str) -> Forecast:
    """The order of the forecast as it is named on the command line."""
    if text not in ("auto", "0", "1", "2"):
        raise typer.BadParameter(f"{text!r} is none of auto, 0, 1 and 2", param_hint="--forecast")
    return "auto" if text == "auto" else int(text)


def read_branch(text: str, option_name: str = "--branch") -> branch.Branch:
    """A skip connection as it is named on the command line."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 0:
        raise typer.BadParameter(
            f"{text!r} is neither a number of at least 0 nor block,layer as in 1,2", param_hint=option_name
        )
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
