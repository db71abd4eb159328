"""Graphs of workflows/ that draw with an adapter, or around a seed."""

from __future__ import annotations

from parts import DEMO, PROMPT, TEXT_PX, draw, enlarge, sampling, show
from sheet import STREET, Node, Schemas, Sheet

MY_ADAPTER = "ngrpo/my-flux-adapter.safetensors"
HUB = "https://huggingface.co"
DOWNLOADS = {
    "flux1-dev.safetensors": f"{HUB}/black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors",
    "clip_l.safetensors": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    "t5xxl_fp16.safetensors": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    "ae.safetensors": f"{HUB}/black-forest-labs/FLUX.1-dev/resolve/main/ae.safetensors",
}
"""Where the files are that graphs name; the browser offers to download what is not there."""


def noise_and_size(sheet: Sheet, adapter: Node, batch_size: int) -> tuple[Node, Node]:
    """Noise, and latents of the size that an adapter was trained with."""
    size = {"width": adapter["width"], "height": adapter["height"]}
    latent = sheet.add("EmptySD3LatentImage", "Size and batch", batch_size=batch_size, **size)
    return sheet.add("RandomNoise", noise_seed=7), latent


def sample_with_adapter(schemas: Schemas) -> Sheet:
    """The demo adapter, with the settings that it was trained with."""
    sheet = Sheet("sample-with-adapter", schemas)
    sheet.column(360)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Sample with an adapter\n\n"
            "**Run.** Six pictures in a second or two on any CPU: the model comes with the pack.\n\n"
            "**Load Adapter** reads from the file how the adapter was trained and gives the sampler, the noise levels "
            "and the picture size that go with it.\n\n"
            "Set **strength** to 0 to see the base with the same noise.\n\n"
            "The model knows circles, squares, triangles, stars, hearts and crosses: `a green cross`, `three circles`, "
            "`a red star and a blue circle`, `a heart below a square`.",
            330,
        )
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    sheet.column(320)
    with sheet.group("Prompt", "text"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, clip=model["CLIP"], text=PROMPT)
    sheet.space(STREET)
    with sheet.group("Adapter", "model"):
        adapter = sheet.add("NGRPO_LoadAdapter", room=TEXT_PX, model=model["MODEL"], lora_name=DEMO)
    sheet.column(260)
    with sheet.group("Guide", "sample"):
        guider = sheet.add("BasicGuider", model=adapter["MODEL"], conditioning=text[0])
    sheet.space(190)
    with sheet.group("Noise and size", "sample"):
        noise, latent = noise_and_size(sheet, adapter, 6)
    sheet.column(270)
    with sheet.group("Pictures", "result"):
        images = draw(
            sheet,
            guider[0],
            model["VAE"],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        shown = show(sheet, enlarge(sheet, images), 560)
    sheet.as_app(shown, text=text, lora_name=adapter, strength=adapter, batch_size=latent, noise_seed=noise)
    return sheet


def neighbor_explorer(schemas: Schemas) -> Sheet:
    """One seed's picture and its neighbours."""
    sheet = Sheet("neighbor-explorer", schemas)
    sheet.column(360)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Neighbours of a picture\n\n"
            "**Run.** The first of nine pictures is the seed's, the others are its neighbours: noise at a distance "
            "from the seed's noise.\n\n"
            "Turn **perturbation_strength**: at 0.1 the pictures differ in details, at 0.3 (as Neighbor GRPO trains) "
            "more, at 1 nothing is left of the seed.\n\n"
            "For more neighbours raise the batch size, or set **member** to 8, 17, ...\n\n"
            "To keep one: its member, with batch size 1.",
            330,
        )
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    sheet.column(240)
    with sheet.group("Prompt", "text"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, clip=model["CLIP"], text="a red star and a blue circle")
    sheet.space(2 * STREET)
    with sheet.group("Sampling", "sample"):
        sampler, sigmas, latent = sampling(sheet, 9)
    sheet.column(300)
    with sheet.group("Guide", "sample"):
        guider = sheet.add("BasicGuider", model=model["MODEL"], conditioning=text[0])
    sheet.space(3 * STREET)
    with sheet.group("Neighbours", "sample"):
        noise = sheet.add("NGRPO_NeighborNoise", noise_seed=7, perturbation_strength=0.3, member=-1)
    sheet.column(270)
    with sheet.group("Pictures", "result"):
        images = draw(
            sheet,
            guider[0],
            model["VAE"],
            noise=noise[0],
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        shown = show(sheet, enlarge(sheet, images), 560)
    sheet.as_app(shown, text=text, perturbation_strength=noise, noise_seed=noise)
    return sheet


def sample_flux_with_adapter(schemas: Schemas) -> Sheet:
    """FLUX.1-dev through ComfyUI's loaders."""
    sheet = Sheet("sample-flux-with-adapter", schemas, DOWNLOADS)
    sheet.column(400)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## FLUX.1-dev with an adapter\n\n"
            "1. The files of FLUX.1-dev as for ComfyUI's own FLUX graphs: flux1-dev in diffusion_models, clip_l and "
            "t5xxl in text_encoders, ae in vae. FLUX.1-dev is gated: accept its licence on the Hub first.\n"
            "2. Choose your adapter in **Load Adapter**; the template `train-flux` makes one.\n"
            "3. **Run.**\n\n"
            "Sampler, noise levels, guidance and size are those of the adapter's training. Other LoRAs of FLUX.1 work "
            "too and are drawn as the preset flux is: 8 steps, 720 x 720, guidance 3.5.",
            330,
        )
    with sheet.group("FLUX.1-dev", "model"):
        clip = sheet.add(
            "DualCLIPLoader",
            "Text encoders",
            files="text_encoders",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl_fp16.safetensors",
            type="flux",
        )
        model = sheet.add("UNETLoader", "FLUX.1-dev", files="diffusion_models", unet_name="flux1-dev.safetensors")
        vae = sheet.add("VAELoader", files="vae", vae_name="ae.safetensors")
    sheet.column(340)
    with sheet.group("Prompt", "text"):
        text = sheet.add(
            "CLIPTextEncode", "Prompt", body=160, clip=clip[0], text="a lighthouse on a cliff at dusk, oil painting"
        )
    sheet.space(2 * STREET)
    with sheet.group("Adapter", "model"):
        adapter = sheet.add(
            "NGRPO_LoadAdapter", room=TEXT_PX, files="loras", model=model["MODEL"], lora_name=MY_ADAPTER
        )
    sheet.column(260)
    with sheet.group("Guidance", "sample"):
        guided = sheet.add("FluxGuidance", conditioning=text[0], guidance=adapter["guidance"])
    sheet.space(3 * STREET)
    with sheet.group("Noise and size", "sample"):
        noise, latent = noise_and_size(sheet, adapter, 1)
    sheet.column(240)
    with sheet.group("Picture", "result"):
        guider = sheet.add("BasicGuider", model=adapter["MODEL"], conditioning=guided[0])
        sheet.beside(270)
        images = draw(
            sheet,
            guider[0],
            vae[0],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        sheet.below()
        sheet.space(STREET)
        saved = sheet.add("SaveImage", body=760, images=images, filename_prefix="ngrpo/flux")
    sheet.as_app(saved, text=text, lora_name=adapter, strength=adapter, batch_size=latent, noise_seed=noise)
    return sheet
