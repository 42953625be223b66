"""A ComfyUI server of one's own: headless, on the CPU, with the node, the tests' nodes and random models."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("COMFYUI")
PYTHON = os.environ.get("COMFYUI_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
WAIT = 300.0


@dataclass
class Done:
    """What a workflow left."""

    latents: list[torch.Tensor] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    """The exception of a node, if one raised."""


def prepare(base: Path) -> None:
    """Models, nodes and a picture in a folder that ComfyUI takes for its own."""
    assert CHECKOUT is not None
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "deepcache_fx").symlink_to(ROOT / "comfyui")
    (base / "custom_nodes" / "oracle_node").symlink_to(ROOT / "tests" / "comfyui" / "oracle_node")
    for name in ("input", "output", "temp", "user"):
        (base / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(base / "input" / "picture.png")
    script = ROOT / "tests" / "comfyui" / "make_models.py"
    subprocess.run([PYTHON, str(script), str(base)], cwd=CHECKOUT, env=environment(), check=True, timeout=WAIT)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


class Server:
    """Started on a free port of this machine alone; `stop` ends it."""

    def __init__(self, base: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = base
        self.log = base / "server.log"
        command = [PYTHON, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *options]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=str(CHECKOUT), env=environment(), stdout=out, stderr=subprocess.STDOUT
            )
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < WAIT:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at its start:\n{self.text()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer in {WAIT:.0f} s:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, values: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()}") from error

    def run(self, workflow: dict[str, Any]) -> Done:
        """Run a workflow in ComfyUI's API form, and collect what its output nodes saved."""
        started = time.monotonic()
        number = self.post("/prompt", {"prompt": workflow})["prompt_id"]
        while True:
            history = self.get(f"/history/{number}")
            if number in history and history[number]["status"]["status_str"] in ("success", "error"):
                break
            if time.monotonic() - started > WAIT or self.process.poll() is not None:
                raise RuntimeError(f"the workflow did not end:\n{self.text()[-3000:]}")
            time.sleep(0.05)
        done = Done(seconds=time.monotonic() - started)
        for kind, message in history[number]["status"]["messages"]:
            if kind in ("execution_error", "execution_interrupted"):
                done.error = message.get("exception_message", "interrupted")
        for _, output in sorted(history[number]["outputs"].items()):
            done.texts += output.get("text", [])
            for item in output.get("latents", []):
                done.latents.append(load_file(self._path(item))["latent_tensor"])
            for item in output.get("images", []):
                done.images.append(Image.open(self._path(item)).convert("RGB"))
        return done

    def _path(self, item: dict[str, str]) -> Path:
        return self.base / item["type"] / item.get("subfolder", "") / item["filename"]

    def free(self) -> None:
        """Unload models and forget results."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)  # done by the worker's thread


def clean(base: Path) -> None:
    shutil.rmtree(base, ignore_errors=True)
