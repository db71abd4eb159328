"""The model card of a run: what its adapter is, what it gained, how to draw with it.

All of it comes from the run's own files; a part whose data is missing is left out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.fusing import shown
from ngrpo_lora.config import RunConfig
from ngrpo_lora.hub.usage import VIDEOS, Adapter, read_pushed, shown_guidance, usage
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.reports.grids import are_paired
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.world import MODELS

if TYPE_CHECKING:
    from ngrpo_lora.evaluation.statistics import Difference

__all__ = ["Shown", "base_license", "cell", "shown_pictures", "write_card"]

HUB = "https://huggingface.co"
PROMPT_CHARACTERS = 200  # of a prompt in a table; the gallery has all of it

# By the base of the shipped presets, for when its own card cannot be read: license, license_name, file of the licence.
LICENSES: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(MODELS, ("apache-2.0", "", "")),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": ("other", "nscl-v2-custom", "LICENSE.txt"),
    "Qwen/Qwen-Image": ("apache-2.0", "", ""),
    "Qwen/Qwen-Image-Edit-2509": ("apache-2.0", "", ""),
    "Tongyi-MAI/Z-Image": ("apache-2.0", "", ""),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("apache-2.0", "", ""),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("apache-2.0", "", ""),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ("apache-2.0", "", ""),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("apache-2.0", "", ""),
    "black-forest-labs/FLUX.1-Krea-dev": ("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "black-forest-labs/FLUX.1-Kontext-dev": ("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", "", ""),
    "black-forest-labs/FLUX.2-dev": ("other", "flux-dev-non-commercial-license", "LICENSE.txt"),
    "black-forest-labs/FLUX.2-klein-base-4B": ("apache-2.0", "", ""),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": ("other", "tencent-hunyuan-community", ""),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("other", "tencent-hunyuan-community", ""),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community", "LICENSE.md"),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community", "LICENSE.md"),
}

CITATION = """\
@article{he2025neighbor,
  title   = {Neighbor GRPO: Contrastive ODE Policy Optimization Aligns Flow Models},
  author  = {He, Dailan and Feng, Guanlin and Ge, Xingtong and Niu, Yazhe and Zhang, Yi and Ma, Bingqi and Song, Guanglu and Liu, Yu and Li, Hongsheng},
  journal = {arXiv preprint arXiv:2511.16955},
  year    = {2025}
}"""  # noqa: E501  # as arXiv gives it, one author list


@dataclass(frozen=True)
class Shown:
    """A held-out picture after training, and before it where there is one; paths within the repository."""

    prompt: str
    seed: int
    after: str
    before: str | None


def shown_pictures(folder: Path) -> list[Shown]:
    """The pictures that a run's evaluations keep in `samples/first` and `samples/last`, sorted by file name."""
    found = []
    for path in sorted((folder / "samples" / "last").glob("*.png")):
        text, before = read_png_text(path), folder / "samples" / "first" / path.name
        same = are_paired(read_png_text(before), text)  # a resumed run may have been given other prompts
        after, first = (file.relative_to(folder).as_posix() for file in (path, before))
        found.append(Shown(str(text["prompt"]), int(text["seed"]), after, first if same else None))
    return found


