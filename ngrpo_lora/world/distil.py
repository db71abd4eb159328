"""Make the embedded model from a larger one: `python -m ngrpo_lora.world.distil --teacher runs/teacher`.

The larger one, of width 256 and 5.6 M parameters, is `ngrpo_lora.world.pretrain`'s. This one costs about a third of it
per picture, so that the demo and the comparisons of algorithms fit on two CPU cores, and leaves more to gain. Three
stages, each seeded and each leaving a file (a long one every 200 steps), so that a stopped run goes on:

    targets   the teacher's velocity at noised latents of rendered scenes: what the student learns to say
    vae       a small AutoencoderKL that shares the teacher's latents
    flow      FluxTransformer2DModel of width 128 and the teacher's text encoders on 12 tokens, EMA

The teacher's velocity is a mean over all pictures that could be under the noise, a target with less noise of its own
than a single picture. Held-out scenes (`scenes.split_scenes`) are in no stage.
"""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel

from ngrpo_lora.records.files import written
from ngrpo_lora.world.pretrain import SHIFT, batch_of_images
from ngrpo_lora.world.scenes import place, scatter

log = logging.getLogger(__name__)

MAX_TOKENS = 12  # the longest caption has 11 tokens of either kind
NOISES, BATCH = 3, 32  # noise levels of each rendered scene; latents of a training step


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the peak learning rate: linear warm-up, then linear decay to 0."""
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def optimise(
    module: nn.Module,
    steps: int,
    peak: float,
    path: Path,
    loss_fn: Callable[[int], Tensor],
    ema: AveragedModel,
) -> None:
    """Minimise `loss_fn(step)` by AdamW and average the weights in `ema`, whose module is then saved to `path`.

    Every 200 steps all that it holds goes into a `.partial` file beside `path`, from which a stopped run goes on.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    stateful: list[Any] = [module, optimizer, schedule, ema]
    partial, first = path.with_suffix(".partial"), 0
    if partial.exists():
        first, states = torch.load(partial, weights_only=True)
        for part, state in zip(stateful, states, strict=True):
            part.load_state_dict(state)
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(first, steps):
        loss = loss_fn(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update_parameters(module)
        mean_loss += (loss.item() - mean_loss) / min(step - first + 1, 100)
        if (step + 1) % 200 == 0:
            log.info("%s %d/%d loss %.5f %.0f s", path.stem, step + 1, steps, mean_loss, time.perf_counter() - start)
            with written(partial) as unfinished:
                torch.save((step + 1, [part.state_dict() for part in stateful]), unfinished)
    save_model(ema.module, str(path))


def make_vae(like: AutoencoderKL) -> AutoencoderKL:
    """An eightfold VAE of half the teacher's channels where pictures are large, with the same latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # a group of one channel would lose its mean, and with it colours and backgrounds
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=like.config.scaling_factor,
        shift_factor=0.0,
    )


def train_vae(path: Path, teacher: AutoencoderKL, steps: int) -> AutoencoderKL:
    """Train the small VAE, or load it: its encoder repeats the teacher's, its decoder draws from the teacher's latents.

    The decoder sees the latents' means with up to the whole of their posterior's noise, as drawn latents are not exact.
    """
    vae = make_vae(teacher)
    if not path.exists():
        vae.to(memory_format=torch.channels_last)

        def loss_fn(step: int) -> Tensor:
            rng, generator = np.random.default_rng((5, step)), torch.Generator().manual_seed(step)
            images = torch.cat([batch_of_images(16, rng, layout)[0] for layout in (scatter, place)])
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                known = teacher.encode(images).latent_dist
                noise = torch.randn(known.mean.shape, generator=generator) * torch.rand(
                    32, 1, 1, 1, generator=generator
                )
            own, decoded = vae.encode(images).latent_dist, vae.decode(known.mean + noise * known.std).sample
            apart = F.mse_loss(own.mean, known.mean) + F.mse_loss(own.logvar, known.logvar)
            return (decoded - images).abs().mean() + 0.5 * (decoded - images).square().mean() + 0.1 * apart

        optimise(vae, steps, 3e-3, path, loss_fn, AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.99)))
    load_model(vae, path)
    return vae.eval()


@torch.no_grad()
def ask(path: Path, teacher: FluxPipeline, scenes: int) -> dict[str, Any]:
    """What the teacher says of `scenes` scenes at `NOISES` noise levels each; N = scenes * NOISES.

    Returns:
        noised (N, 16, 64) and velocity (N, 16, 64) in float16, sigma (N,), and N captions, one in twenty empty.
    """
    if not path.exists():
        rng, generator = np.random.default_rng(6), torch.Generator().manual_seed(6)
        parts, captions = [], []
        ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        teacher.vae.to(memory_format=torch.channels_last)
        for batch in range(scenes // 100):
            images, texts = batch_of_images(100, rng, place)
            images = images.contiguous(memory_format=torch.channels_last)
            means = teacher.vae.encode(images).latent_dist.mean * teacher.vae.config.scaling_factor
            clean = FluxPipeline._pack_latents(means, 100, 16, 8, 8).repeat(NOISES, 1, 1)
            texts = ["" if rng.random() < 0.05 else text for text in texts * NOISES]
            at = torch.rand(len(clean), generator=generator)
            sigma = SHIFT * at / (1 + (SHIFT - 1) * at)
            level = sigma[:, None, None]
            noised = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator)
            told, pooled, text_ids = teacher.encode_prompt(
                texts, None, max_sequence_length=teacher.tokenizer_2.model_max_length
            )
            velocity = teacher.transformer(
                hidden_states=noised,
                timestep=sigma,
                pooled_projections=pooled,
                encoder_hidden_states=told,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            parts.append({"noised": noised.half(), "sigma": sigma, "velocity": velocity.half()})
            captions += texts
            if batch % 40 == 39:
                log.info("targets %d/%d", batch + 1, scenes // 100)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        save_file(tensors, path, {"captions": "\n".join(captions)})
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors | {"captions": file.metadata()["captions"].split("\n")}


def make_transformer() -> FluxTransformer2DModel:
    """FLUX with one head of width 128, one double and three single blocks: 1.5 M parameters."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )


def shorten(encoder: CLIPTextModel) -> CLIPTextModel:
    """A CLIP text encoder for `MAX_TOKENS` tokens, with the weights of one for more."""
    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings = MAX_TOKENS
    short, weights = CLIPTextModel(config), encoder.state_dict()
    key = next(name for name in weights if name.endswith("position_embedding.weight"))
    short.load_state_dict(weights | {key: weights[key][:MAX_TOKENS]})
    return short


class Student(nn.Module):
    """Transformer and text encoders as one trainable map (latents, sigma, caption) -> velocity."""

    def __init__(self, teacher: FluxPipeline):
        super().__init__()
        self.transformer, self.clip = make_transformer(), shorten(teacher.text_encoder)
        self.t5 = copy.deepcopy(teacher.text_encoder_2)
        self.tokenizers = [copy.deepcopy(teacher.tokenizer), copy.deepcopy(teacher.tokenizer_2)]
        for tokenizer in self.tokenizers:
            tokenizer.model_max_length = MAX_TOKENS
        self.register_buffer("txt_ids", torch.zeros(MAX_TOKENS, 3), persistent=False)
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32), False)

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """CLIP and T5 token ids, each (B, 12), padded as `FluxPipeline.encode_prompt` pads."""
        kwargs = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        return [tokenizer(captions, **kwargs).input_ids for tokenizer in self.tokenizers]

    def forward(self, packed: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Packed latents (B, 16, 64), sigma (B,), token ids (B, 12) of CLIP and of T5 -> velocity (B, 16, 64)."""
        return self.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=self.txt_ids,
            img_ids=self.img_ids,
            return_dict=False,
        )[0]


def train_flow(path: Path, student: Student, targets: dict[str, Any], steps: int) -> None:
    """Train the student on the teacher's clean predictions; leaves averaged weights in `student`.

    An error of velocities counts by sigma^2 then: most at the noise levels where a picture's layout is settled.
    """
    if not path.exists():
        texts = sorted(set(targets["captions"]))
        clip_ids, t5_ids = student.tokenize(texts)
        places = {text: place for place, text in enumerate(texts)}
        caption = torch.tensor([places[text] for text in targets["captions"]])

        def loss_fn(step: int) -> Tensor:
            chosen = torch.randint(len(caption), (BATCH,), generator=torch.Generator().manual_seed(step))
            told, sigma = caption[chosen], targets["sigma"][chosen]
            velocity = student(targets["noised"][chosen].float(), sigma, clip_ids[told], t5_ids[told])
            error = sigma[:, None, None] * (velocity - targets["velocity"][chosen].float())  # of clean predictions
            return error.square().mean()

        ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimise(student, steps, 3e-3, path, loss_fn, ema)
    load_model(student, path)


def assemble(student: Student, vae: AutoencoderKL) -> FluxPipeline:
    """Put the parts together as a stock FluxPipeline in bfloat16."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=student.clip,
        tokenizer=student.tokenizers[0],
        text_encoder_2=student.t5,
        tokenizer_2=student.tokenizers[1],
        transformer=student.transformer,
    )
    return pipeline.to(torch.bfloat16)


