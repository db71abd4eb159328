"""Adapters by the name of their repository, by the real client from a server here that speaks the Hub's protocol."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from commands import refuse, run
from conftest import MakeConfig
from hub_server import HubServer, Repository
from pictures import pixels
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.finding import adapter_label, find_adapter
from ngrpo_lora.adapters.reading import read_adapter_file
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._index import model_index
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.training.setup import prepare

REPO, ADAPTER = "owner/name", "pytorch_lora_weights.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: Path) -> Iterator[HubServer]:
    """With a run's adapter in `owner/name`; commands run in an empty folder."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        server.repositories[REPO] = Repository()
        server.files(REPO)[ADAPTER] = adapter.read_bytes()
        yield server


def test_sample_draws_by_name_and_strength_and_again_from_its_picture(hub: HubServer, adapter: Path):
    words = ["-p", "a red star", "--output"]
    (named,) = run("sample", "--adapter", f"{REPO}:0.5", *words, "named")
    (local,) = run("sample", "--adapter", f"{adapter}:0.5", *words, "local")
    assert np.array_equal(pixels(named), pixels(local))
    asked = len(hub.requests)
    (again,) = run("sample", "--like", named, "--output", "again")
    assert np.array_equal(pixels(again), pixels(named))
    assert len(hub.requests) == asked  # the file is in the cache
    sheet = run("sample", "--adapter", REPO, "--base-too", "--steps", 2, *words, "both")
    assert [Path(line).stem for line in sheet] == ["000-a-red-star-seed0-base", "000-a-red-star-seed0-name"]


def test_info_tells_what_a_repository_holds(hub: HubServer, adapter: Path):
    (said,) = json.loads("\n".join(run("info", REPO, "--json")))
    (local,) = json.loads("\n".join(run("info", adapter, "--json")))
    assert said["draw"] == f'ngrpo sample --adapter {REPO} --prompt "..."'
    assert said == local | {"file": REPO, "draw": said["draw"]}


def test_export_and_merge_write_here(hub: HubServer, adapter: Path):
    assert run("export", REPO, "--format", "comfyui") == ["name-comfyui.safetensors"]
    run("merge", f"{REPO}:0.75", f"{adapter}:0.25", "--output", "merged.safetensors")
    expected = read_adapter_file(adapter).layers
    for path in ("name-comfyui.safetensors", "merged.safetensors"):
        layers = read_adapter_file(path).layers
        for name, layer in expected.items():
            torch.testing.assert_close(layers[name].delta(), layer.delta())


def test_compare_takes_names(hub: HubServer):
    words = ["--reward", "jpeg", "--num-prompts", 1, "--seeds", 1, "--output", "out"]
    assert "| name | base |" in "\n".join(run("compare", REPO, *words))


