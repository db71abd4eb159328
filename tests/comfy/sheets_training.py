"""Graphs of workflows/ that train."""

from __future__ import annotations

from parts import DEMO, PAGE_PX, PICTURE_PX, TEXT_PX, draw, enlarge, prompt, sampling, side_by_side
from sheet import GAP, STREET, Node, Output, Schemas, Sheet
from sheets_sampling import noise_and_size


def train_embedded(schemas: Schemas) -> Sheet:
    """Training, and drawing with what came of it, in one graph."""
    sheet = Sheet("train-embedded", schemas)
    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Train an adapter, then draw with it\n\n"
            "**Run.** The embedded model learns to draw what the prompt says: 150 iterations, ten minutes on a CPU. "
            "The node shows the reward and a group of candidates.\n\n"
            "**Cancel** at any time: queue again and it goes on. When it has ended, the adapter is in all LoRA lists, "
            "and **Load Adapter** draws with it at once.\n\n"
            "More iterations gain more: the preset has 280. Connect another **Reward** to teach something "
            "else: `jpeg` with weight -1 makes pictures rich in detail.",
            400,
        )
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    with sheet.group("What is taught", "train"):
        reward = sheet.add("NGRPO_Reward", name="world")
    trained = train(sheet, reward[0], "demo", "my-first-adapter", num_prompts=240, iterations=150)
    draw_with_it(sheet, model, trained, "a red star and a blue circle")
    return sheet


def vote(schemas: Schemas) -> Sheet:
    """Training by votes, and drawing with what came of it, in one graph."""
    sheet = Sheet("vote", schemas)
    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Teach a model your taste\n\n"
            "**Run.** After a minute the Train node shows six pictures of a prompt: tap what is better than the rest, "
            "tap again for worse, **Vote**. Two votes make an iteration, 30 votes a taste of colours.\n\n"
            "Its link opens the page in a tab of its own. Take your time: the run waits. **Cancel** keeps all votes; "
            "queue again and it goes on.\n\n"
            "**votes** keeps them for several runs, and **who_votes** lets a head that learned from them judge alone.",
            400,
        )
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    with sheet.group("Who judges", "train"):
        reward = sheet.add("NGRPO_VoteReward")
    trained = train(sheet, reward[0], "demo-vote", "my-taste", num_prompts=24, iterations=15, width=540, room=PAGE_PX)
    draw_with_it(sheet, model, trained, "two stars")
    return sheet


def train(
    sheet: Sheet,
    rewards: Output,
    preset: str,
    name: str,
    num_prompts: int,
    iterations: int,
    width: int = 440,
    room: int = 0,
) -> Node:
    """Train in a column of its own; room is what the node shows beside text and pictures."""
    sheet.column(width)
    with sheet.group("Train", "train", street=STREET + 40):
        return sheet.add(
            "NGRPO_Train",
            room=room + TEXT_PX + PICTURE_PX,
            preset=preset,
            name=name,
            overrides=f"# settings over the preset's, one a line\nevaluation.num_prompts={num_prompts}",
            iterations=iterations,
            rewards=rewards,
        )


def draw_with_it(sheet: Sheet, model: Node, trained: Node, words: str) -> None:
    """Pictures by the adapter that a node has trained, beside its curves."""
    sheet.column(320)
    with sheet.group("Prompt", "text", street=STREET + 40):
        text = sheet.add("CLIPTextEncode", "Prompt", body=110, clip=model["CLIP"], text=words)
    sheet.space(STREET)
    with sheet.group("New adapter", "model"):
        adapter = sheet.add(
            "NGRPO_LoadAdapter", room=TEXT_PX, files="loras", model=model["MODEL"], lora_name=trained["lora_name"]
        )
        adapter.saved["widgets_values"][0] = DEMO  # behind the link; else whatever file is first
    sheet.column(260)
    with sheet.group("Guide", "sample", street=STREET + 40):
        guider = sheet.add("BasicGuider", model=adapter["MODEL"], conditioning=text[0])
    sheet.space(3 * STREET)
    with sheet.group("Noise and size", "sample"):
        noise, latent = noise_and_size(sheet, adapter, 6)
    sheet.column(270)
    with sheet.group("Pictures of the new adapter", "result", street=STREET + 40):
        images = draw(
            sheet,
            guider[0],
            model["VAE"],
            noise=noise[0],
            sampler=adapter["SAMPLER"],
            sigmas=adapter["SIGMAS"],
            latent_image=latent[0],
        )
        large = enlarge(sheet, images)
        sheet.below(400)
        sheet.space(STREET)
        drawn = sheet.add("PreviewImage", "Drawn with it", body=760, images=large)
        sheet.beside(380)
        sheet.space(STREET)
        sheet.add("PreviewImage", "Curves, before and after", body=760, images=trained["summary"])
    sheet.as_app(trained, drawn, iterations=trained, text=text)