STAGES = ("targets", "vae", "flow")


def main() -> None:
    """Run the stages that have not been run, then write the pipeline to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="the pipeline that pretrain made")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/distil"), help="where the stages leave files")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "model", help="the pipeline")
    parser.add_argument("--scenes", type=int, default=24_000, help="scenes that the teacher sees, a multiple of 100")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--flow-steps", type=int, default=14_000)
    parser.add_argument("--only", choices=STAGES, help="one stage alone, so that two can run at once")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.scenes % 100 or min(args.scenes, args.vae_steps, args.flow_steps) <= 0:
        parser.error(f"steps must be positive and --scenes a multiple of 100, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    teacher = FluxPipeline.from_pretrained(args.teacher, torch_dtype=torch.float32)
    stages = STAGES if args.only is None else (args.only,)
    torch.manual_seed(0)
    student = Student(teacher)
    if "vae" in stages:
        train_vae(args.work_dir / "vae.safetensors", teacher.vae, args.vae_steps)
    if "targets" in stages or "flow" in stages:
        targets = ask(args.work_dir / "targets.safetensors", teacher, args.scenes)
        if "flow" in stages:
            train_flow(args.work_dir / "flow.safetensors", student, targets, args.flow_steps)
    if args.only is None:
        vae = train_vae(args.work_dir / "vae.safetensors", teacher.vae, args.vae_steps)
        assemble(student, vae).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
