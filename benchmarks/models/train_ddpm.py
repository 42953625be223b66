"""Train the embedded pixel-space diffusion model: a class-conditional DDPM of 32x32 Fashion-MNIST garments.

    python -m benchmarks.models.train_ddpm --minutes 75 --out benchmarks/models/fashion-ddpm

A `UNet2DModel` of 6.0 M parameters at four resolutions, two residual blocks each, attention at the lower two; a linear
1000-step DDPM schedule; the class is the only condition and there is no guidance. Training is planned by the clock: the
learning rate falls as a cosine of the time used, so that any budget ends annealed. The checkpoint in `--work` holds the
time used: an interrupted run goes on where it stopped, a finished one is only saved and judged again, and a larger
`--minutes` trains on, at the learning rate of that budget.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import fashion
from benchmarks.environment import environment
from benchmarks.fidelity.own_score import own_score
from benchmarks.models import training

AVERAGE_EVERY = 4
"""Steps from one update of the averaged weights to the next: each update walks over all of them."""
WARMUP = 200
"""Steps over which the learning rate rises."""


def parse_args() -> argparse.Namespace:
    parser = training.options(__doc__, out="fashion-ddpm", work="train-ddpm", lr=1e-3)
    parser.add_argument("--minutes", type=float, default=75.0, help="time for training, over all resumed runs")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time from one checkpoint to the next")
    parser.add_argument("--samples", type=int, default=1000, help="images judged at the end; 0 judges nothing")
    return parser.parse_args()


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 96, 144),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=len(fashion.CLASSES),
        norm_num_groups=8,
        attention_head_dim=24,
    )


def make_scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)


def rate(step: int, share: float) -> float:
    """Learning-rate factor: a linear warm-up over steps, times a cosine over the share of the time used."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def stratified(count: int, top: int, generator: torch.Generator) -> torch.Tensor:
    """`count` timesteps in [0, top), one from each of `count` equal parts: less noise in the loss, no bias."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * top / count).long().clamp(max=top - 1)


@dataclass
class State:
    """How far training has come."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    """Weighted, smoothed over about 50 steps."""
    test_loss: float = 0.0
    """Unweighted mean square error of the averaged model's noise prediction, on test images."""


class Trainer:
    """Epsilon prediction with min-SNR-5 weights (arXiv 2303.09556), and weights averaged over time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.unet = make_unet().to(args.device)
        self.mean = training.copies(self.unet)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), args.lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True
        )
        self.alphas = make_scheduler().alphas_cumprod.to(args.device)
        self.state = State()
        self.checkpoint = args.work / "unet.pt"
        saved = training.load_checkpoint(self.checkpoint, args.device)
        if saved is not None:
            self.unet.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.mean, self.state = saved["mean"], State(**saved["state"])

    def save(self) -> None:
        saved = {
            "model": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "state": asdict(self.state),
        }
        training.save_checkpoint(self.checkpoint, saved)

    def predict(
        self, unet: UNet2DModel, clean: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Square errors of the predicted noise, (count,)."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        with torch.autocast(self.args.device, torch.bfloat16):
            guess = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, class_labels=labels).sample
        errors: torch.Tensor = ((guess.float() - noise) ** 2).mean((1, 2, 3))
        return errors

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> float:
        args, state = self.args, self.state
        pick = torch.randint(len(images), (args.batch,), generator=generator)
        clean = training.pad32(images[pick]).to(args.device)
        t = stratified(args.batch, len(self.alphas), generator).to(args.device)
        noise = torch.randn(clean.shape, generator=generator).to(args.device)
        snr = self.alphas[t] / (1 - self.alphas[t])
        loss = (self.predict(self.unet, clean, labels[pick].to(args.device), t, noise) * snr.clamp(max=5) / snr).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * rate(state.step, state.seconds / (60 * args.minutes))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        state.step += 1
        if state.step % AVERAGE_EVERY == 0:
            training.average(self.mean, self.unet, min(0.999, state.step / (state.step + 10)) ** AVERAGE_EVERY)
        return float(loss)

    @torch.no_grad()
    def test(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The averaged model's error on these images, with noise and timesteps that are always the same."""
        generator = torch.Generator().manual_seed(1)
        unet = self.averaged()
        t = stratified(len(images), len(self.alphas), generator).to(self.args.device)
        clean = training.pad32(images)
        noise = torch.randn(clean.shape, generator=generator)
        parts = (x.to(self.args.device).split(128) for x in (clean, labels, t, noise))
        return torch.cat([self.predict(unet, *part) for part in zip(*parts, strict=True)]).mean().item()

    def averaged(self) -> UNet2DModel:
        unet = make_unet().to(self.args.device)
        unet.load_state_dict(self.mean)
        return unet.eval()

    def updates(self) -> Iterator[State]:
        """Train until the time is used up; yields after every checkpoint, and at least every second between."""
        args, state = self.args, self.state
        budget = 60 * args.minutes
        images, labels = fashion.load("train")
        test = tuple(part[:512] for part in fashion.load("t10k"))
        generator = torch.Generator().manual_seed(args.seed + state.step)
        saved = yielded = clock = time.monotonic()
        while state.seconds < budget:
            loss = self.train_step(images, labels, generator)
            state.loss = loss if state.step == 1 else 0.98 * state.loss + 0.02 * loss
            now = time.monotonic()
            state.seconds += now - clock
            clock = now
            if now - saved >= 60 * args.save_minutes or state.seconds >= budget:
                state.test_loss = self.test(*test)
                self.save()
                print(describe(state), flush=True)
                saved = clock = time.monotonic()  # the clock leaves out what testing and saving take
            if now - yielded >= 1 or saved >= now:
                yielded = now
                yield state


def describe(state: State) -> str:
    return (
        f"step {state.step}, {state.seconds / 60:.1f} minutes: "
        f"loss {state.loss:.4f}, averaged model on test images {state.test_loss:.5f}"
    )


def train(args: argparse.Namespace) -> tuple[UNet2DModel, State]:
    trainer = Trainer(args)
    columns = (TextColumn("DDPM"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=60 * args.minutes, completed=int(trainer.state.seconds), text="")
        for state in trainer.updates():
            text = f"step {state.step}, loss {state.loss:.4f}"
            progress.update(task, completed=state.seconds, text=text)
    return trainer.averaged(), trainer.state


def main() -> None:
    args = parse_args()
    training.begin(args)
    unet, state = train(args)
    DDPMPipeline(unet.to("cpu", torch.float16), make_scheduler()).save_pretrained(args.out, safe_serialization=True)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
        "loss": state.loss,
        "test_loss": state.test_loss,
        "environment": environment(args.device),
    }
    if args.samples:
        record["score"] = own_score(args.out, args.samples)
    training.write_record(args.out, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
