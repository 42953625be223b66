"""What `draw` promises: a picture of every level, skip and cell that agrees with the split that runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn.functional import conv2d, interpolate

import deepcache_fx
from deepcache_fx import BranchError, DeepCacheError, draw
from deepcache_fx.drawing.anatomy import Anatomy, Cell, Level, RateMacs, Rung
from deepcache_fx.drawing.dissect import dissect
from deepcache_fx.drawing.ladder import Unit, mebibytes, place, side
from deepcache_fx.drawing.paint import FILL, paint
from deepcache_fx.drawing.svg import fit, text_width
from deepcache_fx.graph.capture import capture
from deepcache_fx.graph.module_path import first_part
from deepcache_fx.graph.pass_order import apply_passes
from deepcache_fx.graph.signature import CallReader
from deepcache_fx.graph.skips import SkipConnection, find_skip_connections
from deepcache_fx.graph.split import RATES, Cost, Macs, Variants, split
from deepcache_fx.options import Options
from deepcache_fx.planning.example_inputs import example_inputs
from tests import small
from tests.compvis import CompVisUNet
from tests.families import family
from tests.models import sd_unet

RATE_NAMES = ("prompt", "refresh", "step")
COMPVIS_INPUTS = {"x": torch.zeros(2, 4, 8, 8), "timesteps": torch.zeros(2), "context": torch.zeros(2, 3, 6)}


class Bare(torch.nn.Module):
    """Weights and functions, no modules: two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
        self.lower = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
        self.deepest = torch.nn.Parameter(torch.randn(8, 8, 3, 3))
        self.upper = torch.nn.Parameter(torch.randn(4, 16, 3, 3))
        self.out = torch.nn.Parameter(torch.randn(3, 8, 3, 3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        first = conv2d(sample, self.into, padding=1) * timestep.cos()
        second = conv2d(first, self.lower, padding=1, stride=2)
        deepest = conv2d(conv2d(second, self.deepest, padding=1, stride=2), self.deepest, padding=1)
        deep = conv2d(torch.cat([interpolate(deepest, scale_factor=2.0), second], 1), self.upper, padding=1)
        return conv2d(torch.cat([interpolate(deep, scale_factor=2.0), first], 1), self.out, padding=1)


class Subject:
    """A UNet, its inputs, and what the library itself says of it."""

    def __init__(self, unet: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
        self.unet, self.inputs = unet, inputs
        reader = CallReader(type(unet).forward)
        self.call = reader.read_example(unet, inputs)
        self.captured, _ = apply_passes(capture(unet, self.call, reader), Options())
        self.skips = find_skip_connections(self.captured.graph.graph)

    @functools.cache  # noqa: B019 - a handful of them, for as long as the tests run
    def split(self, branch: int) -> Variants:
        prompt = self.call.prompt_inputs
        return split(self.captured, self.skips[branch], rates=RATES, prompt_inputs=prompt)

    @functools.cache  # noqa: B019
    def cut(self, branch: int) -> Svg:
        """What `draw` paints for a branch, without capturing anew."""
        facts = dissect(self.captured, self.skips, self.split(branch))
        return Svg(paint(facts, f"{type(self.unet).__name__}, cut at branch {branch}", "inputs"))

    def draw(self, path: Path, **options: Any) -> Svg:
        draw(self.unet, path, example_inputs=self.inputs, **options)
        return Svg(path.read_bytes())


class Svg:
    """A picture, read back."""

    def __init__(self, text: bytes) -> None:
        self.root = ElementTree.fromstring(text.decode("ascii"))

    def all(self, tag: str, class_: str = "") -> list[ElementTree.Element]:
        found = self.root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")
        return [e for e in found if not class_ or class_ in (e.get("class") or "").split()]

    def words(self) -> list[str]:
        return ["".join(e.itertext()).strip() for e in self.all("text")]

    def cell_macs(self) -> list[RateMacs]:
        return [RateMacs(*(number(cell, f"data-{rate}") for rate in RATE_NAMES)) for cell in self.all("g", "cell")]


def number(element: ElementTree.Element, name: str) -> int:
    value = element.get(name)
    assert value is not None
    return int(value)


def box(group: ElementTree.Element) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the first rectangle of a group."""
    rect = group.find("{http://www.w3.org/2000/svg}rect")
    assert rect is not None
    x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.fixture(scope="module")
def compvis() -> Subject:
    return Subject(CompVisUNet(), COMPVIS_INPUTS)


@pytest.fixture(scope="module")
def sd() -> Subject:
    unet = sd_unet(**small.LEVELS)
    return Subject(unet, example_inputs(unet))


@pytest.fixture(scope="module")
def ddpm() -> Subject:
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            attention_head_dim=None,
        ).eval()
    return Subject(unet, example_inputs(unet, batch=1))


@pytest.fixture(scope="module")
def bare() -> Subject:
    return Subject(Bare().eval(), {"sample": torch.zeros(1, 3, 16, 16), "timestep": torch.tensor(5)})


@pytest.fixture(params=family(["compvis", "sd", "ddpm", "bare"], "compvis", "bare"))
def subject(request: pytest.FixtureRequest) -> Subject:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Subject)
    return found


def test_every_skip_connection_is_an_arc_with_its_bytes(subject: Subject) -> None:
    arcs = subject.cut(0).all("g", "skip")
    found = {number(arc, "data-branch"): number(arc, "data-bytes") for arc in arcs}
    assert len(arcs) == len(subject.skips)
    assert found == {skip.index: _bytes_set_aside(skip) for skip in subject.skips}


def _bytes_set_aside(skip: SkipConnection) -> int:
    [other] = [operand for operand in skip.cat.all_input_nodes if operand is not skip.deep]
    return int(other.meta["val"].numel() * other.meta["val"].element_size())


def test_every_level_is_a_box_on_either_side_and_the_u_narrows_downwards(subject: Subject) -> None:
    picture = subject.cut(0)
    sizes = list(dict.fromkeys("x".join(map(str, skip.cat.meta["val"].shape[2:])) for skip in subject.skips))
    for way in ("down", "up"):
        levels = picture.all("g", way)
        assert [level.get("data-resolution") for level in levels] == sizes
        tops = [box(level)[1] for level in levels]
        assert tops == sorted(set(tops))
    left, right = map(box, picture.all("g", "down")), map(box, picture.all("g", "up"))
    gaps = [up[0] - down[2] for down, up in zip(left, right, strict=True)]
    assert gaps == sorted(set(gaps), reverse=True)
    assert gaps[-1] > 0
    [middle] = picture.all("g", "middle")
    assert box(middle)[1] > max(box(level)[3] for level in picture.all("g", "level") if level is not middle)


def test_the_macs_of_all_cells_are_those_of_the_plan(subject: Subject) -> None:
    picture = subject.cut(0)
    planned = deepcache_fx.plan(subject.unet, example_inputs=subject.inputs)
    total = sum((cell.total for cell in picture.cell_macs()), 0)
    assert total == planned.full.total
    shared = [e for group in picture.all("g", "shared") for e in group]
    boxes = sum(number(level, "data-macs") for level in picture.all("g", "level"))
    assert boxes + sum(number(cell, f"data-{rate}") for cell in shared for rate in RATE_NAMES) == total


def test_the_rates_of_all_cells_are_those_of_the_split_at_every_branch(subject: Subject) -> None:
    for skip in subject.skips:
        found = sum(subject.cut(skip.index).cell_macs(), RateMacs())
        variants = subject.split(skip.index)
        assert found.step == variants.cuts[0].shallow.macs.total
        assert found.prompt == variants.full.prompt_macs.total
        assert found.step + found.refresh == variants.full.macs.total


def test_above_the_cut_nothing_waits_and_below_it_nothing_runs_at_every_step(compvis: Subject) -> None:
    picture = compvis.cut(1)
    cut = _cut_y(picture)
    cells = [
        (box(cell)[1], cell) for level in picture.all("g", "level") for cell in level if cell.get("class") == "cell"
    ]
    above = [cell for y, cell in cells if y < cut]
    below = [cell for y, cell in cells if y > cut]
    assert (len(above), len(below)) == (4, 5)
    assert all(number(cell, "data-step") and not number(cell, "data-prompt") for cell in above)
    assert not any(number(cell, "data-step") for cell in below)
    # What depends on the deep feature alone has moved out of the cell that reads it, and out of no other.
    assert [bool(number(cell, "data-refresh")) for cell in above] == [False, False, False, True]


def test_colours_are_the_rates_of_a_cell_and_the_legend_names_them(sd: Subject) -> None:
    picture = sd.cut(0)
    [legend] = picture.all("g", "legend")
    assert {rect.get("class"): rect.get("fill") for rect in legend if rect.tag.endswith("rect")} == FILL
    seen = set()
    for cell, macs in zip(picture.all("g", "cell"), picture.cell_macs(), strict=True):
        painted = [rect for rect in cell if rect.tag.endswith("rect") and rect.get("class")]
        assert [rect.get("class") for rect in painted] == list(macs.parts)
        assert [rect.get("fill") for rect in painted] == [FILL[rate] for rate in macs.parts]
        frame = next(rect for rect in cell if rect.tag.endswith("rect") and not rect.get("class"))
        assert sum(float(r.attrib["width"]) for r in painted) == pytest.approx(float(frame.attrib["width"]), abs=0.2)
        seen |= set(macs.parts)
    assert seen == set(FILL)


def _cut_y(picture: Svg) -> float:
    [line] = [e for e in picture.all("path") if e.get("stroke-dasharray")]
    return float(line.attrib["d"].split("H")[0].split()[1])


def test_the_cut_lies_between_the_chosen_branch_and_the_next(subject: Subject) -> None:
    for skip in subject.skips:
        picture = subject.cut(skip.index)
        [cut] = picture.all("g", "cut")
        assert number(cut, "data-branch") == skip.index
        assert number(cut, "data-cache") == subject.split(skip.index).cuts[0].cost.cache_bytes
        # Cells of a level are listed from its shallowest skip connection downwards.
        rows = [box(cell) for level in picture.all("g", "down") for cell in level if cell.get("class") == "cell"]
        assert [y < _cut_y(picture) for _, y, _, _ in rows] == [i <= skip.index for i in range(len(subject.skips))]
        assert not any(top < _cut_y(picture) < bottom for _, top, _, bottom in rows)
        assert f"cut at branch {skip.index}" in picture.words()


def test_draw_writes_the_picture_of_the_branch_it_is_given(compvis: Subject, tmp_path: Path) -> None:
    for branch in (0, 3):
        written, painted = compvis.draw(tmp_path / "unet.svg", branch=branch), compvis.cut(branch)
        assert written.words()[0] == painted.words()[0]
        assert written.words()[2:] == painted.words()[2:]
        assert written.cell_macs() == painted.cell_macs()


def test_a_branch_may_be_given_as_published(compvis: Subject, tmp_path: Path) -> None:
    [cut] = compvis.draw(tmp_path / "unet.svg", branch=(1, 0)).all("g", "cut")
    assert number(cut, "data-branch") == next(s.index for s in compvis.skips if (s.block, s.layer) == (1, 0)) > 0


def test_an_optimised_unet_is_drawn_as_its_options_split_it_and_stays_so(tmp_path: Path) -> None:
    unet = CompVisUNet()
    deepcache_fx.optimize(unet, branch=2, disable=RATES, example_inputs=COMPVIS_INPUTS)
    before = deepcache_fx.report(unet)
    draw(unet, tmp_path / "own.svg", example_inputs=COMPVIS_INPUTS)
    draw(unet, tmp_path / "told.svg", example_inputs=COMPVIS_INPUTS, branch=0)
    own, told = (Svg((tmp_path / f"{name}.svg").read_bytes()) for name in ("own", "told"))
    assert [number(p.all("g", "cut")[0], "data-branch") for p in (own, told)] == [2, 0]
    assert sum(own.cell_macs(), RateMacs()).step == before.signatures[0].shallow_macs
    assert sum(own.cell_macs(), RateMacs()).prompt == 0
    assert deepcache_fx.report(unet) == before


def test_the_totals_are_those_of_the_split_and_of_the_published_way(compvis: Subject) -> None:
    picture = compvis.cut(0)
    full = sum(picture.cell_macs(), RateMacs()).total
    cost, plain = compvis.split(0).cuts[0].cost, compvis.split(0).cuts[0].plain
    bound = 3 * full / (full + 2 * cost.macs.total)
    words = picture.words()
    assert f"{full / 1e6:.1f} MMAC" in words
    assert f"shallow step, {cost.macs.total / full:.1%}" in words
    assert f"{cost.cache_bytes / 1024:.2f} KiB" in words
    assert f"{bound:.2f}x" in words
    planned = deepcache_fx.plan(compvis.unet, example_inputs=compvis.inputs).branches[0]
    assert plain == Cost(planned.shallow, planned.cache_bytes)
    assert f"bound {planned.speedup(3):.2f}x." in words[-1]


def test_names_come_from_modules_or_else_from_operators(sd: Subject, compvis: Subject, bare: Subject) -> None:
    words = sd.cut(0).words()
    assert {"conv_in", "resnets.0, attentions.0", "resnets.1, conv_out"} <= set(words)
    assert {"down_blocks.0 8x8", "down_blocks.1 4x4", "up_blocks.1 8x8", "mid_block 4x4"} <= set(words)
    assert any(word.startswith("time_embedding") for word in words)
    assert {"input_blocks.3", "output_blocks.3, out.2", "middle_block.0-2", "time_embed"} <= set(compvis.cut(0).words())
    words = bare.cut(0).words()
    assert words.count("1 conv2d") == 4
    assert "2 conv2d" in words


def test_the_title_says_model_inputs_and_dtype_of_a_model_without_weights(ddpm: Subject, tmp_path: Path) -> None:
    draw(ddpm.unet, tmp_path / "unet.svg", batch=3, height=32)
    words = Svg((tmp_path / "unet.svg").read_bytes()).words()
    assert words[0] == "UNet2DModel, cut at branch 0"
    assert words[1].replace("\xa0", " ") == "one call in float32: sample 3x3x32x16, timestep scalar"


def test_odd_class_names_are_text(tmp_path: Path) -> None:
    name = "<script>&\"']]><!--\u00dcnet"
    unet = CompVisUNet()
    unet.__class__ = type(name, (CompVisUNet,), {})
    draw(unet, tmp_path / "unet.svg", example_inputs=COMPVIS_INPUTS)
    picture = Svg((tmp_path / "unet.svg").read_bytes())
    assert picture.words()[0] == f"{name}, cut at branch 0"
    assert not picture.all("script")


def test_no_two_texts_touch_and_none_leaves_the_paper(subject: Subject) -> None:
    _check_texts(subject.cut(len(subject.skips) - 1))


def test_many_levels_and_long_names_leave_the_texts_apart() -> None:
    def cell(*modules: str) -> Cell:
        return Cell(RateMacs(1, 10**9, 2), modules, ())

    long = tuple(f"down_blocks.{i}.a_module_with_a_long_name_{i}" for i in range(9))
    levels = tuple(
        Level((512 >> i, 2048 >> i), (Rung(i, cell(*long), cell(*long), (2, 320, 64, 64), 10**9, 10**9),))
        for i in range(10)
    )
    cost = Cost(Macs(10**12), 10**10)
    facts = Anatomy(levels, cell(*long), (1, 4), cell("embed"), 4, cost, cost)
    _check_texts(Svg(paint(facts, "A" * 200, "sample\xa02x3x4, " * 40)))


def _check_texts(picture: Svg) -> None:
    places = []
    for element in picture.all("text"):
        size, text = float(element.attrib["font-size"]), "".join(element.itertext()).strip()
        # Narrower than the layout's own guess: what touches here touches in every font.
        width, x, y = text_width(text, size) * 0.92, float(element.attrib["x"]), float(element.attrib["y"])
        x -= {"middle": width / 2, "end": width}.get(element.get("text-anchor", ""), 0)
        places.append((x, y - 0.75 * size, x + width, y + 0.2 * size, text))
    paper = [float(picture.root.attrib[side]) for side in ("width", "height")]
    for index, (left, top, right, bottom, text) in enumerate(places):
        assert left >= 0, text
        assert right <= paper[0], text
        assert bottom <= paper[1], text
        for other in places[index + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (text, other[4])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("unet.png", "give a file name that ends in .svg, not 'unet.png'"),
        ("unet", "give a file name that ends in .svg, not 'unet'"),
        ("missing/unet.svg", "there is no directory"),
        ("directory.svg", "it is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "directory.svg").mkdir()
    never: Callable[..., Any] = pytest.fail
    unet = CompVisUNet()
    unet.forward = never  # type: ignore[method-assign]
    with pytest.raises(DeepCacheError, match=message):
        draw(unet, tmp_path / path, example_inputs=COMPVIS_INPUTS)
    assert [p.name for p in tmp_path.iterdir()] == ["directory.svg"]


def test_what_cannot_be_drawn_is_refused_and_leaves_the_file_there_was(compvis: Subject, tmp_path: Path) -> None:
    path = tmp_path / "unet.svg"
    path.write_text("before")
    with pytest.raises(BranchError, match=r"branch 9 is out of range: CompVisUNet has skip connections 0 .* to 3"):
        compvis.draw(path, branch=9)
    with pytest.raises(BranchError, match="-1"):
        compvis.draw(path, branch=-1)
    with pytest.raises(BranchError, match="Conv2d has no skip connection"):
        draw(torch.nn.Conv2d(3, 3, 1), path, example_inputs={"input": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(DeepCacheError, match=r"draw takes a UNet or a diffusers pipeline with a \.unet, got int"):
        draw(3, path)
    with pytest.raises(DeepCacheError, match="pass example_inputs="):
        draw(CompVisUNet(), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_are_as_short_as_they_can_be() -> None:
    assert [(Unit.of(m).name, Unit.of(m)(m)) for m in (803_300_000_000, 4_100_000, 950, 0)] == [
        ("GMAC", "803.3"),
        ("MMAC", "4.1"),
        ("MAC", "950.0"),
        ("MAC", "0"),
    ]
    assert Unit.of(10**12)(94_371_840) == "0.094"
    assert [mebibytes(count) for count in (5 * 2**20, 2**17, 2**17 - 1, 512)] == [
        "5.00 MiB",
        "0.12 MiB",
        "128.00 KiB",
        "0.50 KiB",
    ]
    assert [fit("abcdefghij", width, 10) for width in (60, 59)] == ["abcdefghij", "abcdef..."]


def test_a_box_is_titled_by_the_module_of_its_deepest_cell() -> None:
    def titled(*cells: tuple[str, ...]) -> tuple[str, list[str]]:
        found = side({index: Cell(RateMacs(), modules, ("conv2d", "conv2d")) for index, modules in enumerate(cells)})
        return found.title, list(found.labels.values())

    assert titled(("down.0.pool.0",), ("down.1.res.0", "down.1.attn.0")) == (
        "down.1",
        ["down.0.pool.0", "res.0, attn.0"],
    )
    assert titled(("in.1.0",), ("in.2.0", "in.2.1")) == ("", ["in.1", "in.2"])
    assert titled(("mid.0.a", "mid.0.b", "mid.1.q", "mid.1.k", "mid.2.a", "mid.2.b")) == ("", ["mid.0-2"])
    assert titled(()) == ("", ["2 conv2d"])
    assert first_part("down_blocks.0.resnets.1.conv1") == ("down_blocks.0", "resnets.1.conv1")
    assert first_part("conv_in") == ("conv_in", "")
    assert first_part("") == ("", "")


def test_a_cut_below_the_last_level_leaves_the_middle_below_it() -> None:
    cell = Cell(RateMacs(step=1), (), ())
    cost = Cost(Macs(1), 1)
    levels = tuple(Level((8 >> i, 8), (Rung(i, cell, cell, (1,), 1, 1),)) for i in range(2))
    layouts = [place(Anatomy(levels, cell, (2,), cell, branch, cost, cost), 100) for branch in (0, 1)]
    assert layouts[0].rows[0].left.bottom < layouts[0].cut_y < layouts[0].rows[1].left.y
    assert layouts[1].rows[1].left.bottom < layouts[1].cut_y < layouts[1].middle.y
    assert layouts[0].bottom == layouts[1].bottom
