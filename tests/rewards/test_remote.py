"""`ngrpo reward-server` and its client: the real server, the real client, and servers that misbehave."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from scripted_server import Answer, ScriptedServer
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import parse_config
from ngrpo_lora.errors import UserError
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.scoring.server import MAX_REQUEST_BYTES, RewardServer
from ngrpo_lora.types import Samples
from ngrpo_lora.world import scenes

OWN = """
import numpy as np

def redness(image):
    value = float(np.asarray(image)[..., 0].astype(float).std()) / 7
    return value if value > 0 else float("nan")

def above_mean(images, prompt, metadata):
    values = np.array([np.asarray(image).mean() for image in images])
    return (values - values.mean()) / 3 + len(prompt) + metadata.get("bonus", 0)

def short(images, prompts):
    return [0.0]
"""
SLOW = """
import time

def slow(image):
    print("scoring", flush=True)
    time.sleep(0.5)
    return 0.25
"""
RANDOM = np.random.default_rng(0)
NOISE = [Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
SAMPLES = Samples(NOISE, ["a red star"] * 3 + ["a circle"] * 3, [{}] * 3 + [{"bonus": 0.1}] * 3, group_size=3)


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NGRPO_REWARD_TOKEN", raising=False)


Serve = Callable[..., RewardServer]

EDITS = """
import numpy as np

def changed(images, prompts, metadata):
    pairs = [(np.asarray(i, int), np.asarray(m["source"], int)) for i, m in zip(images, metadata)]
    return [float(np.abs(i - source).mean()) + m["n"] for (i, source), m in zip(pairs, metadata)]
