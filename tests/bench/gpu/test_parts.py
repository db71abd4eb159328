"""What is measured: the same parts on every device, of configurations that are as large as they say."""

from __future__ import annotations

from ngrpo_lora.bench.gpu.parts import make_parts
from ngrpo_lora.planning.plan import rehearse


def test_a_cpu_has_the_parts_and_settings_of_a_gpu():
    gpu, cpu = make_parts("cuda"), make_parts("cpu")
    assert [(part.name, part.kind, part.allotted_s) for part in cpu] == [(p.name, p.kind, p.allotted_s) for p in gpu]
    for ours, theirs in zip(cpu, gpu, strict=True):
        for row, other in zip(ours.rows, theirs.rows, strict=True):
            assert row.config.model.path == "embedded"
            assert other.config.model.path == "black-forest-labs/FLUX.1-dev"
            assert row.config.algorithm == other.config.algorithm
            assert row.config.rollout == other.config.rollout
            assert row.config.model.quantization == other.config.model.quantization


def test_rows_are_told_apart_and_files_too():
    parts = make_parts("cuda:1")
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert len({row.label for row in part.rows}) == len(part.rows)
        assert all(row.config.model.device == "cuda:1" for row in part.rows)


def test_iterations_have_the_papers_function_evaluations():
    parts = {part.name: part for part in make_parts("cuda")}
    for row, old, theta in zip(parts["methods"].rows, (8, 25), (4 / 3, 14), strict=True):
        evaluations = rehearse(row.config).evaluations(1, 1)
        assert evaluations.theta_per_sample == theta
        assert evaluations.rollout / evaluations.samples == old
    for row in (*parts["sizes"].rows, *parts["batches"].rows):
        assert rehearse(row.config).evaluations(1, 1).theta_per_sample == 4 / 3
