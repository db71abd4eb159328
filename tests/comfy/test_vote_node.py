"""Training by votes in the graph: the page at ComfyUI's address, cancel and go on, where votes are, what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from comfy_client import Comfy, Graph, Refused, Result, start
from graphs import node
from test_training import SMALL
from voters import VotingPage, attended, hearing, until

from ngrpo_lora.voting.ballots import VotesFile

# A custom node of the test's own: while there is a file `idle`, nobody has voted for so many minutes more.
HOOKS = """
from pathlib import Path

from ngrpo_lora.voting.voting import Voting

NODE_CLASS_MAPPINGS = {}
IDLE, idle_s = Path(__file__).parents[2] / "idle", Voting.idle_s.fget
Voting.idle_s = property(lambda self: idle_s(self) + 60 * float(IDLE.read_text() if IDLE.exists() else 0))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    base = tmp_path_factory.mktemp("voting")
    (base / "custom_nodes" / "hooks").mkdir(parents=True)
    (base / "custom_nodes" / "hooks" / "__init__.py").write_text(HOOKS)
    bad = base / "models" / "diffusers" / "bad"
    bad.mkdir(parents=True)
    (bad / "model_index.json").write_text('{"_class_name": "FluxPipeline"')
    running = start(base)
    yield running
    running.stop()


def voted(**widgets: Any) -> dict[str, Any]:
    """The node that asks; votes can be taken back for no time."""
    own = {"votes": "", "who_votes": "you", "wait_minutes": 0.0, "phone": False, "port": 0, "weight": 1.0}
    return node("NGRPO_VoteReward", **(own | {"settings": "undo_s=0"} | widgets))


def train(name: str, overrides: str = SMALL, iterations: int = 1, **widgets: Any) -> Graph:
    """Two votes of four pictures an iteration."""
    own = {"preset": "demo", "run_seed": 0, "earlier_run": "go on with it", "rewards": ["vote", 0]}
    return {
        "vote": voted(**widgets),
        "train": node("NGRPO_Train", name=name, overrides=overrides, iterations=iterations, **own),
    }


def run_of(server: Comfy, name: str) -> Path:
    return server.base / "output" / "ngrpo" / name


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def succeeded(result: Result) -> Result:
    assert result.status == "success", result.error
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_votes_through_comfyui_train_an_adapter_and_the_page_goes_when_the_run_ends(server: Comfy):
    port = free_port()
    with attended(server) as events:
        result = succeeded(server.run(train("taste", iterations=2, port=port)))
        until(lambda: events.path is None, "the page is still shown")
    folder = run_of(server, "taste")
    assert len(lines_of(folder / "votes.jsonl")) == 4
    assert len([*(folder / "votes").glob("*.png")]) == 16
    assert lines_of(folder / "metrics.jsonl")[-1]["rollout/vote/votes"] == 4
    assert (server.base / "models" / "loras" / "ngrpo" / "taste.safetensors").exists()
    path = next(event["path"] for event in events.all)
    assert {event["node"] for event in events.all} == {"train"}
    assert not any("nan" in text for _, text in result.texts)
    gone = requests.get(f"{server.url}{path}state", timeout=60)
    assert (gone.status_code, "its run has ended" in gone.text) == (404, True)
    assert is_free(port)


def test_cancel_ends_a_run_that_waits_and_the_same_port_asks_only_what_was_not_said(server: Comfy):
    graph = train("cancelled", port=free_port())
    with hearing(server) as events, server.listening() as (client, messages):
        started = time.monotonic()
        prompt = server.submit(graph, client)
        page = VotingPage(server, events)
        first = page.groups(2)["group"]["name"]
        assert page.vote(first).ok
        second = page.groups(1)["group"]["name"]
        asked = time.monotonic()
        server.interrupt()
        result = server.follow(prompt, messages)
        waited = time.monotonic() - asked
        until(lambda: events.path is None, "the page is still shown")
    assert result.status == "interrupted"
    assert waited < max(1.0, 2 * (asked - started)), waited  # on a busy machine, by what came before
    votes = run_of(server, "cancelled") / "votes.jsonl"
    assert [line["group"] for line in lines_of(votes)] == [first]
    with hearing(server) as events, server.listening() as (client, messages):
        prompt = server.submit(graph, client)
        page = VotingPage(server, events)
        assert page.groups(1)["group"]["name"] == second
        assert page.vote(second).ok
        succeeded(server.follow(prompt, messages))
    assert [line["group"] for line in lines_of(votes)] == [first, second]


