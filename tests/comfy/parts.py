"""What several graphs of workflows/ have in common."""

from __future__ import annotations

from sheet import GAP, Node, Output, Sheet

DEMO = "ngrpo-demo.safetensors"
PROMPT = "a star above a heart"
TEXT_PX, PICTURE_PX = 200, 290  # what nodes grow by when they have run
PAGE_PX = 640  # and while they show a voting page


def prompt(sheet: Sheet, clip: Output, words: str) -> tuple[Node, Output]:
    """The prompt as text, for rewards, and encoded."""
    text = sheet.add("PrimitiveStringMultiline", "Prompt", body=110, value=words)
    sheet.beside(sheet.width)
    encoded = sheet.add("CLIPTextEncode", "Encoded prompt", body=110, clip=clip, text=text[0])
    return text, encoded[0]


def sampling(sheet: Sheet, batch_size: int = 1) -> tuple[Output, Output, Output]:
    """Sampler, noise levels and empty latents of the embedded model."""
    sigmas = sheet.add("NGRPO_FlowSigmas", base="embedded", steps=8, width=64, height=64)
    sheet.beside(sheet.width)
    sampler = sheet.add("NGRPO_FlowSampler")
    title = "Size and batch" if batch_size > 1 else "Size"
    latent = sheet.add("EmptySD3LatentImage", title, width=64, height=64, batch_size=batch_size)
    return sampler[0], sigmas[0], latent[0]


def draw(sheet: Sheet, guider: Output, vae: Output, **inputs: Output) -> Output:
    """Pictures by ComfyUI's sampler, from left to right; inputs are noise, sampler, sigmas and latent_image."""
    drawn = sheet.add("SamplerCustomAdvanced", guider=guider, **inputs)
    sheet.beside(240)
    return sheet.add("VAEDecode", samples=drawn["output"], vae=vae)["IMAGE"]


def enlarge(sheet: Sheet, images: Output) -> Output:
    """Pictures of 64 pixels, large enough to be seen."""
    sheet.beside(240)
    return sheet.add("ImageScaleBy", "Enlarge", image=images, upscale_method="lanczos", scale_by=4)[0]


def show(sheet: Sheet, images: Output, body: int, title: str | None = None) -> Node:
    """Pictures below all that made them, as wide as these."""
    sheet.below()
    sheet.space(GAP)
    return sheet.add("PreviewImage", title, body=body, images=images)


def side_by_side(sheet: Sheet, **inputs: Output) -> Node:
    """Compare, and its pictures large, in two columns; inputs are all that it needs of other nodes."""
    sheet.column(360)
    with sheet.group("Compare", "train"):
        seeds = {"noise_seed": 7, "num_seeds": 3, "cell_px": 256}
        compared = sheet.add("NGRPO_Compare", room=TEXT_PX + PICTURE_PX, **inputs, **seeds)
    sheet.column(760)
    with sheet.group("Side by side", "result"):
        sheet.add("PreviewImage", "Comparison", body=960, images=compared["grid"])
    return compared
