"""Make the embedded model that edits from the one that draws: `python -m ngrpo_lora.world.pretrain_edit`.

Its VAE is the same, its transformer and text encoders go on from there, with the tokens of a source beside those of
the picture, as in FLUX.1-Kontext. Two stages, each seeded and each leaving a file (the long one every 200 steps), so
that a stopped run goes on:

    pairs     latents of sources and of what they are after an edit
    flow      FluxTransformer2DModel and both text encoders, rectified-flow matching, EMA

Held-out edits (`edits.split_edits`) are in neither. About an hour on one CPU core.
"""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ngrpo_lora.world import EMBEDDED, EMBEDDED_EDIT
from ngrpo_lora.world._parts import Flow, assemble, noised
from ngrpo_lora.world.distil import MAX_TOKENS, optimise
from ngrpo_lora.world.edits import EDIT_TASKS, Edit, all_edits, apply, choose_source, split_edits
from ngrpo_lora.world.pretrain import all_captions, make_tokenizers

log = logging.getLogger(__name__)

BATCH = 32


class EditFlow(Flow):
    """Transformer and text encoders as one trainable map (latents, source, sigma, instruction) -> velocity."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        drawn = self.get_buffer("img_ids")
        source = drawn + torch.tensor([1.0, 0, 0])  # the same places, apart by the first coordinate
        self.register_buffer("img_ids", torch.cat([drawn, source]), persistent=False)

    def forward(self, packed: Tensor, source: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """As of `Flow`, with the tokens (B, 16, 64) of the source behind those that are drawn."""
        return super().forward(torch.cat([packed, source], 1), sigma, clip_ids, t5_ids)[:, : packed.shape[1]]


def widened(embedding: nn.Embedding, old: dict[str, int], new: dict[str, int]) -> nn.Embedding:
    """An embedding for a new vocabulary: rows of tokens that are in both stay, others get the mean row and noise."""
    weight = embedding.weight.detach()
    rows = weight.mean(0) + weight.std(0) * torch.randn(len(new), weight.shape[1])
    for token in new.keys() & old.keys():
        rows[new[token]] = weight[old[token]]
    return nn.Embedding.from_pretrained(rows, freeze=False)


def make_editor(base: FluxPipeline) -> EditFlow:
    """The flow of the model that draws, with the words of instructions in its vocabulary."""
    instructions = [edit.instruction for task in EDIT_TASKS for edit in all_edits(task)]
    clip, t5 = tokenizers = make_tokenizers([*all_captions(), *instructions], MAX_TOKENS)
    encoders = copy.deepcopy(base.text_encoder), copy.deepcopy(base.text_encoder_2)
    for encoder, old, new in zip(encoders, (base.tokenizer, base.tokenizer_2), tokenizers, strict=True):
        encoder.set_input_embeddings(widened(encoder.get_input_embeddings(), old.get_vocab(), new.get_vocab()))
        encoder.config.vocab_size = len(new)
    encoders[0].config.update(
        {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "pad_token_id": clip.pad_token_id}
    )
    return EditFlow(copy.deepcopy(base.transformer), encoders, tokenizers)


@torch.no_grad()
def encode_pairs(path: Path, vae: AutoencoderKL, n: int) -> tuple[Tensor, list[str]]:
    """Packed float16 latents (n, 2, 16, 64) of sources and edited pictures, and the instructions."""
    if not path.exists():
        rng, parts, instructions = np.random.default_rng(11), [], []
        pools = [split_edits(task)[0] for task in EDIT_TASKS]
        for batch in range(n // 100):
            pairs = [drawn_pair(pools[i % len(pools)], rng) for i in range(100)]
            instructions += [edit.instruction for edit, _ in pairs]
            pixels = torch.from_numpy(np.stack([picture for _, pair in pairs for picture in pair]))
            images = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
            parts.append(FluxPipeline._pack_latents(latents, 200, 16, 8, 8).view(100, 2, 16, 64).half())
            if batch % 20 == 19:
                log.info("pairs %d/%d", batch + 1, n // 100)
        save_file({"packed": torch.cat(parts)}, path, {"instructions": "\n".join(instructions)})
    with safe_open(path, "pt") as file:
        return file.get_tensor("packed"), file.metadata()["instructions"].split("\n")


def drawn_pair(edits: list[Edit], rng: np.random.Generator) -> tuple[Edit, tuple[np.ndarray, np.ndarray]]:
    """A random edit of a list, with a source and what it is afterwards, each (64, 64, 3) uint8."""
    edit = edits[rng.integers(len(edits))]
    source = choose_source(edit, rng)
    return edit, (source.render(), apply(edit, source, rng).render())


def train(path: Path, flow: EditFlow, packed: Tensor, instructions: list[str], steps: int, peak: float) -> None:
    """Train by flow matching; leaves averaged weights in `flow`.

    An error of velocities counts by sigma then, between an even count and that of clean predictions.
    """
    if not path.exists():
        texts = sorted(set(instructions))
        clip_ids, t5_ids = flow.tokenize(texts)
        places = {text: place for place, text in enumerate(texts)}
        asked = torch.tensor([places[text] for text in instructions])

        def loss_fn(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(step)
            chosen = torch.randint(len(packed), (BATCH,), generator=generator)
            source, clean = packed[chosen].float().unbind(1)
            latents, sigma, noise = noised(clean, generator)
            velocity = flow(latents, source, sigma, clip_ids[asked[chosen]], t5_ids[asked[chosen]])
            return F.mse_loss(velocity, noise - clean)

        ema = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimise(flow, steps, peak, path, loss_fn, ema)
    load_model(flow, path)


def main() -> None:
    """Run the stages that have not been run, then write the pipeline to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/pretrain-edit"), help="where the stages leave files"
    )
    parser.add_argument("--output-dir", type=Path, default=EMBEDDED_EDIT, help="the pipeline")
    parser.add_argument("--pairs", type=int, default=24_000, help="pictures before and after, a multiple of 100")
    parser.add_argument("--steps", type=int, default=8_000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.pairs % 100 or min(args.pairs, args.steps) <= 0:
        parser.error(f"--steps must be positive and --pairs a multiple of 100, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base = FluxPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    packed, instructions = encode_pairs(args.work_dir / "pairs.safetensors", base.vae, args.pairs)
    torch.manual_seed(0)
    flow = make_editor(base)
    train(args.work_dir / "flow.safetensors", flow, packed, instructions, args.steps, 2e-3)
    for part in (flow.transformer, base.vae):  # where they are from, and no folder of this machine
        part.register_to_config(_name_or_path="ngrpo_lora/world/model")
    drawing = assemble(flow, base.vae, base.vae.config.scaling_factor)
    FluxKontextPipeline(**drawing.components).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