def base_license(base: str) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a base, by its own card, else by our table, else none."""
    local = Path(base) / "README.md"
    license, name, link = LICENSES.get(base, ("", "", ""))
    if base not in MODELS:
        # No network, no such card, or one that cannot be parsed: of many kinds, and none is worth a failed push.
        with contextlib.suppress(Exception):
            own = ModelCard.load(local if local.is_file() else base, ignore_metadata_errors=True).data.to_dict()
            license, name, link = own["license"], own.get("license_name", ""), own.get("license_link", "")
    if link and "://" not in link:
        link = f"{HUB}/{base}/blob/main/{link}"
    found = {"license": license, "license_name": name, "license_link": link}
    return {key: value for key, value in found.items() if value}


def write_card(
    folder: Path,
    repo: str,
    config: RunConfig,
    iterations: int,
    differences: Sequence[Difference],
    license: dict[str, str],
    revision: str | None = None,
) -> ModelCard:
    """Make the card of the files in `folder`, which lie there as they will in the repository.

    Args:
        folder: adapter, `summary.png`, `samples/`; all but the adapter may be missing.
        iterations: how many the adapter was trained for.
        differences: last evaluation against first, one a reward; none without two evaluations.
        revision: branch that the adapter is on; None: the main one.
    """
    adapter, pictures = read_pushed(folder / FILE_NAME), shown_pictures(folder)
    base, video = adapter.hub_id, (adapter.model.num_frames or 1) > 1 or adapter.family in VIDEOS
    task = f"{'image' if adapter.edits else 'text'}-to-{'video' if video else 'image'}"
    family = adapter.family.replace("_", "-")
    prompt, seed = (pictures[0].prompt, pictures[0].seed) if pictures else ("a red star", 0)
    gallery = [{"text": picture.prompt, "output": {"url": picture.after}} for picture in pictures]
    data = ModelCardData(
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base,
        tags=[task, "diffusers", "lora", "template:sd-lora", "neighbor-grpo", family],
        base_model_relation="adapter" if base else None,
        widget=gallery or None,
        model_name=repo.partition("/")[2],
        eval_results=evaluations(differences, task, config) or None,
    )
    sections = [
        introduction(repo, config, base, bool(pictures)),
        gains(differences, pictures, (folder / "summary.png").is_file(), iterations),
        usage(repo, revision, adapter, prompt, seed),
        training(repo, revision, config, adapter, iterations),
        limitations(config, bool(differences)),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def evaluations(differences: Sequence[Difference], task: str, config: RunConfig) -> list[EvalResult]:
    """The last evaluation's mean of each reward, as the Hub shows it beside the model."""
    held_out = config.prompts.held_out
    name = "held-out prompts"
    if isinstance(held_out, str) and held_out.startswith(("world:", "edits:", "hf:", "hpdv2:")):
        name = held_out
    return [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=name,
            metric_type=difference.reward,
            metric_name=f"{difference.reward}, {difference.before:.4g} before training",
            metric_value=round(difference.after, 4),
        )
        for difference in differences
    ]


def introduction(repo: str, config: RunConfig, base: str | None, gallery: bool) -> str:
    """Section of the card: its title, one sentence, and the gallery where there are pictures."""
    model = f"[{base}]({HUB}/{base})" if base else "the model embedded in ngrpo-lora"
    if not base and config.model.path not in MODELS:
        model = cell(Path(config.model.path).name)
    rewards = ", ".join(f"`{reward.key}`" for reward in config.rewards.train)
    text = (
        f"# {cell(repo.partition('/')[2])}\n\nA LoRA for {model}, tuned on the reward {rewards} with Neighbor GRPO "
        "([arXiv 2511.16955](https://arxiv.org/abs/2511.16955)) by ngrpo-lora."
    )
    return f"{text}\n\n<Gallery />" if gallery else text


def gains(differences: Sequence[Difference], pictures: Sequence[Shown], summary: bool, iterations: int) -> str:
    """Section of the card: held-out figures and pictures before and after, and the curve; empty without any."""
    parts = []
    if differences:
        pairs = max(d.pairs for d in differences)
        rows = [
            (
                cell(d.reward),
                f"{d.before:.3f}",
                f"{d.after:.3f}",
                d.difference.show("+.3f"),
                d.win_rate.show(".0%"),
                str(d.pairs),
            )
            for d in differences
        ]
        parts += [
            f"{pairs} held-out images, each with the same prompt and seed before training and after {iterations} "
            "iterations; intervals are of 95%.",
            markdown_table(("reward", "before", "after", "difference (95% CI)", "images won (95% CI)", "pairs"), rows),
            "Every score is in [evaluation.csv](evaluation.csv).",
        ]
    before = [picture for picture in pictures if picture.before]
    if before:
        rows = [(cell(p.prompt), str(p.seed), f"![before]({p.before})", f"![after]({p.after})") for p in before]
        parts.append(markdown_table(("prompt", "seed", "before", "after"), rows))
    if summary:
        parts.append("![The reward over the run, and held-out pictures before and after](summary.png)")
    return "\n\n".join(["## What it gained", *parts]) if parts else ""