def test_two_vote_at_once_and_after_a_kill_nobody_is_asked_again(tmp_path: Path):
    votes = tmp_path / "output" / "ngrpo" / "killed" / "votes.jsonl"
    killed = start(tmp_path)
    with hearing(killed) as events:
        killed.submit(train("killed"))
        pages = [VotingPage(killed, events) for _ in range(2)]
        first, second = pages[0].groups(2)["names"]
        with ThreadPoolExecutor() as pool:
            answers = pool.map(lambda voter: pages[voter % 2].vote(first, [[[voter], [3]]]).status_code, range(3))
        assert sorted(answers) == [200, 409, 409]
        assert pages[0].take_back(second).status_code == 409  # nobody has voted on it
        assert pages[1].take_back(first).ok
        assert pages[0].state()["names"] == [first, second]
        assert pages[0].vote(first, [[[2], [0]]]).ok
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
    again = start(tmp_path)
    with hearing(again) as events, again.listening() as (client, messages):
        prompt = again.submit(train("killed"), client)
        page = VotingPage(again, events)
        assert page.groups(1)["names"] == [second]
        assert "from another window" in page.vote(first).json()["error"]
        assert page.vote(second).ok
        succeeded(again.follow(prompt, messages))
    again.stop()
    assert VotesFile(votes).ballots[first].orders == (((2,), (0,)),)
    assert [*VotesFile(votes).ballots] == [first, second]


def test_what_is_no_vote_is_said_at_the_page_and_the_run_waits_on(server: Comfy):
    graph = train("wrong")
    with hearing(server) as events, server.listening() as (client, messages):
        prompt = server.submit(graph, client)
        page, other = VotingPage(server, events), VotingPage(server, events)
        group = page.groups(2)["group"]["name"]
        assert "picture" in page.vote(group, [[[0], [9]]]).json()["error"]
        assert page.vote(group, "0>1").status_code == 400
        assert requests.post(f"{page.address}ballot", data=b"\xff", timeout=60).status_code == 400
        assert "gone on without" in page.vote("0" * 16).json()["error"]
        circle = [[[0], [1]], [[1], [2]], [[2], [0]]]
        assert page.vote(group, circle).ok
        slower = other.vote(group)
        assert (slower.status_code, "from another window" in slower.json()["error"]) == (409, True)
        stranger = requests.get(f"{server.url}/ngrpo/vote/wrong/state", timeout=60)
        assert stranger.status_code == 404
        assert page.vote(page.groups(1)["group"]["name"], [], "none").ok
        succeeded(server.follow(prompt, messages))
    circular, none = VotesFile(run_of(server, "wrong") / "votes.jsonl").ballots.values()
    assert (len(circular.orders), none.said) == (3, "none")


def test_a_page_that_nobody_looks_at_is_waited_for_and_the_node_says_how_long(server: Comfy):
    idle = server.base / "idle"
    with hearing(server) as events, server.listening() as (client, messages):
        prompt = server.submit(train("idle"), client)
        page = VotingPage(server, events)
        page.groups(2)
        time.sleep(2)
        idle.write_text("65")
        time.sleep(2)
        server.interrupt()
        result = server.follow(prompt, messages)
        idle.unlink()
    said = "iteration 1 of 1: 2 groups to vote on"
    for expected in (f"{said}\n{page.address}", f"{said}, no vote for 65 min; the run waits\n{page.address}"):
        assert ("train", expected) in result.texts


def test_without_a_vote_in_time_a_group_is_left_out(server: Comfy):
    succeeded(server.run(train("late", wait_minutes=0.01)))
    row = lines_of(run_of(server, "late") / "metrics.jsonl")[-1]
    assert (row["rollout/vote_unsaid_share"], row["rollout/vote/votes"]) == (1, 0)


