"""Sources, mixes and splits: the same prompt at the same position, whoever asks when, and none on both sides."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ngrpo_lora.config import PromptsConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.checking import check_sources
from ngrpo_lora.prompts.files import Prompt, read_prompts
from ngrpo_lora.prompts.sources import (
    PromptList,
    PromptSource,
    count_longer,
    divide,
    open_prompts,
    open_split,
    read_split,
    token_lengths,
)
from ngrpo_lora.world import EMBEDDED
from ngrpo_lora.world.edit_verifier import look, promises
from ngrpo_lora.world.edits import EDIT_TASKS, parse_edit
from ngrpo_lora.world.scenes import TASKS, parse

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write("a.txt", prompts)`: a file in the working directory, one prompt a line; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, lines: list[str]) -> str:
        Path(name).write_text("\n".join(lines), encoding="utf-8")
        return name

    return write


def texts(source: PromptSource, count: int) -> list[str]:
    return [source.prompt(i).text for i in range(count)]


def test_a_list_gives_every_prompt_once_an_epoch_in_a_new_order():
    source = PromptList([Prompt(f"prompt {i}", {"i": i}) for i in range(20)], seed=3)
    epochs = [[source.prompt(20 * epoch + i) for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch, key=lambda prompt: prompt.metadata["i"]) == source.prompts for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != source.prompts


def test_repeated_lines_are_one_prompt_unless_they_are_kept(write: Write, caplog: pytest.LogCaptureFixture):
    write("a.txt", ["a", "A ", "b"])
    with caplog.at_level(logging.INFO, "ngrpo_lora"):
        train, _ = open_split(PromptsConfig(train="a.txt"), 0, 0)
    assert sorted(texts(train, 2)) == ["a", "b"]
    assert caplog.messages == ["prompts.train: 1 duplicates of a.txt dropped"]
    train, _ = open_split(PromptsConfig(train="a.txt", deduplicate=False), 0, 0)
    assert sorted(texts(train, 3)) == ["A", "a", "b"]


@pytest.mark.parametrize("name", ["world:train", "world:held_out", "file.txt"])
def test_a_position_has_one_prompt_whatever_was_asked_before(name: str, write: Write):
    write("file.txt", [f"prompt {i}" for i in range(7)])
    forwards = texts(open_prompts(name, 5), 30)
    source = open_prompts(name, 5)
    assert [source.prompt(i).text for i in reversed(range(30))] == forwards[::-1]
    assert texts(open_prompts(name, 6), 30) != forwards


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("world:train", ["a drawing of a heart", "a picture of a star and a cross", "a circle below a triangle"]),
        (
            "world:held_out/position",
            ["a drawing of a triangle above a heart", "a picture of a star right of a triangle"]
            + ["a circle left of a triangle"],
        ),
        (
            {"world:train/color": 2, "world:train": 1},
            ["a drawing of a green star", "a picture of a star", "a drawing of an orange star"],
        ),
    ],
)
def test_the_worlds_prompts_are_those_of_earlier_versions(source: Any, expected: list[str]):
    prompts = open_prompts(source, 5)
    assert [prompts.prompt(i).text for i in (0, 1, 1000)] == expected


@pytest.mark.parametrize("name", ["world:train", "world:held_out"])
def test_the_worlds_prompts_are_scenes_of_its_six_tasks_in_turn(name: str):
    found = [parse(text) for text in texts(open_prompts(name, 0), 120)]
    assert [scene.task for scene in found] == list(TASKS) * 20
    assert len(set(found)) > 30


@pytest.mark.parametrize("task", TASKS)
def test_one_task_of_the_world(task: str):
    held_out = {parse(text) for text in texts(open_prompts(f"world:held_out/{task}", 0), 200)}
    train = {parse(text) for text in texts(open_prompts(f"world:train/{task}", 0), 200)}
    assert {scene.task for scene in held_out | train} == {task}
    assert not train & held_out


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_take_turns_and_each_has_a_picture_that_it_can_be_asked_of(split: str):
    source = open_prompts(f"edits:{split}", 0)
    prompts = [source.prompt(index) for index in range(24)]
    assert [parse_edit(prompt.text).task for prompt in prompts] == list(EDIT_TASKS) * 6
    for prompt in prompts:
        assert prompt.source is not None
        assert promises(parse_edit(prompt.text), look(np.asarray(prompt.source.load())).found) is not None
    check_sources("prompts.train", prompts, edits=True, model="embedded-edit")
    assert len({prompt.key for prompt in prompts}) == 24
    again = open_prompts(f"edits:{split}", 0)
    assert [again.prompt(index) for index in reversed(range(24))] == prompts[::-1]
    assert source.prompt(0).key != open_prompts(f"edits:{split}", 1).prompt(0).key


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_one_task_of_edits(task: str):
    held_out = {parse_edit(text) for text in texts(open_prompts(f"edits:held_out/{task}", 0), 60)}
    train = {parse_edit(text) for text in texts(open_prompts(f"edits:train/{task}", 0), 60)}
    assert {edit.task for edit in held_out | train} == {task}
    assert not {edit.meaning for edit in train} & {edit.meaning for edit in held_out}


def test_a_mix_gives_every_source_its_weight_in_every_cycle(write: Write):
    weights = {write(f"{name}.txt", [f"{name}{i}" for i in range(50)]): w for name, w in (("a", 4), ("b", 1), ("c", 3))}
    found = texts(open_prompts(weights, 5), 80)
    for start in range(0, 80, 8):
        cycle = [prompt[0] for prompt in found[start : start + 8]]
        assert (cycle.count("a"), cycle.count("b"), cycle.count("c")) == (4, 1, 3)
        assert "aaa" not in "".join(cycle)
    # Every source runs through its own prompts in its own order: 40 of 50, 10 and 30, none of them twice.
    assert len(set(found)) == 80
    assert found == texts(open_prompts(weights, 5), 80)
    assert found != texts(open_prompts(weights, 6), 80)


def test_training_never_sees_a_held_out_scene():
    train, held_out = (
        {parse(text) for text in texts(open_prompts(name, seed), 3000)}
        for name, seed in (("world:train", 1), ("world:held_out", 2))
    )
    assert not train & held_out


def test_a_fraction_is_held_out_by_the_prompts_themselves():
    prompts = [Prompt(f"prompt {i}") for i in range(10_000)]
    train, held_out = divide(prompts, 0.05)
    assert sorted(train + held_out) == sorted(prompts)
    assert 435 < len(held_out) < 565  # three standard deviations
    assert [prompt.text for prompt in held_out[:3]] == ["prompt 5", "prompt 10", "prompt 18"]
    # Neither other prompts nor order, case and spaces matter; a larger fraction holds out more.
    some = random.Random(0).sample(prompts, 5000)
    assert sorted(divide(some, 0.05)[1]) == sorted(prompt for prompt in held_out if prompt in some)
    shouted = [Prompt(f"  {prompt.text.upper()} ") for prompt in held_out]
    assert divide([*shouted, train[0]], 0.05) == ([train[0]], shouted)
    more = divide(prompts, 0.1)[1]
    assert len(more) > len(held_out)
    assert all(prompt in more for prompt in held_out)


def test_a_run_with_a_fraction_never_trains_on_a_prompt_that_it_evaluates(write: Write):
    write("a.txt", [f"prompt {i}" for i in range(100)])
    write("b.txt", [f"Prompt {i}" for i in range(50, 150)])
    config = PromptsConfig(train={"a.txt": 2, "b.txt": 1}, held_out=0.2)
    train, held_out = open_split(config, 1, 2)
    trained, evaluated = ({text.lower() for text in texts(source, 600)} for source in (train, held_out))
    assert not trained & evaluated
    assert trained | evaluated == {f"prompt {i}" for i in range(150)}
    assert texts(open_split(config, 3, 2)[1], 50) == texts(held_out, 50)
    assert texts(open_split(config, 1, 4)[0], 50) == texts(train, 50)


def test_a_fraction_that_leaves_one_side_empty_or_divides_the_world_is_an_error(write: Write):
    write("a.txt", ["a", "b"])
    with pytest.raises(ConfigError) as error:
        read_split(PromptsConfig(train={"a.txt": 1, "world:train": 1}, held_out=0.001))
    assert error.value.problems == (
        "prompts.held_out=0.001 of 'a.txt' must leave prompts on both sides, but of 2 it holds out 0; "
        "set another fraction, or a source of its own",
        "prompts.held_out=0.001 must divide files or datasets, but world:train is neither; "
        "set it to a source such as world:held_out",
    )


def test_prompts_in_both_files_are_counted_in_a_warning(write: Write, caplog: pytest.LogCaptureFixture):
    config = PromptsConfig(train=write("a.txt", ["a", "b", "c"]), held_out=write("b.txt", ["B ", "c", "d", "e"]))
    open_split(config, 0, 0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("2 of 4 prompts of prompts.held_out are in prompts.train too")
    caplog.clear()
    open_split(PromptsConfig(train="a.txt", held_out=write("c.txt", ["x"])), 0, 0)
    assert not caplog.records


def test_every_faulty_source_is_a_problem_of_its_key(write: Write):
    write("good.txt", ["a"])
    with pytest.raises(ConfigError) as error:
        read_split(PromptsConfig(train={"good.txt": 1, "gone.txt": 1, "far.csv": 1}, held_out="none.jsonl"))
    keys_and_files = [(problem.split()[0], problem.split()[-1]) for problem in error.value.problems]
    assert keys_and_files == [
        ("prompts.train", "'gone.txt'"),
        ("prompts.train", "'far.csv'"),
        ("prompts.held_out", "'none.jsonl'"),
    ]


def test_prompts_beyond_a_tokenizers_limit_are_counted():
    folder = EMBEDDED
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    prompts = ["a red star", "a red star and a red star and a red star and a red star and a red star"]
    assert token_lengths(prompts, tokenizer) == [len(tokenizer.tokenize(prompt)) + 2 for prompt in prompts] == [5, 21]
    assert [count_longer(prompts, tokenizer, limit) for limit in (4, 5, 20, 21)] == [2, 1, 1, 0]


def test_files_read_before_are_not_read_again(write: Write):
    tables = {write("a.txt", ["a"]): read_prompts("a.txt")}
    write("a.txt", ["b"])
    assert open_prompts("a.txt", 0, tables).prompt(0).text == "a"
    assert open_prompts("a.txt", 0).prompt(0).text == "b"
