"""Wan image-to-video on ComfyUI's own model: an adapter that we export fits it, and it draws as diffusers does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from rounding import MULTIPLE, relative_error, with_rounding
from safetensors.torch import load_file
from torch import Tensor
from wan_parts import make_first_frame_folder

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.reading import read_adapter_file
from ngrpo_lora.adapters.writing import convert, save_tensors
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.sampling.strengths import parse_schedule
from ngrpo_lora.training.export import save_adapter
from ngrpo_lora.types import TextEmbeds

pytestmark = pytest.mark.usefixtures("in_process")

WIDTH = 256  # ComfyUI takes heads to be 128 wide, and texts, times and what CLIP sees as wide as Wan has them
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
}
SEEN: dict[str, Any] = {"image_dim": 1280, "added_kv_proj_dim": WIDTH}
KINDS = {"single": None, "pair": 0.9}
"""Wan 2.1, whose transformer sees the first frame by CLIP too, and Wan 2.2, a pair with a boundary between them."""

SIGMA = 0.7


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def weights(kind: str) -> dict[str, Tensor]:
    """Random weights of the transformer by the names that Wan's own files have."""
    import comfy.ldm.wan.model
    import comfy.ops

    sizes = {"in_dim": 36, "dim": WIDTH, "ffn_dim": 32, "num_heads": 2, "num_layers": 2}
    model = comfy.ldm.wan.model.WanModel(
        "i2v" if kind == "single" else "t2v", **sizes, operations=comfy.ops.manual_cast, dtype=torch.float32
    )
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        one = name.endswith("weight") and weight.ndim == 1
        torch.nn.init.normal_(weight, float(one), 0.2 if weight.ndim == 1 else weight[0].numel() ** -0.5)
    return {name: weight.detach() for name, weight in model.state_dict().items()}


@pytest.fixture
def family(kind: str, weights: dict[str, Tensor], tmp_path: Path) -> BaseFamily:
    """Ours, with these weights."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    sizes = TRANSFORMER | (SEEN if kind == "single" else {})
    folder = make_first_frame_folder(tmp_path / "model", KINDS[kind], **sizes)
    family = load_family(ModelConfig(path=str(folder), device="cpu"))
    family.transformer.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))
    return family


@pytest.fixture
def model(weights: dict[str, Tensor]) -> Any:
    """ComfyUI's, which it finds out by the weights."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": torch.float32})


@pytest.fixture
def adapter(family: BaseFamily, make_config: MakeConfig, tmp_path: Path) -> Path:
    """A file as a run exports it; the LoRA stays in our model."""
    config = make_config(tmp_path, f"model.path={family.config.path}", "lora.rank=2", "lora.alpha=4")
    lora.inject(family.transformer, config.lora, *family.lora_targets("attention+feed_forward"), seed=0)
    for name, weight in lora.parameters(family.transformer).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.3)
    save_adapter(tmp_path / "adapter.safetensors", family, config)
    return tmp_path / "adapter.safetensors"


class Inputs:
    """What one step is computed from: latents, prompt, and a first frame as the VAE and CLIP give it."""

    def __init__(self, sees: bool):
        draw = torch.Generator().manual_seed(2)
        self.latents, self.frame = (torch.randn(1, 16, 3, 4, 8, generator=draw) for _ in range(2))
        self.text = torch.randn(1, 512, 4096, generator=draw)
        self.seen = torch.randn(1, 257, 1280, generator=draw) if sees else None

    def by_comfyui(self, model: Any) -> Tensor:
        """The velocity of a MODEL, with the conditioning that WanImageToVideo gives."""
        import comfy.samplers

        drawn: list[Tensor] = []

        def step(denoise: Any, latents: Tensor, sigmas: Tensor, extra_args: Any, *_: Any, **__: Any) -> Tensor:
            clean = denoise(latents, sigmas[:1], **extra_args)
            drawn.append((latents - clean) / sigmas[0])
            return clean

        mask = torch.ones(1, 1, *self.latents.shape[2:])
        mask[:, :, :1] = 0
        given: dict[str, Any] = {"concat_latent_image": self.frame, "concat_mask": mask}
        if self.seen is not None:
            given["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=self.seen)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": [[self.text, given]]})
        guider.set_cfg(1.0)
        noise = self.latents / SIGMA  # what is drawn from begins at the mean of the latents
        start = model.model.process_latent_out(torch.zeros_like(noise))
        guider.sample(
            noise, start, comfy.samplers.KSAMPLER(step), torch.tensor([SIGMA, 0.0]), disable_pbar=True, seed=0
        )
        return drawn[0]

    @torch.no_grad()
    def by_diffusers(self, family: BaseFamily, model: Any) -> tuple[Tensor, float]:
        """The velocity of our family's transformer, and the relative error that rounding explains.

        ComfyUI rounds the frequencies of a noise level otherwise: so much may the level itself be rounded.
        """
        frame = model.model.process_latent_in(self.frame)
        is_given = torch.zeros_like(frame[:, :4])
        is_given[:, :, 0] = 1
        given = {"prompt_embeds": self.text, "condition": torch.cat([is_given, frame], 1)}
        text = TextEmbeds(given | ({} if self.seen is None else {"image_embeds": self.seen}))

        def velocity(level: float = SIGMA) -> Tensor:
            return family.forward(self.latents, torch.tensor([level]), text)

        expected, rounding = with_rounding(family.transformer, velocity)
        eps = torch.finfo(torch.float32).eps
        levels = [relative_error(velocity(SIGMA * (1 + sign * eps)), expected) for sign in (1, -1)]
        return expected, rounding + MULTIPLE * max(levels)


def by_ours(model: Any, file: Path) -> Any:
    """A MODEL with an adapter, by Load Adapter."""
    from comfy_nodes.fitting import read_fitting
    from comfy_nodes.schedules import apply

    return apply(model, read_fitting(model, file), 1.0, parse_schedule(""))


def by_theirs(model: Any, file: Path) -> Any:
    """A MODEL with an adapter as `ngrpo export --format comfyui` writes it, by ComfyUI's own loader."""
    import comfy.sd
    import comfy.utils

    save_tensors(converted := file.with_name("comfyui.safetensors"), *convert(read_adapter_file(file), "comfyui"))
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(converted)), 1.0, 0.0)[0]


def test_without_an_adapter_it_draws_as_diffusers_does(kind: str, family: BaseFamily, model: Any):
    inputs = Inputs(kind == "single")
    expected, rounding = inputs.by_diffusers(family, model)
    assert relative_error(inputs.by_comfyui(model), expected) <= rounding


@pytest.mark.parametrize("load", [by_ours, by_theirs])
def test_an_exported_adapter_draws_as_diffusers_does(
    kind: str,
    family: BaseFamily,
    model: Any,
    adapter: Path,
    load: Callable[[Any, Path], Any],
    caplog: pytest.LogCaptureFixture,
):
    inputs = Inputs(kind == "single")
    base = inputs.by_comfyui(model)
    with caplog.at_level(logging.WARNING):
        patched = load(model, adapter)
    assert "not loaded" not in caplog.text
    assert len(patched.patches) == len(load_file(adapter)) / 2 == 2 * (8 + 2 + 2 * (kind == "single"))
    expected, rounding = inputs.by_diffusers(family, model)
    assert relative_error(base, expected) > 0.05
    assert relative_error(inputs.by_comfyui(patched), expected) <= rounding
