"""The page: its controls, and what they do. Gradio is imported here and in `server` alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from deepcache_fx.errors import DeepCacheError
from deepcache_fx.web import views
from deepcache_fx.web.line import Line
from deepcache_fx.web.settings import (
    FIELDS,
    FORECASTS,
    LARGEST_GUIDANCE,
    LARGEST_POWER,
    LARGEST_SEED,
    LONGEST_TEXT,
    MOST_STEPS,
    SCHEDULES,
    Settings,
)
from deepcache_fx.web.studio import Outcome, Studio

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
KEPT = 8
"""Pictures of a visit that its history shows."""
POLL_SECONDS = 0.1
NOTHING = '<p class="legend">Nothing was made yet.</p>'
EMPTY = '<div class="empty">The picture comes here.</div>'
READ_BY = {
    "interval": ("uniform", "power", "nested"),
    "power": ("power",),
    "center": ("power",),
    "deeper": ("nested",),
    "deeper_interval": ("nested",),
    "full_steps": ("steps",),
}
"""Controls that some schedules alone read."""


def build_page(studio: Studio, line: Line, *, prompts: tuple[str, ...], guidance_scale: float) -> gr.Blocks:
    """The page over a pipeline and its line of visitors.

    Args:
        studio: Makes the pictures.
        line: Whose thread they are made by.
        prompts: Some that suit the model; the first is what the page begins with.
        guidance_scale: What the page begins with.
    """
    with gr.Blocks(title="deepcache_fx", analytics_enabled=False, fill_width=True) as page:
        about = f"<h1>deepcache_fx</h1><p>{views.escape(studio.name)}, with DeepCache as two static graphs</p>"
        gr.HTML(about, elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                controls = _controls(studio, prompts, guidance_scale)
                strip = gr.HTML(elem_id="strip")
                with gr.Row():
                    make = gr.Button("Generate", variant="primary", min_width=90)
                    both = gr.Button("Compare", min_width=90)
                    halt = gr.Button("Stop", variant="stop", interactive=False, min_width=90)
                status = gr.HTML(views.message("Ready."), elem_id="status")
            with gr.Column(scale=4, min_width=320):
                pictures = gr.HTML(EMPTY, elem_id="pictures")
                facts = gr.HTML(elem_id="facts")
                with gr.Tabs():
                    with gr.Tab("Step times"):
                        chart = gr.HTML(NOTHING, elem_id="chart")
                    with gr.Tab("Report"):
                        report = gr.HTML(NOTHING, elem_id="report")
                    with gr.Tab("History"):
                        history = gr.HTML(NOTHING, elem_id="history")
        visit = gr.State([])
        inputs = [controls[name] for name in FIELDS]
        shown = [status, halt, pictures, facts, chart, report, history, visit]

        async def generate(request: gr.Request, *sent: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for update in _serve(studio, line, str(request.session_hash), False, sent):
                yield update

        async def compare(request: gr.Request, *sent: Any) -> AsyncIterator[tuple[Any, ...]]:
            async for update in _serve(studio, line, str(request.session_hash), True, sent):
                yield update

        def leave(request: gr.Request) -> None:
            line.stop(str(request.session_hash))

        def preview(*sent: Any) -> str:
            try:
                settings = Settings.read({**dict(zip(FIELDS, sent, strict=True)), "prompt": "any"}, studio.choices)
                return views.strip(studio.preview(settings))
            except DeepCacheError as error:
                return views.message(str(error), is_error=True)

        def choose(schedule: str) -> list[Any]:
            return [gr.update(visible=schedule in readers) for readers in READ_BY.values()]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for trigger, function in ((make.click, generate), (both.click, compare), (controls["prompt"].submit, generate)):
            trigger(function, [*inputs, visit], shown, concurrency_limit=None, **private)
        halt.click(leave, None, None, queue=False, **private)
        controls["schedule"].change(
            choose, controls["schedule"], [controls[name] for name in READ_BY], queue=False, **private
        )
        changes = [control.change for name, control in controls.items() if "prompt" not in name and name != "seed"]
        gr.on([*changes, page.load], preview, inputs, strip, queue=False, trigger_mode="always_last", **private)
        page.unload(leave)
    page.queue(max_size=100, api_open=False)
    return page


async def _serve(
    studio: Studio, line: Line, visitor: str, compare: bool, sent: tuple[Any, ...]
) -> AsyncIterator[tuple[Any, ...]]:
    """(status, stop button, pictures, facts, chart, report, history, visit) whenever there is news of a run."""
    *values, visit = sent
    unchanged = (gr.skip(),) * 6

    def done(text: str, *, is_error: bool = False) -> tuple[Any, ...]:
        return (views.message(text, is_error=is_error), gr.update(interactive=False), *unchanged)

    try:
        settings = Settings.read(dict(zip(FIELDS, values, strict=True)), studio.choices)
        studio.preview(settings)
        ticket = line.submit(visitor, lambda ticket: studio.make(settings, compare=compare, watch=ticket.report))
    except DeepCacheError as error:
        yield (views.message(str(error), is_error=True), gr.skip(), *unchanged)
        return
    try:
        told: object = None
        while not ticket.is_over:
            ahead = line.position(ticket)
            stage, step, total = ticket.progress
            if (news := (ahead, stage, step)) != told:
                told = news
                text = views.progress(stage, step, total) if stage else views.message("Starting.")
                waits = views.message(f"{ahead} visitor{'s' * (ahead > 1)} before you.")
                yield (waits if ahead else text, gr.update(interactive=True), *unchanged)
            await asyncio.sleep(POLL_SECONDS)
    finally:
        if not ticket.is_over:
            line.stop(visitor)
    outcome = ticket.result
    if outcome is None:
        yield done("Stopped.") if ticket.is_stopped else done(ticket.error or "It failed.", is_error=True)
        return
    yield (views.message(_summary(outcome)), gr.update(interactive=False), *_views(outcome, visit))


def _summary(outcome: Outcome) -> str:
    first = outcome.preparation_seconds
    prepared = f"; prepared in {first:.1f} s, once for these settings" if first > 1 else ""
    return f"Done in {outcome.cached.seconds:.2f} s{prepared}."


def _views(outcome: Outcome, visit: list[Outcome]) -> tuple[Any, ...]:
    made = [*visit, outcome][-KEPT:]
    seen = (views.pictures(outcome), views.facts(outcome), views.chart(outcome), views.report(outcome))
    return (*seen, views.history(made), made)


def _controls(studio: Studio, prompts: tuple[str, ...], guidance_scale: float) -> dict[str, Any]:
    """Every control, by the name of its setting. Bounds are those of `settings`, which checks them on the server."""
    choices, last_branch = studio.choices, len(studio.branches) - 1
    found: dict[str, Any] = {}
    known = f"The model knows: {', '.join(prompts[:10])}." if len(prompts) > 1 else None
    found["prompt"] = gr.Textbox(
        prompts[0], label="Prompt", info=known, lines=1, max_lines=3, max_length=LONGEST_TEXT, autofocus=True
    )
    found["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=2, max_length=LONGEST_TEXT)
    narrow: dict[str, Any] = {"min_width": 110}

    def whole(name: str, label: str, value: int, low: int, high: int, **more: Any) -> None:
        found[name] = gr.Number(value, label=label, precision=0, minimum=low, maximum=high, **narrow, **more)

    with gr.Row():
        whole("steps", "Steps", 50, 1, MOST_STEPS)
        whole("seed", "Seed", 0, 0, LARGEST_SEED)
        found["guidance_scale"] = gr.Number(
            guidance_scale, label="Guidance", minimum=0, maximum=LARGEST_GUIDANCE, step=0.5, **narrow
        )
    with gr.Row():
        sizes = [f"{width}x{height}" for width, height in choices.sizes]
        found["scheduler"] = gr.Dropdown(
            list(choices.schedulers), value=studio.own_scheduler, label="Scheduler", **narrow
        )
        found["size"] = gr.Dropdown(sizes, value=sizes[0], label="Size", **narrow)
        found["forecast"] = gr.Dropdown(list(FORECASTS), value="auto", label="Forecast", **narrow)
    with gr.Row():
        found["schedule"] = gr.Dropdown(list(SCHEDULES), value="uniform", label="Schedule", **narrow)
        whole("interval", "Interval", 3, 1, MOST_STEPS)
        whole("branch", "Branch", 0, 0, last_branch)
    with gr.Row():
        found["power"] = gr.Number(
            1.4, label="Power", minimum=1.05, maximum=LARGEST_POWER, step=0.1, visible=False, **narrow
        )
        whole("center", "Center", 15, 0, MOST_STEPS, visible=False)
        whole("deeper", "Deeper branch", min(1, last_branch), 0, last_branch, visible=False)
        whole("deeper_interval", "Deeper interval", 2, 1, MOST_STEPS, visible=False)
        found["full_steps"] = gr.Textbox(
            "0, 5, 10, 20, 30, 40", label="Full steps", max_length=LONGEST_TEXT, visible=False, **narrow
        )
    return found
