"""Adapters compared with their base, or with one another, on the same prompts and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.progress import track

from ngrpo_lora.adapters.finding import adapter_label
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation import pages
from ngrpo_lora.evaluation.judging import judge, write_csv, write_json
from ngrpo_lora.evaluation.statistics import Difference, compare_scores
from ngrpo_lora.prompts.checking import check_sources, warn_of_cropping
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.metrics import finite
from ngrpo_lora.records.pictures import Picture, read_png_text, save_png
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.seeds import consecutive_seeds
from ngrpo_lora.world import HELD_OUT
from ngrpo_lora.world.meanings import meaning_of

if TYPE_CHECKING:
    from ngrpo_lora.adapters.header import AdapterInfo

__all__ = ["compare_adapters", "distinct_prompts", "open_candidates", "suiting"]


@dataclass(frozen=True)
class Candidate:
    """One model to compare, the base alone or with an adapter: its label, and all that its pictures are drawn with."""

    label: str
    adapter: Path | None
    info: AdapterInfo

    def settings(self) -> dict[str, Any]:
        """Settings that a picture depends on beside weights, prompt and seed."""
        rollout = self.info.rollout.model_dump(mode="json", include={"solver", "num_steps", "shift"})
        return self.info.model.model_dump(mode="json") | rollout

    def fingerprint(self) -> str:
        """SHA-256 digest that is equal for equal weights and settings."""
        weights = None if self.adapter is None else digest(self.adapter)
        return _digest(weights, self.settings())


def compare_adapters(
    baseline: Candidate,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    num_seeds: int,
    seed: int,
    configs: Sequence[RewardConfig],
    output: Path,
    device: str = "cpu",
) -> list[Difference]:
    """Draw, judge and write `images/`, `results.csv`, `results.json`, `side_by_side.html` and `blind.html`.

    Args:
        baseline: what the candidates are compared with.
        prompts: (P,), all different.
        num_seeds: K pictures per prompt; picture i of the P * K, prompt-major, has the seed `seed + i`.
    Returns:
        The difference of every candidate from the baseline by every reward.
    """
    scorer = Scorer(configs, device)  # what a reward lacks should be known before a large model is loaded
    seeds = consecutive_seeds(seed, len(prompts) * num_seeds)
    everyone = [baseline, *candidates]
    pictures: dict[str, list[Picture]] = {}
    for one in reversed(everyone):  # adapters first: one that does not fit should be known before hours of drawing
        pictures[one.label] = draw(one, prompts, seeds, output / "images" / one.label)
    cache = ScoreCache(output / "scores.sqlite")
    scores = {
        one.label: judge(scorer, pictures[one.label], cache, f"pictures of {one.label}", num_seeds) for one in everyone
    }
    meanings = [meaning_of(picture.prompt or "") for picture in pictures[baseline.label]]
    differences = [
        difference
        for one in candidates
        for difference in compare_scores(one.label, scores[one.label], baseline.label, scores[baseline.label], meanings)
    ]
    write_results(everyone, pictures, scores, seeds, differences, output)
    return differences


def save_sources(pictures: Sequence[Picture], folder: Path) -> list[dict[str, str]]:
    """Write what was edited to `sources/` of a folder, as rewards saw it; of each picture `source`, its file there."""
    found: list[dict[str, str]] = []
    for picture in pictures:
        source = picture.metadata.get("source")
        if not isinstance(source, Image.Image):
            found.append({})
            continue
        path = folder / "sources" / f"{hashlib.sha256(source.tobytes()).hexdigest()[:16]}.png"
        if not path.exists():  # its name is of its pixels
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, source, {})
        found.append({"source": path.relative_to(folder).as_posix()})
    return found


def write_results(
    everyone: Sequence[Candidate],
    pictures: dict[str, list[Picture]],
    scores: dict[str, dict[str, list[float]]],
    seeds: Sequence[int],
    differences: Sequence[Difference],
    output: Path,
) -> None:
    """Write `results.json`, `results.csv` and the two pages; the first of everyone is the baseline."""
    labels = [one.label for one in everyone]
    texts = [picture.prompt for picture in pictures[labels[0]]]
    sources = save_sources(pictures[labels[0]], output)
    rows: list[dict[str, Any]] = [
        sources[row]
        | {
            "prompt": texts[row],
            "seed": seeds[row],
            "files": {label: pictures[label][row].path.relative_to(output).as_posix() for label in labels},
            "scores": {label: {name: raw[row] for name, raw in scores[label].items()} for label in labels},
        }
        for row in range(len(seeds))
    ]
    results = finite(
        {
            "comparison": _digest([one.fingerprint() for one in everyone], texts, [*seeds])[:12],
            "labels": labels,
            "rewards": list(scores[labels[0]]),
            "adapters": {one.label: None if one.adapter is None else str(one.adapter) for one in everyone},
            "settings": everyone[0].settings(),
            "differences": [asdict(difference) for difference in differences],
            "pictures": rows,
        }
    )
    write_json(output / "results.json", results)
    lines = [
        {"label": label, "prompt": row["prompt"], "seed": row["seed"], "file": row["files"][label]}
        | row["scores"][label]
        for label in labels
        for row in rows
    ]
    write_csv(output / "results.csv", lines)
    pages.write(results, output)


def distinct_prompts(source: str, count: int, seed: int) -> list[Prompt]:
    """The first `count` different prompts of a source; fewer where it has no more.

    Raises:
        ConfigError: there is no such source.
    """
    try:
        prompts = open_prompts(source, seed)
    except ConfigError as error:
        raise ConfigError(f"--prompts {error}") from None
    found: dict[tuple[str, SourcePicture | None], Prompt] = {}
    for index in range(20 * count):
        prompt = prompts.prompt(index)
        found.setdefault((prompt.text, prompt.source), prompt)
        if len(found) == count:
            break
    return list(found.values())


def open_candidates(
    adapters: Sequence[Path], model: str | None, base: bool, device: str
) -> tuple[Candidate, list[Candidate]]:
    """The baseline (the base model, else the first adapter) and the adapters that are compared with it, by their names.

    Raises:
        UserError: a file is not an adapter, there is nothing to compare with, or adapters draw in different ways.
    """
    from ngrpo_lora.adapters.matching import check_adapters  # diffusers is slow to import
    from ngrpo_lora.sampling.settings import drawing_settings

    if len(adapters) + base < 2:
        raise ConfigError("ADAPTER must be given twice or more with --no-base, got 1; the others meet the first")
    infos = [drawing_settings(adapter, model, device, adapters) for adapter in adapters]
    found = [Candidate("base", None, infos[0])] if base else []
    for adapter, info in zip(adapters, infos, strict=True):
        name, number = adapter_label(adapter), 2
        label = name
        while label in {"base", *(one.label for one in found)}:
            label, number = f"{name}-{number}", number + 1
        found.append(Candidate(label, adapter, info))
    first = found[0].settings()
    for one in found:
        for key, value in one.settings().items():
            if value != first[key]:
                raise ConfigError(
                    f"adapters must draw alike to be compared, but {key} is {value} for {one.label} and {first[key]} "
                    f"for {found[-len(adapters)].label}; compare each with its base in a call of its own"
                )
    check_adapters(found[0].info.model, adapters)
    return found[0], found[1:]


def held_out(candidate: Candidate) -> str:
    """Where prompts come from that no training of an embedded model has seen; for others those of the embedded one."""
    return HELD_OUT.get(candidate.info.model.path, HELD_OUT["embedded"])


def suiting(prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, all of one model, which edits where prompts have sources if it can do both.

    Raises:
        ConfigError: the model edits and a prompt has no source, or the other way round.
    """
    from ngrpo_lora.models._loading import family_class  # diffusers is slow to import
    from ngrpo_lora.sampling.settings import editing

    found = [replace(one, info=editing(one.info, prompts)) for one in candidates]
    model = found[0].info.model
    sizes = check_sources("--prompts", prompts, family_class(model).edits, model.path)
    warn_of_cropping("--prompts", sizes, (model.width_px, model.height_px))
    return found


