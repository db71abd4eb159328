"""What is found wrong with a run before its model loads."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
from conftest import FinishedRun, MakeConfig
from huggingface_hub.errors import LocalEntryNotFoundError

from ngrpo_lora import registry
from ngrpo_lora.config import RunConfig, dump_config
from ngrpo_lora.config.description import describe
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.planning.preflight import MAY_CHANGE, _output_dir, check_resumable, check_run, check_settings
from ngrpo_lora.records import checkpoints


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.init_from=gone", r"lora.init_from: adapter must be a LoRA file, a run's .*, but 'gone' does not exist"),
        ("lora.rank=1", "lora.rank must be at least 4, that of lora.init_from"),
    ],
)
def test_what_is_wrong_with_a_start_is_said_before_a_model_loads(
    setting: str, message: str, make_config: MakeConfig, finished_run: FinishedRun, tmp_path: Path
):
    settings = {"lora.init_from": str(finished_run.output_dir)} | dict([setting.split("=")])
    config = make_config(tmp_path / "run", *(f"{key}={value}" for key, value in settings.items()))
    with pytest.raises(ConfigError, match=message):
        check_run(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["rewards=preservation"],
            "rewards: preservation judges edits beside their sources, but model.path 'embedded'",
        ),
        (
            ["evaluation.strict=world_edit_strict"],
            "rewards: world_edit_strict judges edits beside their sources, but model.path",
        ),
        (["evaluation.rewards=[world_edit]"], "rewards: world_edit judges edits beside their sources, but model.path"),
        (
            [
                "rewards=jpeg",
                "evaluation.rewards=[{name: preservation, label: kept}]",
                "model.path=Wan-AI/Wan2.1-T2V-14B",
            ],
            None,  # it is not known what that is
        ),
        (["rewards=preservation", "model.path=black-forest-labs/FLUX.2-klein-4B"], "edits no pictures; leave it out"),
        (["rewards=preservation", "model.path=black-forest-labs/FLUX.2-klein-4B", "model.edits=true"], None),
        (["rewards=preservation", "model.path=black-forest-labs/FLUX.1-Kontext-dev"], None),
        (["rewards=preservation", "model.path=embedded-edit", "prompts.train=edits:train"], None),
        (
            ["model.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "model.fuse=embedded-turbo"],
            "model.fuse must be LoRA files of",
        ),
        (
            ["model.path=black-forest-labs/FLUX.2-klein-4B", "lora.init_from=embedded-turbo", "lora.rank=64"],
            "lora.init_from must be a LoRA file of 'black-forest-labs/FLUX.2-klein-4B', but '.*' is of flux",
        ),
    ],
)
def test_what_does_not_go_with_the_model_is_said_without_asking_a_network(
    settings: list[str], message: str | None, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ngrpo_lora.models._index.download", missing)
    strict = [] if any("strict=" in setting for setting in settings) else ["evaluation.strict=null"]
    config = make_config(tmp_path / "run", *strict, *settings)
    if message is None:
        check_settings(config)
        return
    with pytest.raises(ConfigError, match=message) as error:
        check_settings(config)
    assert len(error.value.problems) == 1


def missing(*args: object, **options: object) -> str:
    raise LocalEntryNotFoundError("no network")


def test_files_in_place_of_a_runs_folders_and_folders_in_place_of_its_files_are_named(
    make_config: MakeConfig, tmp_path: Path
):
    (tmp_path / "checkpoints").write_text("")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError) as error:
        check_run(make_config(tmp_path))
    wrong = {"a folder 'checkpoints'": "checkpoints", "a file 'metrics.jsonl'": "metrics.jsonl"}
    assert [*error.value.problems] == [
        f"output_dir must have {what}, or nothing of that name, but '{tmp_path / name}' is none; move it"
        for what, name in wrong.items()
    ]


def test_settings_alone_are_checked_without_a_trace(make_config: MakeConfig, tmp_path: Path):
    check_settings(make_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    wrong = make_config(tmp_path / "run", "rewards=gone.py:score", "model.path=./nowhere")
    with pytest.raises(ConfigError) as error:
        check_settings(wrong)
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["rewards.train.0.name", "model.path"]


def test_a_resumed_run_may_change_its_length_and_none_of_its_updates(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump_config(make_config(tmp_path)))
    check_resumable(make_config(tmp_path, "trainer.num_iterations=9", "evaluation.every=3", "model.device=cpu"))
    with pytest.raises(ConfigError) as error:
        check_resumable(make_config(tmp_path, "lora.rank=2", "seed=1"))
    assert sorted(problem.partition("but ")[2].partition(":")[0] for problem in error.value.problems) == [
        "lora.rank",
        "seed",
    ]


def begun(folder: Path, config: RunConfig, iteration: int) -> None:
    """A run in a folder, with a checkpoint of an iteration."""
    checkpoints.save(folder, iteration, {"iteration": iteration}, keep=3)
    (folder / "config.yaml").write_text(dump_config(config))


WATCHED = "evaluation.rewards=[{name: world_manifold}, {name: world_strict, label: s}]"


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("evaluation.seed=5", "evaluation.seed: 1000 -> 5"),
        ("evaluation.num_prompts=7", "evaluation.num_prompts: 2 -> 7"),
        ("evaluation.num_steps=3", "evaluation.num_steps: None -> 3"),
        ("evaluation.solver=euler", "evaluation.solver: None -> euler"),
        ("evaluation.strict=world_manifold", "evaluation.strict: {'name': 'world_strict', 'label': 's'} -> "),
        (
            "evaluation.rewards=[{name: world_manifold, clip: [-9, 0]}, {name: world_strict, label: s}]",
            r"evaluation.rewards \(world_manifold\): {'name': 'world_manifold'} -> {.*'clip': \[-9.0, 0.0\]}",
        ),
        (
            "evaluation.rewards=[{name: world, label: world_manifold}, {name: world_strict, label: s}]",
            r"evaluation.rewards \(world_manifold\): {'name': 'world_manifold'} -> {'name': 'world', ",
        ),
        ("evaluation.rewards=[]", "evaluation.strict: {'name': 'world_strict', 'label': 's'} -> {'name': "),
        ("evaluation.measures=b.py:variety", r"evaluation.measures: \['a.py:variety'\] -> \['b.py:variety'\]"),
    ],
)
def test_what_later_evaluations_could_not_be_compared_by_is_refused_once_the_base_is_evaluated(
    setting: str, change: str, make_config: MakeConfig, tmp_path: Path
):
    settings = dict(text.split("=", 1) for text in (WATCHED, "evaluation.measures=a.py:variety"))

    def config(folder: str, resume: str, *other: str) -> RunConfig:
        given = settings | {"resume": resume} | dict(text.split("=", 1) for text in other)
        return make_config(tmp_path / folder, *(f"{key}={value}" for key, value in given.items()))

    begun(tmp_path / "run", config("run", "null"), 1)
    message = (
        rf"^a resumed run must evaluate as it did its base, .* but {change}.*; undo it, or start anew in another "
        rf"output_dir with lora.init_from='{tmp_path / 'run'}'$"
    )
    check_resumable(config("run", "latest"))
    changed = config("run", "latest", setting)
    with pytest.raises(ConfigError, match=message):
        check_resumable(changed)
    assert [one for one in [*_output_dir(changed)] if re.match(message, one)] == [*_output_dir(changed)] != []
    # Elsewhere evaluations begin anew, and after iteration 0 the base is evaluated anew.
    assert [*_output_dir(config("new", str(tmp_path / "run" / "checkpoints" / "iteration-000001"), setting))] == []
    begun(tmp_path / "early", config("early", "null"), 0)
    check_resumable(config("early", "latest", setting))
    assert [*_output_dir(config("early", "latest", setting))] == []


@pytest.mark.parametrize(
    "setting",
    [
        *("evaluation.every=3", "evaluation.micro_batch_size=2", "evaluation.num_samples=1", "evaluation.strict=null"),
        "evaluation.rewards=[]",
        "evaluation.rewards=[{name: world_manifold, timeout_s: 9}, {name: world}]",
        *("evaluation.measures=[]", "evaluation.measures=[a.py:variety, b.py:other]"),
    ],
)
def test_a_resumed_run_may_change_what_alters_no_figure_of_its_evaluations(
    setting: str, make_config: MakeConfig, tmp_path: Path
):
    settings = {"evaluation.rewards": "world_manifold", "evaluation.measures": "a.py:variety"}
    begun(tmp_path, make_config(tmp_path, *(f"{key}={value}" for key, value in settings.items())), 1)
    settings |= {"resume": "latest"} | dict([setting.split("=", 1)])
    config = make_config(tmp_path, *(f"{key}={value}" for key, value in settings.items()))
    check_resumable(config)
    assert [*_output_dir(config)] == []


def test_a_resumed_run_may_not_end_before_its_checkpoint(make_config: MakeConfig, tmp_path: Path):
    begun(tmp_path, make_config(tmp_path), 5)
    renamed = tmp_path / "checkpoints" / "five"
    for resume in ("latest", str(renamed)):
        check_run(make_config(tmp_path, f"resume={resume}", "trainer.num_iterations=5"))
        with pytest.raises(ConfigError, match=r"trainer.num_iterations must be at least 5, which .* got 4; give at"):
            check_run(make_config(tmp_path, f"resume={resume}", "trainer.num_iterations=4"))
        if not renamed.exists():
            shutil.copytree(tmp_path / "checkpoints" / "iteration-000005", renamed)


def test_a_resumed_run_may_call_its_rewards_otherwise_but_may_not_have_others(make_config: MakeConfig, tmp_path: Path):
    reward = "{{name: ngrpo_lora.rewards.world:score, weight: {}, range: {}, timeout_s: {}}}"
    (tmp_path / "config.yaml").write_text(dump_config(make_config(tmp_path, f"rewards={reward.format(1, [0, 1], 9)}")))
    check_resumable(make_config(tmp_path, f"rewards={reward.format(1, [0, 2], 99)}"))
    with pytest.raises(ConfigError, match="a resumed run must keep its settings, but rewards.train"):
        check_resumable(make_config(tmp_path, f"rewards={reward.format(2, [0, 1], 9)}"))


def test_what_a_message_advises_before_resume_latest_is_accepted(make_config: MakeConfig, tmp_path: Path):
    """Every key that stands in a module's texts with the words resume=latest, or in texts of that module."""
    package = Path(registry.__file__).parent
    keys = {option.key for option in describe() if not option.is_section} - {"resume"}
    advised: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if path.name in ("preflight.py", "app.py") or "bench" in path.parts:  # whose examples are none of advice
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        said = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings]
        texts = [str(node.value) for node in said if " " in str(node.value)]
        if "resume=latest" in " ".join(texts):
            advised[path.stem] = {key for key in keys for text in texts if re.search(rf"\b{re.escape(key)}\b", text)}
    assert advised["lora_step"] == {"optimizer.learning_rate"}
    assert "rewards.max_failed_share" in advised["rewarding"]
    anew = {"model.dtype", "lora.init_from", "model.quantization", "model.height_px"}  # of a run that is started anew
    refused = {key for found in advised.values() for key in found - anew if not key.startswith(MAY_CHANGE)}
    assert not refused
    (tmp_path / "config.yaml").write_text(dump_config(make_config(tmp_path)))
    check_resumable(make_config(tmp_path, "optimizer.learning_rate=1e-5", "rewards.max_failed_share=0.9"))
