"""The page in a real browser, over the embedded model: what visitors do, and what a server must refuse."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deepcache_fx.comparing import loading
from deepcache_fx.files.png_metadata import read_settings
from deepcache_fx.web.line import Line
from deepcache_fx.web.settings import FIELDS
from deepcache_fx.web.studio import Studio

pytestmark = pytest.mark.web
MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "fashion-t2i"
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60_000
"""Milliseconds: other work may run on this machine."""


@dataclass(frozen=True)
class Site:
    """A server in this process."""

    url: str
    line: Line


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'deepcache-fx[web]'")
    from deepcache_fx.web import server

    pipe = loading.load_pipeline(str(MODEL), dtype=torch.float32, device=torch.device("cpu"))
    line = Line()
    studio = Studio(pipe, name="fashion-t2i", backend="eager")
    app = server.application(studio, line, prompts=("a bag", "a coat"), guidance_scale=4.0, hosts=server.LOOPBACK)
    with server.listen("127.0.0.1", 0) as socket:
        served = server.make_server(app)
        thread = threading.Thread(target=served.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            while not served.started:
                time.sleep(0.05)
            yield Site(f"http://127.0.0.1:{socket.getsockname()[1]}", line)
        finally:
            line.close()
            served.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM}: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """A browser's page, and what it has asked for."""

    def __init__(self, browser: Any, site: Site) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(site.url)
        self.foresees("full")

    def fill(self, **values: object) -> None:
        for label, value in values.items():
            label = label.replace("_", " ")
            field = self.page.get_by_label(label, exact=True).or_(self.page.get_by_label(f"{label} The model knows"))
            field.fill(str(value))
            field.blur()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def says(self, text: str) -> None:
        self.page.locator("#status").get_by_text(text).wait_for()

    def foresees(self, text: str) -> None:
        self.page.locator("#strip").get_by_text(text).first.wait_for()

    def send(self, field: str, value: object) -> None:
        """Another value than the page's own with the next runs."""

        def change(route: Any) -> None:
            body = json.loads(route.request.post_data)
            if len(body["data"]) == len(FIELDS) + 1:  # with the visit: a run is asked for
                body["data"][FIELDS.index(field)] = value
            route.continue_(post_data=json.dumps(body))

        self.page.route("**/queue/join**", change)

    def picture(self) -> str:
        source: str = self.page.locator("#pictures img").first.get_attribute("src")
        return source


@pytest.fixture
def visitors(browser: Any, site: Site) -> Iterator[Any]:
    made: list[Visitor] = []

    def enter() -> Visitor:
        made.append(Visitor(browser, site))
        return made[-1]

    yield enter
    for visitor in made:
        visitor.context.close()
        assert not visitor.errors


@pytest.fixture
def visitor(visitors: Any) -> Visitor:
    found: Visitor = visitors()
    found.fill(Steps=6)
    found.foresees("6 steps: 2 full, 4 shallow")
    return found


def post(site: Site, path: str, body: bytes, **headers: str) -> int:
    request = urllib.request.Request(site.url + path, data=body, method="POST", headers=headers)
    return status(request)


def status(request: urllib.request.Request | str) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_picture_is_made_and_carries_its_settings(visitor: Visitor) -> None:
    visitor.fill(Prompt="a ${1} {{bag}} <b>", Seed=7)
    visitor.click("Generate")
    visitor.says("Done in")
    assert visitor.page.locator("#pictures img").get_attribute("alt") == "a ${1} {{bag}} <b>, made with caching"
    with visitor.page.expect_download() as download:
        visitor.page.get_by_text("Save PNG, with caching").click()
    found = read_settings(Path(download.value.path()))
    assert (found["prompt"], found["seed"], found["steps"]) == ("a ${1} {{bag}} <b>", 7, 6)
    assert found == read_settings(io.BytesIO(base64.b64decode(visitor.picture().split(",")[1])))


def test_a_comparison_shows_both_pictures_and_what_was_measured(visitor: Visitor) -> None:
    visitor.click("Compare")
    visitor.says("Done in")
    facts = visitor.page.locator("#facts").inner_text()
    assert all(
        name in facts for name in ("without caching", "with caching", "speed-up", "by arithmetic", "PSNR", "SSIM")
    )
    assert visitor.page.locator("#pictures img").count() == 2
    slider = visitor.page.get_by_role("slider")
    slider.focus()
    for _ in range(10):
        visitor.page.keyboard.press("ArrowLeft")
    assert visitor.page.locator("figure.cut").get_attribute("style") == "--cut: 40%;"
    assert visitor.page.locator("#chart rect").count() == visitor.page.locator("#chart path").count() == 6
    visitor.page.get_by_role("tab", name="Report").click()
    visitor.page.get_by_text("6 calls: 2 full, 4 shallow").wait_for()
    visitor.click("Generate")
    visitor.page.locator("#pictures img").nth(1).wait_for(state="detached")
    visitor.page.get_by_role("tab", name="History").click()
    visitor.page.locator("#history li").nth(1).wait_for()