def train_flux(schemas: Schemas) -> Sheet:
    """FLUX.1-dev on two rewards."""
    sheet = Sheet("train-flux", schemas)
    sheet.column(400)
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
            440,
        )
    sheet.column(300)
    with sheet.group("What is taught", "sample"):
        first = sheet.add("NGRPO_Reward", "How much people like it", name="hpsv2", settings="offload=true")
        sheet.space(STREET - GAP)
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
    sheet.column(620)
    with sheet.group("What came of it", "result"):
        sheet.add("PreviewImage", "Before", body=340, images=trained["before"])
        sheet.add("PreviewImage", "After", body=340, images=trained["after"])
        sheet.add("PreviewAny", "Figures", body=180, source=trained["figures"])
    sheet.as_app(trained, preset=trained, iterations=trained, prompts=trained)
    return sheet


def compare_algorithms(schemas: Schemas) -> Sheet:
    """Two adapters, each trained by another algorithm on the same reward, side by side on the same seeds."""
    sheet = Sheet("compare-algorithms", schemas)
    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Compare algorithms\n\n"
            "**Run.** Two adapters are trained on the same reward, prompts and seed, by Neighbor GRPO and by "
            "DiffusionNFT, 40 iterations each: ten minutes on a CPU. Then base and both draw the same seeds, and the "
            "reward judges.\n\n"
            "Any other algorithm is a line of **overrides**: `algorithm=flow_grpo`, `dance`, `mix`, `branch`, "
            "`best_of_n`. Iterations do not cost the same: what each took is in its report.\n\n"
            "Another prompt trains nothing again: change it and **Run**.",
            380,
        )
    with sheet.group("What is taught, and judges", "train"):
        reward = sheet.add("NGRPO_Reward", name="world")
    sheet.column(330)
    with sheet.group("Train", "train", street=2 * STREET):
        trained = []
        for number, (title, algorithm) in enumerate((("Neighbor GRPO", "neighbor"), ("DiffusionNFT", "nft"))):
            if number:
                sheet.beside(330)
            trained.append(
                sheet.add(
                    "NGRPO_Train",
                    title,
                    room=TEXT_PX + PICTURE_PX,
                    name=f"by-{algorithm}",
                    overrides=f"algorithm={algorithm}\nevaluation.num_prompts=240",
                    iterations=40,
                    rewards=reward[0],
                )
            )
    sheet.column(240)
    with sheet.group("Model and prompt", "model", street=2 * STREET):
        model = sheet.add("NGRPO_LoadEmbedded")
        text, encoded = prompt(sheet, model["CLIP"], "a red star and a blue circle")
    sheet.space(STREET)
    with sheet.group("What is compared", "train"):
        first = sheet.add("NGRPO_AdapterList", "By Neighbor GRPO", files="loras", lora_name=trained[0]["lora_name"])
        sheet.beside(240)
        both = sheet.add(
            "NGRPO_AdapterList",
            "By DiffusionNFT",
            files="loras",
            lora_name=trained[1]["lora_name"],
            adapters=first[0],
        )
        for node in (first, both):
            node.saved["widgets_values"][0] = DEMO  # behind the link; else whatever file is first
    sheet.space(STREET)
    with sheet.group("Sampling", "sample"):
        sampler, sigmas, latent = sampling(sheet)
    compared = side_by_side(
        sheet,
        model=model["MODEL"],
        positive=encoded,
        vae=model["VAE"],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
        prompt=text[0],
        adapters=both[0],
        rewards=reward[0],
    )
    sheet.as_app(compared, value=text, noise_seed=compared, num_seeds=compared)
    return sheet
