"""A run's folder as training leaves it, written by hand, with prompts that would break a page that does not escape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ngrpo_lora.config import dump_config, load_config
from ngrpo_lora.evaluation.report.record import Record, save_group
from ngrpo_lora.records.pictures import save_png

HOSTILE = "</script><script>alert('$title')</script> \"quoted\" & <b>bold</b> 🎨 אדום"
PROMPTS = ["a red star", "a photo of a green circle", HOSTILE, HOSTILE]


def rows_of(iterations: int) -> list[dict[str, Any]]:
    """Metrics of a healthy run: the reward rises from 0.2 to 0.6 on held-out prompts."""
    rows: list[dict[str, Any]] = [{"step": 0, "time/evaluation_s": 3.0} | evaluation(0.2)]
    for step in range(1, iterations + 1):
        rows.append(
            {
                "step": step,
                "rollout/reward_mean": 0.3 + 0.01 * step,
                "rollout/reward_std": 0.1,
                "rollout/zero_spread_share": 0.0,
                "rollout/failed_share": 0.0,
                "policy/clip_fraction": 0.1,
                "policy/max_abs_log_ratio": 0.01,
                "policy/entropy": 2.4,
                "policy/skipped_updates": 0.0,
                "nfe/old_per_sample": 8.0,
                "nfe/theta_per_sample": 1.25,
                "time/rollout_s": 2.0,
                "time/reward_s": 0.5,
                "time/update_s": 1.0,
            }
        )
    rows[-1] |= {"time/evaluation_s": 3.0} | evaluation(0.6)
    return rows


def evaluation(reward: float) -> dict[str, float]:
    names = ("reward_mean", "world_mean", "strict_accuracy", "world_strict_mean", "world_manifold_mean")
    return {f"eval/{name}": reward for name in names}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, iterations: int = 10, watched: float = 0.0, **metrics: float) -> Record:
    """Write a run whose every iteration has these metrics, and whose watched reward gains `watched`."""
    config = load_config(None, [f"output_dir={folder}", "trainer.num_iterations=10", "evaluation.every=5"])
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    rows = rows_of(iterations)
    for row in rows[1:]:
        row |= {key.replace("__", "/"): value for key, value in metrics.items()}
    lines(folder / "metrics.jsonl", rows)
    for step, gained in ((0, 0.0), (iterations, 1.0)):
        scores = [
            {"prompt": prompt, "seed": 7 + i, "world": 0.25 + 0.5 * gained, "world_manifold": i + watched * gained}
            | {"world_strict": float(i == 0 or bool(gained and i < 3))}
            for i, prompt in enumerate(PROMPTS)
        ]
        lines(folder / "evaluations" / f"{step:06d}.jsonl", scores)
    for part, color in (("first", "red"), ("last", "blue")):
        for i in (0, 2):
            text = {"prompt": PROMPTS[i], "seed": str(7 + i)}
            (folder / "samples" / part).mkdir(parents=True, exist_ok=True)
            save_png(folder / "samples" / part / f"{i}.png", Image.new("RGB", (64, 64), color), text)
    images = [Image.new("RGB", (64, 64), (50 * i, 0, 0)) for i in range(3)]
    save_group(folder, iterations, HOSTILE, images, [0.25, 0.75, 0.5])
    return Record.read(folder, config, is_running=False)
