"""The reward `vote`: groups are asked about, what is not said is masked, a run waits, stops at once, and goes on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from PIL import Image
from refusing import message
from runs import assert_same_state, read_rows
from vote_groups import make_group

from ngrpo_lora.config import load_config
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.records import checkpoints
from ngrpo_lora.rewards.vote import Asking, Config
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import misfit, prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.types import Samples
from ngrpo_lora.voting.ballots import VotesFile
from ngrpo_lora.voting.simulated import Voter, vote_at

VOTE = "rewards={name: vote, open_browser: false, undo_s: 0}"


def brightness(image: Image.Image) -> float:
    """A taste to which no two pictures are alike."""
    return float(np.asarray(image, dtype=float).mean())


def samples(*numbers: int) -> Samples:
    """Groups of four pictures."""
    groups = [make_group(number) for number in numbers]
    images = [image for group in groups for image in group.images]
    prompts = [group.prompt for group in groups for _ in group.images]
    return Samples(images, prompts, [{}] * len(images), 4)


def asking(scorer: Scorer) -> Asking:
    reward = scorer.lasting["vote"]
    assert isinstance(reward, Asking)
    return reward


@contextmanager
def attended(scorer: Scorer, most: int = 10**6) -> Iterator[None]:
    """A simulated voter at the page of a reward, who leaves after so many votes."""
    reward, left = asking(scorer), threading.Event()

    def should_stop() -> bool:
        return left.is_set() or len(reward.voting.booth.votes.ballots) >= most

    done = in_thread(partial(vote_at, reward.voting.address, Voter(brightness, 0, 0), should_stop))
    try:
        yield
    finally:
        left.set()
        done.result(30)


def test_groups_are_asked_about_and_what_is_not_said_is_masked(tmp_path: Path):
    config = Config(name="vote", votes=str(tmp_path / "votes.jsonl"), open_browser=False, undo_s=0)
    with closing(Scorer([config])) as scorer:
        wait = scorer.submit(samples(0, 1))
        booth, looks = asking(scorer).voting.booth, []
        while len(booth.waiting) < 2:
            time.sleep(0.02)
        first, second = booth.waiting
        if first != make_group(0).name:
            first, second = second, first
        booth.cast(first, "order", [[[1], [3]]])
        booth.cast(second, "none")
        scores = wait(lambda: looks.append(1))["vote"].view(2, 4)
        assert [*scores[0].isnan().tolist()] == [True, False, True, False]
        assert scores[1].tolist() == [0, 0, 0, 0]
        assert scorer.metrics()["vote/votes"] == 2
        assert scorer.rewards["vote"].failures == {}


def free_port() -> int:
    """One that nobody has, and that a page can have at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_free(port: int) -> None:
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the page is still there"


def test_the_page_is_closed_where_another_reward_cannot_be_had(tmp_path: Path):
    port = free_port()
    asked = Config(name="vote", votes=str(tmp_path / "votes.jsonl"), open_browser=False, port=port)
    with pytest.raises(UserError, match="asks a person"):
        Scorer([asked, Config(name="vote", label="other")])
    check_free(port)


@pytest.mark.parametrize(
    "lacking", ["model.path={folder}", "evaluation.rewards={{name: '{folder}/none.py:score'}}", "resume={folder}"]
)
def test_a_run_that_cannot_start_closes_its_page(lacking: str, make_config: MakeConfig, tmp_path: Path):
    port, folder = free_port(), tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"')
    vote = f"rewards={{name: vote, open_browser: false, port: {port}}}"
    with pytest.raises(UserError):
        prepare(make_config(tmp_path / "run", vote, lacking.format(folder=folder)))
    check_free(port)


def test_who_looks_on_knows_the_page(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path / "run", VOTE))
    with closing(run.scorer):
        assert run.start().voting is asking(run.scorer).voting
    other = prepare(make_config(tmp_path / "other"))
    assert other.start().voting is None


def test_of_a_picture_alone_nobody_is_asked(tmp_path: Path):
    config = Config(name="vote", votes=str(tmp_path / "votes.jsonl"), open_browser=False)
    with closing(Scorer([config])) as scorer:
        alone = Samples(make_group(0).images, [""] * 4, [{}] * 4)
        assert scorer(alone)["vote"].isnan().all()
        assert not asking(scorer).voting.booth.waiting


def test_a_vote_that_takes_longer_than_it_may_is_none_and_the_group_is_gone(tmp_path: Path):
    config = Config(name="vote", votes=str(tmp_path / "votes.jsonl"), open_browser=False, timeout_s=0.3)
    with closing(Scorer([config])) as scorer:
        assert scorer(samples(0))["vote"].isnan().all()
        booth = asking(scorer).voting.booth
        for _ in range(100):
            if not booth.waiting:
                return
            time.sleep(0.05)
        raise AssertionError("the group still waits")


