"""HPSv3: how much people prefer an image for a prompt, by Qwen2-VL-7B with a head in place of its next word.

Source: Human Preference Score v3 (arXiv 2508.03789), package hpsv3 1.0.0, file `HPSv3.safetensors`. The network reads
the image, an instruction that holds the prompt, and the token <|Reward|>; the state there goes through

    Linear(3584, 1024), ReLU, Linear(1024, 16), ReLU, Linear(16, 2)

whose first output is the score, the mean of a normal distribution (the second is its spread). Unbounded.
The image keeps its shape at about 256 * 28^2 pixels, both sides multiples of 28.
Weights: MIT (package); 8.3 B parameters, 16.6 GB of memory in bfloat16; its activations may not fit in float16.

Two facts of the package that a port easily loses: all tokens, those of the image too, are at plain positions 0, 1, 2,
... (it calls the network without Qwen2-VL's grid positions), and the side is rounded down after a division in float64:
an image of 768 x 768 pixels is read at 420 x 420, one of 512 x 512 or 1024 x 1024 at 448 x 448.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ngrpo_lora.config.rewards.hpsv3 import FILE, Config
from ngrpo_lora.rewards._clip import MEAN, STD, read_weights, unreadable
from ngrpo_lora.rewards._placement import in_use, placement

PATCH_PX, MERGED = 14, 2  # the language model sees one token for 2 x 2 patches of 14 x 14 pixels
FRAMES = 2  # an image is a video of two equal frames
SIDE_PX = PATCH_PX * MERGED
AREA_PX = 256 * SIDE_PX**2
IMAGE, REWARD = "<|image_pad|>", "<|Reward|>"

INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense "
    "of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, "
    "or adult material. If such content is present, the image quality and satisfaction score should be the "
    "lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of number, "
    "appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance the "
    "subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
)


class Reward:
    """HPSv3's score of each image for its prompt, (B,) float32, unbounded."""

    def __init__(self, config: Config, device: str):
        from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

        self.device, dtype = placement(config, device, half="bfloat16")
        self.offload = config.offload
        state = read_weights(config, "path", config.path, FILE)
        try:
            architecture = AutoConfig.from_pretrained(config.processor)
            self.tokenizer = AutoTokenizer.from_pretrained(config.processor, padding_side="right")
            self.tokenizer.add_tokens([REWARD], special_tokens=True)
            architecture.text_config.vocab_size = len(self.tokenizer)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            wanted = "config.json and tokenizer of Qwen2-VL"
            raise unreadable(config, "processor", config.processor, wanted, error) from error
        weights = {name: tensor for key, tensor in state.items() if (name := renamed(key))}
        self.head = nn.Sequential(
            nn.Linear(architecture.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        loaded: Any  # transformers' own annotations do not fit what it returns
        try:
            head = {name: weights.pop(f"rm_head.{name}").float() for name in self.head.state_dict()}
            self.head.load_state_dict(head)
            loaded = Qwen2VLModel.from_pretrained(
                None, config=architecture, state_dict=weights, dtype=dtype, output_loading_info=True
            )
            self.network, report = loaded
            if unfit := [*report["missing_keys"], *report["unexpected_keys"]]:
                raise ValueError(f"{min(unfit)} is missing or unknown, one of {len(unfit)} such names")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise unreadable(config, "path", config.path, f"HPSv3's weights ({FILE})", error) from error
        self.network.eval().requires_grad_(False)
        self.head.eval().requires_grad_(False).to(self.device)
        self.reward_id = self.tokenizer.convert_tokens_to_ids(REWARD)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU, the score of each image for its prompt."""
        seen = [patches(image) for image in images]
        texts = [self.text(prompt, len(pixels) // MERGED**2) for prompt, (pixels, _) in zip(prompts, seen, strict=True)]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        positions = torch.arange(tokens.input_ids.shape[1], device=self.device).expand(3, *tokens.input_ids.shape)
        with in_use(self.network, self.device, self.offload) as network:
            states = network(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                position_ids=positions,
                pixel_values=torch.cat([pixels for pixels, _ in seen]).to(self.device, network.dtype),
                image_grid_thw=torch.tensor([grid for _, grid in seen], device=self.device),
                use_cache=False,
            ).last_hidden_state  # (B, L, D)
            return self.head(states[tokens.input_ids == self.reward_id].float())[:, 0].cpu()

    def text(self, prompt: str, num_image_tokens: int) -> str:
        """The conversation that is scored, with placeholders for the image; ValueError where the prompt has one."""
        if IMAGE in prompt or REWARD in prompt:
            raise ValueError(f"a prompt must not hold {IMAGE} or {REWARD}, got {prompt!r}")
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION.format(text_prompt=prompt)}]
        conversation = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return text.replace(IMAGE, IMAGE * num_image_tokens)


def renamed(key: str) -> str | None:
    """A weight's name in today's transformers, from that of 4.45 (`visual.`, `model.`) or later (`model.visual.`)."""
    if key.startswith("lm_head."):
        return None  # next words are not asked for
    key = re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)
    return key.removeprefix("model.")


def size_read(width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels at which an image is read: multiples of 28, an area of about 256 * 28^2."""
    sides = [max(1, round(side / SIDE_PX)) * SIDE_PX for side in (width, height)]
    if sides[0] * sides[1] > AREA_PX:
        shrink = math.sqrt(width * height / AREA_PX)
        sides = [math.floor(side / shrink / SIDE_PX) * SIDE_PX for side in (width, height)]
    elif sides[0] * sides[1] < AREA_PX:
        grow = math.sqrt(AREA_PX / (width * height))
        sides = [math.ceil(side * grow / SIDE_PX) * SIDE_PX for side in (width, height)]
    return sides[0], sides[1]


def patches(image: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
    """Preprocess an image of any size and mode into the patches that the network takes.

    Returns:
        (H * W, 3 * 2 * 14 * 14) float32, the four patches of a token one after the other, and their grid (1, H, W).
    """
    image = image.convert("RGB")
    image = image.resize(size_read(*image.size), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD  # (3, height, width)
    rows, columns = image.height // PATCH_PX, image.width // PATCH_PX
    blocks = pixels.reshape(3, rows // MERGED, MERGED, PATCH_PX, columns // MERGED, MERGED, PATCH_PX)
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # (rows * columns, 3, 14, 14)
    return blocks[:, :, None].expand(-1, -1, FRAMES, -1, -1).flatten(1), (1, rows, columns)
