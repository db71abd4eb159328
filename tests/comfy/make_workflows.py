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
MY_ADAPTER = "ngrpo/my-flux-adapter.safetensors"
HUB = "https://huggingface.co"
TEXT_PX, PICTURE_PX = 200, 290  # what nodes grow by when they have run
PAGE_PX = 640  # and while they show a voting page
DOWNLOADS = {
    "flux1-dev.safetensors": f"{HUB}/black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors",
    "clip_l.safetensors": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    "t5xxl_fp16.safetensors": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    "ae.safetensors": f"{HUB}/black-forest-labs/FLUX.1-dev/resolve/main/ae.safetensors",
}
"""Where the files are that graphs name; the browser offers to download what is not there."""


def prompt(sheet: Sheet, clip: Output, words: str) -> tuple[Output, Node]:
    """The prompt as text, for rewards, and encoded."""
    text = sheet.add("PrimitiveStringMultiline", "Prompt", body=110, value=words)
    return text[0], sheet.add("CLIPTextEncode", "Encoded prompt", body=110, clip=clip, text=text[0])


def draw(sheet: Sheet, model: Output, text: Output, vae: Output, **inputs: Output) -> Output:
    """Pictures by ComfyUI's sampler; inputs are noise, sampler, sigmas and latent_image."""
    guider = sheet.add("BasicGuider", model=model, conditioning=text)
    drawn = sheet.add("SamplerCustomAdvanced", guider=guider[0], **inputs)
    return sheet.add("VAEDecode", samples=drawn["output"], vae=vae)["IMAGE"]


def show(sheet: Sheet, images: Output, body: int, title: str | None = None) -> None:
    """Pictures of 64 pixels, large enough to be seen."""
    large = sheet.add("ImageScaleBy", "Enlarge", image=images, upscale_method="lanczos", scale_by=4)
    sheet.add("PreviewImage", title, body=body, images=large[0])


