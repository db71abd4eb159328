"""Run folders of the paper's comparison as a complete run leaves them, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.bench.paper import plan as plans
from ngrpo_lora.bench.paper.plan import Job, Plan, make_plan
from ngrpo_lora.config import RunConfig, dump_config
from ngrpo_lora.records.pictures import save_png

PROMPTS = ["a red star", "a star and a heart", "a red star and a blue heart", "three hearts", "a heart above a star"]
"""Three of trained tasks and two of left-out ones."""


def small_plan(folder: Path, *names: str, profile: str = "quick", **asked: object) -> Plan:
    return make_plan(folder, profile, names=names or ("neighbor-dpmpp-8", "flow-grpo"), **asked)  # pyright: ignore


def cost_of_8(config: RunConfig, budget: float) -> tuple[int, float]:
    """A made-up length: 40 forward passes per sample for stochastic steps, 10 for Neighbor GRPO."""
    cost = 10.0 if config.algorithm.name == "neighbor" else 40.0
    return max(1, int(budget / cost)), cost


def jobs_of(plan: Plan) -> list[Job]:
    return plans.main_jobs(plan, {method.name: method.untuned for method in plan.searched}, cost_of_8)


def leave(job: Job, score: Callable[[int, int], float]) -> None:
    """Write a complete run in which `score(picture, step)` is the reward, and strict is whether it is above a half."""
    folder, total, every = job.folder, job.config.trainer.num_iterations, job.config.evaluation.every
    for place in ("adapter", "evaluations", "samples/first", "samples/last"):
        (folder / place).mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(job.config))
    (folder / "adapter" / FILE_NAME).write_bytes(b"")
    rows = []
    for step in range(total + 1):
        row: dict[str, float] = {"step": step}
        if step:
            row |= {"nfe/old_per_sample": job.cost - 3, "nfe/theta_per_sample": 1.0}
            row |= {"time/rollout_s": 1.0, "time/reward_s": 0.5, "time/update_s": 0.25}
        if step % every == 0 or step == total:
            values = [score(index, step) for index in range(len(PROMPTS))]
            row["eval/reward_mean"] = sum(values) / len(values)
            row |= {"eval/strict_accuracy": 0.5, "eval/world_mean": 0.5, "eval/hue_bits": 2 - 0.01 * step}
            lines = [
                {"prompt": prompt, "seed": 1000 + i, "world": values[i], "world_strict": float(values[i] > 0.5)}
                | {job.config.rewards.train[0].key: values[i]}
                for i, prompt in enumerate(PROMPTS)
            ]
            path = folder / "evaluations" / f"{step:06d}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part, shade in (("first", "gray"), ("last", "red")):
        for index in range(2):
            image = Image.new("RGB", (16, 16), shade)
            save_png(folder / "samples" / part / f"{index}.png", image, {"prompt": PROMPTS[index], "seed": "1"})