"""


def test_source_pictures_travel_with_the_metadata(serve: Serve, tmp_path: Path):
    (path := tmp_path / "edits.py").write_text(EDITS)
    server = serve(f"{path}:changed")
    sources = [NOISE[5], NOISE[5], NOISE[4]]
    edits = Samples(NOISE[:3], ["red"] * 3, [{"source": source, "n": n} for n, source in enumerate(sources)])
    expected = Scorer(configs(f"{path}:changed"))(edits)
    found = Scorer(configs({"name": "remote", "url": server.url}))(edits)
    assert [*found.values()][0].tolist() == [*expected.values()][0].tolist()
    assert len({round(value, 6) for value in [*found.values()][0].tolist()}) == 3


def test_pictures_must_be_as_many_as_images_and_be_pictures(serve: Serve, own: str):
    server = serve(f"{own}:redness")
    (label,) = server.scorer.rewards
    body = {"reward": label, "images": [""], "prompts": [""], "metadata": [{}]}
    for pictures, part in (([], "pictures must be as many as images, got 0 for 1"), ([{"source": "x"}], "images.")):
        answer = requests.post(f"{server.url}/score", json=body | {"pictures": pictures}, timeout=30)
        assert answer.status_code == 400
        assert part in answer.json()["error"]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server of these rewards."""
    with ExitStack() as stack:

        def start(*entries: Any, token: str | None = None) -> RewardServer:
            server = RewardServer(configs(*entries), "127.0.0.1", 0, "cpu", token)
            thread = threading.Thread(target=server.serve, daemon=True)
            thread.start()
            stack.callback(thread.join, 30)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def script() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts a server that gives these answers to POST /score."""
    healthy = Answer({"protocol": 1, "rewards": {"ocr": "single"}})
    with ExitStack() as stack:
        yield lambda *answers, health=healthy: stack.enter_context(
            ScriptedServer({"/health": [health], "/score": list(answers) or [Answer({})]})
        )


def configs(*entries: Any) -> Any:
    return parse_config({"rewards": {"train": list(entries)}}).rewards.train


def remote(server: RewardServer | ScriptedServer, **settings: Any) -> Scorer:
    return Scorer(configs({"name": "remote", "url": server.url, **settings}))


def ask(server: RewardServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request by plain http.client."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, sent)
    response = connection.getresponse()
    text = response.read().decode()
    result = json.loads(text) if response.headers.get_content_type() == "application/json" else text
    connection.close()
    return response.status, result


def request(**changes: Any) -> dict[str, Any]:
    return {"reward": "redness", "images": [encoded()], "prompts": ["a"], "metadata": [{}], **changes}


def encoded(image: Image.Image = NOISE[0], kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


# Scores -------------------------------------------------------------------------------------------------------------


def test_remote_scores_are_the_local_ones_bit_by_bit(serve: Serve, own: str):
    images = [Image.fromarray(scenes.render(scenes.parse("a red star"), np.random.default_rng(n))) for n in range(18)]
    samples = Samples(
        [*images, Image.new("RGB", (64, 64))],
        ["a red star"] * 10 + ["a blue circle"] * 9,
        [{"n": n} for n in range(19)],
    )
    entries = ["world", f"{own}:redness"]
    server = serve(*entries)
    local = Scorer(configs(*entries))(samples)
    for name in ("world", "redness"):
        there = remote(server, reward=name)(samples)["remote"]
        torch.testing.assert_close(there, local[name], rtol=0, atol=0, equal_nan=True)
    assert local["redness"].isnan().tolist() == [False] * 18 + [True]
    assert len(set(local["redness"][:18].tolist())) == 18


def test_a_group_reward_sees_its_groups(serve: Serve, own: str):
    entry = f"{own}:above_mean"
    scorer = remote(serve(entry))
    assert scorer.rewards["remote"].form == "group"
    local = Scorer(configs(entry))(SAMPLES)["above_mean"]
    torch.testing.assert_close(scorer(SAMPLES)["remote"], local, rtol=0, atol=0)
    assert local[:3].mean() == pytest.approx(len("a red star"))
    assert local[3:].mean() == pytest.approx(len("a circle") + 0.1)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "CMYK"])
def test_an_image_of_any_mode_arrives_as_rgb(serve: Serve, own: str, mode: str):
    image = NOISE[0].convert(mode)
    scorer = Scorer(configs(f"{own}:redness"))
    there = remote(serve(f"{own}:redness"))(Samples([image], ["a"], [{}]))["remote"]
    assert there.tolist() == scorer(Samples([image.convert("RGB")], ["a"], [{}]))["redness"].tolist()


def test_batches_are_as_large_as_asked(script: Callable[..., ScriptedServer]):
    server = script(Answer({"scores": [1, 2, 3, 4]}), Answer({"scores": [5, None]}))
    scores = remote(server, batch_size=4)(SAMPLES)["remote"]
    assert scores.tolist() == pytest.approx([1, 2, 3, 4, 5, math.nan], nan_ok=True)
    bodies = [request.body for request in server.requests["/score"]]
    assert [len(body["images"]) for body in bodies] == [4, 2]
    assert bodies[1] | {"images": []} == {
        "reward": "ocr",
        "images": [],
        "prompts": ["a circle"] * 2,
        "metadata": [{"bonus": 0.1}] * 2,
        "group_size": 1,
    }


def test_settings_of_a_served_reward_count(serve: Serve):
    server = serve({"name": "world", "label": "strict_enough", "range": [0, 1]})
    assert ask(server, "GET", "/health") == (200, {"protocol": 1, "rewards": {"strict_enough": "batch"}})


# Server: who may ask ------------------------------------------------------------------------------------------------


def test_a_token_lets_in_who_has_it(serve: Serve, own: str, monkeypatch: pytest.MonkeyPatch):
    server = serve(f"{own}:redness", token="secret")
    monkeypatch.setenv("NGRPO_REWARD_TOKEN", "secret")
    assert remote(server)(SAMPLES)["remote"].isfinite().all()
    monkeypatch.setenv("MINE", "secret")
    monkeypatch.setenv("NGRPO_REWARD_TOKEN", "wrong")
    assert remote(server, token_env="MINE")(SAMPLES)["remote"].isfinite().all()
    with pytest.raises(UserError, match=r"refuses the token \(status 401\); .* variable NGRPO_REWARD_TOKEN"):
        remote(server)


@pytest.mark.parametrize("header", ["", "secret", "Bearer", "Bearer wrong", "Bearer secret2", "Bearer é"])
def test_any_other_token_is_refused(serve: Serve, own: str, header: str):
    server = serve(f"{own}:redness", token="secret")
    for method, path, body in (("GET", "/health", None), ("POST", "/score", request())):
        status, result = ask(server, method, path, body, Authorization=header)
        assert (status, result) == (401, {"error": "the request must bring the token of NGRPO_REWARD_TOKEN"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_without_a_token_no_other_machine_is_let_in(host: str):
    result = CliRunner().invoke(app, ["reward-server", "world", "--host", host])
    assert result.exit_code == 2
    assert "lets other machines in, which needs a token; set the environment variable" in result.stderr


def test_with_a_token_it_listens_to_all():
    server = RewardServer(configs("world"), "0.0.0.0", 0, "cpu", "secret")
    assert server.url == f"http://0.0.0.0:{server.port}"
    server.socket.close()


# Server: what it takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_images_of_the_usual_formats_are_taken(serve: Serve, own: str, kind: str):
    status, result = ask(serve(f"{own}:redness"), "POST", "/score", request(images=[encoded(kind=kind)]))
    assert status == 200
    assert result["scores"][0] > 1


def test_an_image_is_judged_as_people_see_it(serve: Serve, own: str):
    """Transparent parts are on white, and 16 bits are not cut off."""
    server = serve(f"{own}:redness")
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    deep = np.zeros((8, 8), np.uint16)
    deep[:, :4] = 20_000
    for image, level in ((clear, 255), (Image.fromarray(deep), 78)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        sent = {"images": [base64.b64encode(buffer.getvalue()).decode()], "prompts": ["a"], "metadata": [{}]}
        status, result = ask(server, "POST", "/score", request(**sent))
        assert status == 200
        assert result["scores"] == [pytest.approx(level / 2 / 7)]  # half of it is black


def huge_png() -> str:
    """A PNG of a few bytes whose header says 12,000 x 12,000 px."""
    data = bytearray(base64.b64decode(encoded()))
    data[16:24] = struct.pack(">II", 12_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return base64.b64encode(data).decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"", 400, "Invalid JSON"),
        (b"{", 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "Invalid JSON"),
        ([], 400, "request: "),
        ({"reward": "redness"}, 400, "images: Field required"),
        (request(pickle="x"), 400, "pickle: Extra inputs are not permitted"),
        (request(images=[]), 400, "images: "),
        (request(images=[1]), 400, "images.0: "),
        (request(metadata=["x"]), 400, "metadata.0: "),
        (request(prompts=["a", "b"]), 400, "must be equally many, got 1, 2, 1"),
        (request(group_size=0), 400, "group_size: "),
        (request(group_size=2), 400, "images must be a multiple of group_size 2, got 1"),
        (request(images=["*"]), 400, "images.0 must be the base64 of an image in PNG, WEBP, JPEG"),
        (request(images=[encoded()[:200]]), 400, "images.0 must be the base64 of an image"),
        (request(images=[encoded(kind="GIF")]), 400, "images.0 must be the base64 of an image"),
        (
            request(images=[huge_png()]),
            413,
            "must have at most 134217728 pixels, got 144000000 with images.0",
        ),
        (request(reward="rednes"), 404, "no reward 'rednes' here, only redness; did you mean redness?"),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(serve: Serve, own: str, body: Any, status: int, why: str):
    server = serve(f"{own}:redness")
    got, result = ask(server, "POST", "/score", body)
    assert got == status
    assert why in result["error"]
    assert ask(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "why"),
    [
        ("GET", "/", {}, 404, "there are GET /health and POST /score, got GET /"),
        ("GET", "/score", {}, 405, "got GET /score"),
        ("POST", "/health", {}, 405, "got POST /health"),
        ("PUT", "/score", {}, 405, "there are GET /health and POST /score, got PUT /score"),
        (
            "POST",
            "/score",
            {"Content_Type": "application/x-pickle"},
            415,
            "must be application/json, got application/x",
        ),
        ("POST", "/score", {"Content_Type": ""}, 415, "must be application/json, got none"),
        ("POST", "/score", {"Content_Length": "many"}, 400, "Invalid HTTP request"),
        ("POST", "/score", {"Content_Length": "9" * 5000}, 400, "Invalid HTTP request"),
        (
            "POST",
            "/score",
            {"Content_Length": str(MAX_REQUEST_BYTES + 1)},
            413,
            "at most 268435456 bytes, got 26",
        ),
    ],
)
def test_what_http_does_not_allow_is_refused_with_the_reason(
    serve: Serve, own: str, method: str, path: str, headers: dict[str, str], status: int, why: str
):
    server = serve(f"{own}:redness")
    got, result = ask(server, method, path, b"", **headers)
    assert got == status
    assert why in (result if status == 400 else result["error"])
    assert ask(server, "GET", "/health")[0] == 200


def test_a_body_in_chunks_is_taken_up_to_the_limit(serve: Serve, own: str, monkeypatch: pytest.MonkeyPatch):
    server = serve(f"{own}:redness")
    body, headers = json.dumps(request()).encode(), {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    statuses = []
    for limit in (len(body), len(body) - 1):
        monkeypatch.setattr("ngrpo_lora.scoring.server.MAX_REQUEST_BYTES", limit)
        connection.request("POST", "/score", iter([body[:100], body[100:]]), headers, encode_chunked=True)
        response = connection.getresponse()
        statuses.append((response.status, json.loads(response.read())))
    connection.close()
    (taken, scores), (refused, error) = statuses
    assert (taken, len(scores["scores"])) == (200, 1)
    assert (refused, error["error"].partition(";")[0]) == (
        413,
        f"a request must have at most {len(body) - 1} bytes, got {len(body)}",
    )


def test_a_body_that_stalls_is_given_up(serve: Serve, own: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ngrpo_lora.scoring.server.STALLED_S", 0.2)
    status, result = ask(serve(f"{own}:redness"), "POST", "/score", b"{", Content_Length="2")
    assert (status, result) == (408, {"error": "the request must come whole, but nothing came for 0.2 s"})


def test_more_requests_than_there_are_places_wait(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ngrpo_lora.scoring.server.MAX_REQUESTS_IN_MEMORY", 2)
    (tmp_path / "slow.py").write_text(SLOW)
    server = serve(f"{tmp_path / 'slow.py'}:slow")
    scores, running, most = server.scores, [], []

    def watched(body: bytes) -> list[float]:
        running.append(body)
        most.append(len(running))
        try:
            return scores(body)
        finally:
            running.pop()

    monkeypatch.setattr(server, "scores", watched)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: ask(server, "POST", "/score", request(reward="slow")), range(6)))
    assert [status for status, _ in found] == [200] * 6
    assert max(most) == 2


def test_more_connections_than_allowed_are_told_to_come_again(serve: Serve, own: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ngrpo_lora.scoring.server.MAX_CONNECTIONS", 2)
    server = serve(f"{own}:redness")
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    time.sleep(0.2)
    assert ask(server, "GET", "/health")[0] == 503
    for one in idle:
        one.close()
    time.sleep(0.2)
    assert ask(server, "GET", "/health")[0] == 200


def test_a_refused_request_leaves_its_connection_in_order(serve: Serve, own: str):
    connection = http.client.HTTPConnection("127.0.0.1", serve(f"{own}:redness").port, timeout=20)
    for body, status in ((request(images=["*"]), 400), (request(), 200)):
        connection.request("POST", "/score", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert not response.will_close
    connection.close()


@pytest.mark.parametrize(("headers", "status"), [({"Authorization": "x"}, 401), ({"Content-Type": "text/x"}, 415)])
def test_the_body_of_a_refused_request_is_no_next_request(serve: Serve, own: str, headers: dict[str, str], status: int):
    server = serve(f"{own}:redness", token="secret")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    usual = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    connection.request("POST", "/score", b"GET /health HTTP/1.1\r\n\r\n" * 100_000, usual | headers)
    response = connection.getresponse()
    response.read()
    assert response.status == status
    connection.request("POST", "/score", json.dumps(request()), usual)
    response = connection.getresponse()
    assert len(json.loads(response.read())["scores"]) == 1
    connection.close()


def test_a_reward_that_is_none_fails_the_request(serve: Serve, own: str, caplog: pytest.LogCaptureFixture):
    server = serve(f"{own}:short")
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert remote(server)(SAMPLES)["remote"].isnan().all()
    assert "answers status 500: reward short must return 6 numbers for 6 images, got [0.0]" in caplog.text


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1, port \d+: .*; choose another"):
            RewardServer(configs("world"), "127.0.0.1", taken.getsockname()[1], "cpu")


# Client: first contact ----------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_an_error_at_the_start(script: Callable[..., ScriptedServer]):
    server = script()
    server.server_close()
    with pytest.raises(UserError, match=rf"reward remote reaches no server at {server.url} .*`ngrpo reward-server`"):
        remote(server)


TWO_REWARDS = Answer({"protocol": 1, "rewards": {"ocr": "single", "world": "batch"}})


@pytest.mark.parametrize(
    ("health", "settings", "why"),
    [
        (Answer("<html>hello</html>"), {}, "needs a server started with `ngrpo reward-server`, but .* '<html>hello"),
        (Answer({"status": "ok"}), {}, "needs a server started with `ngrpo reward-server`"),
        (Answer([1]), {}, "needs a server started with `ngrpo reward-server`"),
        (Answer({"error": "no"}, 404), {}, "answers status 404"),
        (
            Answer({"protocol": 2, "rewards": {"ocr": "single"}}),
            {},
            "speaks protocol 2, this client 1; update",
        ),
        (TWO_REWARDS, {}, "set reward to one of ocr, world"),
        (TWO_REWARDS, {"reward": "wrld"}, "must be one of ocr, world at .*, got 'wrld'; did you mean world"),
    ],
)
def test_a_server_that_cannot_score_is_an_error_at_the_start(
    script: Callable[..., ScriptedServer], health: Answer, settings: dict[str, Any], why: str
):
    with pytest.raises(UserError, match=why):
        remote(script(health=health), **settings)


# Client: a server in trouble ----------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says(script: Callable[..., ScriptedServer]):
    server = script(Answer({"error": "busy"}, 429, {"Retry-After": "1"}), Answer({"scores": [1] * 6}))
    start = time.monotonic()
    assert remote(server)(SAMPLES)["remote"].tolist() == [1.0] * 6
    assert time.monotonic() - start >= 1.0
    assert len(server.requests["/score"]) == 2


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_busy_or_gone_is_asked_again(script: Callable[..., ScriptedServer], status: int):
    server = script(Answer({}, status), Answer({"scores": [1] * 6}))
    assert remote(server, max_retries=1)(SAMPLES)["remote"].tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer({"error": "out of memory"}, 500), "answers status 500: out of memory"),
        (Answer({"error": "busy"}, 503), "answers status 503: busy"),
        (Answer("<html>hello</html>", 500), "must answer with 6 scores, got status 500, '<html>hello</html>'"),
        (Answer("<html>hello</html>"), "must answer with 6 scores, got status 200, '<html>hello</html>'"),
        (Answer({"scores": [1.0] * 5}), "must answer with 6 scores"),
        (Answer({"scores": [1.0] * 5 + ["1"]}), "must answer with 6 scores"),
        (Answer({"scores": [1.0] * 5 + [True]}), "must answer with 6 scores"),
        (Answer({"scores": 1.0}), "must answer with 6 scores"),
        (Answer([1.0] * 6), "must answer with 6 scores"),
        (Answer({"scores": [1.0] * 6}, 500), "must answer with 6 scores, got status 500"),
    ],
)
def test_an_answer_without_scores_is_a_failure_with_the_reason(
    script: Callable[..., ScriptedServer], answer: Answer, why: str, caplog: pytest.LogCaptureFixture
):
    server = script(answer)
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert remote(server, max_retries=0)(SAMPLES)["remote"].isnan().all()
    assert f"RuntimeError: {server.url}/score {why}" in caplog.text


# Command ------------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-c", "from ngrpo_lora.cli import app; app()", "reward-server"]
    rewards = [f"{own}:redness", f"{{name: {own}:above_mean, label: group}}"]
    environment = {**os.environ, "NGRPO_REWARD_TOKEN": "secret", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *rewards, "--port", "0", "--device", "cpu"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs of a script start with it ignored
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving redness, group at http://127.0.0.1:"), process.communicate(timeout=30)
        url = line.split(" at ")[1].split(";")[0]
        with pytest.raises(UserError, match="refuses the token"):
            Scorer(configs({"name": "remote", "url": url, "reward": "redness"}))
        monkeypatch.setenv("NGRPO_REWARD_TOKEN", "secret")
        pair = [{"name": "remote", "label": name, "url": url, "reward": name} for name in ("redness", "group")]
        there = Scorer(configs(*pair))(SAMPLES)
        here = Scorer(configs(f"{own}:redness", f"{own}:above_mean"))(SAMPLES)
        torch.testing.assert_close(there["redness"], here["redness"], rtol=0, atol=0)
        torch.testing.assert_close(there["group"], here["above_mean"], rtol=0, atol=0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_what_is_under_way_is_answered_before_the_command_ends(tmp_path: Path, asked: signal.Signals):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "ngrpo_lora", "reward-server", f"{tmp_path / 'slow.py'}:slow", "--port", "0"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" at ")[1].split(";")[0]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(requests.post, f"{url}/score", json=request(reward="slow"), timeout=20)
            assert process.stdout.readline() == "scoring\n"
            process.send_signal(asked)
            assert answer.result().json() == {"scores": [0.25]}
        assert process.wait(20) == (0 if asked == signal.SIGINT else -signal.SIGTERM)
    finally:
        process.kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


def test_the_command_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ngrpo_lora.cli.reward_server.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["reward-server", "world"])
    assert result.exit_code == 2
    assert "needs starlette and uvicorn; install what it needs with pip install starlette uvicorn" in result.stderr


def test_the_command_refuses_a_reward_that_is_none():
    result = CliRunner().invoke(app, ["reward-server", "wrld"])
    assert result.exit_code == 2
    assert "got 'wrld'; did you mean world?" in result.stderr
