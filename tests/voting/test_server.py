"""The page over HTTP: who is let in, what is taken, and what is said of all else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from vote_groups import make_group

from ngrpo_lora.errors import UserError
from ngrpo_lora.voting.ballots import VotesFile
from ngrpo_lora.voting.booth import Booth
from ngrpo_lora.voting.head import Head, pixel_features
from ngrpo_lora.voting.server import MAX_BODY_BYTES, PageServer

GROUP = make_group(0)
VOTE = {"group": GROUP.name, "said": "order", "orders": [[[0], [1]]]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    booth = Booth(VotesFile(tmp_path / "votes.jsonl"), Head(pixel_features), undo_s=3600)
    booth.show(GROUP)
    opened = PageServer(booth, "127.0.0.1", 0, "secret")
    yield opened
    opened.close()


def get(server: PageServer, path: str) -> requests.Response:
    return requests.get(f"{server.addresses[0]}{path}", timeout=30)


def post(server: PageServer, path: str, body: object) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(f"{server.addresses[0]}{path}", data=data, timeout=30)


def test_the_page_loads_nothing_else_and_shows_a_group_with_its_pictures(server: PageServer):
    page = get(server, "")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    group = get(server, "state").json()["group"]
    assert (group["name"], group["prompt"]) == (GROUP.name, "a plain picture")
    picture = get(server, f"pictures/{group['pictures'][2]}.png")
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(picture.content))), np.asarray(GROUP.images[2]))


@pytest.mark.parametrize(
    "path", ["", "wrong/", "wrong/state", "secre/state", "secret2/state", "ä/state", "favicon.ico"]
)
def test_without_the_token_there_is_nothing(path: str, server: PageServer):
    answer = requests.get(f"http://127.0.0.1:{server.port}/{path}", timeout=30)
    assert answer.status_code == 404
    assert "its last part is a token" in answer.text
    for action in ("ballot", "undo"):
        assert requests.post(f"http://127.0.0.1:{server.port}/wrong/{action}", json=VOTE, timeout=30).status_code == 404
    assert server.booth.state()["votes"] == 0


@pytest.mark.parametrize("name", ["0" * 16, "..%2f..%2fvotes", "%00"])
def test_only_pictures_of_groups_that_are_shown_can_be_had(name: str, server: PageServer):
    assert get(server, f"pictures/{name}.png").status_code == 404


def test_a_vote_is_on_the_disk_when_it_is_answered_and_can_be_taken_back(server: PageServer):
    answer = post(server, "ballot", VOTE)
    assert (answer.status_code, answer.json()["votes"], answer.json()["group"]) == (200, 1, None)
    assert [*VotesFile(server.booth.votes.path).ballots] == [GROUP.name]
    undone = post(server, "undo", {"group": GROUP.name})
    assert (undone.json()["votes"], undone.json()["group"]["name"]) == (0, GROUP.name)
    late = post(server, "undo", {"group": GROUP.name})
    assert late.status_code == 409
    assert late.json()["state"]["group"]["name"] == GROUP.name


def test_of_two_browsers_the_faster_one_counts(server: PageServer):
    assert post(server, "ballot", VOTE).ok
    slower = post(server, "ballot", VOTE | {"orders": [[[1], [0]]]})
    assert slower.status_code == 409
    assert "from another window" in slower.json()["error"]
    (ballot,) = VotesFile(server.booth.votes.path).ballots.values()
    assert ballot.orders == (((0,), (1,)),)


def test_of_many_votes_at_once_one_counts(server: PageServer):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(post(server, "ballot", VOTE).status_code)) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200, *[409] * 11]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        [],
        {},
        VOTE | {"said": "best"},
        VOTE | {"orders": [[[0], [9]]]},
        VOTE | {"orders": [[[0], [0]]]},
        VOTE | {"orders": []},
        VOTE | {"orders": "0>1"},
        VOTE | {"more": 1},
        b"[" * 10000,
    ],
)
def test_what_is_no_vote_is_refused_and_the_group_waits_on(body: object, server: PageServer):
    answer = post(server, "ballot", body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert answer.json()["state"]["group"]["name"] == GROUP.name
    assert not server.booth.votes.path.exists()


@pytest.mark.parametrize("body", [b"", {}, {"group": 1}, {"group": GROUP.name, "more": 1}])
def test_what_names_no_vote_takes_none_back(body: object, server: PageServer):
    assert post(server, "ballot", VOTE).ok
    answer = post(server, "undo", body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert answer.json()["state"]["votes"] == 1


@pytest.mark.parametrize("path", ["ballot", "undo"])
def test_a_body_without_end_is_not_read(path: str, server: PageServer):
    assert post(server, path, b" " * (MAX_BODY_BYTES + 1)).status_code == 413


def test_a_vote_that_cannot_be_written_says_so_and_the_group_waits_on(server: PageServer):
    server.booth.votes.path.mkdir()
    answer = post(server, "ballot", VOTE)
    assert answer.status_code == 507
    assert "it does not count" in answer.json()["error"]
    assert answer.json()["state"]["group"]["name"] == GROUP.name


def test_a_port_that_is_taken_is_refused_unless_any_will_do(server: PageServer, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=f"port {server.port}: .*; choose another port"):
        PageServer(server.booth, "127.0.0.1", server.port, "secret")
    monkeypatch.setattr("ngrpo_lora.voting.server.PORT", server.port)
    other = PageServer(server.booth, "127.0.0.1", None, "secret")
    assert other.port != server.port
    other.close()


@pytest.mark.parametrize("host", ["192.0.2.7", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str, server: PageServer):
    with pytest.raises(UserError, match="the voting page cannot be at"):
        PageServer(server.booth, host, 0, "secret")


def test_all_addresses_of_a_page_for_the_whole_network_are_told(server: PageServer):
    wide = PageServer(server.booth, "0.0.0.0", 0, "secret")
    assert wide.addresses[0] == f"http://127.0.0.1:{wide.port}/secret/"
    for address in wide.addresses:
        assert requests.get(f"{address}state", timeout=30).ok
    wide.close()


def test_a_closed_page_gives_its_port_back_within_seconds(server: PageServer):
    port = server.port
    with requests.Session() as session:
        session.get(f"{server.addresses[0]}state", timeout=30)  # a connection that is kept
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 5
    again = PageServer(server.booth, "127.0.0.1", port, "secret")
    assert get(again, "state").ok
    again.close()
