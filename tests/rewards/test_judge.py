"""Rewards that ask a vision-language model: the real client, and a server of prepared answers in OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripted_server import CHAT, MODELS, ONE_MODEL, Answer, ScriptedServer, models, says

from ngrpo_lora.config import parse_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import BoundReward
from ngrpo_lora.types import Samples

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
Serve = Callable[..., ScriptedServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server that gives these answers to questions."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        yield lambda *answers, listed=ONE_MODEL: stack.enter_context(
            ScriptedServer({MODELS: [listed], CHAT: list(answers)})
        )


def judge(server: ScriptedServer, name: str = "judge", **settings: Any) -> BoundReward:
    entry = {"name": name, "base_url": f"{server.url}/v1", **settings}
    (config,) = parse_config({"rewards": {"train": [entry]}}).rewards.train
    return BoundReward(config, "cpu")


def samples(count: int = 1, prompt: str = "a red star", image: Image.Image = NOISE) -> Samples:
    return Samples([image] * count, [prompt] * count, [{}] * count)


# Question -----------------------------------------------------------------------------------------------------------


def test_the_server_is_asked_for_a_greedy_answer_about_the_prompt_and_the_very_pixels(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(says("Score: 7"))
    reward = judge(server, template='Is "{prompt}" {nice}?', api_key_env="MY_KEY", max_tokens=50)
    assert reward(samples(prompt="a {prompt} [red] star")).tolist() == [7.0]
    (request,) = server.requests[CHAT]
    assert request.headers["authorization"] == "Bearer secret"
    assert {key: request.body[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "vlm",
        "temperature": 0,
        "max_tokens": 50,
    }
    (message,) = request.body["messages"]
    image, text = message["content"]
    assert message["role"] == "user"
    assert text == {"type": "text", "text": 'Is "a {prompt} [red] star" {nice}?'}
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert sent.format == "PNG"
    assert np.array_equal(np.asarray(sent), np.asarray(NOISE))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_an_image_of_any_mode_is_sent_as_rgb(serve: Serve, mode: str):
    server = serve(says("Score: 7"))
    assert judge(server)(samples(image=NOISE.convert(mode))).tolist() == [7.0]
    url = server.requests[CHAT][0].body["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert np.array_equal(np.asarray(sent), np.asarray(NOISE.convert(mode).convert("RGB")))


def test_of_an_edit_the_source_is_sent_before_the_result_with_a_question_of_its_own(serve: Serve):
    server, source = serve(says("Score: 7"), says("Score: 2")), Image.new("RGB", (5, 3), (1, 2, 3))
    reward = judge(server, edit_template="Was it {prompt}?")
    edits = Samples([NOISE] * 2, ["made red"] * 2, [{"source": source}, {"source": "coco"}])
    assert sorted(reward(edits).tolist()) == [2.0, 7.0]
    contents = [request.body["messages"][0]["content"] for request in server.requests[CHAT]]
    plain, edit = sorted(contents, key=len)
    assert edit[2] == {"type": "text", "text": "Was it made red?"}
    assert plain[1]["text"].startswith("This image was made for the following description.")
    urls = [part["image_url"]["url"] for part in edit[:2]]
    sent = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [np.asarray(image).tolist() for image in sent] == [np.asarray(i).tolist() for i in (source, NOISE)]


def test_the_model_that_is_named_is_asked(serve: Serve):
    server = serve(says("Score: 7"), listed=models("other", "mine"))
    judge(server, model="mine")(samples())
    assert server.requests[CHAT][0].body["model"] == "mine"


# Answer -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("Score: 7", {}, 7.0),
        ("Score: 3? The star is blue.\nScore: 8.25.", {}, 8.25),
        ("I give 4/5", {"pattern": r"(\d)/5", "score_range": [1, 5]}, 4.0),
        ("Score: 0", {}, 0.0),
    ],
)
def test_the_score_is_the_number_of_the_last_match(serve: Serve, text: str, settings: dict[str, Any], expected: float):
    assert judge(serve(says(text)), **settings)(samples()).tolist() == [expected]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("It is a nice star." * 20, {}),
        (None, {}),
        ("Score: 11", {}),
        ("Score: -1", {}),
        ("Score: nan", {"pattern": r"Score: (\w+)"}),
    ],
)
def test_an_answer_without_a_score_is_a_failed_score_that_quotes_it(
    serve: Serve, text: str | None, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        failed, right = judge(serve(says(text), says("Score: 5")), concurrency=1, **settings)(samples(2)).tolist()
    assert math.isnan(failed)
    assert right == 5.0
    assert "1 of 2 images are masked: ValueError: the answer must hold a number from 0 to 10" in caplog.text
    assert f"got {(text or '')[:200]!r}" in caplog.text


def test_an_answer_that_is_cut_off_is_a_failed_score(serve: Serve, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert judge(serve(says("Score: 7", finish_reason="length")), max_tokens=4)(samples()).isnan().all()
    assert "the answer must end within max_tokens 4, got 'Score: 7'" in caplog.text


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"Yes": 0.6, "No": 0.2, "The": 0.2}, 0.75),
        ({"Yes": 0.3, " yes": 0.1, "YES": 0.2, "no": 0.1, "▁No": 0.1}, 0.6 / 0.7),
        ({"No": 0.9}, 0.0),
        ({"yes": 0.9}, 1.0),
    ],
)
def test_logprobs_give_the_probability_of_yes_against_no(serve: Serve, first: dict[str, float], expected: float):
    server = serve(says("Yes", first))
    reward = judge(server, answer="logprobs", template="Is it {prompt}?")
    assert reward(samples()).tolist() == pytest.approx([expected], abs=1e-12)
    body = server.requests[CHAT][0].body
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says("The", {"The": 0.95, "Yes": 0.01}), "must answer yes or no, but they have a probability of 0.01"),
        (says("Yes"), "the server must tell top_logprobs, got none beside 'Yes'"),
    ],
)
def test_no_probability_of_yes_is_a_failed_score(
    serve: Serve, answer: Answer, why: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert judge(serve(answer), answer="logprobs")(samples()).isnan().all()
    assert why in caplog.text


# Published judges ---------------------------------------------------------------------------------------------------


def test_vqascore_asks_its_question(serve: Serve):
    server = serve(says("Yes", {"Yes": 0.6, "No": 0.2}))
    assert judge(server, "vqascore")(samples()).tolist() == pytest.approx([0.75], abs=1e-12)
    text = server.requests[CHAT][0].body["messages"][0]["content"][1]["text"]
    assert text == 'Does this figure show "a red star"? Please answer yes or no.'


ANSWER_2 = "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 2.3715\nStyle Score (1-5): 5"


@pytest.mark.parametrize(
    ("settings", "answer", "expected", "asked"),
    [
        ({}, ANSWER_2, 2.6947, "- Alignment Score: How well the image matches the caption in terms of content.\n"),
        ({"aspect": "coherence"}, ANSWER_2, 2.3715, "Coherence Score (1-5): Y\n"),
        ({"aspect": "style"}, ANSWER_2, 5.0, "Style Score (1-5): Z\n\nYour task is provided as follows:\n"),
        ({"version": "1.0"}, "star (object): 1\nFinal Score: 4.5", 4.5, "a score from 1 to 5 after 'Final Score:'.\n"),
        ({}, "Alignment Score (1-5): 6", math.nan, "(each rated from 1 to 5):\n"),
        ({"version": "1.0"}, ANSWER_2, math.nan, "1. Alignment with the Caption: Assess how well"),
    ],
)
def test_unifiedreward_asks_and_reads_as_its_version_was_trained(
    serve: Serve, settings: dict[str, Any], answer: str, expected: float, asked: str
):
    server = serve(says(answer))
    assert judge(server, "unifiedreward", **settings)(samples()).tolist() == pytest.approx([expected], nan_ok=True)
    text = server.requests[CHAT][0].body["messages"][0]["content"][1]["text"]
    assert asked in text
    assert text.endswith("Your task is provided as follows:\nText Caption: [a red star]")


# A server in trouble ------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says(serve: Serve):
    server = serve(Answer({"error": {}}, 429, {"Retry-After": "1"}), says("Score: 7"))
    start = time.monotonic()
    assert judge(server)(samples()).tolist() == [7.0]
    assert time.monotonic() - start >= 1.0
    assert len(server.requests[CHAT]) == 2


def test_a_failing_server_is_asked_again(serve: Serve):
    server = serve(Answer("<html>", 503), says("Score: 7"))
    assert judge(server, max_retries=1)(samples()).tolist() == [7.0]
    assert len(server.requests[CHAT]) == 2


def test_a_server_that_keeps_failing_fails_the_score(serve: Serve, caplog: pytest.LogCaptureFixture):
    server = serve(Answer({"error": {"message": "out of memory"}}, 500))
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert judge(server, max_retries=0)(samples()).isnan().all()
    assert "InternalServerError: Error code: 500" in caplog.text
    assert "out of memory" in caplog.text
    assert len(server.requests[CHAT]) == 1


def test_a_server_that_hangs_fails_the_score(serve: Serve, caplog: pytest.LogCaptureFixture):
    over = threading.Event()
    server = serve(says("Score: 7", before=lambda: over.wait(5)), says("Score: 8"))
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        reward = judge(server, attempt_timeout_s=0.5, max_retries=0, concurrency=1)
        late, right = reward(samples(2)).tolist()
    over.set()
    assert math.isnan(late)
    assert right == 8.0
    assert "APITimeoutError" in caplog.text


def test_calls_are_under_way_at_once(serve: Serve):
    """Each of four answers comes only when all four questions have arrived."""
    together = threading.Barrier(4)
    server = serve(says("Score: 7", before=lambda: together.wait(20)))
    assert judge(server, concurrency=4, max_retries=0)(samples(8)).tolist() == [7.0] * 8
    assert not together.broken


def test_an_image_is_judged_once_where_scores_are_kept(serve: Serve, tmp_path: Path):
    server, cache = serve(says("Score: 7"), says("no idea"), says("Score: 8")), ScoreCache(tmp_path / "scores.sqlite")
    reward = judge(server, concurrency=1)
    both = Samples([NOISE, NOISE], ["a red star", "a blue star"], [{}, {}])
    assert reward(both, cache).tolist() == pytest.approx([7.0, math.nan], nan_ok=True)
    assert reward(both, cache).tolist() == [7.0, 8.0]
    assert reward(both, cache).tolist() == [7.0, 8.0]
    assert len(server.requests[CHAT]) == 3


# First contact ------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_an_error_at_the_start(serve: Serve):
    server = serve(says(""))
    server.server_close()
    with pytest.raises(UserError, match=rf"reward judge reaches no server at {server.url}/v1 .*correct base_url"):
        judge(server)


@pytest.mark.parametrize(
    ("listed", "settings", "message"),
    [
        (Answer({"error": {}}, 401), {}, r"refuses the API key \(status 401\).*api_key_env, which is null"),
        (Answer({"error": {}}, 403), {}, r"refuses the API key \(status 403\)"),
        (
            Answer({"detail": "Not Found"}, 404),
            {},
            "needs an OpenAI-compatible server, but .*/v1/models lists no",
        ),
        (Answer("<html>hello</html>"), {}, "needs an OpenAI-compatible server"),
        (Answer({"hello": 1}), {}, "needs an OpenAI-compatible server"),
        (models("vlm-7b", "llm"), {"model": "vlm-8b"}, "must be one of vlm-7b, llm .*'vlm-8b'; did you mean vlm-7b"),
        (models("vlm-7b", "llm"), {}, "set model to one of vlm-7b, llm"),
    ],
)
def test_a_server_that_cannot_judge_is_an_error_at_the_start(
    serve: Serve, listed: Answer, settings: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message):
        judge(serve(says(""), listed=listed), **settings)


def test_a_server_that_lists_nothing_is_believed(serve: Serve):
    assert judge(serve(says("Score: 7"), listed=models()), model="mine")(samples()).tolist() == [7.0]


def test_an_api_key_that_is_not_set_is_an_error_at_the_start(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="takes its API key from the environment variable MY_KEY, which is empty"):
        judge(serve(says("")), api_key_env="MY_KEY")


def test_without_its_package_it_says_what_to_install(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"reward judge needs the package openai; .* pip install openai"):
        judge(serve(says("")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "How nice?"}, r"template must hold \{prompt\}, where the prompt goes, got 'How nice\?'"),
        ({"pattern": "Score"}, "pattern must have one group, the number, got 0 in 'Score'"),
        ({"pattern": "(a)(b)"}, "pattern must have one group, the number, got 2"),
        ({"pattern": "(a"}, r"pattern must be a regular expression, got '\(a'"),
        ({"score_range": [5, 1]}, r"score_range must be \[low, high\] with low below high, got \[5.0, 1.0\]"),
        ({"base_url": "localhost:8000"}, "base_url must start with http:// or https://, got 'localhost:8000'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_the_server_is_asked(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config({"rewards": {"train": [{"name": "judge", **settings}]}})
