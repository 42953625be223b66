"""Workflows in ComfyUI's API form, put together by name: a checkpoint, prompts, patches of the model, a sampler."""

from __future__ import annotations

from typing import Any

Link = list[Any]
CHECKPOINT = "random.safetensors"
NODE: dict[str, Any] = {
    "interval": 3,
    "branch": 0,
    "schedule": "uniform",
    "forecast": "repeat",
    "backend": "eager",
    "precision": "as loaded",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


class Workflow(dict[str, Any]):
    """`add` appends a node and gives a link to its first output."""

    def __init__(self) -> None:
        super().__init__()
        self.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.model: Link = ["1", 0]
        self.positive = self.prompt("a red boot")
        self.negative = self.prompt("blurred")
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)

    def add(self, kind: str, **inputs: Any) -> Link:
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]

    def prompt(self, text: str) -> Link:
        return self.add("CLIPTextEncode", text=text, clip=["1", 1])

    def patch(self, kind: str, **inputs: Any) -> Link:
        """The model goes on through a node."""
        self.model = self.add(kind, model=self.model, **inputs)
        return self.model

    def cache(self, **inputs: Any) -> Link:
        return self.patch("DeepCacheFX", **{**NODE, **inputs})

    def oracle(self, interval: int = 3, branch: int = 0) -> Link:
        return self.patch("TestOracle", interval=interval, branch=branch)

    def sample(self, *, steps: int = 6, sampler: str = "euler", scheduler: str = "normal", **others: Any) -> Link:
        """A sampler; its latent is saved, and becomes that of the next."""
        given = {"seed": 1, "cfg": 3.0, "denoise": 1.0, "positive": self.positive, "negative": self.negative, **others}
        self.latent = self.add(
            "KSampler",
            model=self.model,
            steps=steps,
            sampler_name=sampler,
            scheduler=scheduler,
            latent_image=self.latent,
            **given,
        )
        self.add("SaveLatent", samples=self.latent, filename_prefix="latent")
        return self.latent

    def report(self) -> Link:
        return self.add("DeepCacheFXReport", model=self.model, after=self.latent)

    def image(self) -> Link:
        pixels = self.add("VAEDecode", samples=self.latent, vae=["1", 2])
        return self.add("SaveImage", images=pixels, filename_prefix="image")
