"""Make the teacher of the embedded model: `python -m ngrpo_lora.world.pretrain --output-dir runs/teacher`.

`ngrpo_lora.world.distil` makes the embedded model itself from it.

Five stages, each seeded and each leaving a file, so that a stopped run goes on where it was:

    tokenizers   BPE (CLIP) and Unigram (T5) with the world's words
    vae          AutoencoderKL, 64 px -> (16, 8, 8) latents, L1 + KL
    encode       latents of rendered scenes, and the scale that gives them unit variance
    read         the text encoders learn to tell what a caption promises, before they see a picture
    flow         FluxTransformer2DModel + both text encoders, rectified-flow matching, EMA

Held-out scenes (`scenes.split_scenes`) are in none of them. About an hour and a half on a CPU.
"""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ngrpo_lora.devices import resolve_dtype
from ngrpo_lora.world._parts import (
    SHARES,
    TRAIN_SCENES,
    Flow,
    assemble,
    batch_of_images,
    caption,
    make_transformer,
    make_vae,
    noised,
)
from ngrpo_lora.world.scenes import (
    COLORS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    TASKS,
    TEMPLATES,
    Scene,
    place,
    plural,
    sample_scene,
    scatter,
    split_scenes,
)

log = logging.getLogger(__name__)

MAX_TOKENS, BATCH = 16, 96


def all_captions() -> list[str]:
    """Every caption of the world, in every template."""
    scenes = [scene for task in TASKS for pool in split_scenes(task) for scene in pool]
    return [template.format(scene.caption) for scene in scenes for template in TEMPLATES]


def make_tokenizers(corpus: Sequence[str], max_tokens: int = MAX_TOKENS) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Two tokenizers that know every word of a corpus as one token and fall back to letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"

    words = sorted({word for text in corpus for word in text.split()})
    merges: list[tuple[str, str]] = []
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in words:
        *head, suffix = [*word[:-1], f"{word[-1]}</w>"]
        for letter in reversed(head):  # grow each word from its last letter
            if (letter, suffix) not in merges:
                merges.append((letter, suffix))
            suffix = letter + suffix
            if suffix not in vocab:
                vocab.append(suffix)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges)
    clip.model_max_length = max_tokens

    pieces = [(f"\u2581{word}", -2.0) for word in words] + [(piece, -10.0) for piece in ("\u2581", *letters)]
    t5 = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], extra_ids=0)
    t5.model_max_length = max_tokens
    return clip, t5


def make_text_encoders(clip_tokens: int, eos: int, t5_tokens: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 text encoders of width 64, which are trained with the flow."""
    clip = CLIPTextConfig(
        vocab_size=clip_tokens,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=eos - 1,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    t5 = T5Config(vocab_size=t5_tokens, d_model=64, d_kv=32, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0)
    return CLIPTextModel(clip), T5EncoderModel(t5)


FIELDS = (len(SHAPES), len(COLORS) + 1, 4, len(RELATIONS) + 1)  # shape, colour or none, number, side or none


def promises(scene: Scene) -> list[tuple[int, int, int, int]]:
    """What each noun of a caption stands for: indices of its shape, colour, number and side, as counted in FIELDS."""
    nouns = scene.objects[:1] if scene.task == "count" else scene.objects
    number = len(scene.objects) - len(nouns)
    sides = (scene.relation, OPPOSITE[scene.relation]) if scene.relation else (None, None)
    return [
        (
            SHAPES.index(noun.shape),
            list(COLORS).index(noun.color) if noun.color else len(COLORS),
            number,
            RELATIONS.index(side) if side else len(RELATIONS),
        )
        for noun, side in zip(nouns, sides, strict=False)
    ]


def learning_rate_factor(step: int, steps: int, warmup: int = 200, decay_share: float = 0.5) -> float:
    """Factor of the peak learning rate: linear warm-up, constant, linear decay to 0 over the last `decay_share`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay_share * steps))


def make_optimizers(module: nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Optimizers of a module: Muon for the matrices of transformer blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        (matrices if parameter.ndim == 2 and "transformer_blocks" in name else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=2 * peak, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def optimise(
    module: nn.Module,
    steps: int,
    peak: float,
    name: str,
    loss_fn: Callable[[], Tensor],
    ema: AveragedModel | None = None,
) -> None:
    """Minimise `loss_fn()` on `learning_rate_factor`'s schedule; `ema` averages the weights.

    Passes are in bfloat16 where the CPU has instructions for it, which else takes many times float32's time.
    """
    native = resolve_dtype("auto", "cpu") == "bfloat16"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = make_optimizers(module, peak)
    schedules = [LambdaLR(o, lambda step: learning_rate_factor(step, steps)) for o in optimizers]
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=native):
            loss = loss_fn()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(module)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 100)
        if (step + 1) % 200 == 0:
            log.info("%s %d/%d loss %.4f %.0f s", name, step + 1, steps, mean_loss, time.perf_counter() - start)
            if ema is not None and (step + 1) % 1000 == 0:
                save_model(ema.module, f"{name}.partial.safetensors")  # to look at, not to resume from


def train_vae(path: Path, steps: int) -> AutoencoderKL:
    """Train the VAE on rendered scenes, or load it: L1 + 0.5 squared error + 0.002 KL per latent dimension."""
    vae = make_vae()
    if not path.exists():
        rng = np.random.default_rng(1)
        vae.to(memory_format=torch.channels_last)

        def loss_fn() -> Tensor:
            images, _ = batch_of_images(32, rng, scatter)
            posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)).sample.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            return (decoded - images).abs().mean() + 0.5 * (decoded - images).square().mean() + 2e-3 * kl

        optimise(vae, steps, 2e-3, "vae", loss_fn)
        save_model(vae, str(path))
    load_model(vae, path)
    return vae.eval()


