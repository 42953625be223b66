"""The fidelity benchmark measures what it says: metrics of known value, tiny models through the real sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

import deepcache_fx
from benchmarks.fidelity.__main__ import main as fidelity_main
from benchmarks.fidelity.arms import all_arms, equal_macs_steps, nested, select
from benchmarks.fidelity.cases import Case, Outcome, Row, RowsFile, Scores, is_rows_file, read_rows
from benchmarks.fidelity.class_conditional import ClassConditionalPipeline, load
from benchmarks.fidelity.clock import CallTimer
from benchmarks.fidelity.judges import fashion_judge, hub_judge, load_inception
from benchmarks.fidelity.metrics import PairDistance, Pairs, SetDistance, coverage
from benchmarks.fidelity.models import Model, UNetCost, load_model
from benchmarks.fidelity.plots import pareto
from benchmarks.fidelity.report import grouped, newest, write_report
from benchmarks.fidelity.samplers import SAMPLERS
from benchmarks.fidelity.setting import Setting, uniform_calls
from benchmarks.fidelity.sweep import Sweep, Times, batches, total_seconds
from benchmarks.fidelity.targets import targets
from benchmarks.speed.report import is_results
from deepcache_fx.comparing.loading import LoadError
from tests import models, small
from tests.families import family, thorough

CASE = Case("tiny", "0", "ddim", 6, 4, 0, 0, "float32", "cpu", "uncached", 1)
FACTS = {"commit": "abc", "device_name": "a test", "date": "2026-01-01", "command": "pytest", "judge": "A judge"}


def case(arm: str, interval: int = 1, **changes: object) -> Case:
    return dataclasses.replace(CASE, arm=arm, interval=interval, **changes)  # type: ignore[arg-type]


def row(arm: str, interval: int, psnr: float | None, share: float, fid: float = 1.0, **changes: object) -> Row:
    calls = "F" * 6 if arm == "uncached" else uniform_calls(6, interval)
    scores = Scores(fid=fid, psnr=psnr, identical=0.0, agreement=0.9)
    outcome = Outcome(calls, share * 6e9, share, scores, seconds=share, time_share=share)
    return Row(case(arm, interval, **changes), "measured", outcome=outcome, environment=FACTS)


# Metrics of known value.


def test_the_fid_of_equal_sets_is_nothing_and_of_a_shifted_set_the_squared_shift() -> None:
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    for shift, expected in ((0.0, 0.0), (0.5, 8 * 0.25)):
        distance = SetDistance(features)
        for part in (features + shift).split(200):
            distance.add(part)
        assert distance.fid() == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_tell_fakes_from_missing_modes() -> None:
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(60, 4, generator=generator), torch.randn(60, 4, generator=generator) + 50
    both = torch.cat([near, far])[torch.randperm(120, generator=generator)]
    assert coverage(near, of=near) == 1.0
    assert coverage(near, of=far) == 0.0
    distance = SetDistance(both)
    distance.add(torch.cat([near, near[:60]]))  # covers one of two modes
    precision, recall = distance.precision_recall() or (0.0, 0.0)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.1)


def test_too_few_images_have_no_distribution() -> None:
    distance = SetDistance(torch.randn(10, 4))
    assert (distance.fid(), distance.precision_recall()) == (None, None)
    distance.add(torch.randn(3, 4))
    assert distance.fid() is not None
    assert distance.precision_recall() is None


def test_paired_scores_of_a_known_error_do_not_depend_on_the_batches() -> None:
    reference = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8
    images = reference + 0.1
    images[:3] = reference[:3]
    whole, parts = PairDistance(), PairDistance()
    whole.add(images, reference)
    for part in ((0, 1), (1, 6)):
        parts.add(images[slice(*part)], reference[slice(*part)])
    for found in (whole.result(), parts.result()):
        assert found.psnr == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
        assert found.psnr_median == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)  # between 0 and 0.01
        assert found.identical == 0.5
        assert found.lpips is None
    assert whole.result().ssim == pytest.approx(parts.result().ssim)


def test_one_image_that_comes_out_as_another_decides_the_psnr_but_not_its_median() -> None:
    reference = torch.full((5, 1, 32, 32), 0.4)
    images = reference + torch.tensor([0.01, 0.01, 0.01, 0.01, 0.6]).view(5, 1, 1, 1)
    pairs = PairDistance()
    pairs.add(images, reference)
    found = pairs.result()
    assert found.psnr == pytest.approx(-10 * math.log10((4 * 0.01**2 + 0.6**2) / 5), abs=1e-3)
    assert found.psnr_median == pytest.approx(40, abs=1e-3)


def test_calls_of_every_depth_count_as_what_they_take() -> None:
    times = Times()
    for _ in range(2):
        times.add("Fstt", [8.0, 1.0, 3.0, 3.0], 1)
    durations = {kind: times.quantiles(kind) for kind in "Fst"}
    assert total_seconds("FssFt", durations) == 2 * 8 + 2 * 1 + 3
    assert total_seconds("FssFtu", durations) is None


def test_a_nested_arm_refreshes_as_often_as_uniform_does() -> None:
    schedule = nested(3)
    kinds = [0 if schedule.is_full(n, 20) else schedule.branch_at(n, 20) for n in range(20)]
    assert [n for n, kind in enumerate(kinds) if kind is not None] == list(range(0, 20, 3))
    assert kinds.count(0) == 4


def test_identical_images_have_no_finite_psnr() -> None:
    pairs = PairDistance()
    pairs.add(torch.ones(2, 1, 32, 32), torch.ones(2, 1, 32, 32))
    assert pairs.result() == Pairs(None, None, ssim=pytest.approx(1.0), lpips=None, identical=1.0)
    with pytest.raises(ValueError, match="have no counterparts"):
        pairs.add(torch.ones(1, 1, 32, 32), torch.ones(2, 1, 32, 32))


def test_the_first_call_of_a_kind_is_not_timed() -> None:
    times = Times()
    times.add("Fss", [9.0, 7.0, 1.0], 2)
    times.add("Fss", [2.0, 1.0, 1.0], 2)
    full, shallow = times.quantiles("F"), times.quantiles("s")
    assert full is not None
    assert shallow is not None
    assert (full.median, full.count, shallow.median, shallow.count) == (1.0, 1, 0.5, 3)


@pytest.mark.parametrize(("images", "most", "sizes"), [(10, 4, [3, 4, 3]), (8, 4, [4, 4]), (3, 50, [3])])
def test_batches_are_even_and_leave_no_image_out(images: int, most: int, sizes: list[int]) -> None:
    parts = batches(images, most)
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == list(range(images))


# A tiny class-conditional model through the real sweep.


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
        norm_num_groups=4,
        add_attention=False,
    )
    path = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(unet, DDPMScheduler(clip_sample=True)).save_pretrained(path)
    return path


@pytest.fixture
def model(directory: Path) -> Model:
    pipe = load(directory, dtype=torch.float32, device=torch.device("cpu"))
    return Model("tiny", pipe, ClassConditionalPipeline.prompts)


@pytest.fixture(scope="module")
def cost(directory: Path) -> UNetCost:
    return Model("tiny", load(directory, dtype=torch.float32, device=torch.device("cpu")), ("a dress",)).cost(0)


@pytest.fixture
def sweep(model: Model, cost: UNetCost, tmp_path: Path) -> Sweep:
    judge = fashion_judge(model, real=torch.rand(40, 1, 28, 28))
    file = RowsFile(tmp_path / "results" / "fidelity-tiny.json")
    found = Sweep(model, judge, all_arms(), file, FACTS, batch=2, work=tmp_path / "work")
    found._costs[0] = cost  # counting it takes a capture
    return found


def test_every_arm_costs_what_its_calls_cost(sweep: Sweep, cost: UNetCost) -> None:
    names = ["repeat", "power", "fewer-steps", "zeroed"]
    cases = list(select(names, [3], CASE, sweep.arms))
    assert [(c.arm, c.interval) for c in cases[:2]] == [("uncached", 1), ("repeat", 3)]
    sweep.run(cases)
    found = {r.case.arm: r.outcome for r in sweep.file.rows.values()}
    for arm, outcome in found.items():
        assert outcome is not None, arm
        assert outcome.macs == pytest.approx(cost.of(outcome.calls))
        assert outcome.macs_share == pytest.approx(outcome.macs / (6 * cost.full))
        assert (outcome.time_share is None) == (arm == "zeroed")
    calls = {arm: outcome.calls for arm, outcome in found.items() if outcome is not None}
    assert calls["repeat"] == calls["zeroed"] == "FssFss"
    assert calls["uncached"] == "FFFFFF"
    assert calls["power"].count("F") == 2
    assert calls["fewer-steps"] == "F" * round(2 + 4 * cost.share)
    assert sweep.file.rows[CASE.key].scores.psnr is None


def test_on_a_trained_model_the_negative_control_is_much_worse(tmp_path: Path) -> None:
    model = load_model("t2i", device="cpu")
    judge = fashion_judge(model, real=torch.rand(40, 1, 28, 28))
    file = RowsFile(tmp_path / "rows.json")
    group = case("uncached", model="t2i", steps=8, images=2)
    cases = [group, *(dataclasses.replace(group, arm=arm, interval=2) for arm in ("repeat", "zeroed"))]
    sweep = Sweep(model, judge, all_arms(), file, FACTS, batch=2, work=tmp_path)
    sweep._costs[0] = UNetCost(7e8, 6e7, 0, 0)  # about right, and not at stake: counting takes a capture
    sweep.run(cases)
    plain, repeat, zeroed = (file.rows[c.key].scores for c in cases)
    assert plain.agreement == 1.0
    assert repeat.psnr is not None
    assert zeroed.psnr is not None
    assert repeat.psnr > zeroed.psnr + 6


def test_a_resumed_run_makes_no_image_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(select(["repeat"], [2], CASE, sweep.arms))
    sweep.run(cases)
    made: list[int] = []

    def count(self: Model, indexes: range, *, steps: int, seed: int) -> torch.Tensor:
        made.extend(indexes)
        return generate(self, indexes, steps=steps, seed=seed)

    generate = Model.generate
    monkeypatch.setattr(Model, "generate", count)
    again = dataclasses.replace(sweep, file=RowsFile(sweep.file.path))
    again.run(cases)
    assert made == []
    more = [*cases, case("fewer-steps", 3)]
    again.run(more)
    assert made == [0, 1, 2, 3], "the uncached images are on disk"
    for path in again.work.glob("tiny*/*"):
        path.unlink()
    made.clear()
    again.run([*more, case("fewer-steps", 4)])
    assert made == [0, 1, 2, 3] * 2, "the uncached images were gone"
    assert [r.case for r in read_rows(sweep.file.path)] == [*more, case("fewer-steps", 4)]


def test_caching_nothing_gives_the_same_images(sweep: Sweep) -> None:
    sweep.run([CASE, case("repeat", 1)])
    scores = sweep.file.rows[case("repeat", 1).key].scores
    assert scores.identical == 1.0 or (scores.psnr or 0.0) > 100.0, "to rounding: exact passes may reorder sums"


@pytest.mark.parametrize("sampler", family([name for name in SAMPLERS if name != "ddim"], "pndm"))
def test_every_other_sampler_samples(sampler: str, sweep: Sweep) -> None:
    chosen = [case(arm, n, sampler=sampler, images=2) for arm, n in (("uncached", 1), ("repeat", 2))]
    sweep.run(chosen)
    repeat = sweep.file.rows[chosen[1].key]
    assert repeat.status == "measured", repeat.reason
    assert repeat.outcome is not None
    calls = {"pndm": 7, "dpm++-sde": 11}.get(sampler, 6)  # PLMS begins with one more, the other makes two a step
    assert repeat.outcome.calls == uniform_calls(calls, 2)
    assert repeat.outcome.notes == ()


def test_arms_of_ours_say_what_they_forecast(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def optimized(target: Any, interval: int = 3, branch: int = 0, *, forecast: int) -> Any:
        seen.append((interval, forecast))
        return nullcontext()

    monkeypatch.setattr(deepcache_fx, "optimized", optimized)
    setting = Setting(sweep.model, case("any", 3), UNetCost(1.0, 0.1, 0, 0))
    for name in ("repeat", "forecast-1", "forecast-2"):
        sweep.arms[name].applied(setting)
    assert seen == [(3, 0), (3, 1), (3, 2)]


def test_a_calibrated_schedule_is_asked_for_the_cost_of_the_uniform_one(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def calibrate(pipe: Any, prompts: list[str], **arguments: Any) -> Any:
        asked.update(arguments, prompts=prompts)
        return SimpleNamespace(options={"schedule": deepcache_fx.Steps([0, 1]), "branch": 0, "forecast": 1})

    monkeypatch.setattr(deepcache_fx, "calibrate", calibrate)
    arm = all_arms()["calibrated"]
    with arm.applied(Setting(model, case("calibrated", 3), UNetCost(10.0, 1.0, 0, 0), tmp_path)):
        model.generate([0], steps=6, seed=0)
        assert deepcache_fx.report(model.pipe).last_run == "FFssss"
    assert (asked["budget"], asked["steps"], asked["seed"]) == (2, 6, 4)
    assert asked["out"].parent == tmp_path
    assert asked["prompts"][:2] == ["a t-shirt", "a trouser"]


@pytest.mark.parametrize("branch", family([0, 1, 3], 1))
def test_the_negative_control_hides_what_is_deeper_than_the_branch(branch: int, model: Model) -> None:
    unet = model.pipe.unet
    setting = Setting(model, case("zeroed", 2, branch=branch), model.cost(branch))
    inputs = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def run() -> list[torch.Tensor]:
        with torch.no_grad(), all_arms()["zeroed"].applied(setting):
            return [unet(inputs, t, class_labels=torch.tensor([0])).sample for t in (9, 5, 3)]

    before = run()
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.mul_(-3)
    after = run()
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_equal_macs_are_rounded_to_whole_steps(model: Model) -> None:
    setting = Setting(model, case("fewer-steps", 5, steps=50), UNetCost(100.0, 10.0, 0, 0))
    assert equal_macs_steps(setting) == 14
    assert equal_macs_steps(dataclasses.replace(setting, case=case("fewer-steps", 20, steps=2))) == 1


def test_other_weights_are_another_model(directory: Path, model: Model) -> None:
    other = load(directory, dtype=torch.float32, device=torch.device("cpu"))
    assert Model("tiny", other, model.prompts).fingerprint() == model.fingerprint()
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert Model("tiny", other, model.prompts).fingerprint() != model.fingerprint()


def test_a_prompt_that_names_no_class_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="no such class: a banana; there are: a t-shirt"):
        model.pipe(["a banana"])
    with pytest.raises(ValueError, match="output_type is pt or latent"):
        model.pipe("a dress", output_type="pil")


# Any other pipeline, on stand-ins.


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a CLIP model, real images and prompts: all tiny, all random."""
    path = tmp_path_factory.mktemp("stand-ins")
    small.pipeline().save_pretrained(path / "pipe")
    tokens = models.tokenizer()
    torch.manual_seed(0)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16)
    config = CLIPConfig(
        text_config=models.text_config(tokens).to_dict(), vision_config=dict(vision, patch_size=8), projection_dim=8
    )
    CLIPModel(config).save_pretrained(path / "clip")
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size)
    CLIPProcessor(image_processor=images, tokenizer=tokens).save_pretrained(path / "clip")
    (path / "real").mkdir()
    for index in range(6):
        Image.effect_noise((20, 16), 20.0 + index).save(path / "real" / f"{index}.png")
    (path / "prompts.txt").write_text("a cat\n\na dog\n")
    return path


