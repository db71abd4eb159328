"""Draw the pictures that the verifier is calibrated on: `python tests/world/make_calibration.py [ADAPTER]`.

Writes `calibration.png`, 192 generated pictures of held-out prompts in rows of 16, and keeps the labels in
`calibration.json`: 1 where a person finds the prompt fulfilled. New pictures want new labels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.prompts import open_prompts
from ngrpo_lora.sampling import draw, load_family
from ngrpo_lora.solvers import flow_sigmas

HERE = Path(__file__).parent
COUNT, COLUMNS, SIDE_PX, SEED = 192, 16, 64, 2000


def main() -> None:
    """Every other picture by the base model, the rest by the adapter, where one is given."""
    source = open_prompts("world:held_out", SEED)
    prompts = [source.prompt(i) for i in range(COUNT)]
    sheet = Image.new("RGB", (COLUMNS * SIDE_PX, COUNT // COLUMNS * SIDE_PX))
    family = load_family(ModelConfig())
    sigmas = flow_sigmas(8, float(family.settings["shift"]))
    for tuned in (False, True):
        if tuned and len(sys.argv) > 1:
            family.load_adapter(sys.argv[1], 1.0)
        rows = [i for i in range(COUNT) if i // 6 % 2 == tuned]
        images = draw(family, family.encode([prompts[i] for i in rows]), [SEED + i for i in rows], "dpmpp_2m", sigmas)
        for i, image in zip(rows, images, strict=True):
            sheet.paste(image, (i % COLUMNS * SIDE_PX, i // COLUMNS * SIDE_PX))
    sheet.save(HERE / "calibration.png")
    (HERE / "calibration.json").write_text(json.dumps([{"prompt": p, "label": None} for p in prompts], indent=0))


if __name__ == "__main__":
    main()