def test_earlier_votes_judge_other_pictures_without_asking(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    config = Config(name="vote", votes=str(path), open_browser=False, undo_s=0)
    with closing(Scorer([config])) as scorer, attended(scorer):
        for number in range(25):
            scorer(samples(number))
    offline = Scorer([Config(name="vote", votes=str(path), ask=False)])
    assert offline.lasting == {}
    found = offline(samples(*range(100, 120)))["vote"].view(20, 4)
    wanted = torch.tensor([[brightness(image) for image in make_group(number).images] for number in range(100, 120)])
    assert (found.argmax(1) == wanted.argmax(1)).double().mean() > 0.6  # a quarter would be by chance


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rewards={name: vote, ask: false}", "votes must name a file with ask=false"),
        ("rewards={name: vote, votes: votes.txt}", "votes"),
        ("rewards={name: vote, port: 0}", "port"),
        ("rewards={name: vote, port: 65536}", "port"),
        ("rewards={name: vote, undo_s: -1}", "undo_s"),
        ("rewards=[vote, {name: vote, label: other}]", "must ask people for one reward, got vote, other"),
        ("evaluation.rewards=vote", "must ask no people for held-out pictures, got vote"),
    ],
)
def test_what_cannot_be_asked_is_refused(override: str, problem: str):
    assert problem in message(override)


def test_outside_of_a_run_there_is_nobody_to_ask():
    with pytest.raises(UserError, match="asks a person about what a run draws; give ask: false and votes"):
        Scorer([Config(name="vote")])


def test_votes_without_a_preference_judge_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="needs votes that prefer a picture"):
        Scorer([Config(name="vote", ask=False, votes=str(tmp_path / "votes.jsonl"))])


def test_people_are_asked_by_one_process():
    assert "needs a run of one process, got 2" in str(misfit(load_config("demo-vote"), 2))
    assert misfit(load_config("demo-vote"), 1) is None
    assert misfit(load_config("demo"), 2) is None


def test_a_resumed_run_may_have_its_page_elsewhere(make_config: MakeConfig, tmp_path: Path):
    def given(more: str) -> list[str]:
        return [f"rewards={{name: vote, open_browser: false, undo_s: 0{more}}}", "trainer.num_iterations=1"]

    run = prepare(make_config(tmp_path / "run", *given("")))
    with closing(run.scorer), attended(run.scorer):
        complete(run)
    check_run(make_config(tmp_path / "run", *given(", host: 0.0.0.0, port: 8999"), "resume=latest"))
    with pytest.raises(UserError, match="head_votes"):
        check_run(make_config(tmp_path / "run", *given(", head_votes: true"), "resume=latest"))


def finished(run: Run) -> None:
    with closing(run.scorer), attended(run.scorer):
        complete(run)


def test_a_run_waits_for_votes_stops_at_once_and_goes_on_as_if_it_had_not(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = [VOTE, "trainer.num_iterations=3", "evaluation.every=3"]
    finished(prepare(make_config(tmp_path / "whole", *settings)))
    rows = read_rows(tmp_path / "whole")
    assert [row.get("rollout/vote/votes") for row in rows] == [None, 2, 4, 6]
    assert rows[1]["rollout/failed_share"] == rows[1]["rollout/vote_unsaid_share"] == 0
    assert (rows[0]["eval/reward_mean"], rows[0]["eval/vote_mean"]) == (None, None)

    run = prepare(make_config(tmp_path / "halved", *settings))
    booth, times = asking(run.scorer).voting.booth, []

    def interrupt() -> None:  # after three votes, while the second one of the second iteration is waited for
        while len(booth.votes.ballots) < 3 or not booth.waiting:
            time.sleep(0.05)
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with closing(run.scorer), attended(run.scorer, most=3):
        in_thread(interrupt)
        with pytest.raises(SharedError, match="stopped in iteration 2 of 3, while people were asked .* resume=latest"):
            complete(run)
        assert time.monotonic() - times[0] < 5  # with its checkpoint, on a busy machine
    again = make_config(tmp_path / "halved", *settings, "resume=latest")
    check_run(again)
    finished(prepare(again))
    whole, halved = (VotesFile(tmp_path / name / "votes.jsonl").ballots for name in ("whole", "halved"))
    assert [*halved] == [*whole]  # no group was asked about twice, and the pictures were the same
    assert len((tmp_path / "halved" / "votes.jsonl").read_text().splitlines()) == 6
    assert [ballot.orders for ballot in halved.values()] == [ballot.orders for ballot in whole.values()]
    states = [checkpoints.load("latest", tmp_path / name, "cpu") for name in ("whole", "halved")]
    assert_same_state(*states)
