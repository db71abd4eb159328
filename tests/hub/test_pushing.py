"""Pushing a run, by the real client to a server here that speaks the Hub's protocol, and that fails as it is told."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from conftest import SMALL_RUN, FinishedRun, MakeConfig
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repository
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import HubConfig, dump_config, load_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.hub import pushing
from ngrpo_lora.hub.pipeline_file import pipeline_file
from ngrpo_lora.hub.pushing import Pusher, check_access, push_run
from ngrpo_lora.planning.preflight import check_run

REPO = "owner/name"
ADAPTER = "pytorch_lora_weights.safetensors"
BILLING = {"error": "Private repository storage limit reached"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client or we would have waited."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> Iterator[HubServer]:
    """The Hub that this process's client knows, with Git LFS; the last test has its own process, and Xet."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A finished run of its own."""
    shutil.copytree(finished_run.output_dir, tmp_path / "run")
    os.utime(tmp_path / "run" / "adapter" / ADAPTER)  # newer than the checkpoints, as in the run itself
    return tmp_path / "run"


def refused(run: Path, hub: HubConfig) -> str:
    with pytest.raises(UserError) as error:
        push_run(run, hub)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is pushed -----------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_adapter_card_pictures_and_figures(hub: HubServer, run: Path):
    assert push_run(run, HubConfig(repo=REPO)) == f"{hub.url}/{REPO}"
    files = hub.files(REPO)
    pictures = {"summary.png", *(f"samples/00000{i}.png" for i in (0, 2, 4))}
    pictures |= {f"samples/{part}/{i}.png" for part in ("first", "last") for i in (0, 1)}
    named = {".gitattributes", "README.md", "config.yaml", "evaluation.csv", "pipeline.py", ADAPTER}
    assert set(files) == named | pictures
    assert files["pipeline.py"].decode() == pipeline_file("flux")
    assert files[ADAPTER] == (run / "adapter" / ADAPTER).read_bytes()
    assert files["samples/last/1.png"] == (run / "samples/last/1.png").read_bytes()
    assert files["evaluation.csv"].startswith(b"run,prompt,seed,reward,before,after")
    assert hub.repositories[REPO].commits == [("main", "LoRA after 4 iterations")]
    assert not hub.repositories[REPO].private
    assert sorted(run.glob(".push-*")) == []


def test_the_pushed_configuration_runs_again_elsewhere(hub: HubServer, run: Path, tmp_path: Path):
    original = load_config(run / "config.yaml", [f"hub={REPO}", "resume=latest"])
    (run / "config.yaml").write_text(dump_config(original))
    push_run(run, original.hub)
    (tmp_path / "config.yaml").write_bytes(hub.files(REPO)["config.yaml"])
    expected = original.model_copy(update={"hub": HubConfig(), "resume": None, "output_dir": "runs/name"})
    assert load_config(tmp_path / "config.yaml") == expected


def test_an_interrupted_run_pushes_its_last_checkpoint(hub: HubServer, run: Path):
    shutil.rmtree(run / "adapter")
    push_run(run, HubConfig(repo=REPO, commit_message="what I have"))
    assert hub.files(REPO)[ADAPTER] == (run / "checkpoints" / "iteration-000004" / ADAPTER).read_bytes()
    assert hub.repositories[REPO].commits == [("main", "what I have")]


def test_a_run_without_an_adapter_is_refused_before_anything_is_asked(hub: HubServer, run: Path):
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    assert "holds no adapter yet" in refused(run, HubConfig(repo=REPO))
    assert hub.requests == []


def test_nothing_is_sent_twice(hub: HubServer, run: Path):
    hub.fail("POST", "/commit/", 403)
    refused(run, HubConfig(repo=REPO))
    sent = hub.count("^PUT")
    assert sent == 9  # the adapter and the pictures
    push_run(run, HubConfig(repo=REPO))
    assert hub.count("^PUT") == sent
    assert len(hub.repositories[REPO].commits) == 1


def test_branches_and_pull_requests(hub: HubServer, run: Path):
    assert push_run(run, HubConfig(repo=REPO, revision="v1")) == f"{hub.url}/{REPO}/tree/v1"
    assert push_run(run, HubConfig(repo=REPO, create_pr=True)) == f"{hub.url}/{REPO}/discussions/1"
    push_run(run, HubConfig(repo=REPO, revision="refs/pr/1", commit_message="once more"))
    branches = hub.repositories[REPO].branches
    assert set(branches) == {"main", "v1", "refs/pr/1"}
    assert ADAPTER not in branches["main"]
    assert ADAPTER in branches["v1"]
    assert ADAPTER in branches["refs/pr/1"]


