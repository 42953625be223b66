"""Train the embedded text-to-image pipeline: a small latent diffusion model of Fashion-MNIST garments.

    python -m benchmarks.models.train_text_to_image --out benchmarks/models/fashion-t2i

A real `StableDiffusionPipeline`: an `AutoencoderKL` (32x32 pixels to 16x16x4 latents), a `CLIPTextModel` with a
byte-pair tokenizer of its own, a three-resolution `UNet2DConditionModel` with cross-attention, a DDIM scheduler.
Stages: classifier, autoencoder, latents, UNet with text encoder, saving, judging. Each stage leaves a checkpoint in
`--work`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, load_model, save_file, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import fashion
from benchmarks.environment import environment
from benchmarks.models import training

MAX_TOKENS = 16
TEXT_WIDTH = 96
AVERAGE_EVERY = 8
"""Steps from one update of the averaged weights to the next: each update walks over all of them."""


def parse_args() -> argparse.Namespace:
    parser = training.options(__doc__, out="fashion-t2i", work="train-t2i", lr=8e-4)
    parser.add_argument("--classifier", type=Path, default=Path(__file__).parent / "fashion-classifier.safetensors")
    parser.add_argument("--classifier-steps", type=int, default=1400)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=2300)
    parser.add_argument("--samples", type=int, default=200, help="images judged by the classifier at the end")
    return parser.parse_args()


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )


def cosine(step: int, total: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_classifier(args: argparse.Namespace) -> fashion.Classifier:
    model = fashion.Classifier().to(args.device)
    if args.classifier.exists():
        load_model(model, args.classifier)
        return model.eval()
    images, labels = (t.to(args.device) for t in fashion.load("train"))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, args.classifier_steps))
    with bar() as progress:
        task = progress.add_task("classifier", total=args.classifier_steps, loss=0.0)
        for _ in range(args.classifier_steps):
            pick = torch.randint(len(images), (128,), device=args.device)
            loss = F.cross_entropy(model(images[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    model.eval()
    test_images, test_labels = fashion.load("t10k")
    with torch.no_grad():
        right = sum(
            (model(x.to(args.device)).argmax(1).cpu() == y).sum().item()
            for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)
        )
    print(f"classifier: {right / len(test_labels):.2%} of the test set")
    save_model(model, args.classifier)
    return model


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def train_vae(args: argparse.Namespace, images: torch.Tensor) -> AutoencoderKL:
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    checkpoint = args.work / "vae.safetensors"
    if checkpoint.exists():
        load_model(vae, checkpoint)
        return vae.eval()
    optimizer = torch.optim.AdamW(vae.parameters(), 1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, args.vae_steps))
    with bar() as progress:
        task = progress.add_task("autoencoder", total=args.vae_steps, loss=0.0)
        for _ in range(args.vae_steps):
            batch = training.pad32(images[torch.randint(len(images), (32,))].to(args.device))
            with torch.autocast(args.device, torch.bfloat16):
                posterior = vae.encode(batch).latent_dist
                decoded = vae.decode(posterior.sample()).sample.float()
            kl = posterior.kl().mean() / batch[0].numel()
            loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-3 * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    save_model(vae, checkpoint)
    return vae.eval()


@torch.no_grad()
def encode_all(args: argparse.Namespace, vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Latents (count, 4, 16, 16) scaled to unit variance, and the scaling factor."""
    checkpoint = args.work / "latents.safetensors"
    if not checkpoint.exists():
        latents = []
        with bar() as progress:
            task = progress.add_task("latents", total=len(images), loss=0.0)
            for part in images.split(200):
                with torch.autocast(args.device, torch.bfloat16):
                    latents.append(vae.encode(training.pad32(part.to(args.device))).latent_dist.mode().half().cpu())
                progress.update(task, advance=len(part))
        save_file({"latents": torch.cat(latents).contiguous()}, checkpoint)
    latents = load_file(checkpoint)["latents"].float()
    scale = 1.0 / latents.std().item()
    return latents * scale, scale


