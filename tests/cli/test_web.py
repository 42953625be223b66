"""The `web` command: what it needs, and what it refuses. The page itself is tested in a browser (`tests/web`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from deepcache_fx.cli import web
from tests.command import refused
from tests.families import thorough


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(["web"], "the web page needs Gradio: pip install 'deepcache-fx[web]'")


@pytest.fixture
def with_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_gradio")
def test_outside_a_checkout_a_model_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "EMBEDDED", web.EMBEDDED / "nowhere")
    refused(["web"], "name a pipeline with --model")


@pytest.mark.usefixtures("with_gradio")
def test_a_wrong_argument_is_one_line() -> None:
    refused(["web", "--model", "./nowhere"], "there is no directory './nowhere'")
    refused(["web", "--device", "moon"], "device 'moon' cannot be used here")
    refused(["web", "--port", "70000"], "'--port'")


@thorough
def test_other_commands_import_no_gradio() -> None:
    code = "import sys, deepcache_fx.cli.app; sys.exit('gradio' in sys.modules or 'uvicorn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
