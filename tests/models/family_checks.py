"""What every family has to do, checked against diffusers' own pipeline on a tiny model of the true classes.

A family's test saves such a model to a folder (`model_folder`), runs the stock pipeline on it (`record`) and calls
the checks. Latents are unpacked, (B, C, H, W) or (B, C, F, H, W), everywhere.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import MakeConfig
from diffusers import FlowMatchEulerDiscreteScheduler
from peft.utils import get_peft_model_state_dict
from PIL import Image
from rounding import relative_error, with_rounding
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.config import LoraConfig, ModelConfig, RolloutConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.evaluation import comparison
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.sampling.sampler import draw
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.types import TextEmbeds

PROMPTS = ["a red star", "two blue circles", "a photo of a heart above a cross, at dusk"]
TOLERANCE = 1e-5  # relative, of float32


# Tiny parts


def byte_vocabulary(*others: str) -> dict[str, int]:
    """The 256 symbols of byte-level BPE and other tokens, numbered."""
    return {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *others])}


def clip_tokenizer(max_tokens: int = 77) -> CLIPTokenizer:
    """CLIP's, with bytes for tokens."""
    final = [f"{symbol}</w>" for symbol in byte_vocabulary()]
    vocabulary = byte_vocabulary(*final, "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)


def t5_tokenizer(max_tokens: int = 512) -> T5Tokenizer:
    """T5's, with letters for tokens."""
    pieces = [(piece, -2.0) for piece in "▁abcdefghijklmnopqrstuvwxyz0123456789.,"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_tokens)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with bytes for tokens and a chat template of turns."""
    vocabulary = byte_vocabulary("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


def picture(path: Path, seed: int, size: tuple[int, int] = (100, 40)) -> SourcePicture:
    """Blocks of random colours in a file, of another shape than what is drawn."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path / f"{seed}.png")
    return SourcePicture(path / f"{seed}.png", f"{seed}.png", "here")


def picture_prompts(folder: Path, edits: Sequence[Prompt]) -> Path:
    """A file of prompts with their sources, which `picture` has put beside it by their numbers."""
    rows = [{"prompt": edit.text, "source": f"{seed}.png"} for seed, edit in enumerate(edits)]
    (file := folder / "videos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return file


def model_folder(pipeline: Any, folder: Path) -> Path:
    """Save a tiny pipeline whose every weight is random: what starts as zero would hide what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    transformers = [pipeline.transformer, getattr(pipeline, "transformer_2", None)]
    with torch.no_grad():
        for parameter in (p for transformer in filter(None, transformers) for p in transformer.parameters()):
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    pipeline.save_pretrained(folder)
    return folder


def load(folder: Path, parts: Parts = "all", **settings: Any) -> Any:
    """Our family of a folder, found by the pipeline's class, on the CPU."""
    return load_family(ModelConfig(path=str(folder), device="cpu", **settings), parts)


def stock(folder: Path, pipeline_class: str, **parts: Any) -> Any:
    """diffusers' own pipeline of a folder."""
    pipeline = getattr(diffusers, pipeline_class).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class GivenSigmas(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler solver on noise levels (K + 1,) given beforehand, for pipelines that take none."""

    def __init__(self, sigmas: Tensor):
        super().__init__()
        self.given = sigmas

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **_: Any) -> None:
        """As if the noise levels were the model's own."""
        super().set_timesteps(sigmas=self.given[:-1].tolist(), device=device)


# What diffusers does


@dataclass(frozen=True)
class Recording:
    """One sampling run of a stock pipeline.

    latents: K + 1, the noise first. velocities: K, guided, as the scheduler got them. sigmas: (K + 1,).
    """

    latents: list[Tensor]
    velocities: list[Tensor]
    sigmas: Tensor
    images: list[Image.Image]


def record(pipeline: Any, unpack: Callable[[Tensor], Tensor] = lambda x: x, **call: Any) -> Recording:
    """Run a stock pipeline and keep what passes through its scheduler; `unpack` gives latents our shape."""
    latents, velocities, own_step = [], [], pipeline.scheduler.step

    @functools.wraps(own_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = own_step(model_output, timestep, sample, *args, **kwargs)
        latents[len(velocities) :] = [unpack(sample), unpack(result[0])]
        velocities.append(unpack(model_output))
        return result

    pipeline.scheduler.step = step
    try:
        drawn = pipeline(**call, output_type="pil", return_dict=False)[0]
    finally:
        del pipeline.scheduler.step
    images = drawn if isinstance(drawn[0], Image.Image) else [frame for video in drawn for frame in video]
    return Recording(latents, velocities, pipeline.scheduler.sigmas.clone(), images)


def noise_of(family: BaseFamily, seed: int = 0) -> Tensor:
    """(1, ...) initial noise of the family's shape."""
    return gaussian_noise((1, *family.latent_shape), seed)


# The checks


@torch.no_grad()
def check_velocities(family: BaseFamily, prompt: str | Prompt, recording: Recording) -> None:
    """On the pipeline's own latents our guided velocity is what its scheduler got."""
    text = family.encode([prompt])
    for latents, sigma, expected in zip(recording.latents, recording.sigmas, recording.velocities, strict=False):
        assert relative_error(family.velocity(latents, sigma.item(), text), expected) <= TOLERANCE


@torch.no_grad()
def check_comparison(family: BaseFamily, edits: Sequence[Prompt], folder: Path) -> None:
    """A comparison draws each prompt from its own source; of a video the middle frame is compared."""
    base = comparison.Candidate("base", None, AdapterInfo(family.config, RolloutConfig(num_steps=2)))
    wanted = [edits[0], edits[0]._replace(source=edits[1].source)]
    assert comparison.suiting(wanted, [base]) == [base]
    pictures = comparison.draw(base, wanted, [7, 7], folder)
    for prompt, drawn in zip(wanted, pictures, strict=True):
        frames = draw(family, family.encode([prompt]), [7], "dpmpp_2m", family.sigmas(2))
        assert len(frames) == family.num_frames
        assert np.array_equal(np.asarray(drawn.load()), np.asarray(frames[len(frames) // 2]))


@torch.no_grad()
def check_encoding_once(
    family: BaseFamily, edits: Sequence[Prompt], negative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of prompt and source is encoded once, and the negative prompt once for all of them."""
    again: Any = family.with_settings(family.config)
    encoded, encode_alone = [], again.encode_alone
    monkeypatch.setattr(again, "encode_alone", lambda prompt: encoded.append(prompt) or encode_alone(prompt))
    wanted = [edits[0], edits[0]._replace(source=edits[1].source), edits[0], edits[1]]
    first, second = again.encode(wanted), again.encode(wanted)
    assert encoded == [edits[0].text, negative, edits[0].text, edits[1].text]
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])
        assert torch.equal(tensor[0], tensor[2])
    assert not torch.equal(first.tensors["prompt_embeds"][0], first.tensors["negative_prompt_embeds"][0])


def check_conditionings_on_disk(
    family: BaseFamily, alone: BaseFamily, edits: Sequence[Prompt], folder: Path, others: Sequence[dict[str, Any]]
) -> None:
    """What the part that encodes leaves on disk is what the whole model encodes; with `others` for settings, nothing.

    Args:
        alone: the part of the same model that encodes.
    """
    cache = EmbeddingCache(folder, family.config)
    cache.fill(alone, edits)
    expected, found = family.encode(edits), cache.encode(edits, torch.device("cpu"))
    assert {name: t.shape for name, t in found.tensors.items()} == {n: t.shape for n, t in expected.tensors.items()}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert len(load_file(cache.file(edits[0]))) == len(expected.tensors)
    for other in others:
        assert EmbeddingCache(folder, family.config.model_copy(update=other)).missing(edits) == edits


def check_sampling(family: BaseFamily, prompt: str | Prompt, recording: Recording, solver: str = "euler") -> None:
    """From the same noise our solver on the family's own schedule takes the pipeline's path to its pictures."""
    sigmas = family.sigmas(len(recording.velocities))
    torch.testing.assert_close(sigmas, recording.sigmas.float(), rtol=1e-6, atol=1e-7)
    text = family.encode([prompt])

    def draw() -> Tensor:
        return torch.stack(SOLVERS[solver](lambda x, s: family.velocity(x, s, text), recording.latents[0], sigmas))

    path, rounding = with_rounding(family.transformer, draw)
    assert relative_error(path, torch.stack(recording.latents)) <= rounding
    for image, expected in zip(family.decode(path[-1]), recording.images, strict=True):
        pixels = np.asarray(expected).astype(int)
        assert pixels.std() > 1  # not one colour
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1


@torch.no_grad()
def check_neighbours(
    family: BaseFamily, prompts: Sequence[str | Prompt] = PROMPTS, tolerance: float = TOLERANCE
) -> None:
    """A picture is the same to the bit whatever is drawn beside it; a batch of velocities, to float rounding."""
    text, seeds, sigmas = family.encode(prompts), range(len(prompts)), family.sigmas(2)
    assert len(text) == len(prompts)
    if "lengths" in text.tensors:
        assert len(set(text.tensors["lengths"].tolist())) > 1
    together = draw(family, text, seeds, "euler", sigmas)
    latents = torch.cat([noise_of(family, seed) for seed in seeds])
    levels = torch.linspace(0.9, 0.3, len(prompts))
    velocities = family.velocity(latents, levels, text)
    for row, prompt in enumerate(prompts):
        alone = family.encode([prompt])
        assert {name: tuple(tensor.shape[1:]) for name, tensor in alone.tensors.items()} == shapes(family, alone)
        at = row * family.num_frames
        pictures = draw(family, alone, [row], "euler", sigmas)
        assert [p.tobytes() for p in pictures] == [p.tobytes() for p in together[at : at + len(pictures)]]
        single = family.velocity(latents[[row]], levels[row].item(), alone)
        assert torch.equal(single, family.velocity(latents[[row]], levels[row].item(), text[[row]]))
        assert relative_error(velocities[[row]], single) <= tolerance


def shapes(family: BaseFamily, text: TextEmbeds) -> dict[str, tuple[int, ...]]:
    """What `text_shapes` says of one prompt, with a negative one of its own length where they are encoded together."""
    limit, found = int(family.settings["max_sequence_length"]), {}
    for name in text.tensors:
        lengths = "negative_lengths" if name.startswith("negative_") else "lengths"
        others = family.text_shapes(0).get("prompt_embeds", (0,))[0]  # tokens of a picture beside the prompt
        tokens = int(text.tensors[lengths]) - others if lengths in text.tensors else limit
        found[name] = family.text_shapes(tokens)[name]
    return found


@torch.no_grad()
def check_half_precision(folder: Path, prompt: str | Prompt = PROMPTS[0], **settings: Any) -> None:
    """In bfloat16 the model computes nearly the same, and what leaves it is float32."""
    half, full = (load(folder, dtype=dtype, **settings) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    velocities = [family.velocity(noise_of(family), 0.5, family.encode([prompt])) for family in (half, full)]
    assert {v.dtype for v in velocities} == {torch.float32}
    assert relative_error(*velocities) <= 0.05
    assert len(half.decode(noise_of(half))) == half.num_frames


def check_another_size(
    folder: Path | str, first: dict[str, Any], second: dict[str, Any], prompt: str | Prompt = PROMPTS[0]
) -> None:
    """A loaded model draws at other settings what one loaded with them draws, to the bit, and stays what it is."""

    def drawn(family: BaseFamily) -> list[Any]:
        text = family.encode([prompt])
        return [np.asarray(image).tolist() for image in draw(family, text, [5], "dpmpp_2m", family.sigmas(3))]

    loaded, wanted = load(Path(folder), **first), load(Path(folder), **second)
    before = drawn(loaded)
    other = loaded.with_settings(wanted.config)
    assert other.transformer is loaded.transformer
    assert drawn(other) == drawn(wanted)
    assert drawn(loaded) == before


def check_targets(family: BaseFamily, attention: set[str], feed_forward: set[str]) -> None:
    """Both `lora.targets` adapt exactly the layers meant, by their full names."""
    for targets, expected in (("attention", attention), ("attention+feed_forward", attention | feed_forward)):
        transformer = copy.deepcopy(family.transformer)
        lora.inject(transformer, LoraConfig(rank=2), *family.lora_targets(targets), seed=0)
        names = {name.partition(".lora_A")[0] for name in lora.parameters(transformer) if ".lora_A" in name}
        assert names == expected


def check_training(
    make_config: MakeConfig,
    folder: Path,
    output_dir: Path,
    *settings: str,
    prompts: Path | None = None,
    **parts_of_stock: Any,
) -> Run:
    """Two iterations train the LoRA and nothing else, and a stock pipeline draws with what is exported.

    Alpha is not the rank and weights are averaged, so that the file differs from the live parameters.
    """
    if prompts is None:
        prompts = output_dir / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    common = [
        f"model.path={folder}",
        "model.device=cpu",
        f"prompts.train={prompts}",
        f"prompts.held_out={prompts}",
        "evaluation.strict=null",
        "rollout.group_size=3",
        "lora.rank=4",
        "lora.alpha=8",
        "optimizer.ema_decay=0.5",
    ]
    run = prepare(make_config(output_dir / "run", *common, *settings))
    family, trained = run.family, set(run.lora_step.parameters)
    others = [*family.transformers[1:], *family.encoders]
    parts = {"transformer": family.transformer, "vae": family.vae} | dict(enumerate(others))
    start = {(part, name): w.clone() for part, module in parts.items() for name, w in module.state_dict().items()}
    complete(run)
    for part, module in parts.items():
        for name, weight in module.state_dict().items():
            adapted = part == "transformer" and name in trained
            assert torch.equal(weight, start[part, name]) != adapted, name

    seen: list[tuple[Any, Any]] = []
    remember = family.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad(), lora.swapped(family.transformer, run.lora_step.averaged):
        text = family.encode(run.held_out[:1])
        velocity = family.velocity(noise_of(family), family.probe_sigma, text)
        remember.remove()
        with lora.merged(family.transformer):
            assert relative_error(family.velocity(noise_of(family), family.probe_sigma, text), velocity) <= TOLERANCE
        expected = [first(family.transformer(*args, **kwargs)) for args, kwargs in seen]
        with lora.disabled(family.transformer):
            base = [first(family.transformer(*args, **kwargs)) for args, kwargs in seen]
    pipeline = stock(folder, family.pipeline_class, **parts_of_stock)
    file = output_dir / "run" / "adapter" / FILE_NAME
    second = {"load_into_transformer_2": True} if family.expert == "low_noise" else {}
    transformer = pipeline.transformer_2 if second else pipeline.transformer
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(file.parent, adapter_name=lora.ADAPTER_NAME, **second)
    else:  # as HunyuanVideo 1.5's
        transformer.load_lora_adapter(file.parent, weight_name=FILE_NAME, adapter_name=lora.ADAPTER_NAME)
    loaded = get_peft_model_state_dict(transformer, adapter_name=lora.ADAPTER_NAME)
    assert {f"transformer.{name}" for name in loaded} == set(load_file(file))
    with torch.no_grad():
        actual = [first(transformer(*args, **kwargs)) for args, kwargs in seen]
    for ours, theirs, bare in zip(expected, actual, base, strict=True):
        assert relative_error(theirs, ours) <= TOLERANCE
        assert relative_error(bare, ours) > 10 * TOLERANCE
    return run


def first(output: Any) -> Tensor:
    """The transformer's answer, out of the tuples and lists that it comes in."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