@pytest.mark.parametrize("overrides", ["", "model.path=bad"])
def test_a_run_that_cannot_start_says_why_and_leaves_no_page(overrides: str, server: Comfy):
    """The port is taken, or the model, which comes after the page, cannot be loaded."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if overrides:
            other.close()
        else:
            other.listen()
        result = server.run(train("lacking", SMALL + overrides, port=port))
    assert (result.status, result.error_node) == ("error", "train")
    reason = "model_index.json is no JSON" if overrides else f"the voting page cannot be at 127.0.0.1, port {port}"
    assert result.error.count(reason) == 1, result.error
    assert is_free(port)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("votes", "place"),
    [
        ("mine.jsonl", "mine.jsonl"),
        ("taste/mine.jsonl", "taste/mine.jsonl"),
        ("{output}/mine.jsonl", "mine.jsonl"),
        ("../mine.jsonl", None),
        ("~/mine.jsonl", None),
        ("/etc/mine.jsonl", None),
    ],
)
def test_votes_are_below_the_output_folder_whoever_names_them(votes: str, place: str | None, tmp_path: Path):
    import folder_paths

    from comfy_nodes.rewards import entry
    from comfy_nodes.runs import configure
    from comfy_nodes.voting import YOU, VoteReward
    from ngrpo_lora.errors import ConfigError

    output = Path(folder_paths.get_output_directory())
    name = votes.format(output=output)
    makers = (
        lambda: VoteReward.entry(name, YOU, 0, False, 0, 1.0, ""),
        lambda: entry("vote", 1.0, f"votes={name}"),
        lambda: configure("demo", "x", f"rewards.train={{name: vote, votes: {name}}}", 1, 0).rewards.train[0],
    )
    for make in makers:
        if place is None:
            with pytest.raises(ConfigError, match="votes must lie in one of ComfyUI's folders"):
                make()
        else:
            made = make()
            assert (made.votes, made.open_browser) == (str(output / place), False)  # pyright: ignore


@pytest.mark.parametrize(
    ("widgets", "reason"),
    [
        ({"votes": "votes.txt"}, "votes"),
        ({"votes": "../votes.jsonl"}, "votes must lie in one of ComfyUI's folders"),
        ({"who_votes": "everyone"}, "who_votes must be one of you, you, and the head along, the head alone"),
        ({"who_votes": "the head alone"}, "votes must name a file of earlier votes where who_votes is"),
        ({"port": 70000}, "port"),
        ({"wait_minutes": -1.0}, "wait_minutes must be at least 0, got -1"),
        ({"weight": 0.0}, "must not be 0"),
        ({"settings": "undo=3"}, "unknown key undo"),
        ({"settings": "path=/etc"}, "path must lie in one of ComfyUI's folders"),
    ],
)
def test_bad_input_is_refused_with_the_reason(widgets: dict[str, Any], reason: str, server: Comfy):
    with pytest.raises(Refused) as refused:
        server.submit(train("bad", **widgets))
    assert refused.value.status == 400
    assert reason in refused.value.reasons
    assert not run_of(server, "bad").exists()


def test_earlier_votes_judge_pictures_and_nobody_is_asked_outside_of_a_run(server: Comfy):
    with attended(server):
        succeeded(server.run(train("judged", votes="judged.jsonl")))
    assert len(lines_of(server.base / "output" / "judged.jsonl")) == 2
    pictures = {"pictures": node("EmptyImage", width=64, height=64, batch_size=2, color=0xFF0000)}
    score = {"images": ["pictures", 0], "rewards": ["vote", 0], "prompt": "a star", "n": 1}
    score |= {"combine": "standardized", "metadata": "", "sheet_px": 160}
    graph = pictures | {"score": node("NGRPO_Score", **score)}
    asked = server.run(graph | {"vote": voted()})
    assert (asked.status, asked.error_node) == ("error", "score")
    assert "rewards must ask nobody here, got vote" in asked.error
    alone = succeeded(server.run(graph | {"vote": voted(votes="judged.jsonl", who_votes="the head alone")}))
    assert "| 1 |" in alone.outputs["score"]["text"][0]