def test_the_strip_follows_the_controls(visitor: Visitor) -> None:
    visitor.fill(Interval=2)
    visitor.foresees("6 steps: 3 full, 3 shallow")
    visitor.page.get_by_label("Schedule", exact=True).click()
    visitor.page.get_by_role("option", name="steps").click()
    visitor.fill(Full_steps="0, 5")
    visitor.foresees("6 steps: 2 full, 4 shallow")
    assert not visitor.page.get_by_label("Interval", exact=True).is_visible()
    visitor.fill(Full_steps="0, five")
    visitor.foresees("Full steps must be step numbers")


def test_a_run_is_stopped(visitor: Visitor, site: Site) -> None:
    visitor.fill(Steps=150)
    visitor.click("Compare")
    visitor.says("Without caching: step")
    visitor.click("Stop")
    visitor.says("Stopped.")
    visitor.fill(Steps=6)
    visitor.click("Generate")
    visitor.says("Done in")


def test_two_visitors_stand_in_one_line_and_get_their_own_pictures(visitors: Any) -> None:
    first, second = visitors(), visitors()
    first.fill(Steps=40, Prompt="a bag")
    second.fill(Steps=5, Prompt="a coat")
    first.click("Compare")
    first.says("step")
    second.click("Generate")
    second.says("1 visitor before you.")
    first.says("Done in")
    second.says("Done in")
    for visitor, prompt in ((first, "a bag"), (second, "a coat")):
        data = base64.b64decode(visitor.picture().split(",")[1])
        assert read_settings(io.BytesIO(data))["prompt"] == prompt


def test_who_leaves_stops_what_was_being_made_for_him(visitor: Visitor, site: Site) -> None:
    visitor.fill(Steps=150)
    visitor.click("Compare")
    visitor.says("Without caching: step")
    (ticket,) = site.line._tickets
    visitor.page.reload()
    visitor.foresees("50 steps")
    visitor.fill(Steps=5)
    visitor.click("Generate")
    visitor.says("Done in")
    assert ticket.is_stopped
    assert visitor.page.locator("#pictures img").count() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 10**6),
        ("size", "9999x9999"),
        ("scheduler", "os.system"),
        ("prompt", "a" * 5000),
        ("guidance_scale", None),
    ],
)
def test_the_server_refuses_what_the_page_would_never_send(
    visitor: Visitor, site: Site, field: str, value: object
) -> None:
    visitor.send(field, value)
    visitor.click("Generate")
    said = visitor.page.locator(".alert, .toast-body, .error").first
    said.wait_for()
    assert "Traceback" not in visitor.page.content()
    assert site.line.stop("anyone") is False
    assert visitor.page.locator("#pictures img").count() == 0


def test_a_path_for_a_text_is_a_text(visitor: Visitor) -> None:
    visitor.send("prompt", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}})
    visitor.click("Generate")
    visitor.page.locator(".alert, .toast-body, .error, #pictures img").first.wait_for()
    assert "root:" not in visitor.page.content()


def test_no_request_leaves_the_server(visitor: Visitor, site: Site) -> None:
    visitor.click("Generate")
    visitor.says("Done in")
    elsewhere = [url for url in visitor.asked if not url.startswith((site.url, "data:", "blob:"))]
    assert elsewhere == []


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/stream/a/1/2/playlist.m3u8",
        "/assets/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static//etc/passwd",
        "/gradio_api/component_server",
        "/monitoring",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_file_of_the_machine_is_served(site: Site, path: str) -> None:
    assert status(site.url + path) in (403, 404)


def test_nothing_is_taken_that_the_page_does_not_send(site: Site) -> None:
    assert post(site, "/gradio_api/upload", b"a file") == 404
    assert post(site, "/gradio_api/component_server", b"{}") == 404
    assert post(site, "/gradio_api/queue/join", b"x" * 100_000) == 413


def test_other_sites_cannot_use_the_server_through_a_browser(site: Site) -> None:
    assert post(site, "/gradio_api/queue/join", b"{}", Origin="http://example.com") == 403
    assert status(urllib.request.Request(site.url, headers={"Host": "example.com"})) == 403
