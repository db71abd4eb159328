"""Presets: what they say of themselves is what `ngrpo plan` says, and files can build on others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import dump_config, load_config, preset_names, presets
from ngrpo_lora.config.presets import MEMORY, check_model, preset_files
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.planning.plan import GIB, make_plan

FOLDER = Path(presets.__file__).parent
FILES = {preset.name: preset for preset in preset_files()}
DEMOS = ("demo", "demo-edit", "demo-turbo", "demo-vote")
FAST = ("flux",)  # models whose every file is planned in a moment; the others are `slow`


def planned() -> list[object]:
    marks = {name: () if MEMORY.sub("", name) in FAST else (pytest.mark.slow,) for name in FILES if name not in DEMOS}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("name", planned())
def test_a_preset_needs_what_its_head_says_and_fits_the_memory_of_its_name(name: str):
    found = MEMORY.search(name)
    gpus = load_config(name).trainer.planned_gpus
    assert gpus == (int(found[1] or 1) if found else 1)
    figures = make_plan(load_config(name), gpus)
    said = [float(number) for number in re.findall(r"(\d+(?:\.\d+)?) GiB", FILES[name].needs)]
    assert said == [round(figures.peak / GIB, 1), round(figures.system_peak / GIB)]
    assert f"each of {gpus} GPUs" in FILES[name].needs or gpus == 1
    assert re.fullmatch(r"not yet|\d+\.\d+ GiB on an? .+", FILES[name].measured)
    if found:
        assert figures.fits(int(found[2]) * GIB)


@pytest.mark.parametrize("name", [name for name in FILES if name not in DEMOS])
def test_a_preset_keeps_the_papers_settings(name: str):
    config = load_config(name)
    assert config.output_dir == f"runs/{name}"
    assert (config.rollout.group_size, config.rollout.solver) == (12, "dpmpp_2m")
    assert config.rollout.num_steps == (4 if name.startswith(("flux-schnell", "qwen-image-lightning")) else 8)
    algorithm = config.algorithm.model_dump()
    assert (algorithm["num_anchors"], algorithm["perturbation_strength"]) == (4, 0.3)
    assert algorithm["num_train_steps"] == (3 if name.startswith("wan22-i2v") else 4)  # all that its transformer draws
    of_edits, of_pictures = ["clip_directional", "preservation"], ["hpsv2", "pickscore", "imagereward"]
    assert [reward.name for reward in config.rewards.train] == (
        of_edits if re.search("kontext|edit", name) else of_pictures
    )
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    if found := MEMORY.search(name):
        title = f"on {found[1]} GPUs of {found[2]} GB" if found[1] else f"on a GPU of {found[2]} GB"
        assert title in lines[0]
        assert len(lines) < 30
        changed = set(yaml.safe_load("\n".join(lines))) - {"extends", "output_dir"}
        assert changed <= {"model", "rollout", "rewards", "trainer", "evaluation"}


def test_the_command_lists_every_preset():
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if re.match(r"\S", line)]
    assert listed[1:] == [preset.name for preset in FILES.values()]
    assert sorted(listed[1:]) == preset_names()
    assert FILES["flux-krea-12gb"].model == "black-forest-labs/FLUX.1-Krea-dev"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_extends_a_preset_key_by_key(tmp_path: Path):
    path = write(tmp_path / "mine.yaml", "extends: flux\nmodel: {height_px: 512}\nprompts: {train: a.txt}\n")
    mine, flux = load_config(path, ["seed=3"]), load_config("flux")
    assert mine.model == flux.model.model_copy(update={"height_px": 512})
    assert (mine.prompts.train, mine.prompts.held_out, mine.seed) == ("a.txt", flux.prompts.held_out, 3)
    assert mine.rewards == flux.rewards


def test_a_chain_of_files_is_followed_beside_each_of_them(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "first.yaml", "extends: second.yaml\nseed: 1\n")
    write(tmp_path / "deep" / "second.yaml", "extends: ../third.yaml\nseed: 2\nlora: {rank: 2}\n")
    write(tmp_path / "third.yaml", "seed: 3\nlora: {rank: 3, alpha: 5}\noutput_dir: third\n")
    config = load_config(tmp_path / "deep" / "first.yaml")
    assert (config.seed, config.lora.rank, config.lora.alpha, config.output_dir) == (1, 2, 5, "third")


def test_lists_and_sources_of_prompts_are_replaced_as_a_whole(tmp_path: Path):
    write(tmp_path / "base.yaml", "rewards: [world, world_strict]\nprompts: {train: {a.txt: 1, b.txt: 2}}\n")
    path = write(
        tmp_path / "own.yaml",
        "extends: base.yaml\nrewards: {train: world, combine: raw}\nprompts: {train: {c.txt: 1}}\n",
    )
    config = load_config(path)
    assert [reward.name for reward in config.rewards.train] == ["world"]
    assert config.rewards.combine == "raw"
    assert config.prompts.train == {"c.txt": 1}
    kept = write(tmp_path / "kept.yaml", "extends: base.yaml\nrewards: {combine: raw}\n")
    assert len(load_config(kept).rewards.train) == 2


def test_what_is_extended_may_be_dumped_and_read_back(tmp_path: Path):
    config = load_config("flux-24gb")
    path = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: self.yaml\n", r"extends must not lead back to the file itself, but .*self.yaml -> .*self.yaml"),
        ("extends: other.yaml\n", r"other.yaml: extends must not lead back .*self.yaml -> .*other.yaml -> .*self.yaml"),
        ("extends: [flux]\n", r"extends must be the name of a preset or the path of a file, got \['flux'\]"),
        ("extends: flx\n", r"must be a YAML file or one of the presets .*, got 'flx'; did you mean flux"),
        ("extends: none.yaml\n", r"config file 'none.yaml' does not exist"),
        ("extends: flux\nextends: demo\n", r"key 'extends' is given twice"),
        ("extends: flux\nmodel: {hight_px: 512}\n", r"unknown key model.hight_px; did you mean model.height_px"),
        ("extends: demo\nalgorithm: 3\n", r"algorithm must be a name"),
    ],
)
def test_what_cannot_be_extended_is_an_error(text: str, message: str, tmp_path: Path):
    write(tmp_path / "other.yaml", "extends: self.yaml\n")
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "self.yaml", text))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("flux", "did you mean black-forest-labs/FLUX.1-dev?"),  # a preset
        ("flux.1-schnel", "did you mean black-forest-labs/FLUX.1-schnell?"),
        ("embeded", "did you mean embedded?"),
        ("nope", "`ngrpo presets` lists some"),
        ("./gone/model", "`ngrpo presets` lists some"),
    ],
)
def test_a_name_that_is_no_model_leads_to_one(name: str, remedy: str):
    with pytest.raises(ConfigError) as error:
        check_model(name, "--model")
    rule = "--model must be embedded, embedded-edit, a diffusers folder or a Hub id (owner/name)"
    assert str(error.value) == f"{rule}, got {name!r}; {remedy}"


def test_names_that_may_be_models_pass(tmp_path: Path):
    for name in ("embedded", "embedded-edit", str(tmp_path), "owner/name", "Owner_1/na.me-2"):
        check_model(name)
