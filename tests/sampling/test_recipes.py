"""What draws side by side, and under which name."""

from __future__ import annotations

from pathlib import Path

from ngrpo_lora.sampling.recipes import Column, columns_of

A, B = (Path("a.safetensors"), 1.0), (Path("deep/a.safetensors"), 1.0)


def test_adapters_draw_together_or_each_apart_and_the_base_where_nothing_else_does():
    half = (Path("b.safetensors"), 0.5)
    assert columns_of([], False, False) == [Column("base")]
    assert columns_of([A, half], False, False) == [Column("a+bx0.5", (A, half))]
    assert columns_of([A, half], True, True) == [Column("base"), Column("a", (A,)), Column("bx0.5", (half,))]


def test_no_two_columns_have_one_name():
    base = (Path("base.safetensors"), 1.0)
    assert [column.label for column in columns_of([A, B, base, A], True, True)] == ["base", "a", "a-2", "base-2", "a-3"]