def test_a_run_starts_from_a_repository(hub: HubServer, adapter: Path, make_config: MakeConfig, tmp_path: Path):
    settings = [f"lora.init_from={REPO}", "lora.rank=4", "trainer.num_iterations=1", "evaluation.every=1"]
    config = make_config(tmp_path / "run", *settings)
    check_run(config)
    parameters = prepare(config).lora_step.parameters
    for name, layer in read_adapter_file(adapter).layers.items():
        down, up = (parameters[f"{name}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close((up @ down).detach(), layer.delta(), atol=1e-6, rtol=1e-5)


def test_what_is_on_this_disk_wins(hub: HubServer, adapter: Path):
    local = Path("owner/name")
    local.mkdir(parents=True)
    save_file({name: 2 * weight for name, weight in load_file(adapter).items()}, local / "mine.safetensors")
    assert find_adapter(REPO) == local / "mine.safetensors"
    assert hub.requests == []


def test_any_name_will_do_where_there_is_one_file(hub: HubServer, adapter: Path):
    files = hub.files(REPO)
    files["mine-v2.safetensors"] = files.pop(ADAPTER)
    assert find_adapter(REPO).name == "mine-v2.safetensors"
    files["folder/another.safetensors"] = b""
    assert find_adapter(REPO).name == "mine-v2.safetensors"
    files["mine-v1.safetensors"] = files["mine-v2.safetensors"]
    message = "--adapter must be one LoRA, but 'owner/name' holds mine-v1.safetensors and mine-v2.safetensors; give the"
    assert message in refuse("sample", "-p", "a star", "--adapter", REPO)
    assert message.replace("--adapter", "FILE") in refuse("info", REPO)
    assert find_adapter(f"{REPO}/mine-v1.safetensors").name == "mine-v1.safetensors"
    assert adapter_label(find_adapter(f"{REPO}/mine-v1.safetensors")) == "mine-v1"


def test_pefts_file_brings_its_alpha(hub: HubServer, adapter: Path):
    files = hub.files(REPO)
    save_file(load_file(adapter), "adapter_model.safetensors")
    files["adapter_model.safetensors"] = Path("adapter_model.safetensors").read_bytes()
    files["adapter_config.json"] = json.dumps({"r": 4, "lora_alpha": 12, "target_modules": ["to_q"]}).encode()
    del files[ADAPTER]
    file = read_adapter_file(REPO)
    assert (file.alpha, {layer.scale for layer in file.layers.values()}) == ("adapter_config.json", {3.0})


def test_what_a_repository_lacks_is_said(hub: HubServer):
    files = hub.files(REPO)
    del files[ADAPTER]
    assert "'owner/name' on the Hub holds no pytorch_lora_weights.safetensors and no other" in refuse("info", REPO)
    assert "'owner/name' on the Hub holds no b.safetensors" in refuse("info", f"{REPO}/b.safetensors")
    files["pytorch_lora_weights.bin"] = b"\x80"
    pickle = "name/pytorch_lora_weights.bin' is a pickle file, which can run any code"
    assert pickle in refuse("info", REPO)
    assert pickle in refuse("merge", f"{REPO}/pytorch_lora_weights.bin", "--output", "x.safetensors")
    assert hub.count(r"resolve/.*\.bin") == 0
    assert "cannot be used" not in refuse("info", "gone")
    assert "or a repository of the Hub (owner/name), but 'gone' does not exist" in refuse("info", "gone")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other", "--adapter 'owner/other' is no file or folder here, and the repository 'owner/other' is not on the"),
        ("gated", "the repository 'owner/name' is gated and this account has no access: accept its licence at"),
        ("offline", "is not in the local cache and the Hub cannot be reached ("),
        ("refused", "is not in the local cache and the Hub cannot be reached ("),
    ],
)
def test_what_stands_in_the_way_is_one_message(
    fault: str, message: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    if fault == "gated":
        hub.fail("HEAD", "resolve", 403, headers={"X-Error-Code": "GatedRepo"}, times=9)
    elif fault == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif fault == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a client that tries again"))
    name = "owner/other" if fault == "other" else REPO
    assert message in refuse("sample", "-p", "a star", "--adapter", name)


def test_what_was_had_before_is_there_without_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    path = find_adapter(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_adapter(REPO) == path
    with pytest.raises(UserError, match="cannot be reached"):
        find_adapter("owner/other")


def test_a_start_that_cannot_be_had_is_said_before_a_model_loads(
    hub: HubServer, make_config: MakeConfig, tmp_path: Path
):
    config = make_config(tmp_path / "run", "lora.init_from=owner/gone")
    with pytest.raises(ConfigError, match="lora.init_from: adapter 'owner/gone' is no file or folder here, and the"):
        check_run(config)


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        (REPO, None, "model.path 'owner/name' holds no model_index.json: it is no diffusers model"),
        (REPO, "v9", "model.path 'owner/name' has no revision 'v9'; drop model.revision"),
        ("owner/gone", None, "model.path 'owner/gone' is not on the Hub, or is private"),
    ],
)
def test_a_base_that_cannot_be_had_is_said_too(repo: str, revision: str | None, message: str, hub: HubServer):
    with pytest.raises(UserError, match=message):
        model_index(repo, revision)


def test_a_label_is_the_runs_the_files_or_the_repositorys(adapter: Path, tmp_path: Path):
    assert adapter_label(adapter) == adapter.parents[1].name
    assert adapter_label(Path(shutil.copy(adapter, tmp_path / "my lora.safetensors"))) == "my-lora"


def test_a_folder_gives_the_one_adapter_in_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"adapter must be .* does not exist"):
        find_adapter(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"holds no pytorch_lora_weights.safetensors and no other"):
        find_adapter(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model.bin' is a pickle file"):
        find_adapter(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert find_adapter(tmp_path).name == "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ConfigError, match=r"must be one LoRA, but .* holds a.safetensors and b.safetensors; give the"):
        find_adapter(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert find_adapter(tmp_path).name == "pytorch_lora_weights.safetensors"
