"""What an adapter says of itself is read back, and what cannot be understood is an error."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from conftest import FinishedRun
from lora_files import rewrite
from safetensors.torch import save_file

from ngrpo_lora.adapters import header
from ngrpo_lora.adapters.header import AdapterInfo, read_adapter
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.errors import UserError


def test_what_the_header_says_is_read_back(adapter: Path, finished_run: FinishedRun):
    info, config, family = read_adapter(adapter), finished_run.run.config, finished_run.run.family
    assert {"guidance_scale", "max_sequence_length"} <= family.settings.keys()
    assert info.model == config.model.model_copy(update=family.settings)
    assert info.rollout == config.rollout.model_copy(update={"shift": family.shift(4)})


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated", "folder"])
def test_a_file_that_is_no_safetensors_is_an_error_that_names_it(damage: str, adapter: Path, tmp_path: Path):
    path = tmp_path / "broken.safetensors"
    content = {"empty": b"", "garbage": b"\x07nothing" * 50, "truncated": adapter.read_bytes()[:3000]}
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "folder":
        path.mkdir()
    what = "does not exist" if damage == "missing" else "is no readable safetensors file"
    with pytest.raises(UserError, match=rf"adapter .*broken\.safetensors' {what}"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ("not json", "Expecting value"),
        ("[]", "list indices must be"),
        ("{}", "'model'"),
        ('{"model": {}}', "'rollout'"),
        ('{"model": {"hight_px": 64}, "rollout": {}}', "hight_px is unknown$"),
        ('{"model": {}, "rollout": {"num_steps": 0}}', "num_steps must be at least 2$"),
        ('{"model": null, "rollout": null}', "must be a section of keys$"),
    ],
)
def test_ngrpo_metadata_that_cannot_be_understood_is_an_error(metadata: str, why: str, adapter: Path, tmp_path: Path):
    path = rewrite(adapter, tmp_path / "odd.safetensors", ngrpo=metadata)
    with pytest.raises(UserError, match=rf"odd\.safetensors' has ngrpo metadata that this version cannot read: {why}"):
        read_adapter(path)


def test_an_adapter_of_another_trainer_is_sampled_with_the_defaults(tmp_path: Path):
    path = tmp_path / "foreign.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, path)
    assert read_adapter(path) == AdapterInfo(ModelConfig(), RolloutConfig())


def test_a_clone_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(header, "version", absent)
    project = tomllib.loads((Path(header.__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert header.code_version() == project["version"] != "unknown"
    monkeypatch.setattr(header, "NAME", "a program around a copy of this package")
    assert header.code_version() == "unknown"
