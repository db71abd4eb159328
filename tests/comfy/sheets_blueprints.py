"""The blueprints of subgraphs/: nodes that are graphs."""

from __future__ import annotations

from blueprint import Blueprint
from parts import DEMO, PICTURE_PX, TEXT_PX
from sheet import STREET, Schemas


def adapter_to_picture(schemas: Schemas) -> Blueprint:
    """Pictures of a prompt with an adapter, as it was trained."""
    sheet = Blueprint(
        "Adapter to Picture",
        schemas,
        description="Draws a prompt with an adapter as it was trained: its sampler, noise levels, guidance and size.",
        aliases=["lora", "text to image", "ngrpo"],
    )
    sheet.column(320)
    with sheet.group("Adapter", "model", street=2 * STREET):
        adapter = sheet.add("NGRPO_LoadAdapter", room=TEXT_PX, lora_name=DEMO)
    with sheet.group("Prompt", "text"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, text="a star above a heart")
    sheet.column(260)
    with sheet.group("Noise and size", "sample", street=2 * STREET):
        size = {"width": adapter["width"], "height": adapter["height"]}
        latent = sheet.add("EmptySD3LatentImage", "Size and batch", batch_size=1, **size)
        noise = sheet.add("RandomNoise", noise_seed=7)
    sheet.space(3 * STREET)
    with sheet.group("Guidance", "sample"):
        guided = sheet.add("FluxGuidance", conditioning=text[0], guidance=adapter["guidance"])
    sheet.column(220)
    with sheet.group("Guide", "sample", street=2 * STREET):
        guider = sheet.add("BasicGuider", model=adapter["MODEL"], conditioning=guided[0])
    sheet.column(270)
    with sheet.group("Draw", "result", street=2 * STREET):
        drawn = sheet.add(
            "SamplerCustomAdvanced",
            noise=noise[0],
            guider=guider[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
    sheet.column(240)
    with sheet.group("Decode", "result", street=2 * STREET):
        picture = sheet.add("VAEDecode", samples=drawn["output"])
    sheet.open("model", (adapter, "model"))
    sheet.open("clip", (text, "clip"))
    sheet.open("vae", (picture, "vae"))
    sheet.open("text", (text, "text"))
    sheet.open("lora_name", (adapter, "lora_name"))
    sheet.open("strength", (adapter, "strength"))
    sheet.open("batch_size", (latent, "batch_size"))
    sheet.open("noise_seed", (noise, "noise_seed"))
    sheet.give("IMAGE", picture[0])
    return sheet


def train_and_compare(schemas: Schemas) -> Blueprint:
    """An adapter trained on rewards, and pictures of it beside the base's."""
    sheet = Blueprint(
        "Train Adapter and Compare",
        schemas,
        description="Trains an adapter on rewards with Neighbor GRPO, then draws the same seeds with the base and with "
        "it, judged by the same rewards.",
        aliases=["train lora", "grpo", "rl", "compare"],
    )
    sheet.column(400)
    with sheet.group("Train", "train", street=2 * STREET):
        trained = sheet.add("NGRPO_Train", room=TEXT_PX + PICTURE_PX, name="my-adapter")
    sheet.column(320)
    with sheet.group("New adapter", "model", street=2 * STREET):
        adapter = sheet.add("NGRPO_LoadAdapter", room=TEXT_PX, files="loras", lora_name=trained["lora_name"])
        listed = sheet.add("NGRPO_AdapterList", files="loras", lora_name=trained["lora_name"])
        for node in (adapter, listed):
            node.saved["widgets_values"][0] = DEMO  # behind the link; else whatever file is first
    with sheet.group("Prompt", "text"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, text="a red star and a blue circle")
    sheet.column(260)
    with sheet.group("Guidance and size", "sample", street=2 * STREET):
        guided = sheet.add("FluxGuidance", conditioning=text[0], guidance=adapter["guidance"])
        size = {"width": adapter["width"], "height": adapter["height"]}
        latent = sheet.add("EmptySD3LatentImage", "Size", batch_size=1, **size)
    sheet.column(360)
    with sheet.group("Compare", "train", street=2 * STREET):
        compared = sheet.add(
            "NGRPO_Compare",
            room=TEXT_PX + PICTURE_PX,
            positive=guided[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
            noise_seed=7,
            num_seeds=3,
            prompt="a red star and a blue circle",
            adapters=listed[0],
        )
    sheet.open("model", (adapter, "model"), (compared, "model"))
    sheet.open("clip", (text, "clip"))
    sheet.open("vae", (compared, "vae"))
    sheet.open("rewards", (trained, "rewards"), (compared, "rewards"))
    for name in ("preset", "name", "overrides", "iterations"):
        sheet.open(name, (trained, name))
    sheet.open("text", (text, "text"), (compared, "prompt"))
    sheet.open("num_seeds", (compared, "num_seeds"))
    sheet.give("grid", compared["grid"])
    sheet.give("lora_name", trained["lora_name"])
    return sheet
