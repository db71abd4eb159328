"""OCR: whether the text that the prompt puts in double quotes can be read in the image, in [0, 1].

    1 - min(distance(read, wanted), len(wanted)) / len(wanted)

with the Levenshtein distance, in lower case and without spaces. Source: Flow-GRPO (arXiv 2505.05470), which sets the
distance to 0 where the wanted text is a part of what is read: extra text is free, and RL finds that out; `exact: true`
charges for it. Departures: all quoted texts of a prompt count, joined, where Flow-GRPO takes the first; a prompt
without any is a failed score; PP-OCRv6 in place of PP-OCRv4.

The models (31 MB, on the CPU; Apache-2.0) are inside the wheel of `rapidocr`, nothing is downloaded. An image of
512 x 512 px takes a quarter of a second on one core, `detect: false` an eighth of that.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import UserError

DETECTION, RECOGNITION = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"


class Config(RewardConfig, frozen=True):
    """Settings of OCR: how text is found in an image, and what counts as right."""

    exact: bool = Field(default=False, description="Charge for text beside what is wanted; false: Flow-GRPO's score.")
    detect: bool = Field(
        default=True, description="Look for text anywhere; false: the image is one line of text, faster and for 32 px."
    )
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="Text read with less confidence is none.")


class Reward:
    """Reads the text in one image and compares it with the text that is wanted."""

    def __init__(self, config: Config, device: str):
        import torch

        try:
            import rapidocr
        except ImportError as error:
            raise UserError(
                f"reward {config.key} needs the packages rapidocr and onnxruntime ({error}); install them with "
                "pip install onnxruntime 'rapidocr>=3.10,<3.11'"
            ) from None
        models = Path(rapidocr.__file__).parent / "models"
        for name in (DETECTION, RECOGNITION):
            if not (models / name).is_file():
                raise UserError(
                    f"reward {config.key} needs the model {name} that is part of rapidocr 3.10, but {str(models)!r} "
                    f"does not hold it; install it with pip install 'rapidocr>=3.10,<3.11'"
                )
        self.config = config
        self.engine = rapidocr.RapidOCR(
            params={
                "Det.model_path": str(models / DETECTION),  # a path, so that it never asks the network
                "Rec.model_path": str(models / RECOGNITION),
                "Global.use_det": config.detect,
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )
        self.one_at_a_time = threading.Lock()  # a call that ran into its timeout may still be going on

    def __call__(self, image: Image.Image, prompt: str, metadata: dict[str, Any]) -> float:
        """Score one image in [0, 1]: 1 for the wanted text, which is metadata's `text` or what the prompt quotes.

        Raises:
            ValueError: neither the prompt nor the metadata has a wanted text.
        """
        wanted = _normalized(metadata["text"] if "text" in metadata else "".join(quoted(prompt)))
        if not wanted:
            raise ValueError(f"the prompt must hold the wanted text in double quotes, got {prompt!r}; or metadata.text")
        return similarity(_normalized(self.read(image)), wanted, self.config.exact)

    def read(self, image: Image.Image) -> str:
        """The text in an image, from top to bottom and left to right."""
        with self.one_at_a_time:
            found: Any = self.engine(image.convert("RGB"))
        lines = zip(found.txts or (), found.scores or (), strict=True)
        return "".join(text for text, confidence in lines if confidence >= self.config.min_confidence)


def quoted(prompt: str) -> list[str]:
    """The parts of a prompt that stand in double quotes, straight or typographic."""
    return re.findall(r'["“”]([^"“”]+)["“”]', prompt)


def similarity(read: str, wanted: str, exact: bool) -> float:
    """Score 1 - min(distance, len(wanted)) / len(wanted); unless `exact`, 1 where `wanted` is a part of `read`."""
    if not exact and wanted in read:
        return 1.0
    return 1 - min(_distance(read, wanted), len(wanted)) / len(wanted)


def _normalized(text: str) -> str:
    return "".join(text.split()).lower()


def _distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions between two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
