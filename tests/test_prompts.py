"""Prompt files and the world's prompts: the same prompt at the same position, whoever asks when."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts import PromptFile, open_prompts, read_prompt_file
from ngrpo_lora.world.scenes import TASKS, parse


def test_a_file_gives_one_prompt_a_line_without_blanks_and_byte_order_mark(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red star\r\n\r\n  ein grünes Herz \n\t\n三つの星".encode())
    assert read_prompt_file(path) == ["a red star", "ein grünes Herz", "三つの星"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_an_error(content: bytes, tmp_path: Path):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"must hold at least one prompt, but .*empty\.txt' is empty"):
        read_prompt_file(path)


def test_a_file_that_is_not_utf_8_is_an_error_that_names_the_byte(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes("a café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"must be a UTF-8 text file, but byte 5 of .*latin\.txt' is not UTF-8"):
        read_prompt_file(path)


def test_a_file_that_is_missing_or_a_folder_is_an_error(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"must be world:train, world:held_out, one task .* or a text file, but there is no"
    ):
        read_prompt_file(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match="must be a readable text file"):
        read_prompt_file(tmp_path)


def test_a_file_gives_every_prompt_once_an_epoch_in_a_new_order():
    source = PromptFile([f"prompt {i}" for i in range(20)], seed=3)
    epochs = [[source.prompt(20 * epoch + i) for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(source.prompts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != source.prompts


def test_repeated_lines_are_repeated_prompts():
    source = PromptFile(["a", "a", "b"], seed=0)
    assert sorted(source.prompt(i) for i in range(3)) == ["a", "a", "b"]


@pytest.mark.parametrize("name", ["world:train", "world:held_out", "file"])
def test_a_position_has_one_prompt_whatever_was_asked_before(name: str, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(7)))
    name = str(path) if name == "file" else name
    forwards = [open_prompts(name, 5).prompt(i) for i in range(30)]
    source = open_prompts(name, 5)
    assert [source.prompt(i) for i in reversed(range(30))] == forwards[::-1]
    assert [open_prompts(name, 6).prompt(i) for i in range(30)] != forwards


@pytest.mark.parametrize("name", ["world:train", "world:held_out"])
def test_the_worlds_prompts_are_scenes_of_its_six_tasks_in_turn(name: str):
    source = open_prompts(name, 0)
    found = [parse(source.prompt(i)) for i in range(120)]
    assert [scene.task for scene in found] == list(TASKS) * 20
    assert len(set(found)) > 30


@pytest.mark.parametrize("task", TASKS)
def test_one_task_of_the_world(task: str):
    held_out = {parse(open_prompts(f"world:held_out/{task}", 0).prompt(i)) for i in range(200)}
    train = {parse(open_prompts(f"world:train/{task}", 0).prompt(i)) for i in range(200)}
    assert {scene.task for scene in held_out | train} == {task}
    assert not train & held_out


def test_a_mix_gives_every_source_its_weight_in_every_cycle(tmp_path: Path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i}" for i in range(50)))
    weights = {str(tmp_path / f"{name}.txt"): weight for name, weight in (("a", 4), ("b", 1), ("c", 3))}
    mix = open_prompts(weights, 5)
    found = [mix.prompt(i) for i in range(80)]
    for start in range(0, 80, 8):
        cycle = [prompt[0] for prompt in found[start : start + 8]]
        assert (cycle.count("a"), cycle.count("b"), cycle.count("c")) == (4, 1, 3)
        assert "aaa" not in "".join(cycle)
    # Every source runs through its own prompts in its own order: 40 of 50, 10 and 30, none of them twice.
    assert len(set(found)) == 80
    assert found == [open_prompts(weights, 5).prompt(i) for i in range(80)]
    assert found != [open_prompts(weights, 6).prompt(i) for i in range(80)]


def test_training_never_sees_a_held_out_scene():
    train, held_out = (
        {parse(source.prompt(i)) for i in range(3000)}
        for source in (open_prompts("world:train", 1), open_prompts("world:held_out", 2))
    )
    assert not train & held_out
