"""What `deepcache-fx suggest` does: values to begin with for a model, where they come from, and what they can save."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deepcache_fx.cards.family import family_of
from deepcache_fx.cards.table import CARDS
from deepcache_fx.cli import loading
from deepcache_fx.cli import options as option
from deepcache_fx.cli.model import named_model, read_facts
from deepcache_fx.files import writing as files
from deepcache_fx.planning.plan import plan


def suggest_command(model: option.Model, json: option.Json = None) -> None:
    """Interval, branch and forecast to begin with, where each comes from, and its bound. Needs no weights."""
    if json is not None:
        files.check_writable(json)
    with loading.quiet():
        family = family_of(read_facts(model))
    card = CARDS[family.name]
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    found: dict[str, Any] = {"model": model, "family": family.name, "reason": family.reason}
    found |= {"few_steps": family.few_steps, "presets": {}}
    say(f"{model}: {card.title} ({family.reason})")
    if family.few_steps is not None:
        say(f"Distilled for few steps: {family.few_steps}. Its steps differ too much for a cache: do not use it.")
    else:
        intervals = sorted({choice.interval for choice in card.choices.values()})
        with named_model(model, height=None, width=None, batch=None, dtype="float16") as named:
            branches = plan(named.unet, example_inputs=named.inputs, intervals=intervals).branches
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("preset", "interval", "branch", "forecast", "bound"):
            table.add_column(head)
        for name, choice in card.choices.items():
            bound = branches[choice.branch].speedup(choice.interval)
            table.add_row(name, str(choice.interval), str(choice.branch), choice.forecast, f"{bound:.2f}")
            found["presets"][name] = {
                "interval": choice.interval,
                "branch": choice.branch,
                "forecast": choice.forecast,
                "speedup_bound": bound,
                "source": choice.source,
            }
        console.print(table)
        for name, choice in card.choices.items():
            say(f"{name}: {choice.source}")
        say(card.note)
        say("bound: the most that the UNet is sped up, were time proportional to MACs (deepcache-fx plan)")
        say('in Python: deepcache_fx.optimize(pipe, preset="balanced"); arguments that you give come first')
    if json is not None:
        files.write_json(json, found)