def sample_with_adapter(schemas: Schemas) -> Sheet:
    """The demo adapter, with the settings that it was trained with."""
    sheet = Sheet("sample-with-adapter", schemas)
    sheet.column(420)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Sample with an adapter\n\n"
            "**Run.** Six pictures in a second or two on any CPU: the model comes with the pack.\n\n"
            "**Load Adapter** reads from the file how the adapter was trained and gives the sampler, the noise levels "
            "and the picture size that go with it.\n\n"
            "Set **strength** to 0 to see the base with the same noise.\n\n"
            "The model knows circles, squares, triangles, stars, hearts and crosses: `a green cross`, `three circles`, "
            "`a red star and a blue circle`, `a heart below a square`.",
            270,
        )
    with sheet.group("Model and adapter", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        adapter = sheet.add("NGRPO_LoadAdapter", room=TEXT_PX, model=model["MODEL"], lora_name=DEMO)
    sheet.column(340)
    with sheet.group("Prompt and noise", "sample"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=130, clip=model["CLIP"], text=PROMPT)
        noise = sheet.add("RandomNoise", noise_seed=7)
        latent = sheet.add(
            "EmptySD3LatentImage", "Size and batch", width=adapter["width"], height=adapter["height"], batch_size=6
        )
    sheet.column(460)
    with sheet.group("Pictures", "result"):
        images = draw(
            sheet,
            adapter["MODEL"],
            text[0],
            model["VAE"],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        show(sheet, images, 420)
    return sheet


def compare_adapters(schemas: Schemas) -> Sheet:
    """Base and adapter at several strengths on the same seeds, with scores."""
    sheet = Sheet("compare-adapters", schemas)
    sheet.column(400)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Compare adapters\n\n"
            "**Run.** Every row is a seed, every column the base or an adapter at a strength; below each picture is "
            "its score, and the best of a row is framed. The table has means and intervals.\n\n"
            "**Adapter List** takes several strengths, and several of them in a chain compare several files.",
            200,
        )
    with sheet.group("Model and prompt", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        words, text = prompt(sheet, model["CLIP"], "a red star and a blue circle")
    sheet.column(340)
    with sheet.group("What is compared", "train"):
        adapters = sheet.add("NGRPO_AdapterList", lora_name=DEMO, strengths="0.5, 1")
        reward = sheet.add("NGRPO_Reward", name="world")
    with sheet.group("Sampling", "sample"):
        sampler = sheet.add("NGRPO_FlowSampler")
        sigmas = sheet.add("NGRPO_FlowSigmas", base="embedded", steps=8, width=64, height=64)
        latent = sheet.add("EmptySD3LatentImage", "Size", width=64, height=64, batch_size=1)
    sheet.column(400)
    with sheet.group("Compare", "train"):
        compared = sheet.add(
            "NGRPO_Compare",
            room=TEXT_PX + PICTURE_PX,
            model=model["MODEL"],
            positive=text[0],
            vae=model["VAE"],
            sampler=sampler[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
            noise_seed=7,
            num_seeds=3,
            prompt=words,
            cell_px=256,
            adapters=adapters[0],
            rewards=reward[0],
        )
    sheet.column(680)
    with sheet.group("Side by side", "result"):
        sheet.add("PreviewImage", "Comparison", body=900, images=compared["grid"])
    return sheet


def best_of_n(schemas: Schemas) -> Sheet:
    """Many pictures of one prompt, of which a reward keeps the best."""
    sheet = Sheet("best-of-n", schemas)
    sheet.column(400)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Best of n by a reward\n\n"
            "**Run.** Sixteen pictures are drawn, judged and sorted; **best** keeps the first.\n\n"
            "**Reward** here is the embedded world's own verifier. For photographs choose hpsv2, pickscore, "
            "imagereward, aesthetic, ...: their weights are downloaded when they are first used. Several **Reward** "
            "nodes in a chain make a weighted sum.",
            220,
        )
    with sheet.group("Model and prompt", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        words, text = prompt(sheet, model["CLIP"], "four hearts")
    sheet.column(340)
    with sheet.group("Sampling", "sample"):
        noise = sheet.add("RandomNoise", noise_seed=7)
        sampler = sheet.add("NGRPO_FlowSampler")
        sigmas = sheet.add("NGRPO_FlowSigmas", base="embedded", steps=8, width=64, height=64)
        latent = sheet.add("EmptySD3LatentImage", "Size and batch", width=64, height=64, batch_size=16)
        images = draw(
            sheet,
            model["MODEL"],
            text[0],
            model["VAE"],
            noise=noise[0],
            sampler=sampler[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
        )
    sheet.column(560)
    with sheet.group("Judge", "train"):
        reward = sheet.add("NGRPO_Reward", name="world")
        score = sheet.add(
            "NGRPO_Score",
            room=TEXT_PX + PICTURE_PX,
            images=images,
            rewards=reward[0],
            prompt=words,
            n=1,
            sheet_px=128,
        )
    sheet.column(400)
    with sheet.group("The best", "result"):
        show(sheet, score["best"], 400)
    return sheet


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
            270,
        )
    with sheet.group("Model and prompt", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        text = sheet.add("CLIPTextEncode", "Prompt", body=130, clip=model["CLIP"], text="a red star and a blue circle")
    sheet.column(340)
    with sheet.group("Neighbours", "sample"):
        noise = sheet.add("NGRPO_NeighborNoise", noise_seed=7, perturbation_strength=0.3, member=-1)
        latent = sheet.add("EmptySD3LatentImage", "Size and batch", width=64, height=64, batch_size=9)
        sampler = sheet.add("NGRPO_FlowSampler")
        sigmas = sheet.add("NGRPO_FlowSigmas", base="embedded", steps=8, width=64, height=64)
    sheet.column(460)
    with sheet.group("Pictures", "result"):
        images = draw(
            sheet,
            model["MODEL"],
            text[0],
            model["VAE"],
            noise=noise[0],
            sampler=sampler[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
        )
        show(sheet, images, 420)
    return sheet


def sample_flux_with_adapter(schemas: Schemas) -> Sheet:
    """FLUX.1-dev through ComfyUI's loaders."""
    sheet = Sheet("sample-flux-with-adapter", schemas, DOWNLOADS)
    sheet.column(440)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## FLUX.1-dev with an adapter\n\n"
            "1. The files of FLUX.1-dev as for ComfyUI's own FLUX graphs: flux1-dev in diffusion_models, clip_l and "
            "t5xxl in text_encoders, ae in vae. FLUX.1-dev is gated: accept its licence on the Hub first.\n"
            "2. Choose your adapter in **Load Adapter**; the template `train-flux` makes one.\n"
            "3. **Run.**\n\n"
            "Sampler, noise levels, guidance and size are those of the adapter's training. Other LoRAs of FLUX.1 work "
            "too and are drawn as the preset flux is: 8 steps, 720 x 720, guidance 3.5.",
            300,
        )
    with sheet.group("Model and adapter", "model"):
        model = sheet.add("UNETLoader", "FLUX.1-dev", files="diffusion_models", unet_name="flux1-dev.safetensors")
        adapter = sheet.add(
            "NGRPO_LoadAdapter", room=TEXT_PX, files="loras", model=model["MODEL"], lora_name=MY_ADAPTER
        )
    sheet.column(400)
    with sheet.group("Prompt", "text"):
        clip = sheet.add(
            "DualCLIPLoader",
            files="text_encoders",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl_fp16.safetensors",
            type="flux",
        )
        text = sheet.add(
            "CLIPTextEncode", "Prompt", body=160, clip=clip[0], text="a lighthouse on a cliff at dusk, oil painting"
        )
        guided = sheet.add("FluxGuidance", conditioning=text[0], guidance=adapter["guidance"])
    with sheet.group("Noise", "sample"):
        noise = sheet.add("RandomNoise", noise_seed=7)
        latent = sheet.add(
            "EmptySD3LatentImage", "Size and batch", width=adapter["width"], height=adapter["height"], batch_size=1
        )
    sheet.column(520)
    with sheet.group("Picture", "result"):
        vae = sheet.add("VAELoader", files="vae", vae_name="ae.safetensors")
        images = draw(
            sheet,
            adapter["MODEL"],
            guided[0],
            vae[0],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        sheet.add("SaveImage", body=520, images=images, filename_prefix="ngrpo/flux")
    return sheet


def train_embedded(schemas: Schemas) -> Sheet:
    """Training, and drawing with what came of it, in one graph."""
    sheet = Sheet("train-embedded", schemas)
    sheet.column(420)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Train an adapter, then draw with it\n\n"
            "**Run.** The embedded model learns to draw what the prompt says: 150 iterations, ten minutes on a CPU. "
            "The node shows the reward and a group of candidates; below, what it was like before.\n\n"
            "**Cancel** at any time: queue again and it goes on. When it has ended, the adapter is in all LoRA lists, "
            "and **Load Adapter** draws with it at once.\n\n"
            "More iterations gain more: the preset has 280. Connect another **Reward** to teach something "
            "else: `jpeg` with weight -1 makes pictures rich in detail.",
            330,
        )
    with sheet.group("Train", "train"):
        reward = sheet.add("NGRPO_Reward", name="world")
        trained = sheet.add(
            "NGRPO_Train",
            room=TEXT_PX + PICTURE_PX,
            preset="demo",
            name="my-first-adapter",
            overrides="# settings over the preset's, one a line\nevaluation.num_prompts=240",
            iterations=150,
            rewards=reward[0],
        )
    sheet.column(420)
    with sheet.group("Model and new adapter", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        adapter = sheet.add(
            "NGRPO_LoadAdapter", room=TEXT_PX, files="loras", model=model["MODEL"], lora_name=trained["lora_name"]
        )
        adapter.saved["widgets_values"][0] = DEMO  # behind the link; else whatever file is first
    with sheet.group("Prompt and noise", "sample"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, clip=model["CLIP"], text="a red star and a blue circle")
        noise = sheet.add("RandomNoise", noise_seed=7)
        latent = sheet.add(
            "EmptySD3LatentImage", "Size and batch", width=adapter["width"], height=adapter["height"], batch_size=6
        )
    sheet.column(560)
    with sheet.group("Pictures of the new adapter", "result"):
        images = draw(
            sheet,
            adapter["MODEL"],
            text[0],
            model["VAE"],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        show(sheet, images, 400)
        sheet.add("PreviewImage", "Before and after, and the curve", body=400, images=trained["summary"])
    return sheet


def train_flux(schemas: Schemas) -> Sheet:
    """FLUX.1-dev on two rewards."""
    sheet = Sheet("train-flux", schemas)
    sheet.column(440)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Train FLUX.1-dev\n\n"
            "1. `pip install bitsandbytes` where ComfyUI runs; accept FLUX.1-dev's licence on the Hub and log in with "
            "`hf auth login`. The model is downloaded in diffusers' format, once.\n"
            "2. Choose the **preset** for your GPU: flux-12gb to flux-80gb.\n"
            "3. **Run.** Every checkpoint can be gone on from: Cancel when you like, and queue again.\n\n"
            "The adapter will be `ngrpo/my-flux-adapter.safetensors` in all LoRA lists; the template "
            "`sample-flux-with-adapter` draws with it.\n\n"
            "Rewards are weighted after each is standardised within its group. Prompts are HPDv2's; write your own "
            "below, one a line.",
            390,
        )
    with sheet.group("Rewards", "sample"):
        first = sheet.add("NGRPO_Reward", "How much people like it", name="hpsv2", settings="offload=true")
        second = sheet.add(
            "NGRPO_Reward", "How well it fits the prompt", name="clip_score", settings="offload=true", rewards=first[0]
        )
    sheet.column(520)
    with sheet.group("Train", "train"):
        trained = sheet.add(
            "NGRPO_Train",
            room=TEXT_PX + PICTURE_PX,
            preset="flux-24gb",
            name="my-flux-adapter",
            overrides="# settings over the preset's, one a line, such as\n# lora.rank=32\nevaluation.num_samples=6",
            rewards=second[0],
        )
    sheet.column(520)
    with sheet.group("What came of it", "result"):
        sheet.add("PreviewImage", "Before", body=290, images=trained["before"])
        sheet.add("PreviewImage", "After", body=290, images=trained["after"])
        sheet.add("PreviewAny", "Figures", body=180, source=trained["figures"])
    return sheet


def vote(schemas: Schemas) -> Sheet:
    """Training by votes, and drawing with what came of it, in one graph."""
    sheet = Sheet("vote", schemas)
    sheet.column(420)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Teach a model your taste\n\n"
            "**Run.** After a minute the Train node shows six pictures of a prompt: tap what is better than the rest, "
            "tap again for worse, **Vote**. Two votes make an iteration, 30 votes a taste of colours.\n\n"
            "Its link opens the page in a tab of its own. Take your time: the run waits. **Cancel** keeps all votes; "
            "queue again and it goes on.\n\n"
            "**votes** keeps them for several runs, and **who_votes** lets a head that learned from them judge alone.",
            330,
        )
    with sheet.group("Who judges", "train"):
        reward = sheet.add("NGRPO_VoteReward")
    sheet.column(540)
    with sheet.group("Train", "train"):
        trained = sheet.add(
            "NGRPO_Train",
            room=PAGE_PX + TEXT_PX + PICTURE_PX,
            preset="demo-vote",
            name="my-taste",
            overrides="# settings over the preset's, one a line\nevaluation.num_prompts=24",
            iterations=15,
            rewards=reward[0],
        )
    sheet.column(420)
    with sheet.group("Model and new adapter", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
        adapter = sheet.add(
            "NGRPO_LoadAdapter", room=TEXT_PX, files="loras", model=model["MODEL"], lora_name=trained["lora_name"]
        )
        adapter.saved["widgets_values"][0] = DEMO  # behind the link; else whatever file is first
    with sheet.group("Prompt and noise", "sample"):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, clip=model["CLIP"], text="two stars")
        noise = sheet.add("RandomNoise", noise_seed=7)
        latent = sheet.add(
            "EmptySD3LatentImage", "Size and batch", width=adapter["width"], height=adapter["height"], batch_size=6
        )
    sheet.column(560)
    with sheet.group("Pictures to your taste", "result"):
        images = draw(
            sheet,
            adapter["MODEL"],
            text[0],
            model["VAE"],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        show(sheet, images, 400)
        sheet.add("PreviewImage", "Before and after, and the curve", body=400, images=trained["summary"])
    return sheet


GRAPHS = (
    sample_with_adapter,
    compare_adapters,
    best_of_n,
    neighbor_explorer,
    train_embedded,
    train_flux,
    sample_flux_with_adapter,
    vote,
)


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