def training(repo: str, revision: str | None, config: RunConfig, adapter: Adapter, iterations: int) -> str:
    """Section of the card: the run's settings as a table, and the command that runs it again."""
    branch = f" --revision {revision}" if revision else ""
    rows = [(name, cell(str(value))) for name, value in settings(config, adapter, iterations)]
    return (
        f"## How it was trained\n\n{markdown_table(('setting', 'value'), rows)}\n\nAgain, with all settings "
        f"([config.yaml](config.yaml)):\n\n```\nhf download {repo} config.yaml{branch} --local-dir .\n"
        "ngrpo train config.yaml\n```"
    )


def settings(config: RunConfig, adapter: Adapter, iterations: int) -> Iterator[tuple[str, Any]]:
    """Names and values of the settings that matter most, for a table."""
    rollout, model, optimizer = adapter.rollout, adapter.model, config.optimizer
    group, prompts = rollout.group_size, rollout.prompts_per_iteration
    yield "rewards", " + ".join(f"{r.weight:g} x {r.key}" if r.weight != 1 else r.key for r in config.rewards.train)
    if config.evaluation.rewards:
        yield "watched, not trained on", ", ".join(reward.key for reward in config.evaluation.rewards)
    sources = config.prompts.train
    yield "prompts", sources if isinstance(sources, str) else ", ".join(f"{s} (x {n})" for s, n in sources.items())
    yield "algorithm", config.algorithm.name
    yield "iterations", iterations
    yield "an iteration", f"{prompts} prompts x {group} candidates = {prompts * group} images"
    yield "images seen", iterations * prompts * group
    yield "solver", f"{rollout.solver}, {rollout.num_steps} steps, shift {rollout.shift:.4g}"
    yield "guidance", shown_guidance(model)
    if model.expert is not None:
        yield "trained transformer", model.expert
    yield "size", f"{model.width_px} x {model.height_px} px"
    yield "LoRA", f"rank {config.lora.rank}, alpha {config.lora.resolved_alpha:g}, {config.lora.targets}"
    yield "optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}"
    if optimizer.ema_decay:
        yield "average of the weights", optimizer.ema_decay
    yield "base", f"{model.dtype}" + ("" if model.quantization == "none" else f", {model.quantization}")
    if model.fuse:
        yield "in the base", ", ".join(f"{shown(path)} at {strength:g}" for path, strength in model.fuse.items())
    yield "seed", config.seed


def limitations(config: RunConfig, measured: bool) -> str:
    """Section of the card: what the adapter may not do, and what its figures do not say."""
    names = ", ".join(f"`{reward.key}`" for reward in config.rewards.train)
    lines = [
        f"- It was tuned to please {names}. What these do not see (variety, style, other subjects) may have changed "
        "too, and their own biases are now the adapter's.",
        "- It was trained at one size, number of steps and guidance (above); elsewhere its effect may be smaller, or "
        "another.",
        "- Whatever the base model cannot do or should not be used for holds for it too, and so does its licence.",
    ]
    if measured:
        lines.insert(
            1,
            "- The figures are of one run, by the rewards themselves, on one seed for each held-out prompt; their "
            "intervals are about prompts, not about training again with another seed.",
        )
    return "## Limitations\n\n" + "\n".join(lines)


def cell(text: str) -> str:
    """Any text as one line of escaped Markdown, also for a table, cut at PROMPT_CHARACTERS."""
    line = " ".join(text.split())
    short = line if len(line) <= PROMPT_CHARACTERS else f"{line[: PROMPT_CHARACTERS - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|~&$@])", r"\\\1", short)
