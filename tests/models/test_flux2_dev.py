"""FLUX.2-dev against diffusers' `Flux2Pipeline`, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from family_checks import (
    PROMPTS,
    byte_vocabulary,
    check_another_size,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_training,
    check_velocities,
    load,
    model_folder,
    noise_of,
    record,
    stock,
)
from rounding import relative_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily

SIZE: dict[str, Any] = {"height_px": 32, "width_px": 48, "max_sequence_length": 256}
SETTINGS = ["model.height_px=32", "model.width_px=48", "model.max_sequence_length=256"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"]


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral's, with bytes for tokens and a chat template of a system message and a turn."""
    bytes_alone = Tokenizer(models.BPE(vocab=byte_vocabulary(*SPECIAL), merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        **{f"{name}_token": token for name, token in zip(("unk", "bos", "eos", "pad"), SPECIAL, strict=False)},
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}{% set form = 'SYSTEM_PROMPT' if turn.role == 'system' else 'INST' %}"
        "[{{ form }}]{% for part in turn.content %}{{ part.text }}{% endfor %}[/{{ form }}]{% endfor %}"
    )
    return tokenizer


def make_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {
        "model_type": "mistral",
        "vocab_size": 512,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 31,  # the 10th, 20th and 30th are read
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, batch_norm_eps=0.1
    )
    vae.bn.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
    vae.bn.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    tokenizer: Any = mistral_tokenizer()  # a PixtralProcessor could not be made without torchvision
    return model_folder(Flux2Pipeline(scheduler, vae, encoder, tokenizer, transformer), folder)


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("flux2_dev"))


@pytest.fixture(scope="session")
def family(dev: Path) -> BaseFamily:
    return load(dev, **SIZE)


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_it_draws_as_diffusers_does_in_one_pass_at_any_guidance(dev: Path, guidance: float | None):
    family = load(dev, **SIZE, guidance_scale=guidance)
    assert not family.guided

    def unpack(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(1, *family.latent_shape)

    call = {"prompt": PROMPTS[2], "latents": noise_of(family), "num_inference_steps": 3, "max_sequence_length": 256}
    call |= {} if guidance is None else {"guidance_scale": guidance}
    recording = record(stock(dev, "Flux2Pipeline"), unpack, **call, height=32, width=48)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_guidance_is_an_input_of_the_transformer(dev: Path, family: BaseFamily):
    assert family.settings == {"guidance_scale": 4.0, "max_sequence_length": 256}
    other = load(dev, **SIZE, guidance_scale=1.0)
    with torch.no_grad():
        velocities = [f.velocity(noise_of(f), 0.5, f.encode(PROMPTS[:1])) for f in (family, other)]
    assert relative_error(*velocities) > 1e-4


def test_pictures_do_not_depend_on_their_neighbours(family: BaseFamily):
    check_neighbours(family)


def test_it_computes_nearly_the_same_in_half_precision(dev: Path):
    check_half_precision(dev, **SIZE)


def test_it_trains_and_a_stock_pipeline_draws_with_the_adapter(make_config: MakeConfig, dev: Path, tmp_path: Path):
    run = check_training(make_config, dev, tmp_path, *SETTINGS, "lora.targets=attention+feed_forward")
    assert (run.family.architecture, run.family.kohya_version) == ("Flux.2-dev", "flux_2_dev")


def test_the_published_index_names_a_processor_of_which_the_tokenizer_is_enough(
    dev: Path, family: BaseFamily, tmp_path: Path
):
    folder = shutil.copytree(dev, tmp_path / "published")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    ours, theirs = (f.encode(PROMPTS[:1]).tensors["prompt_embeds"] for f in (load(folder, **SIZE), family))
    assert torch.equal(ours, theirs)


def test_a_folder_without_a_tokenizer_is_refused(dev: Path, tmp_path: Path):
    folder = shutil.copytree(dev, tmp_path / "bare")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="its folder tokenizer cannot be read"):
        load(folder, **SIZE)


def test_a_prompt_has_the_tokens_that_system_message_and_chat_form_leave(family: BaseFamily):
    """One token more, and the end of the form is lost, not yet the prompt's."""
    ((tokenizer, limit),) = family.tokenizers().values()
    texts = ["a" * length for length in (limit, limit + 1)]
    forms = tokenizer.apply_chat_template(format_input(texts, family.pipeline.system_message), return_dict=True)
    assert [len(tokens) for tokens in forms["input_ids"]] == [256, 257]


def test_a_loaded_model_can_be_asked_for_another_size(dev: Path):
    check_another_size(dev, SIZE, {"height_px": 64, "width_px": 32, "max_sequence_length": 224, "guidance_scale": 2.0})