def make_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer with CLIP's conventions whose vocabulary comes from the prompts alone."""
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainee.normalizer = normalizers.Lowercase()
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trainee.train_from_iterator([t.format(p) for p in fashion.PROMPTS for t in fashion.TEMPLATES], trainer)
    trained = json.loads(trainee.to_str())["model"]
    vocab = dict(trained["vocab"])
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):  # any text can be spelt, as in CLIP's own vocabulary
        vocab.setdefault(symbol + "</w>", len(vocab))
    merges = [tuple(m) for m in trained["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=TEXT_WIDTH,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 96),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 3),
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(
    args: argparse.Namespace, latents: torch.Tensor, labels: torch.Tensor, tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Epsilon prediction with min-SNR-5 weights (arXiv 2303.09556), 10 % empty prompts, weights averaged over time."""
    unet = make_unet().to(args.device, memory_format=torch.channels_last)
    text_encoder = make_text_encoder(tokenizer).to(args.device)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    mean = training.copies(both)
    optimizer = torch.optim.AdamW(both.parameters(), args.lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, args.unet_steps))
    checkpoint = args.work / "unet.pt"
    start = 0
    state = training.load_checkpoint(checkpoint, args.device)
    if state is not None:
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        mean, start = state["mean"], state["step"]

    def save(step: int) -> None:
        saved = {
            "model": both.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "mean": mean,
            "step": step,
        }
        training.save_checkpoint(checkpoint, saved)

    texts = [t.format(p) for p in fashion.PROMPTS for t in fashion.TEMPLATES] + [""]
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(args.device)
    alphas = make_scheduler().alphas_cumprod.to(args.device)
    generator = torch.Generator().manual_seed(args.seed + start)
    with bar() as progress:
        task = progress.add_task("UNet", total=args.unet_steps, completed=start, loss=0.0)
        shown = 0.0
        for step in range(start, args.unet_steps):
            pick = torch.randint(len(latents), (args.batch,), generator=generator)
            clean = latents[pick].to(args.device, memory_format=torch.channels_last)
            template = torch.randint(len(fashion.TEMPLATES), (args.batch,), generator=generator)
            prompt = labels[pick] * len(fashion.TEMPLATES) + template
            prompt[torch.rand(args.batch, generator=generator) < 0.1] = len(texts) - 1
            t = torch.randint(1000, (args.batch,), generator=generator).to(args.device)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            a = alphas[t].view(-1, 1, 1, 1)
            with torch.autocast(args.device, torch.bfloat16):
                states = text_encoder(ids)[0][prompt.to(args.device)]
                guess = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, states).sample.float()
            snr = a / (1 - a)
            loss = ((guess - noise) ** 2 * (snr.clamp(max=5) / snr)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % AVERAGE_EVERY == 0:
                training.average(mean, both, min(0.999, (step + 1) / (step + 10)) ** AVERAGE_EVERY)
            shown = loss.item() if step == start else 0.98 * shown + 0.02 * loss.item()
            progress.update(task, advance=1, loss=shown)
            if (step + 1) % 250 == 0:
                save(step + 1)
                print(f"step {step + 1}: loss {shown:.4f}", flush=True)
    both.load_state_dict(mean)
    return unet.eval(), text_encoder.eval()


@torch.no_grad()
def judge(pipe: StableDiffusionPipeline, classifier: fashion.Classifier, samples: int, steps: int = 50) -> float:
    """The share of samples (as many of each class) in which the classifier sees the garment the prompt names."""
    each = samples // len(fashion.PROMPTS)
    right = 0
    pipe.set_progress_bar_config(disable=True)
    with bar() as progress:
        task = progress.add_task("judging", total=len(fashion.PROMPTS), loss=0.0)
        for label, prompt in enumerate(fashion.PROMPTS):
            generator = torch.Generator().manual_seed(1000 + label)
            images = pipe(
                [prompt] * each, num_inference_steps=steps, guidance_scale=4.0, generator=generator, output_type="pt"
            ).images
            garment = images.float().mean(1, keepdim=True)[:, :, 2:30, 2:30]
            right += (classifier(garment).argmax(1) == label).sum().item()
            progress.update(task, advance=1)
    return right / (each * len(fashion.PROMPTS))


def main() -> None:
    args = parse_args()
    training.begin(args)
    started = time.perf_counter()
    classifier = train_classifier(args)
    images, labels = fashion.load("train")
    vae = train_vae(args, images)
    latents, scale = encode_all(args, vae, images)
    vae.register_to_config(scaling_factor=scale)
    tokenizer = make_tokenizer()
    unet, text_encoder = train_unet(args, latents, labels, tokenizer)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to("cpu", torch.float16).save_pretrained(args.out, safe_serialization=True)
    (args.out / "prompts.json").write_text(json.dumps(list(fashion.PROMPTS), indent=2) + "\n")
    print(f"saved {args.out} after {(time.perf_counter() - started) / 60:.1f} minutes")
    pipe = StableDiffusionPipeline.from_pretrained(args.out, torch_dtype=torch.float32)
    agreement = judge(pipe, classifier.to("cpu"), args.samples)
    print(f"agreement: {agreement:.1%} of {args.samples} samples, uncached")
    record = {
        "agreement": agreement,
        "samples": args.samples,
        "unet_steps": args.unet_steps,
        "batch": args.batch,
        "seed": args.seed,
        "judged": environment("cpu"),
    }
    training.write_record(args.out, record)


if __name__ == "__main__":
    main()