@torch.no_grad()
def encode_scenes(path: Path, vae: AutoencoderKL, n: int) -> tuple[Tensor, list[str], float]:
    """Packed float16 latents (n, 16, 64) of unit variance, their captions, and the scale that made it so."""
    if not path.exists():
        rng, means, captions = np.random.default_rng(2), [], []
        for _ in range(n // 250):
            images, texts = batch_of_images(250, rng, place)
            means.append(vae.encode(images).latent_dist.mean)
            captions += texts
        latents = torch.cat(means)
        scale = 1 / latents.std().item()
        packed = FluxPipeline._pack_latents(latents * scale, n, 16, 8, 8)
        save_file({"packed": packed.half()}, path, {"scale": str(scale), "captions": "\n".join(captions)})
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        return file.get_tensor("packed"), meta["captions"].split("\n"), float(meta["scale"])


def learn_to_read(path: Path, flow: Flow, steps: int) -> None:
    """Teach the text encoders what a caption promises, as FLUX's own come already trained on language.

    T5's state at a noun, and CLIP's pooled state for both nouns, must tell shape, colour, number and side.
    """
    if not path.exists():
        rng = np.random.default_rng(3)
        words = [f"\u2581{form}" for shape in SHAPES for form in (shape, plural(shape))]
        nouns = torch.tensor(flow.tokenizers[1].convert_tokens_to_ids(words))
        at_noun, pooled = nn.Linear(64, sum(FIELDS)), nn.Linear(64, 2 * sum(FIELDS))

        def loss_fn() -> Tensor:
            scenes = [sample_scene(rng, TRAIN_SCENES, SHARES) for _ in range(256)]
            clip_ids, t5_ids = flow.tokenize([caption(scene, rng) for scene in scenes])
            told = [promises(scene) for scene in scenes]
            two = torch.tensor([[True, len(scene) > 1] for scene in told])
            logits = [
                at_noun(flow.t5(t5_ids)[0][torch.isin(t5_ids, nouns)]),  # all nouns in order
                pooled(flow.clip(clip_ids).pooler_output).view(len(told), 2, -1)[two],
            ]
            targets = torch.tensor([noun for scene in told for noun in scene]).repeat(2, 1)  # (N, 4)
            fields = zip(torch.cat(logits).float().split(FIELDS, 1), targets.T, strict=True)
            return torch.stack([F.cross_entropy(*field) for field in fields]).sum()

        reader = nn.ModuleList([flow.clip, flow.t5, at_noun, pooled])
        optimise(reader, steps, 2e-3, str(path.with_suffix("")), loss_fn)
        save_model(flow, str(path))
    load_model(flow, path)


def train_flow(path: Path, flow: Flow, packed: Tensor, captions: list[str], steps: int) -> None:
    """Train by flow matching, with one caption in ten dropped for guidance; leaves averaged weights in `flow`."""
    text, empty = flow.tokenize(captions), flow.tokenize([""])
    generator = torch.Generator().manual_seed(3)

    def loss_fn() -> Tensor:
        index, latents, sigma, velocity = noised_batch(packed, generator)
        dropped = torch.rand(len(index), 1, generator=generator) < 0.1
        clip, t5 = (torch.where(dropped, none, ids[index]) for ids, none in zip(text, empty, strict=True))
        return F.mse_loss(flow(latents, sigma, clip, t5).float(), velocity)

    if not path.exists():
        ema = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.998))
        optimise(flow, steps, 2e-3, str(path.with_suffix("")), loss_fn, ema)
        save_model(ema.module, str(path))
    load_model(flow, path)


def noised_batch(packed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random scenes at random noise levels: index (B,), latents (B, 16, 64), sigma (B,), velocity (B, 16, 64)."""
    index = torch.randint(len(packed), (BATCH,), generator=generator)
    clean = packed[index].float()
    latents, sigma, noise = noised(clean, generator)
    return index, latents, sigma, noise - clean


def main() -> None:
    """Run the stages that have not been run, then write the pipeline to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/pretrain"), help="where the stages leave files")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/teacher"), help="the pipeline")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=60_000, help="scenes to encode, a multiple of 250")
    parser.add_argument("--read-steps", type=int, default=800)
    parser.add_argument("--flow-steps", type=int, default=8_000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.scenes % 250 or min(args.vae_steps, args.scenes, args.read_steps, args.flow_steps) <= 0:
        parser.error(f"steps must be positive and --scenes a multiple of 250, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = train_vae(args.work_dir / "vae.safetensors", args.vae_steps)
    packed, captions, scale = encode_scenes(args.work_dir / "scenes.safetensors", vae, args.scenes)
    torch.manual_seed(0)
    clip, t5 = tokenizers = make_tokenizers(all_captions())
    transformer = make_transformer()
    flow = Flow(transformer, make_text_encoders(len(clip), clip.eos_token_id, len(t5)), tokenizers)
    learn_to_read(args.work_dir / "read.safetensors", flow, args.read_steps)
    train_flow(args.work_dir / "flow.safetensors", flow, packed, captions, args.flow_steps)
    assemble(flow, vae, scale).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
