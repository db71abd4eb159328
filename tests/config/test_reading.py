"""Configuration: what goes in comes out, and a file that cannot be read says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refusing import message

from ngrpo_lora.config import RunConfig, changed_keys, describe, dump_config, load_config, preset_names
from ngrpo_lora.config.plugins import algorithm_settings
from ngrpo_lora.errors import ConfigError


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_its_dump_reads_back_as_itself(preset: str, tmp_path: Path):
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_opens_with_how_to_run_it(preset: str):
    text = (Path(load_config.__code__.co_filename).parent / "presets" / f"{preset}.yaml").read_text()
    assert f"ngrpo train {preset}".removesuffix(" demo") in "\n".join(text.splitlines()[:5])


def test_no_config_is_the_demo_preset():
    assert load_config() == load_config("demo")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("rollout: {num_steps: 6, group_size: 8}\n")
    config = load_config(path, ["rollout.num_steps=5"])
    assert (config.rollout.num_steps, config.rollout.group_size) == (5, 8)
    assert config.rollout.prompts_per_iteration == RunConfig().rollout.prompts_per_iteration


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-3", 2e-3), (".5e-3", 5e-4), ("1e+1", 10.0), ("3", 3)])
def test_scientific_notation_is_a_number(text: str, value: float, tmp_path: Path):
    assert load_config(None, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value
    path = tmp_path / "run.yaml"
    path.write_text(f"optimizer: {{learning_rate: {text}}}\n")
    assert load_config(path).optimizer.learning_rate == value


def test_a_mix_of_prompts_is_given_anew_or_changed_at_one_source(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("prompts: {train: {a.txt: 3, b.txt: 1}}\n")
    assert load_config(path).prompts.train == {"a.txt": 3, "b.txt": 1}
    assert load_config(path, ["prompts.train={c.txt: 2}"]).prompts.train == {"c.txt": 2}
    assert load_config(path, ["prompts.train=c.txt"]).prompts.train == "c.txt"
    assert "prompts.train must be text or" in message("prompts.train={c.txt: 0}", config=path)
    assert "prompts.train must be text or" in message("prompts.train={}", config=path)
    assert next(o.type for o in describe() if o.key == "prompts.train") == "text | {text: int >= 1}"


def test_changed_keys_names_what_differs():
    old, new = load_config(), load_config(None, ["rollout.num_steps=9", "seed=3"])
    assert changed_keys(old, new) == ["rollout.num_steps: 8 -> 9", "seed: 0 -> 3"]
    assert changed_keys(old, old) == []


def test_a_repeated_override_is_refused():
    assert message("seed=1", "seed=2") == "seed is given twice; keep one"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"rollout: [1, 2", "is not valid YAML"),
        (b"seed: 1\nseed: 2\n", "'seed' is given twice at line 2"),
        (b"rollout:\n\tnum_steps: 8\n", "line 2"),
        (b"just words", "must hold `key: value` lines"),
        (b"seed: \xff\n", "must be UTF-8"),
        (b"rollout: {group_szie: 3}\n", "did you mean rollout.group_size?"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("seed: 3\n".encode("utf-16"), "must be UTF-8 text, but byte 0 of"),
        ("seed: 3\n".encode("utf-16-le"), "is NUL, as in UTF-16; save it as UTF-8"),
        (b"output_dir: a\x07b\n", "it holds the character '\\x07', number 14; leave it out"),
        (b"seed:\t3\n", "at line 1, column 6; write spaces, not tabs"),
        (b"seed: 1\n---\nseed: 2\n", "it holds a second document at line 2, column 1; keep one"),
        (b"? [a, b]\n: 1\n", "a key must be one word, not a list or a mapping at line 1"),
        (b"- seed\n", "must hold `key: value` lines, got ['seed']"),
        (b"[" * 5000, "nested more than 50 deep"),
        (b"seed: 010\n", "seed must be a whole number, got '010'; write 10"),
        (b"a: &a [*a]\n", "nested more than 50 deep"),
        (b"trainer.num_iterations: 3\n", "which only key=value has; in YAML write trainer: {num_iterations: ...}"),
        ("seed\u00a0: 3\n".encode(), r"unknown key 'seed\xa0'; did you mean seed?"),
        ("seed\uff1a 3\n".encode(), "must hold `key: value` lines"),
        (b"trainer: {max_hours: 1:30}\n", "trainer.max_hours must be a number, got '1:30'"),
        (b"seed: 1,5\n", "seed must be a whole number, got '1,5'"),
        ("seed: \uff11\n".encode(), "seed must be a whole number, got '\uff11'"),
    ],
)
def test_a_bad_file_is_refused(content: bytes, part: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    text = message(config=path)
    assert part in text
    assert len(text.splitlines()) == 1


def test_a_pipe_is_no_config_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "run.yaml")
    assert "is a pipe or a device, and no file; give a YAML file" in message(config=tmp_path / "run.yaml")


def test_an_empty_file_has_the_defaults(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == RunConfig()


def test_a_missing_file_and_an_unknown_preset_say_what_exists(tmp_path: Path):
    assert "does not exist" in message(config=tmp_path / "no.yaml")
    assert "is a folder" in message(config=tmp_path)
    assert "did you mean demo?" in message(config="demoo")
    assert "demo, demo-edit, demo-turbo, demo-vote, flux" in message(config="demoo")


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfseed: 3\n", b"---\r\nseed: 3\r\n...\r\n", b"seed: &s 3\nevaluation: {seed: *s}\n"]
)
def test_a_mark_other_line_ends_and_anchors_are_read(content: bytes, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert load_config(path).seed == 3


def test_what_looks_like_another_type_in_a_file_is_text_where_text_is_wanted(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: 2025-02-28\nhub: {revision: 010, commit_message: on}\nmodel: {vae_tiling: yes}\n")
    config = load_config(path)
    assert (config.output_dir, config.hub.revision, config.hub.commit_message) == ("2025-02-28", "010", "on")
    assert config.model.vae_tiling is True
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_section_in_short_leaves_its_other_keys_as_they_are(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("hub: {repo: a/b, private: true}\nrewards: {train: world, combine: raw}\n")
    config = load_config(path, ["hub=c/d", "rewards=jpeg", "rewards.frames=2"])
    assert (config.hub.repo, config.hub.private) == ("c/d", True)
    assert (config.rewards.train[0].name, config.rewards.combine, config.rewards.frames) == ("jpeg", "raw", 2)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["rollout={num_steps: 4}", "rollout.num_steps=5"],
            "rollout.num_steps is given twice, also in rollout; keep one",
        ),
        (
            ["rollout.num_steps=5", "rollout={num_steps: 4}"],
            "rollout.num_steps is given twice, also in rollout; keep one",
        ),
        (["rewards=jpeg", "rewards.train=world"], "rewards.train is given twice; keep one"),
        (["algorithm=flow_grpo", "algorithm.name=nft"], "algorithm.name is given twice; keep one"),
    ],
)
def test_overrides_of_which_one_would_undo_another_are_refused(overrides: list[str], problem: str):
    assert message(*overrides) == problem


def test_a_section_as_a_whole_and_its_other_keys_go_together_in_any_order():
    for overrides in (
        ["rollout={num_steps: 4}", "rollout.group_size=6"],
        ["rollout.group_size=6", "rollout={num_steps: 4}"],
    ):
        config = load_config(None, overrides)
        assert (config.rollout.num_steps, config.rollout.group_size) == (4, 6)


def test_another_algorithm_has_nothing_of_the_settings_of_the_files_one():
    config = load_config("demo", ["algorithm=flow_grpo", "algorithm.eta=0.5"])
    assert config.algorithm.model_dump() == {**algorithm_settings("flow_grpo")().model_dump(), "eta": 0.5}


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("fast.safetensors", [("fast.safetensors", 1.0)]),
        ("fast.safetensors:0.5", [("fast.safetensors", 0.5)]),
        ("[a.safetensors, b.safetensors:0.25]", [("a.safetensors", 1.0), ("b.safetensors", 0.25)]),
        ("{a.safetensors: 2}", [("a.safetensors", 2.0)]),
        ("{}", []),
    ],
)
def test_files_that_the_base_takes_in_are_named_with_or_without_strengths(
    text: str, strengths: list[tuple[str, float]]
):
    assert [*load_config(None, [f"model.fuse={text}"]).model.fuse.items()] == strengths


def test_a_file_that_the_base_takes_in_is_named_once():
    with pytest.raises(ConfigError, match=r"model\.fuse must name each file once, got '\./a' twice; add up"):
        load_config(None, ["model.fuse={a: 1, ./a: 1}"])
    with pytest.raises(ConfigError, match="the strength of an adapter must be finite, got nan for 'a'"):
        load_config(None, ["model.fuse=a:nan"])
