"""Draw the pictures that the verifier is calibrated on: `python tests/world/make_calibration.py`.

Writes `calibration.png`, 192 pictures of held-out prompts by the embedded model in rows of 16, and `calibration.json`
with the prompts. A person then labels each: 1 where the prompt is fulfilled, 0 where not. New pictures, new labels.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.sampling.sampler import draw

HERE = Path(__file__).parent
COUNT, COLUMNS, SIDE_PX, SEED = 192, 16, 64, 2000


def main() -> None:
    """Same pictures for the same weights; labels that are there already are lost."""
    source = open_prompts("world:held_out", SEED)
    prompts = [source.prompt(i).text for i in range(COUNT)]
    family = load_family(ModelConfig())
    sigmas = family.sigmas(8)
    images = draw(family, family.encode(prompts), [SEED + i for i in range(COUNT)], "dpmpp_2m", sigmas)
    sheet = Image.new("RGB", (COLUMNS * SIDE_PX, COUNT // COLUMNS * SIDE_PX))
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * SIDE_PX, i // COLUMNS * SIDE_PX))
    sheet.save(HERE / "calibration.png")
    rows = [json.dumps({"prompt": prompt, "label": None}) for prompt in prompts]
    (HERE / "calibration.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
