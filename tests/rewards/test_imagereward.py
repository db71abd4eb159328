from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer

from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards import imagereward
from ngrpo_lora.rewards._blip import from_checkpoint
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

VISION, TEXT, DEPTH, IMAGE_PX = 128, 64, 2, 48
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "dog", "on", "grass", "##s"]
PROMPTS = ["a red circle", "dogs on grass on a red dog", "a dog " * 30, ""]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_state() -> dict[str, Tensor]:
    """ImageReward.pt's names at small sizes; attention far from uniform, embeddings small enough for eps to matter."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float) -> None:
        state[name] = std * torch.randn(shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int, gain: float = 1.5) -> None:
        normal(f"{name}.weight", outputs, inputs, std=gain / inputs**0.5)
        normal(f"{name}.bias", outputs, std=0.2)

    def norm(name: str, width: int) -> None:
        normal(f"{name}.weight", width, std=0.3)
        state[f"{name}.weight"] += 1
        normal(f"{name}.bias", width, std=0.2)

    vision = "blip.visual_encoder"
    normal(f"{vision}.cls_token", 1, 1, VISION, std=0.003)
    normal(f"{vision}.pos_embed", 1, 1 + (IMAGE_PX // 16) ** 2, VISION, std=0.003)
    normal(f"{vision}.patch_embed.proj.weight", VISION, 3, 16, 16, std=0.0002)
    normal(f"{vision}.patch_embed.proj.bias", VISION, std=0.001)
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.mlp.fc1", 4 * VISION, VISION)
        linear(f"{block}.mlp.fc2", VISION, 4 * VISION)
    norm(f"{vision}.norm", VISION)

    text = "blip.text_encoder"
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    normal(f"{text}.embeddings.word_embeddings.weight", len(WORDS) + 2, TEXT, std=0.01)
    normal(f"{text}.embeddings.position_embeddings.weight", 40, TEXT, std=0.003)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", TEXT, width)
            linear(f"{layer}.{attention}.self.value", TEXT, width)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 96, TEXT)
        linear(f"{layer}.output.dense", TEXT, 96)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 8, VISION)
    linear("blip.text_proj", 8, TEXT)
    for i, inputs, outputs in ((0, TEXT, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{i}", outputs, inputs, gain=1.0)
    return state


def restated(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor, fault: str = "") -> Tensor:
    """BLIP's image-grounded text encoder and ImageReward's head, in plain PyTorch; `fault` plants an error."""
    gelu = {"tanh gelu": lambda x: F.gelu(x, approximate="tanh"), "quick gelu": lambda x: x * (1.702 * x).sigmoid()}
    activation = gelu.get(fault, F.gelu)
    vision_eps = 1e-5 if fault == "vision eps" else 1e-6
    text_eps = 1e-5 if fault == "text eps" else 1e-12

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 8 + (0 if bias is None else bias)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    vision = "blip.visual_encoder"
    proj = f"{vision}.patch_embed.proj"
    x = F.conv2d(pixels, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{vision}.pos_embed"]
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, vision_eps)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v))
        x = x + linear(
            f"{block}.mlp.fc2", activation(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, vision_eps)))
        )
    image = x if fault == "no last norm" else norm(f"{vision}.norm", x, vision_eps)

    text = "blip.text_encoder"
    embeddings = f"{text}.embeddings"
    h = state[f"{embeddings}.word_embeddings.weight"][ids]
    h = h + state[f"{embeddings}.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{embeddings}.LayerNorm", h, text_eps)
    bias = torch.where(mask[:, None, None].bool(), 0.0, -torch.inf)
    for i in range(DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for name, source in (("attention", None), ("crossattention", image)):
            if fault == "no cross-attention" and source is not None:
                continue
            qkv = [linear(f"{layer}.{name}.self.query", h)]
            qkv += [linear(f"{layer}.{name}.self.{part}", h if source is None else source) for part in ("key", "value")]
            out = attend(*qkv, bias if source is None and fault != "no attention mask" else None)
            h = norm(f"{layer}.{name}.output.LayerNorm", h + linear(f"{layer}.{name}.output.dense", out), text_eps)
        out = linear(f"{layer}.output.dense", activation(linear(f"{layer}.intermediate.dense", h)))
        h = norm(f"{layer}.output.LayerNorm", h + out, text_eps)
    h = h.mean(1) if fault == "mean of the tokens" else h[:, 0]
    for i in (0, 2, 4, 6, 7):
        h = linear(f"mlp.layers.{i}", h)
    return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state()


@pytest.fixture(scope="module")
def folder(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(state, folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> imagereward.Config:
    return imagereward.Config(name="imagereward", path=str(folder), tokenizer=str(folder / "tokenizer"))


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = ((48, 48), (70, 51), (40, 99), (33, 60))
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def cropped(image: Image.Image, size: int = IMAGE_PX) -> Image.Image:
    """torchvision's Resize and CenterCrop of a PIL image."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    top, left = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
    pixels = np.array(image.resize((w, h), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels[top : top + size, left : left + size])


def inputs(images: list[Image.Image], fault: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids and mask, made by hand: [CLS] words [SEP], 35 tokens."""
    mean, std = ((0.0,) * 3, (1.0,) * 3) if fault == "pixels not normalised" else (MEAN, STD)
    pixels = np.stack([(np.asarray(cropped(image), dtype=np.float64) / 255 - mean) / std for image in images])
    ids = torch.zeros(len(PROMPTS), 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = " ".join(prompt.split()).replace("dogs", "dog ##s").split()[:33]
        line = [WORDS.index(token) for token in ["[CLS]", *tokens, "[SEP]"]]
        ids[row, : len(line)] = torch.tensor(line)
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2), ids, (ids != 0).long()


def test_scores_are_those_of_blip_restated_in_plain_torch(config, state):
    images = pictures()
    scores = Scorer([config])(Samples(images, PROMPTS, [{}] * 4))["imagereward"]
    assert scores.std() > 0.1
    torch.testing.assert_close(scores.float(), restated(state, *inputs(images)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fault",
    [
        "no attention mask",
        "no cross-attention",
        "no last norm",
        "tanh gelu",
        "quick gelu",
        "vision eps",
        "text eps",
        "pixels not normalised",
        "mean of the tokens",
    ],
)
def test_the_comparison_sees_a_planted_fault(state, fault):
    network, images = from_checkpoint(state).eval(), pictures()
    with torch.no_grad():
        right, wrong = network(*inputs(images)), restated(state, *inputs(images, fault), fault)
    assert (right - wrong).abs().max() > 1e-4


@pytest.mark.parametrize(("width", "height"), [(48, 48), (51, 48), (48, 55), (300, 200), (17, 90), (640, 641)])
def test_images_are_resized_and_cropped_as_torchvision_does(width, height):
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = imagereward.center_crop(Image.fromarray(noise), IMAGE_PX)
    assert np.array_equal(np.asarray(ours), np.asarray(cropped(Image.fromarray(noise))))


def test_images_of_any_mode_have_a_score(config):
    reward = imagereward.Reward(config, "cpu")
    images = [Image.new(mode, (50, 64), 1) for mode in ("L", "RGBA", "P", "CMYK")]
    assert reward(images, PROMPTS).isfinite().all()


def test_the_head_stays_float32_and_half_precision_is_near(config):
    half = imagereward.Reward(config.model_copy(update={"dtype": "bfloat16", "offload": True}), "cpu")
    assert half.network.head[0].weight.dtype == torch.float32
    assert half.network.vision.dtype == torch.bfloat16
    scores = half(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, imagereward.Reward(config, "cpu")(pictures(), PROMPTS), rtol=0, atol=0.3)


def test_missing_weights_are_named(config, folder, state, tmp_path):
    torch.save({k: v for k, v in state.items() if "blocks.1.attn.proj.bias" not in k}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"path must be ImageReward's weights.*layers\.1\.self_attn\.projection\.bias"):
        imagereward.Reward(config.model_copy(update={"path": str(tmp_path)}), "cpu")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is missing"):
        imagereward.Reward(config.model_copy(update={"path": str(tmp_path / "other.pt")}), "cpu")


def test_a_missing_tokenizer_is_named(config, tmp_path):
    with pytest.raises(UserError, match="tokenizer must be BERT's tokenizer"):
        imagereward.Reward(config.model_copy(update={"tokenizer": str(tmp_path)}), "cpu")
