"""Pipelines, and what their networks take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ngrpo_lora.bench import pipeline as bench_pipeline


@torch.no_grad()
def test_the_networks_calls_alone_lead_to_the_pipelines_picture():
    ours, stock = bench_pipeline.open_pipelines(1)
    assert type(ours).__name__ == "NeighborGRPOFluxPipeline"
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 64}
    pictures = []
    for pipeline, seed in ((ours, {"seeds": 0}), (stock, {"generator": torch.Generator().manual_seed(0)})):
        with bench_pipeline.recorded(pipeline) as calls:
            pictures.append(pipeline(bench_pipeline.PROMPT, output_type="pt", **settings, **seed).images)
        assert [name for name, _ in calls] == ["text_encoder", "text_encoder_2", *["transformer"] * 3, "vae"]
        assert torch.equal((calls[-1][1]()[0] / 2 + 0.5).clamp(0, 1), pictures[-1])
        count = len(calls)
        pipeline(bench_pipeline.PROMPT, **settings)
        assert len(calls) == count
    assert torch.equal(*pictures)


def test_a_transformer_may_be_made_wider():
    ours, stock = bench_pipeline.open_pipelines(2)
    assert ours.transformer is stock.transformer
    assert ours.transformer.config.num_attention_heads == 2


def test_the_table_has_the_shortest_of_every_way(monkeypatch: pytest.MonkeyPatch):
    """Seconds are given: of each way the second call is the shortest, and the first, which warms up, does not count."""
    seconds = iter([0.01] * 4 + [0.5, 0.9, 1.2, 1.6] + [0.4, 0.8, 1.0, 1.2])

    def timed(draw: Callable[[], object]) -> float:
        draw()
        return next(seconds)

    monkeypatch.setattr(bench_pipeline, "timed", timed)
    lines: list[str] = []
    bench_pipeline.overhead_table([1], [32], [2], 2, lines.append)
    assert lines[-1] == "| 1 M | 32 px | 2 | 200.0 ms | 800.0 ms | 200.0 ms (+25.0%) | 400.0 ms (+50.0%) |"