class Thumbnail(torch.nn.Module):
    """Stands where Inception does: 12 features of bytes (count, 3, height, width)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def run_cli(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(fidelity_main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@thorough
def test_the_command_line_scores_any_pipeline(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fidelity.judges.load_inception", Thumbnail)
    path = tmp_path / "rows.json"
    command = [
        f"--model={stand_ins / 'pipe'}", f"--prompts={stand_ins / 'prompts.txt'}", f"--clip={stand_ins / 'clip'}",
        f"--reference={stand_ins / 'real'}", "--device=cpu", "--images=5", "--batch=3", "--steps=5", "--samplers=pndm",
        "--intervals=2", "--arms=uncached,repeat", f"--json={path}", f"--work={tmp_path / 'work'}",
    ]  # fmt: skip
    found = run_cli(*command)
    assert found.exit_code == 0, found.output
    rows = read_rows(path)
    assert [(r.case.model, r.case.arm, r.status) for r in rows] == [
        ("pipe", "uncached", "measured"),
        ("pipe", "repeat", "measured"),
    ]
    for item in rows:
        assert item.scores.fid is not None
        assert item.scores.clip_score is not None
        assert item.scores.agreement is None
    assert rows[1].scores.psnr is not None
    text = path.read_text()
    assert str(tmp_path) not in text
    assert str(stand_ins) not in text
    before = path.read_text()
    assert run_cli(*command).exit_code == 0
    assert path.read_text() == before


def test_what_cannot_be_had_is_named(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, prompts = stand_ins / "pipe", stand_ins / "prompts.txt"
    model = load_model(str(pipe), device="cpu", prompts=prompts)
    with pytest.raises(LoadError, match="suggests no prompts of its own: pass a file"):
        load_model(str(pipe), device="cpu")
    with pytest.raises(LoadError, match="there is no file of prompts"):
        load_model(str(pipe), device="cpu", prompts=tmp_path / "none.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=r"the CLIP model .* cannot be had"):
        hub_judge(model, clip=str(tmp_path / "no-clip"))
    with pytest.raises(LoadError, match="holds no PNG or JPEG"):
        hub_judge(model, str(stand_ins / "clip"), tmp_path, Thumbnail)
    judge = hub_judge(model, str(stand_ins / "clip"))
    assert "no FID: pass a directory" in judge.notes[0]
    assert judge.start() is not judge.start()
    found = run_cli("--model=no/such/model", "--device=cpu")
    assert found.exit_code == 2
    assert "there is no directory" in found.output


def test_inception_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(LoadError, match="pip install torch-fidelity"):
        load_inception()


# Rows, targets, report.


ROWS = (
    row("uncached", 1, None, 1.0, fid=2.0),
    row("repeat", 3, 30.0, 0.4),
    row("repeat", 5, 25.0, 0.28),
    row("forecast-1", 3, 41.0, 0.404, fid=2.01),
    row("forecast-1", 5, 32.0, 0.30, fid=2.2),
    row("fewer-steps", 3, 33.0, 0.4),
    row("fewer-steps", 5, 33.5, 0.3),
    row("zeroed", 3, 5.0, 0.4, fid=90.0),
    Row(case("calibrated", 3), "absent", "no such branch", environment=FACTS),
)


def write(path: Path, rows: tuple[Row, ...] = ROWS) -> RowsFile:
    file = RowsFile(path)
    for item in rows:
        file.put(item)
    return file


def test_rows_survive_the_way_through_their_file(tmp_path: Path) -> None:
    path = tmp_path / "fidelity-tiny.json"
    file = write(path)
    assert read_rows(path) == list(ROWS)
    assert is_rows_file(path)
    assert not is_results(path), "the speed report leaves it alone"
    assert file.done(ROWS[1].case)
    assert not file.done(ROWS[-1].case)


def test_targets_are_read_off_the_rows() -> None:
    assert {target.wanted: target.met for target in targets(ROWS)} == {
        "N=3: +8 dB over repeat": True,
        "N=5: +8 dB over repeat": False,
        "N=3: at most 3% slower than repeat": True,
        "N=5: at most 3% slower than repeat": False,
        "N=5 at least as close as repeat at N=3": True,
        "N=5: FID within 2% of uncached": False,
        "closer than fewer-steps at every N up to 10": False,
    }
    assert targets(ROWS[:3]) == []


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    assert pareto([(3, 1.0), (1, 5.0), (2, 6.0), (2, 2.0), (4, 1.0)]) == [(1, 5.0), (2, 2.0), (3, 1.0)]


def test_the_report_is_one_page_made_of_the_files_alone(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    more = [dataclasses.replace(r, case=dataclasses.replace(r.case, steps=20)) for r in ROWS[:-2]]
    write(results / "fidelity-tiny.json", (*more, *ROWS))
    (results / "other.json").write_text("[]")
    assert write_report(results, docs) == len(more) + len(ROWS)
    text = (docs / "fidelity.md").read_text()
    assert "| tiny | DDIM | 6 | 4 |  | 41.0 (+11.0, +8.0) | 32.0 (+7.0, -1.5) |  |" in text
    assert "| N=3: +8 dB over repeat | 2 of 2 |" in text
    assert "| N=5: +8 dB over repeat | 0 of 2 |" in text, "a target that is missed is told"
    assert "6 of 14 targets were met, 8 missed." in text
    assert "calibrated: 1 rows absent, no such branch" in text
    assert [path.name for path in (docs / "fidelity").iterdir()] == ["tiny.png"]
    assert "![tiny, DDIM 6 steps, 4 images, branch 0](fidelity/tiny.png)" in text, "the group with the most rows"
    write_report(results, docs)
    assert (docs / "fidelity.md").read_text() == text
    with pytest.raises(deepcache_fx.DeepCacheError, match="no rows in"):
        write_report(docs, docs)


def test_rows_of_older_weights_are_not_reported() -> None:
    old = [dataclasses.replace(r, case=dataclasses.replace(r.case, weights="old")) for r in ROWS[:2]]
    assert newest([*old, *ROWS]) == list(ROWS)
    assert [r.case.arm for r in next(iter(grouped(ROWS[::-1]).values()))][:2] == ["uncached", "repeat"]


def test_hooks_are_gone_after_an_arm(sweep: Sweep) -> None:
    sweep.run([CASE, case("zeroed", 2)])
    hooks: Callable[[torch.nn.Module], int] = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks)  # noqa: E731
    assert sum(map(hooks, sweep.model.pipe.unet.modules())) == 0


def test_a_call_timer_gives_the_times_since_it_was_last_asked() -> None:
    timer, layer = CallTimer(torch.device("cpu")), torch.nn.Linear(2, 2)
    with timer.attached(layer):
        layer(torch.ones(2))
        layer(torch.zeros(2))
        assert [seconds > 0 for seconds in timer.take()] == [True, True]
        layer(torch.ones(2))
    layer(torch.zeros(2))
    assert len(timer.take()) == 1
    assert torch.equal(timer.arguments[0][0], torch.ones(2))
