from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards import hpsv3
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
PROMPTS = ["a red circle", "two dogs {on} a mat, and a good many words more", "a cat"]


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's, of single bytes and, to be quick, the longer words of the instruction."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(sorted({word for word in hpsv3.INSTRUCTION.split() if len(word) > 3 and word.isalpha()}))
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLModel:
    """Qwen2-VL of two layers with large weights and a row for the reward token."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    model = Qwen2VLModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gain = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.mul_(0 if parameter.ndim > 1 else 1).add_(gain * torch.randn(parameter.shape, generator=generator))
    return model


def make_head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = {}
    for i, inputs, outputs in ((0, 64, 1024), (3, 1024, 16), (5, 16, 2)):
        head[f"rm_head.{i}.weight"] = torch.randn(outputs, inputs, generator=generator) * 1.5 / inputs**0.5
        head[f"rm_head.{i}.bias"] = 0.2 * torch.randn(outputs, generator=generator)
    return head


def published_names(model: Qwen2VLModel) -> dict[str, Tensor]:
    """The weights under the names of transformers 4.45, in which HPSv3 was trained."""
    state = {name.replace("language_model.", "model."): tensor for name, tensor in model.state_dict().items()}
    return {**state, "lm_head.weight": torch.zeros(3, 64), **make_head()}


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Qwen2Tokenizer) -> Qwen2VLModel:
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def config(model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> hpsv3.Config:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_file(published_names(model), folder / "HPSv3.safetensors")
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hpsv3.Config(name="hpsv3", path=str(folder), processor=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def reward(config) -> hpsv3.Reward:
    return hpsv3.Reward(config, "cpu")


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = ((64, 64), (200, 300), (90, 260))
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def published(
    model: Qwen2VLModel, tokenizer: Qwen2Tokenizer, image: Image.Image, prompt: str, fault: str = ""
) -> float:
    """The package's forward pass: image states into the text's, the language model without positions, the head."""
    from transformers import Qwen2VLImageProcessorPil

    area = 256 * 28 * 28
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})
    seen = processor(image, return_tensors="pt")
    text = hpsv3.INSTRUCTION.format(text_prompt=prompt)
    text = f"<|im_start|>user\n<|vision_start|>@<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    before, after = (tokenizer(part).input_ids for part in text.replace("<|Reward|>", "~").split("@"))
    reward_id, image_id = len(tokenizer), model.config.image_token_id
    after = [reward_id if token == tokenizer("~").input_ids[0] else token for token in after]
    ids = torch.tensor([[*before, *[image_id] * (seen.image_grid_thw.prod() // 4), *after]])
    embeds = model.language_model.embed_tokens(ids)
    pixels = seen.pixel_values
    if fault == "patches in reading order":
        (_, rows, columns), blocks = seen.image_grid_thw[0].tolist(), pixels
        blocks = blocks.unflatten(0, (rows // 2, columns // 2, 2, 2)).transpose(1, 2)
        pixels = blocks.flatten(0, 3)
    embeds[ids == image_id] = model.visual(pixels, grid_thw=seen.image_grid_thw).pooler_output
    positions = None
    if fault == "grid positions":
        kinds = (ids == image_id).int()
        positions = model.get_rope_index(ids, image_grid_thw=seen.image_grid_thw, mm_token_type_ids=kinds)[0]
    states = model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    state = states[0, -1] if fault == "last token" else states[ids == reward_id][0]
    head = make_head()
    for i in (0, 3, 5):
        state = head[f"rm_head.{i}.weight"] @ state + head[f"rm_head.{i}.bias"]
        state = state if i == 5 or fault == "no relu" else state.relu()
    return state[1 if fault == "second output" else 0].item()


def test_scores_are_those_of_the_published_forward_pass(config, model, tokenizer):
    scores = Scorer([config])(Samples(pictures(), PROMPTS, [{}] * 3))["hpsv3"]
    expected = [published(model, tokenizer, *pair) for pair in zip(pictures(), PROMPTS, strict=True)]
    assert scores.std() > 0.05
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fault", ["grid positions", "patches in reading order", "last token", "no relu", "second output"]
)
def test_the_comparison_sees_a_planted_fault(reward, model, tokenizer, fault):
    image = pictures()[1]
    wrong = published(model, tokenizer, image, PROMPTS[1], fault)
    assert abs(reward([image], [PROMPTS[1]]).item() - wrong) > 1e-3


def test_padding_changes_no_score(reward):
    alone = [reward([image], [prompt]).item() for image, prompt in zip(pictures(), PROMPTS, strict=True)]
    torch.testing.assert_close(reward(pictures(), PROMPTS), torch.tensor(alone), rtol=0, atol=1e-5)


def test_weights_under_todays_names_give_the_same_scores(config, model, reward, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({**state, **make_head()}, tmp_path / "today.safetensors")
    today = hpsv3.Reward(config.model_copy(update={"path": str(tmp_path / "today.safetensors")}), "cpu")
    assert today(pictures(), PROMPTS).equal(reward(pictures(), PROMPTS))


def test_bfloat16_is_the_default_and_the_head_stays_float32(config, reward):
    assert hpsv3.Config(name="hpsv3").dtype == "bfloat16"
    half = hpsv3.Reward(config.model_copy(update={"dtype": "bfloat16", "offload": True}), "cpu")
    assert half.network.dtype == torch.bfloat16
    scores = half(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(pictures(), PROMPTS), rtol=0, atol=0.2)


def test_the_instruction_is_the_published_one_to_the_letter():
    digest = hashlib.sha256(hpsv3.INSTRUCTION.encode()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((448, 448), (448, 448)),
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((768, 768), (420, 420)),  # 447.99999999999994 is rounded down
        ((64, 64), (448, 448)),
        ((200, 300), (392, 560)),
        ((1344, 768), (588, 336)),
    ],
)
def test_images_are_read_at_the_published_sizes(size, read):
    assert hpsv3.size_read(*size) == read


@pytest.mark.parametrize("size", [(448, 448), (300, 200), (31, 50), (1344, 768)])
def test_patches_are_those_of_transformers(size):
    from transformers import Qwen2VLImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    area = 256 * 28 * 28
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})(
        Image.fromarray(noise), return_tensors="pt"
    )
    pixels, grid = hpsv3.patches(Image.fromarray(noise))
    assert list(grid) == theirs.image_grid_thw[0].tolist()
    torch.testing.assert_close(pixels, theirs.pixel_values, rtol=0, atol=1e-6)


def test_a_prompt_with_a_token_of_the_network_has_no_score(reward):
    with pytest.raises(ValueError, match="must not hold"):
        reward(pictures()[:1], ["a <|Reward|>"])


def test_weights_that_do_not_fit_are_named(config, model, tmp_path):
    state = published_names(model)
    del state["model.norm.weight"]
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"path must be HPSv3's weights.*language_model\.norm\.weight"):
        hpsv3.Reward(config.model_copy(update={"path": str(tmp_path)}), "cpu")
    with pytest.raises(UserError, match=r"path must be a file of weights \(HPSv3\.safetensors\)"):
        hpsv3.Reward(config.model_copy(update={"path": str(tmp_path / "none")}), "cpu")


def test_a_processor_of_another_network_is_named(config, tmp_path):
    with pytest.raises(UserError, match=r"processor must be config\.json and tokenizer of Qwen2-VL"):
        hpsv3.Reward(config.model_copy(update={"processor": str(tmp_path)}), "cpu")