def draw(candidate: Candidate, prompts: Sequence[Prompt], seeds: Sequence[int], folder: Path) -> list[Picture]:
    """Draw pictures into `folder`; one that is there already, from the same weights and settings, stays.

    Args:
        prompts: (P,) texts with metadata.
        seeds: (P * K,), prompt-major.
    """
    fingerprint, per_prompt = candidate.fingerprint(), len(seeds) // len(prompts)
    size = candidate.info.model.width_px, candidate.info.model.height_px
    shown = [prompt.shown(size) for prompt in prompts]
    pictures, missing = [], {}
    for row, seed in enumerate(seeds):
        number = row // per_prompt
        prompt = prompts[number]
        picture = Picture(folder / f"{number:03d}-{seed}.png", prompt.text, shown[number])
        text = {"prompt": prompt.text, "seed": str(seed), "ngrpo": fingerprint}
        if prompt.source is not None:
            text["source"] = prompt.source.digest
        pictures.append(picture)
        if not text.items() <= read_png_text(picture.path).items():
            missing[picture.path] = prompt, text
    if missing:
        from ngrpo_lora.sampling.sampler import Sampler  # diffusers is slow to import

        folder.mkdir(parents=True, exist_ok=True)
        sampler = Sampler(candidate.info, candidate.adapter)
        images = sampler([prompt for prompt, _ in missing.values()], [int(t["seed"]) for _, t in missing.values()])
        frames = sampler.family.num_frames  # of a video the middle one is compared
        middle = islice(images, frames // 2, None, frames)
        drawn = track(middle, f"drawing {candidate.label}", len(missing), console=console, transient=True)
        for (path, (_, text)), image in zip(missing.items(), drawn, strict=True):
            save_png(path, image, text)
    return pictures


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
