"""What the page shows of settings and outcomes, as HTML. Everything that a visitor wrote is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from deepcache_fx.comparing.comparison import describe_psnr, describe_ssim
from deepcache_fx.web.studio import Outcome, Preview, Run

KINDS = {"F": "full", "s": "shallow", "t": "deeper"}
CHART_HEIGHT = 80.0


def escape(text: object) -> str:
    """For HTML, and for Gradio's templates, which would compute what stands in braces."""
    return html.escape(str(text)).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def message(text: str, *, is_error: bool = False) -> str:
    """One line below the buttons, read aloud where it changes."""
    role = "alert" if is_error else "status"
    return f'<p class="status {role}" role="{role}">{escape(text)}</p>'


def progress(stage: str, done: int, total: int) -> str:
    """How far a run is."""
    return (
        f'<p class="status" role="status">{escape(stage)}: step {done} of {total} '
        f'<progress value="{done}" max="{max(total, 1)}" aria-label="{escape(stage)}"></progress></p>'
    )


def strip(preview: Preview) -> str:
    """One field a step, by what the step will be."""
    counts = {kind: preview.letters.count(letter) for letter, kind in KINDS.items()}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    fields = "".join(
        f'<i class="{KINDS.get(letter, "full")}" title="step {step}: {KINDS.get(letter, letter)}"></i>'
        for step, letter in enumerate(preview.letters)
    )
    label = f"{len(preview.letters)} steps: {said}"
    return (
        f'<div class="strip" role="img" aria-label="{label}">{fields}</div>'
        f'<p class="legend">{_key("full")}{_key("shallow")}{_key("deeper") if counts["deeper"] else ""}'
        f"<span>{label}; {preview.bound:.2f} times as fast, by arithmetic</span></p>"
    )


def pictures(outcome: Outcome) -> str:
    """The picture; where two were compared, one over the other with a slider between them."""
    prompt = escape(outcome.settings.prompt)
    cached = f'<img src="{_url(outcome.cached)}" alt="{prompt}, made with caching">'
    save = _save(outcome.cached, outcome, "with caching", "cached")
    if outcome.uncached is None:
        return f'<figure class="picture">{cached}</figure><p class="saves">{save}</p>'
    uncached = f'<img class="over" src="{_url(outcome.uncached)}" alt="{prompt}, made without caching">'
    return (
        f'<figure class="picture cut" style="--cut: 50%">{cached}{uncached}<b class="edge"></b>'
        '<input type="range" min="0" max="100" value="50" '
        'aria-label="How much of the picture without caching is shown, in percent, from the left" '
        "oninput=\"this.parentNode.style.setProperty('--cut', this.value + '%')\"></figure>"
        '<p class="sides"><span>&larr; without caching</span><span>with caching &rarr;</span></p>'
        f'<p class="saves">{save}{_save(outcome.uncached, outcome, "without caching", "uncached")}</p>'
    )


def facts(outcome: Outcome) -> str:
    """Times, speed-up and likeness."""
    pairs = [("with caching", f"{outcome.cached.seconds:.2f} s")]
    if outcome.uncached is not None:
        pairs = [("without caching", f"{outcome.uncached.seconds:.2f} s"), *pairs]
    if outcome.speedup is not None:
        pairs.append(("speed-up", f"{outcome.speedup:.2f}"))
    pairs.append(("by arithmetic", f"{outcome.bound:.2f}"))
    if outcome.psnr is not None and outcome.ssim is not None:
        pairs += [("PSNR", describe_psnr(outcome.psnr)), ("SSIM", describe_ssim(outcome.ssim))]
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in outcome.remarks)
    return f'<dl class="facts">{cells}</dl>' + (f'<ul class="remarks">{remarks}</ul>' if remarks else "")


def chart(outcome: Outcome) -> str:
    """The time of each step as bars; without caching as a mark above each, where there was such a run."""
    seconds = outcome.cached.step_seconds
    before = () if outcome.uncached is None else outcome.uncached.step_seconds
    longest = max((*seconds, *before), default=0.0)
    if not longest:
        return ""
    width = 600 / len(seconds)
    drawn = []
    for step, time in enumerate(seconds):
        letter = outcome.letters[step] if step < len(outcome.letters) else "F"
        height = CHART_HEIGHT * time / longest
        drawn.append(
            f'<rect class="{KINDS.get(letter, "full")}" x="{step * width + width * 0.1:.1f}" '
            f'y="{CHART_HEIGHT - height:.1f}" width="{width * 0.8:.1f}" height="{height:.1f}">'
            f"<title>step {step}, {KINDS.get(letter, letter)}: {1000 * time:.1f} ms</title></rect>"
        )
    for step, time in enumerate(before):
        level = CHART_HEIGHT * (1 - time / longest)
        drawn.append(f'<path class="before" d="M{step * width:.1f} {level:.1f} h{width:.1f}"/>')
    said = f"Time of each step: at most {1000 * longest:.1f} ms, with caching {1000 * sum(seconds):.0f} ms in all"
    said += f", without {1000 * sum(before):.0f} ms (lines)" if before else ""
    return (
        f'<svg class="chart" viewBox="0 -2 600 {CHART_HEIGHT + 3:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}">{"".join(drawn)}</svg><p class="legend"><span>{said}</span></p>'
    )


def history(outcomes: Sequence[Outcome]) -> str:
    """What the visitor has made, the newest first."""
    rows = []
    for outcome in reversed(outcomes):
        chosen = outcome.settings
        described = f"{chosen.steps} steps of {chosen.scheduler}, {chosen.schedule}, seed {chosen.seed}"
        took = f"{outcome.cached.seconds:.2f} s"
        if outcome.uncached is not None and outcome.speedup is not None:
            took += f" instead of {outcome.uncached.seconds:.2f} s ({outcome.speedup:.2f} times as fast)"
        rows.append(
            f'<li><img src="{_url(outcome.cached)}" alt="{escape(chosen.prompt)}"><div>'
            f"<strong>{escape(chosen.prompt)}</strong><br>{escape(described)}<br>{took}<br>"
            f"{_save(outcome.cached, outcome, 'with its settings', 'cached')}</div></li>"
        )
    return f'<ol class="history">{"".join(rows)}</ol>'


def report(outcome: Outcome) -> str:
    """What the library says of the run."""
    return f'<pre class="report" tabindex="0" aria-label="Report of the run">{escape(outcome.report)}</pre>'


def _key(kind: str) -> str:
    return f'<span><i class="{kind}"></i>{kind}</span>'


def _url(run: Run) -> str:
    return "data:image/png;base64," + base64.b64encode(run.png).decode("ascii")


def _save(run: Run, outcome: Outcome, label: str, kind: str) -> str:
    name = f"deepcache-fx-{outcome.settings.seed}-{kind}.png"
    return f'<a href="{_url(run)}" download="{name}">Save PNG, {label}</a>'
