"""Configuration: what goes in comes out, and everything that cannot run is refused in one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ngrpo_lora.config import RunConfig, changed_keys, describe, dump_config, load_config, parse_config, preset_names
from ngrpo_lora.errors import ConfigError


def message(*overrides: str, config: str | Path | None = None) -> str:
    """The text of the ConfigError that the overrides cause."""
    with pytest.raises(ConfigError) as error:
        load_config(config, overrides)
    return str(error.value)


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


def test_the_dump_is_complete():
    flat = {option.key for option in describe() if not option.is_section}
    values = yaml.safe_load(dump_config(RunConfig()))

    def keys(node: dict, prefix: str = "") -> set[str]:
        return set().union(
            *({f"{prefix}{k}"} if not isinstance(v, dict) else keys(v, f"{prefix}{k}.") for k, v in node.items())
        )

    assert keys(values) == flat


def test_every_key_has_a_description_and_its_default_is_valid():
    for option in describe():
        assert option.description.endswith("."), option.key
    assert parse_config(yaml.safe_load(dump_config(RunConfig()))) == RunConfig()


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


def test_reward_shorthands_mean_the_same():
    forms = ["rewards=world", "rewards=[world]", "rewards=[{name: world}]", "rewards={name: world, weight: 1}"]
    assert len({load_config(None, [form]).rewards for form in forms}) == 1
    assert load_config(None, ["rewards.train=world", "rewards.combine=raw"]).rewards.train == RunConfig().rewards.train
    two = load_config(None, ["rewards=[world, {name: my_reward.py:score, weight: -0.5}]"]).rewards.train
    assert [(reward.name, reward.weight) for reward in two] == [("world", 1.0), ("my_reward.py:score", -0.5)]


def test_a_mix_of_prompts_is_given_anew_or_changed_at_one_source(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("prompts: {train: {a.txt: 3, b.txt: 1}}\n")
    assert load_config(path).prompts.train == {"a.txt": 3, "b.txt": 1}
    assert load_config(path, ["prompts.train={c.txt: 2}"]).prompts.train == {"c.txt": 2}
    assert load_config(path, ["prompts.train=c.txt"]).prompts.train == "c.txt"
    assert "prompts.train must be text or" in message("prompts.train={c.txt: 0}", config=path)
    assert "prompts.train must be text or" in message("prompts.train={}", config=path)
    assert next(o.type for o in describe() if o.key == "prompts.train") == "text | {text: int >= 1}"


def test_an_algorithm_brings_its_own_keys():
    config = load_config(None, ["algorithm=neighbor", "algorithm.num_anchors=2"])
    assert config.algorithm.name == "neighbor"
    assert config.algorithm.model_dump()["num_anchors"] == 2
    assert "algorithm.num_anchors" in {option.key for option in describe()}


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RunConfig().rollout.num_steps = 1  # type: ignore[misc]


def test_alpha_follows_the_rank_unless_given():
    assert load_config(None, ["lora.rank=8"]).lora.resolved_alpha == 8
    assert load_config(None, ["lora.rank=8", "lora.alpha=4.0"]).lora.resolved_alpha == 4


def test_changed_keys_names_what_differs():
    old, new = load_config(), load_config(None, ["rollout.num_steps=9", "seed=3"])
    assert changed_keys(old, new) == ["rollout.num_steps: 3 -> 9", "seed: 0 -> 3"]
    assert changed_keys(old, old) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.group_size=1", ["rollout.group_size must be at least 2", "got 1", "ranked"]),
        ("rollout.num_steps=1", ["rollout.num_steps must be at least 2", "got 1"]),
        ("rollout.num_steps=1001", ["at most 1000", "got 1001"]),
        ("rollout.num_steps=eight", ["rollout.num_steps must be a whole number", "got 'eight'"]),
        ("rollout.num_steps=8.5", ["rollout.num_steps must be a whole number", "got 8.5"]),
        ("rollout.num_steps=true", ["rollout.num_steps must be a whole number", "got true"]),
        ("rollout.solver=heun", ["rollout.solver must be 'dpmpp_2m' or 'euler'", "got 'heun'"]),
        ("rollout=5", ["rollout must be a section of keys", "got 5"]),
        ("rollout.num_steps.x=1", ["rollout.num_steps.x must be a key of a section"]),
        ("algorithm.perturbation_strength=0", ["algorithm.perturbation_strength must be", "got 0"]),
        ("algorithm.perturbation_strength=1.5", ["algorithm.perturbation_strength must be at most 1", "got 1.5"]),
        ("algorithm.advantage_p=0", ["algorithm.advantage_p must be", "got 0"]),
        ("algorithm.advantage_p=2.5", ["algorithm.advantage_p must be at most 2", "got 2.5"]),
        ("algorithm.temperature=0", ["algorithm.temperature must be", "'auto'", "more than 0", "got 0"]),
        ("algorithm.num_anchors=13", ["algorithm.num_anchors", "rollout.group_size", "13"]),
        ("algorithm.num_train_steps=9", ["algorithm.num_train_steps", "rollout.num_steps", "9"]),
        ("algorithm=naighbor", ["algorithm.name must be one of", "'naighbor'", "did you mean neighbor?"]),
        ("algorithm=[1]", ["algorithm must be a name or a mapping", "[1]"]),
        ("model.height_px=104", ["model.height_px must be a multiple of 16, got 104", "96 and 112"]),
        ("model.width_px=0", ["model.width_px must be at least 16, got 0"]),
        ("model.family=fluxx", ["model.family must be one of", "did you mean flux?"]),
        ("model.dtype=float8", ["model.dtype must be 'auto', 'float32', 'bfloat16' or 'float16'", "got 'float8'"]),
        ("model.device=gpu", ["model.device must be", "got 'gpu'", "cuda:N"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate must be more than 0", "got -1"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate must be a finite number", "got nan"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1 must be less than 1", "got 1.5"]),
        ("rewards=wrld", ["rewards.train.0.name must be one of", "'wrld'", "did you mean world?"]),
        ("rewards=[]", ["rewards.train must have at least one entry"]),
        ("rewards=[world, world]", ["rewards.train must name each reward once", "world"]),
        ("rewards={name: world, weight: 0}", ["rewards.train.0.weight must not be 0"]),
        ("rewards={name: world, clip: [1, 0]}", ["rewards.train.0.clip must be [low, high] with low below high"]),
        ("rewards={name: world, label: a b}", ["rewards.train.0.label must be"]),
        ("rewards=[world, {name: a.py:score, label: world}]", ["must name each reward once, got world twice"]),
        ("rewards={name: ocr, exct: true}", ["unknown key rewards.train.0.exct; did you mean rewards.train.0.exact?"]),
        ("rewards={name: world, revision: x}", ["unknown key rewards.train.0.revision; did you mean model.revision?"]),
        ("evaluation.rewards=[world, {name: ocr, exct: 1}]", ["did you mean evaluation.rewards.1.exact?"]),
        ("rewards={name: ocr, min_confidence: 2}", ["rewards.train.0.min_confidence must be at most 1"]),
        ("rewards.trian=world", ["unknown key rewards.trian; did you mean rewards.train?"]),
        ("rewards.max_failed_share=2", ["rewards.max_failed_share must be at most 1"]),
        ("evaluation.rewards=[wrld]", ["evaluation.rewards.0.name must be one of", "did you mean world?"]),
        ("evaluation.rewards={name: world, wait: 1}", ["evaluation.rewards.0.weight?"]),
        (
            "rewards=[{name: world, wieght: 2}]",
            ["unknown key rewards.train.0.wieght; did you mean rewards.train.0.weight?"],
        ),
        ("evaluation.strict=wrld", ["evaluation.strict must be one of", "did you mean world?"]),
        ("rollout.group_szie=3", ["unknown key rollout.group_szie; did you mean rollout.group_size?"]),
        ("group_size=3", ["unknown key group_size; did you mean rollout.group_size?"]),
        ("algorithm.clip_rnge=3", ["unknown key algorithm.clip_rnge; did you mean algorithm.clip_range?"]),
        ("rolout.group_size=3", ["unknown key rolout", "did you mean rollout?"]),
        ("nonsense=3", ["unknown key nonsense"]),
        ("output_dir=", ["output_dir must be text", "got null"]),
        ("seed=-1", ["seed must be at least 0", "got -1"]),
        ("seed", ["an override must look like key=value", "'seed'"]),
        (".seed=1", ["an override must look like key=value", "'.seed=1'"]),
        ("seed={a", ["seed must be a YAML value", "'{a'"]),
    ],
)
def test_a_bad_override_is_refused_with_rule_and_value(override: str, parts: list[str]):
    text = message(override)
    assert len(text.splitlines()) == 1, text
    for part in parts:
        assert part in text


def test_all_problems_are_reported_at_once():
    text = message("rollout.group_size=1", "rollout.num_stps=3", "optimizer.eps=0")
    assert [line.split(" ")[0] for line in sorted(text.splitlines())] == [
        "optimizer.eps",
        "rollout.group_size",
        "unknown",
    ]


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
    ],
)
def test_a_bad_file_is_refused(content: bytes, part: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    text = message(config=path)
    assert part in text
    assert len(text.splitlines()) == 1


def test_an_empty_file_has_the_defaults(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == RunConfig()


def test_a_missing_file_and_an_unknown_preset_say_what_exists(tmp_path: Path):
    assert "does not exist" in message(config=tmp_path / "no.yaml")
    assert "is a folder" in message(config=tmp_path)
    assert "did you mean demo?" in message(config="demoo")
    assert "demo, flux" in message(config="demoo")


def test_the_flux_preset_has_the_papers_settings():
    config = load_config("flux")
    assert (config.model.height_px, config.model.guidance_scale) == (720, 3.5)
    assert (config.rollout.group_size, config.rollout.num_steps, config.rollout.solver) == (12, 8, "dpmpp_2m")
    algorithm = config.algorithm.model_dump()
    assert [algorithm[k] for k in ("num_anchors", "num_train_steps", "perturbation_strength")] == [4, 4, 0.3]
