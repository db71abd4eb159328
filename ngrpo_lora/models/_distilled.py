"""Into how many steps a model is distilled, as far as it says so: in its own files, or in the name that it goes by.

Such a model draws what it was taught to at the noise levels of its distillation alone; with other numbers of steps its
pictures are blurred or burnt, and what is trained there does not hold where it is drawn.
"""

from __future__ import annotations

import re

from ngrpo_lora.config import ModelConfig, RunConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._index import architectures, known_pipeline, model_index

__all__ = ["distilled_note", "distilled_steps"]

NAMED = re.compile(r"(?<![\d.])(\d\d?)[-_ ]?steps?(?![a-z])", re.IGNORECASE)
"""A number of steps in the name of a file or a repository, such as `Qwen-Image-Lightning-4steps-V1.0`."""
PUBLISHED = {
    "FLUX.1-Turbo-Alpha": 8,
    "FLUX.1-schnell": 4,
    "Z-Image-Turbo": 8,
    "embedded-turbo": 4,
    "stable-diffusion-3.5-large-turbo": 4,
}
"""Steps of models and LoRAs whose names do not tell them; from their model cards."""


def distilled_steps(model: ModelConfig) -> tuple[int, str] | None:
    """Return the number of steps that a model is distilled into, and the file or model that says so.

    None where nothing says so: of a model that is drawn in any number of steps, or of one that cannot be read.
    """
    for path in (*model.fuse, model.path):
        steps = named_steps(path)
        if steps is not None:
            return steps, path
    try:
        steps = _own_steps(model)
    except UserError:  # said where the model is loaded
        return None
    return None if steps is None else (steps, model.path)


def named_steps(path: str) -> int | None:
    """The number of steps in the name of a model or a LoRA file."""
    for published, steps in PUBLISHED.items():
        if published.lower() in path.lower():
            return steps
    found = NAMED.search(re.split(r"[\\/]", path.rstrip("\\/"))[-1])
    return int(found[1]) if found else None


def _own_steps(model: ModelConfig) -> int | None:
    """The number of steps of a model that tells of its distillation in its own files, as klein does."""
    if known_pipeline(model) != "Flux2KleinPipeline":
        return None
    known = None if model.revision else architectures().get(model.path)
    index = known["settings"] if known else model_index(model.path, model.revision)
    return 4 if index.get("is_distilled") else None


def distilled_note(config: RunConfig) -> str | None:
    """What a user should know whose run has other steps than its model is distilled into; None where all is well."""
    found = distilled_steps(config.model)
    if found is None:
        return None
    steps, source = found
    wrong = {"rollout": config.rollout.num_steps, "evaluation": config.evaluation.num_steps}
    settings = [name for name, value in wrong.items() if value not in (None, steps)]
    if not settings:
        return None
    got = " and ".join(f"{name}.num_steps is {wrong[name]}" for name in settings)
    advice = " ".join(f"{name}.num_steps={steps}" for name in settings)
    return (
        f"{source} is distilled into {steps} steps, but {got}: it draws worse pictures there, and what it learns does "
        f"not hold where it is drawn as published; give {advice}"
    )
