"""Graphs of workflows/ that score pictures, and that put adapters side by side."""

from __future__ import annotations

from parts import DEMO, TEXT_PX, draw, prompt, sampling, side_by_side
from sheet import GAP, STREET, Output, Schemas, Sheet

HALF = 240  # width of two columns within a group


def compare(sheet: Sheet, words: str, *listed: tuple[str, str, str]) -> None:
    """Pictures of the example adapter on the same seeds; `listed` are title, strengths and schedule of each."""
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    sheet.column(HALF)
    with sheet.group("Prompt", "text"):
        text, encoded = prompt(sheet, model["CLIP"], words)
    sheet.space(STREET)
    with sheet.group("Sampling", "sample"):
        sampler, sigmas, latent = sampling(sheet)
    with sheet.group("What judges", "train"):
        reward = sheet.add("NGRPO_Reward", name="world")
    sheet.column(270)
    sheet.space(5 * STREET)
    with sheet.group("What is compared", "train"):
        chain: dict[str, Output] = {}
        for title, strengths, schedule in listed:
            sheet.space(STREET - GAP if chain else 0)
            given = {"lora_name": DEMO, "strengths": strengths, "schedule": schedule}
            chain = {"adapters": sheet.add("NGRPO_AdapterList", title, body=190, **given, **chain)[0]}
    compared = side_by_side(
        sheet,
        model=model["MODEL"],
        positive=encoded,
        vae=model["VAE"],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
        prompt=text[0],
        rewards=reward[0],
        **chain,
    )
    sheet.as_app(compared, value=text, noise_seed=compared, num_seeds=compared)


def compare_adapters(schemas: Schemas) -> Sheet:
    """Base and adapter at several strengths on the same seeds, with scores."""
    sheet = Sheet("compare-adapters", schemas)
    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Compare adapters\n\n"
            "**Run.** Every row is a seed, every column the base or an adapter at a strength; below each picture is "
            "its score, and the best of a row is framed. The table has means and intervals.\n\n"
            "**Adapter List** takes several strengths, and several of them in a chain compare several files.",
            260,
        )
    compare(sheet, "a red star and a blue circle", ("Half and whole", "0.5, 1", ""))
    return sheet


def strengths_by_step(schemas: Schemas) -> Sheet:
    """An adapter in all steps, in the first half alone, and in the second half alone."""
    sheet = Sheet("strengths-by-step", schemas)

    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## When in the sampling an adapter acts\n\n"
            "**Run.** The same seeds by the base, by the adapter in all steps, in the first half of them alone, and in "
            "the second half alone.\n\n"
            "**schedule** has factors of the strength as place:factor, from 0, the first step, to 1, the last, with "
            "straight lines between; a place given twice is a jump. `0:0, 1:1` grows, `0:1, 1:0` fades. **Load "
            "Adapter** takes the same.\n\n"
            "Below each picture stand the file, its schedule, the seed and the score.",
            330,
        )
    compare(
        sheet,
        "a red star and a blue circle",
        ("In all steps", "1", ""),
        ("Early", "1", "0:1, 0.5:1, 0.5:0"),
        ("Late", "1", "0:0, 0.5:0, 0.5:1"),
    )
    return sheet


def best_of(sheet: Sheet, words: str, *judges: tuple[str, str, float]) -> None:
    """Many pictures, of which rewards keep the best; `judges` are title, name and weight of each."""
    with sheet.group("Model", "model"):
        model = sheet.add("NGRPO_LoadEmbedded")
    sheet.column(HALF)
    with sheet.group("Prompt", "text"):
        text, encoded = prompt(sheet, model["CLIP"], words)
    sheet.space(2 * STREET)
    with sheet.group("Sampling", "sample"):
        sampler, sigmas, latent = sampling(sheet, 16)
    *others, last = judges
    chain: dict[str, Output] = {}
    if others:
        with sheet.group("Further judges", "train"):
            for number, (title, name, weight) in enumerate(others):
                if number:
                    sheet.beside(HALF)
                chain = {"rewards": sheet.add("NGRPO_Reward", title, name=name, weight=weight, **chain)[0]}
    sheet.column(270)
    with sheet.group("Guide", "sample"):
        guider = sheet.add("BasicGuider", model=model["MODEL"], conditioning=encoded)
    sheet.space(3 * STREET)
    with sheet.group("Noise", "sample"):
        noise = sheet.add("RandomNoise", noise_seed=7)
    with sheet.group("What judges", "train"):
        title, name, weight = last
        reward = sheet.add("NGRPO_Reward", title, name=name, weight=weight, **chain)
    sheet.column(300)
    with sheet.group("Draw and judge", "train"):
        images = draw(
            sheet,
            guider[0],
            model["VAE"],
            noise=noise[0],
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        sheet.below()
        sheet.space(STREET)
        score = sheet.add(
            "NGRPO_Score",
            body=860,
            room=TEXT_PX,
            images=images,
            rewards=reward[0],
            prompt=text[0],
            n=1,
            sheet_px=128,
        )
    sheet.column(420)
    with sheet.group("The best", "result"):
        large = sheet.add("ImageScaleBy", "Enlarge", image=score["best"], upscale_method="lanczos", scale_by=6)
        sheet.below()
        sheet.add("PreviewImage", body=460, images=large[0])
    sheet.as_app(score, value=text, noise_seed=noise)


def best_of_n(schemas: Schemas) -> Sheet:
    """Many pictures of one prompt, of which a reward keeps the best."""
    sheet = Sheet("best-of-n", schemas)
    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Best of n by a reward\n\n"
            "**Run.** Sixteen pictures are drawn, judged and sorted; **best** keeps the first.\n\n"
            "**Reward** here is the embedded world's own verifier. For photographs choose hpsv2, pickscore, "
            "imagereward, aesthetic, ...: their weights are downloaded when they are first used. The template "
            "`best-of-n-rewards` judges by several.",
            280,
        )
    best_of(sheet, "four hearts", ("What the prompt says", "world", 1.0))
    return sheet


def best_of_n_rewards(schemas: Schemas) -> Sheet:
    """Many pictures of one prompt, judged by three rewards at once."""
    sheet = Sheet("best-of-n-rewards", schemas)

    sheet.column(340)
    with sheet.group("What to do", "text"):
        sheet.note(
            "## Best of n by several rewards\n\n"
            "**Run.** Sixteen pictures are judged by three rewards, a chain of **Reward** nodes with weights. Each is "
            "brought to mean 0 and deviation 1 over the batch (**combine**), weighted and added up.\n\n"
            "The table has every score; where rewards disagree, weights decide. A negative weight asks for the "
            "opposite: `jpeg` with -1 prefers rich detail.\n\n"
            "For photographs: hpsv2 and clip_score, for one.",
            300,
        )
    best_of(
        sheet,
        "four hearts",
        ("Little detail", "jpeg", 0.25),
        ("As the world draws", "world_manifold", 0.5),
        ("What the prompt says", "world", 1.0),
    )
    return sheet
