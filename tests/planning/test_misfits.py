"""Prompts that do not go with a run's model or rewards are told before any of these is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import MakeConfig
from PIL import Image
from typer.testing import CliRunner

from ngrpo_lora import registry
from ngrpo_lora.cli import launching
from ngrpo_lora.cli.app import app
from ngrpo_lora.config import load_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.planning.misfits import misfits
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.prompts.sources import Split, needed_prompts, read_split, training_prompts

EDITS = ["model.path=embedded-edit", "prompts.train=edits:train", "prompts.held_out=edits:held_out"]


@pytest.fixture(autouse=True)
def _nothing_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No model is loaded and no process is started; file names in messages are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BaseFamily, "load", lambda *args: pytest.fail("a model is loaded"))
    monkeypatch.setattr(launching, "launch", lambda *args: pytest.fail("processes are started"))


def problems(preset: str | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_run(load_config(preset, [*overrides, "output_dir=run"]))
    assert not Path("run").exists()
    return [*error.value.problems]


def written(count: int, *without: int) -> str:
    """A table of instructions, each with a source of its own but for those of some lines."""
    lines = ["prompt,source"]
    for line in range(2, count + 2):
        Image.new("RGB", (48, 48), (line, 0, 0)).save(f"{line}.png")
        lines.append(f"make it {line}," + ("" if line in without else f"{line}.png"))
    Path("edits.csv").write_text("\n".join(lines))
    return "edits.csv"


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "is no file"), (b"", "is empty; save it anew"), (b"no picture", "is no picture of a known format")],
)
def test_a_source_that_cannot_be_read_is_told_once_before_processes_start(content: bytes | None, why: str):
    words = ["rewards=preservation", "evaluation.strict=null", "trainer.cpu_processes=2", "output_dir=run"]
    words += [f"prompts.train={written(30)}", "prompts.held_out=edits.csv"]
    Path("17.png").unlink()
    if content is not None:
        Path("17.png").write_bytes(content)
    result = CliRunner().invoke(app, ["train", "demo-edit", *words, "--num-processes", "2"])
    assert result.exit_code == 2, result.output
    (message,) = result.stderr.splitlines()
    start = "ngrpo: prompts.train must have readable source pictures, but '17.png' (line 17 of 'edits.csv') "
    assert message.startswith(start + why)


def test_the_first_row_without_a_source_is_that_of_the_file():
    table = written(30, 7, 9, 21)
    for key, other in (("train", "held_out"), ("held_out", "train")):
        (message,) = problems("demo-edit", f"prompts.{key}={table}", f"prompts.{other}=edits:{other}", "seed=3")
        assert message.startswith(
            f"prompts.{key} must have a source picture with every prompt for 'embedded-edit', which starts from one, "
            "but 3 of 30 have none, first 'make it 7' (line 7 of 'edits.csv'); "
        )
    (message,) = problems("demo-edit", "prompts.train=world:train")
    assert "have none, first '" in message


def test_a_source_that_a_model_does_not_take_is_told_however_late_a_run_meets_it():
    Image.new("RGB", (48, 48)).save("late.png")
    Path("mine.csv").write_text("\n".join(["prompt,source", *(f"a {i}," for i in range(1200)), "b,late.png"]))
    settings = ["prompts.train=mine.csv", "rewards=jpeg", "rollout.prompts_per_iteration=60"]
    (message,) = problems(None, *settings, "trainer.num_iterations=21")
    assert "must have no source pictures for 'embedded', which edits none, but line 1202 of 'mine.csv' has" in message


def test_pictures_that_a_run_does_not_need_are_not_read(make_config: MakeConfig):
    made = [*EDITS, f"prompts.train={written(40)}", "rewards=preservation", "evaluation.strict=null"]
    made += ["trainer.num_iterations=1", "rollout.prompts_per_iteration=3"]
    config = make_config(Path("run"), *made)
    needed = {prompt.text for prompt in needed_prompts(config, read_split(config.prompts))["prompts.train"]}
    assert len(needed) == 3
    for line in range(2, 42):
        if f"make it {line}" not in needed:
            Path(f"{line}.png").unlink()
    check_run(config)


@pytest.mark.parametrize("command", ["overhead", "gradient", "scaling"])
def test_benches_check_prompts_before_they_load_a_model(command: str):
    result = CliRunner().invoke(app, ["bench", command, "demo-edit", "prompts.train=world:train"])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("ngrpo: prompts.train must have a source picture with every prompt")


def test_prompts_of_the_package_are_all_alike(make_config: MakeConfig):
    config = make_config(Path("run"), "trainer.num_iterations=100000")
    assert len(training_prompts(config)) > 100_000
    needed = needed_prompts(config, Split({}, {}))
    assert 100 < len(needed["prompts.train"]) <= 1000
    assert len(needed["prompts.held_out"]) == config.evaluation.num_prompts


CAPTION = "a prompt must be a caption of the world, such as 'a photo of a red star'"
OTHERS = "another reward, or other prompts"
INSTRUCTION = "a prompt must be an instruction of the world, such as 'make the star blue'"


@pytest.mark.parametrize(
    ("preset", "settings", "rule", "advised"),
    [
        ("demo-edit", ["rewards=world"], f"rewards (world): {CAPTION}, but 960 of 960 in prompts.train", "rewards"),
        ("demo-edit", ["rewards=world_strict"], f"rewards (world_strict): {CAPTION}, but 960 of 960", "rewards"),
        ("demo-edit", ["evaluation.strict=world_strict"], f"evaluation.strict: {CAPTION}", "evaluation.strict"),
        ("demo-edit", ["evaluation.rewards=world"], f"evaluation.rewards (world): {CAPTION}", "evaluation.rewards"),
        (
            None,
            ["rewards=jpeg", "prompts.held_out=mine.txt", "evaluation.measures=[]"],
            f"evaluation.strict: {CAPTION}, but 1 of 2",
            None,
        ),
        (
            None,
            ["prompts.held_out=mine.txt", "evaluation.strict=null", "evaluation.measures=[]"],
            f"rewards (world): {CAPTION}, but 1 of 2 in prompts.held_out is not",
            None,
        ),
        (None, ["prompts.train=mine.txt"], f"rewards (world): {CAPTION}, but 1 of 2 in prompts.train is not", None),
        (
            "demo-edit",
            ["prompts.train=edits.csv"],
            f"rewards (world_edit): {INSTRUCTION}, but 4 of 4 in prompts.train are not, first 'make it 2' (line 2 of",
            None,
        ),
    ],
)
def test_a_reward_that_does_not_read_the_prompts_is_told_before_a_model_loads(
    preset: str | None, settings: list[str], rule: str, advised: str | None
):
    written(4)
    Path("mine.txt").write_text("a red star\na cat\n")
    (message,) = problems(preset, *settings)
    assert message.startswith(rule)
    assert message.endswith("; give " + (OTHERS if advised is None else "world_edit or world_edit_strict"))
    if advised:
        check_run(load_config(preset, [f"{advised}=world_edit_strict", "output_dir=run"]))


@pytest.mark.parametrize(
    ("preset", "settings", "count"),
    [
        ("demo-edit", [], "120 of 120"),
        (None, ["prompts.held_out=mine.txt", "rewards=jpeg", "evaluation.strict=null"], "1 of 2"),
        ("demo-turbo", ["prompts.held_out=mine.txt", "rewards=jpeg", "evaluation.strict=null"], "1 of 2"),
    ],
)
def test_a_measure_that_does_not_read_the_prompts_is_told_before_a_model_loads(
    preset: str | None, settings: list[str], count: str
):
    Path("mine.txt").write_text("a red star\na cat\n")
    measures = "evaluation.measures=[ngrpo_lora.world.sharpness:sharpness, ngrpo_lora.world.freedom:freedom]"
    settings = [*settings, "evaluation.rewards=[]", "evaluation.num_prompts=120"]
    (message,) = problems(preset, measures, *settings)
    assert message.startswith(
        f"evaluation.measures (ngrpo_lora.world.freedom:freedom): {CAPTION}, but {count} in prompts.held_out "
    )
    assert message.endswith("; leave it out, or give other prompts")
    check_run(load_config(preset, ["evaluation.measures=ngrpo_lora.world.sharpness:sharpness", *settings]))


@pytest.mark.parametrize(
    ("preset", "settings", "where"),
    [
        ("demo", ["evaluation.strict=null", "evaluation.rewards=[]", "evaluation.measures=[]"], "rewards (world)"),
        ("demo", ["rewards=jpeg", "evaluation.rewards=[]", "evaluation.measures=[]"], "evaluation.strict"),
        (
            "demo",
            ["rewards=jpeg", "evaluation.strict=null", "evaluation.rewards=world_manifold", "evaluation.measures=[]"],
            "evaluation.rewards (world_manifold)",
        ),
        (
            "demo",
            ["rewards=jpeg", "evaluation.strict=null", "evaluation.rewards=[]"],
            "evaluation.measures (ngrpo_lora.world.freedom:freedom)",
        ),
        (
            "demo",
            [
                "rewards=ngrpo_lora.rewards.world:score",
                "evaluation.strict=null",
                "evaluation.rewards=[]",
                "evaluation.measures=[]",
            ],
            "rewards (world)",
        ),
    ],
)
def test_a_judge_of_squares_is_told_of_other_pictures_before_a_model_loads(
    preset: str, settings: list[str], where: str
):
    (message,) = problems(preset, "model.width_px=128", *settings)
    rule = "must have square pictures, got model.width_px=128 and model.height_px=64"
    assert message == f"{where} {rule}; give both the same, or leave it out"
    check_run(load_config(preset, ["model.width_px=64", *settings]))


def test_where_another_reward_reads_the_prompts_as_the_model_draws_it_is_named():
    Path("mine.txt").write_text("make the star blue\n")
    (message,) = problems(None, "prompts.train=mine.txt")
    assert message.endswith(f"first 'make the star blue' (line 1 of 'mine.txt'); give {OTHERS}")


def test_a_question_that_would_not_be_asked_is_refused():
    own, drawn = "{name: judge, base_url: 'http://a/v1', %s}", ["evaluation.strict=null"]
    poster = own % "template: 'Is {prompt} a poster?'"
    edit = own % "edit_template: 'Is {prompt} done?'"
    both = own % "template: 'Is {prompt} a poster?', edit_template: 'Is {prompt} done?'"
    (message,) = problems("demo-edit", *drawn, f"rewards={poster}")
    assert message == (
        "rewards (judge): template is not asked of edits, which 'embedded-edit' makes; give your question as "
        "edit_template, which is asked with the source before the result"
    )
    (message,) = problems("demo", *drawn, f"rewards={edit}")
    assert message.startswith("rewards (judge): edit_template is asked of edits alone, and 'embedded' makes none; give")
    (message,) = problems("demo", f"evaluation.rewards={edit}")
    assert message.startswith("evaluation.rewards (judge): edit_template is asked")
    for preset, rewards in (("demo-edit", edit), ("demo", poster), ("demo", both), ("demo-edit", both)):
        config = load_config(preset, [*drawn, f"rewards={rewards}"])
        assert [*misfits(config, read_split(config.prompts))] == []


def test_metadata_that_a_reward_needs_is_asked_for_before_anything_loads():
    Image.new("RGB", (48, 48)).save("a.png")
    texts = {"source_caption": "a star", "target_caption": "a blue star"}
    rows = [{"prompt": f"edit {n}", "source": "a.png"} | texts for n in range(8)]
    del rows[5]["target_caption"]
    rows[6]["source_caption"] = None
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["prompts.train=edits.jsonl", "prompts.held_out=0.5", "evaluation.strict=null"]
    (message,) = problems("demo-edit", *own, "rewards={name: clip_directional, path: nowhere}")
    expected = r"rewards \(clip_directional\): \d of \d in prompts.(train|held_out) do(es)? not fit, first 'edit [56]' "
    expected += r"\(line [67] of 'edits.jsonl'\): reward clip_directional needs the columns source_caption and "
    expected += r"target_caption .*, got no (source|target)_caption; add what is missing"
    assert re.fullmatch(expected, message)
    Path("a.txt").write_text("a bench\na red apple\n")
    own = ["prompts.train=a.txt", "evaluation.strict=null", "evaluation.measures=[]"]
    (message,) = problems(None, *own, "rewards=jpeg", "evaluation.rewards=geneval", "prompts.held_out=0.5")
    start = "evaluation.rewards (geneval): 1 of 1 in prompts.held_out does not fit, first 'a "
    assert message.startswith(start)
    assert "needs prompts that say what they `include`" in message


def test_rewards_of_the_embedded_world_that_read_prompts_say_so():
    for name in registry.names(registry.REWARDS):
        reads = registry.defines(registry.REWARDS, name, "reads")
        assert reads == (name in ("world", "world_strict", "world_edit", "world_edit_strict"))
        square = registry.defines(registry.REWARDS, name, "SQUARE")
        assert square == (reads or name == "world_manifold")


@pytest.mark.parametrize("preset", ["demo", "demo-edit", "demo-turbo", "demo-vote"])
def test_presets_of_the_embedded_models_fit(preset: str):
    config = load_config(preset)
    assert [*misfits(config, read_split(config.prompts))] == []


@pytest.mark.parametrize(
    ("rewards", "refused"),
    [
        (["rewards=preservation"], "prompts.train"),
        (["rewards=jpeg", "evaluation.rewards=[preservation]"], "prompts.held_out"),
        (["rewards=jpeg"], None),
    ],
)
def test_a_white_mask_is_refused_where_preservation_judges(rewards: list[str], refused: str | None):
    Image.new("RGB", (48, 48), "red").save("a.png")
    Image.new("L", (48, 48), 255).save("w.png")
    Path("edits.csv").write_text("prompt,source,mask\nmake it blue,a.png,w.png\n")
    settings = [EDITS[0], "prompts.train=edits.csv", "prompts.held_out=edits.csv", "evaluation.strict=null"]
    config = load_config(None, [*settings, *rewards, "evaluation.measures=[]"])
    found = [*misfits(config, read_split(config.prompts))]
    assert [problem.partition(" ")[0] for problem in found] == ([refused] if refused else [])