def test_a_pull_request_needs_no_right_to_write(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch):
    hub.repositories[REPO] = Repository()
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    check_access(HubConfig(repo=REPO, create_pr=True))
    with pytest.raises(UserError, match="the Hub answered 403"):
        check_access(HubConfig(repo=REPO))


def test_a_private_run_is_never_pushed_into_a_public_repository(hub: HubServer, run: Path):
    push_run(run, HubConfig(repo="owner/hidden", private=True))
    assert hub.repositories["owner/hidden"].private
    hub.repositories[REPO] = Repository()
    assert f"hub.private is true, but '{REPO}' is there and public" in refused(run, HubConfig(repo=REPO, private=True))
    assert hub.repositories[REPO].commits == []


def test_the_command_pushes_with_its_options(hub: HubServer, run: Path):
    words = ["push", str(run), "--repo", REPO, "--private", "--revision", "v2", "--message", 'a "red" star: mine 😀']
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hub.url}/{REPO}/tree/v2\n"
    assert hub.repositories[REPO].commits == [("v2", 'a "red" star: mine 😀')]
    assert hub.repositories[REPO].private


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["gone"], "RUN must be the output folder of a run, but 'gone' holds no config.yaml"),
        (["run"], "--repo must be given, as the run's hub.repo is null"),
        (["run", "--repo", "name"], "hub.repo must be owner/name"),
        (["run", "--repo", REPO, "--revision", "x", "--pull-request"], "hub.revision must be null with hub.create_pr"),
    ],
)
def test_the_command_refuses_bad_input(
    words: list[str], part: str, hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(run.parent)
    result = CliRunner().invoke(app, ["push", *words])
    assert result.exit_code == 2
    assert part in result.stderr
    assert hub.requests == []


# Failures -----------------------------------------------------------------------------------------------------------


def before_training(hub: HubConfig) -> str:
    with pytest.raises(UserError) as error:
        check_access(hub)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("token", "repo", "part"),
    [
        ("hf_old", REPO, "the Hub answered 401"),
        (READ_TOKEN, REPO, "You don't have the rights to create a model under this namespace): this token may not"),
        (WRITE_TOKEN, "other/name", "this token may not write there; take one that may"),
    ],
)
def test_what_the_token_may_not_is_said_before_training(
    token: str, repo: str, part: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", token)
    message = before_training(HubConfig(repo=repo))
    assert message.startswith(f"hub.repo '{repo}' cannot be pushed to: ")
    assert part in message


def test_what_is_not_there_is_said_before_training(hub: HubServer):
    assert "there is no such repository" in before_training(HubConfig(repo=REPO, create_pr=True))
    assert "no such branch; check --revision" in before_training(HubConfig(repo=REPO, revision="refs/pr/7"))


def test_no_token_is_said_before_training(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token; `hf auth login`" in before_training(HubConfig(repo=REPO))
    assert hub.requests == []


def test_offline_is_said_before_training(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it; unset it" in before_training(HubConfig(repo=REPO))


@pytest.mark.parametrize("endpoint", ["refused", "http://nowhere.invalid"])
def test_no_connection_is_said_before_training(endpoint: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        port = unused.getsockname()[1]
        url = f"http://127.0.0.1:{port}" if endpoint == "refused" else endpoint
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        message = before_training(HubConfig(repo=REPO))
    assert "the Hub cannot be reached (" in message
    assert message.endswith("; check the network, or HF_ENDPOINT")


def test_a_hub_that_never_answers_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    answer = threading.Event()
    hub.before = lambda request: answer.wait(30)
    monkeypatch.setattr(pushing, "CHECK_TIMEOUT_S", 0.2)
    assert "the Hub cannot be reached (no answer)" in before_training(HubConfig(repo=REPO))
    answer.set()


def test_a_run_asks_the_hub_before_it_starts_and_only_where_it_is_pushed(hub: HubServer, tmp_path: Path):
    check_run(load_config(None, [f"output_dir={tmp_path / 'off'}"]))
    assert hub.requests == []
    check_run(load_config(None, [f"output_dir={tmp_path / 'on'}", f"hub={REPO}"]))
    assert REPO in hub.repositories
    with pytest.raises(ConfigError, match="hub.repo 'other/name' cannot be pushed to"):
        check_run(load_config(None, [f"output_dir={tmp_path / 'other'}", "hub=other/name"]))


@pytest.mark.parametrize(
    ("method", "path", "status", "body", "part"),
    [
        ("POST", "/commit/", 401, {}, "the Hub answered 401: the token is wrong or has expired; `hf auth login`"),
        ("POST", "/commit/", 403, {"error": "no"}, "the Hub answered 403 (no): this token may not write there"),
        ("POST", "/commit/", 403, BILLING, "its storage limit is reached; make room"),
        ("POST", "/preupload/", 404, {}, "the Hub answered 404: there is no such repository"),
        ("POST", "/commit/", 409, {}, "the Hub answered 409: something else changes the repository"),
        ("POST", "/commit/", 413, {}, "its storage limit is reached"),
        ("POST", "/commit/", 429, {}, "the Hub answered 429: too many requests"),
        ("POST", "/commit/", 500, {}, "the Hub answered 500: it has trouble of its own; try again later"),
        ("PUT", "/lfs/", 403, {}, "the Hub answered 403"),
        ("PUT", "/lfs/", 503, {}, "the Hub answered 503"),
        ("POST", "/commit/", 0, {}, "the Hub cannot be reached ("),
        ("POST", "objects/batch", 400, {"error": "bad"}, "the Hub answered 400 (bad); the adapter"),
    ],
)
def test_every_failure_says_why_where_the_adapter_is_and_how_to_try_again(
    method: str, path: str, status: int, body: dict[str, str], part: str, hub: HubServer, run: Path
):
    hub.fail(method, path, status, times=1000, body=body)
    message = refused(run, HubConfig(repo=REPO, private=True, commit_message="two words"))
    assert message.startswith(f"push to {REPO} failed: ")
    assert part in message
    assert f"; the adapter is safe in {run / 'adapter' / ADAPTER}; try again with " in message
    assert message.endswith(f"ngrpo push {run} --repo {REPO} --private --message 'two words'")
    assert (run / "adapter" / ADAPTER).is_file()
    assert hub.repositories[REPO].commits == []


def test_a_repository_that_was_deleted_during_the_run_is_said(hub: HubServer, run: Path):
    with pytest.raises(UserError, match="the Hub answered 404 .Repository not found.: there is no such repository"):
        Pusher(run, HubConfig(repo=REPO)).finish()


def test_a_full_disk_is_said(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch):
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    message = refused(run, HubConfig(repo=REPO))
    assert "the local disk is full (" in message
    assert "make room; the adapter is safe in " in message


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "waited"),
    [
        ("POST", "/commit/", 429, {"Retry-After": "7"}, 7.0),
        ("POST", "/commit/", 429, {"ratelimit": '"api";r=0;t=42'}, 42.0),
        ("POST", "/commit/", 503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1.0),
        ("POST", "/commit/", 409, {}, 1.0),
        ("POST", "/commit/", 0, {}, 1.0),
        ("PUT", "/lfs/", 429, {"Retry-After": "7"}, 8.0),  # the client's own wait
        ("PUT", "/lfs/", 0, {}, 1.0),
    ],
)
def test_what_passes_is_waited_for(
    method: str,
    path: str,
    status: int,
    headers: dict[str, str],
    waited: float,
    hub: HubServer,
    run: Path,
    waits: list[float],
):
    hub.fail(method, path, status, headers=headers)
    push_run(run, HubConfig(repo=REPO))
    assert waits == [waited]
    assert ADAPTER in hub.files(REPO)


def test_waiting_has_an_end(hub: HubServer, run: Path, waits: list[float]):
    hub.fail("POST", "/commit/", 429, times=2, headers={"Retry-After": "200"})
    assert "too many requests" in refused(run, HubConfig(repo=REPO))
    assert waits == [200.0]  # a second one would make 400


def test_a_push_that_hangs_is_given_up(hub: HubServer, run: Path):
    answer = threading.Event()
    hub.before = lambda request: "/commit/" in request and answer.wait(30)
    message = refused(run, HubConfig(repo=REPO, timeout_s=1.0))
    answer.set()
    assert "failed: it took longer than hub.timeout_s (1 s); the adapter is safe in" in message


# Beside training ----------------------------------------------------------------------------------------------------


def test_a_push_beside_training_waits_for_nobody_and_one_more_may_wait(hub: HubServer, run: Path):
    hub.repositories[REPO] = Repository()
    held, go = threading.Event(), threading.Event()

    def hold(request: str) -> None:
        if "/commit/" in request:
            held.set()
            assert go.wait(30)

    hub.before = hold
    shutil.rmtree(run / "adapter")
    shutil.move(run / "checkpoints" / "iteration-000004", run / "later")
    pusher = Pusher(run, HubConfig(repo=REPO))
    pusher.start()
    assert held.wait(30)
    for _ in range(3):
        pusher.start()  # would block here if anything did
    shutil.move(run / "later", run / "checkpoints" / "iteration-000004")
    assert hub.repositories[REPO].commits == []
    go.set()
    assert pusher.finish() == f"{hub.url}/{REPO}"
    assert [message for _, message in hub.repositories[REPO].commits] == [
        "LoRA after 2 iterations",
        "LoRA after 4 iterations",
    ]


def test_checkpoints_go_into_one_pull_request(hub: HubServer, run: Path):
    hub.repositories[REPO] = Repository()
    pusher = Pusher(run, HubConfig(repo=REPO, create_pr=True))
    pusher.start()
    while not hub.repositories[REPO].commits:
        threading.Event().wait(0.01)
    (run / "samples" / "000004.png").write_bytes(b"another")
    pusher.finish()
    assert set(hub.repositories[REPO].branches) == {"main", "refs/pr/1"}
    assert [branch for branch, _ in hub.repositories[REPO].commits] == ["refs/pr/1"] * 2


def test_training_outlives_every_failed_push_and_ends_with_the_command(
    hub: HubServer, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from ngrpo_lora.hub.watching import HubWatcher
    from ngrpo_lora.training.trainer import train

    hub.repositories[REPO] = Repository()
    hub.fail("POST", "/preupload/", 403, times=1000, body={"error": "read only"})
    settings = [f"hub={REPO}", "hub.push=checkpoints", "trainer.save_every=1", "trainer.num_iterations=3"]
    config = make_config(tmp_path / "run", *settings)
    caplog.set_level(logging.WARNING, "ngrpo_lora.hub")
    with pytest.raises(UserError, match=f"push to {REPO} failed: the Hub answered 403 .read only.") as error:
        train(config, HubWatcher())
    adapter = tmp_path / "run" / "adapter" / ADAPTER
    assert f"the adapter is safe in {adapter}; try again with ngrpo push {tmp_path / 'run'}" in str(error.value)
    assert adapter.is_file()
    assert (tmp_path / "run" / "summary.png").is_file()
    (warning,) = caplog.records
    assert "training goes on, and the next checkpoint is pushed again" in warning.message
    hub.faults.clear()
    assert CliRunner().invoke(app, ["push", str(tmp_path / "run")]).exit_code == 0
    assert hub.files(REPO)[ADAPTER] == adapter.read_bytes()


END_TO_END = """if True:
    import ast, json, re, sys
    import torch
    from diffusers import FluxPipeline
    from huggingface_hub import ModelCard, hf_hub_download
    from safetensors.torch import load_file
    from ngrpo_lora.cli import app
    from ngrpo_lora.world import EMBEDDED
    from ngrpo_lora.sampling.sampler import sample_images

    status = app(sys.argv[1:], standalone_mode=False)
    assert not status, status
    pipeline = FluxPipeline.from_pretrained(EMBEDDED)
    pipeline.load_lora_weights("owner/name")
    loaded = {f"transformer.{n}".replace(".default_0", ""): p for n, p in pipeline.transformer.named_parameters()}
    exported = load_file("run/adapter/pytorch_lora_weights.safetensors")
    different = [name for name, weight in exported.items() if not torch.equal(loaded[name], weight)]
    card = ModelCard.load("owner/name")
    snippet = card.text.partition("```python")[2].partition("```")[0]
    exec(snippet)
    assert type(pipeline).__module__.startswith("diffusers_modules.local.owner--name."), type(pipeline)
    prompt, seed = re.search(r"pipeline\\((.*), seeds=(\\d+)\\)", snippet).groups()
    adapter = "run/adapter/pytorch_lora_weights.safetensors"
    (expected,) = sample_images(adapter, None, [ast.literal_eval(prompt)], [int(seed)])
    same = image.tobytes() == expected.tobytes()
    print(json.dumps({"tensors": len(exported), "different": different, "size": image.size, "same": same}))
"""


def test_a_run_pushes_itself_and_stock_diffusers_loads_it_by_its_name(tmp_path: Path):
    """`ngrpo train` in a process of its own with the client as it comes, which demands Xet; then the card's snippet."""
    with HubServer() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE_TOKEN}
        settings = ["rollout.num_steps=2", "trainer.num_iterations=1", "evaluation.every=1", "output_dir=run"]
        keys = tuple(text.partition("=")[0] for text in settings) + ("algorithm.num_train_steps",)
        words = [text for text in SMALL_RUN if not text.startswith(keys)] + settings
        words += ["algorithm.num_train_steps=1", f"hub={REPO}", "hub.private=true"]
        result = subprocess.run(
            [sys.executable, "-c", END_TO_END, "train", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        assert f"pushed to                 {hub.url}/{REPO}" in result.stderr
        answer = json.loads(result.stdout)
        assert answer["tensors"] > 10
        assert answer["different"] == []
        assert answer["size"] == [64, 64]
        assert answer["same"]  # as the trainer draws it, to the bit
        assert hub.repositories[REPO].private
        assert hub.xorbs
        assert hub.files(REPO)[ADAPTER] == (tmp_path / "run" / "adapter" / ADAPTER).read_bytes()
