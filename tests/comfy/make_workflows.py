"""Write workflows/*.json as the browser saves graphs, and workflows/api/*.json as /prompt takes them.

python tests/comfy/make_workflows.py; `make comfy-workflows` does it in the right environment.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api
from comfy_client import REPOSITORY, start
from sheet import Node, Output, Schemas, Sheet

WORKFLOWS = REPOSITORY / "workflows"
DEMO = "ngrpo-demo.safetensors"
PROMPT = "a star above a heart"


def draw(sheet: Sheet, model: Output, text: Output, **inputs: Any) -> Node:
    """ComfyUI's sampler over a model: inputs are noise, sampler, sigmas and latent_image."""
    guider = sheet.add("BasicGuider", model=model, conditioning=text)
    return sheet.add("SamplerCustomAdvanced", guider=guider[0], **inputs)


def neighbor_explorer(schemas: Schemas) -> Sheet:
    """One seed's picture and its neighbours."""
    sheet = Sheet("neighbor-explorer", schemas)
    sheet.column(400)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Neighbours of a picture\n\n"
            "**Run.** The first of nine pictures is the seed's, the others are its neighbours: noise at a distance "
            "from the seed's noise.\n\n"
            "Turn **perturbation_strength**: at 0.1 the pictures differ in details, at 0.3 (as Neighbor GRPO trains) "
            "more, at 1 nothing is left of the seed.\n\n"
            "For more neighbours raise the batch size, or set **member** to 8, 17, ...\n\n"
            "To keep one: its member, with batch size 1.",
            350,
        )
    with sheet.group("Model and prompt", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        text = sheet.add("CLIPTextEncode", "Prompt", clip=model["CLIP"], text="a red star and a blue circle")
    sheet.column(340)
    with sheet.group("Neighbours", "sample"):
        noise = sheet.add("NGRPO_NeighborNoise", noise_seed=7, perturbation_strength=0.3, member=-1)
        latent = sheet.add("EmptySD3LatentImage", "Size and batch", width=64, height=64, batch_size=9)
        sampler = sheet.add("NGRPO_FlowSampler")
        sigmas = sheet.add("NGRPO_FlowSigmas", base="embedded", steps=8, width=64, height=64)
    sheet.column(460)
    with sheet.group("Pictures", "result"):
        drawn = draw(
            sheet,
            model["MODEL"],
            text[0],
            noise=noise[0],
            sampler=sampler[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
        )
        decoded = sheet.add("VAEDecode", samples=drawn["output"], vae=model["VAE"])
        sheet.add("PreviewImage", body=430, images=decoded[0])
    return sheet


GRAPHS = (neighbor_explorer,)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write(schemas: Schemas, folder: Path) -> None:
    """All graphs, in both formats."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for make in GRAPHS:
        sheet = make(schemas)
        write_json(folder / f"{sheet.name}.json", sheet.ui())
        write_json(folder / "api" / f"{sheet.name}.json", convert_ui_to_api(sheet.ui(), schemas))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        server = start(Path(base))
        try:
            write(server.get("/object_info"), WORKFLOWS)
        finally:
            server.stop()
