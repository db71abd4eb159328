"""Rewards chosen in a graph, and pictures judged by them."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from comfy_client import Comfy, Graph, Refused, Result
from graphs import PROMPT, drawing, node
from PIL import Image, ImageDraw, ImageFont
from scripted_server import CHAT, MODELS, ONE_MODEL, Answer, ScriptedServer, says

from ngrpo_lora.records.pictures import as_seen, opened
from ngrpo_lora.rewards import jpeg, ocr, world

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def upload(comfy: Comfy, name: str, image: Image.Image) -> None:
    """Into ComfyUI's input folder."""
    file = io.BytesIO()
    image.save(file, "PNG")
    answer = requests.post(f"{comfy.url}/upload/image", files={"image": (name, file.getvalue())}, timeout=60)
    answer.raise_for_status()


def batch(comfy: Comfy, **pictures: Image.Image) -> Graph:
    """Nodes that load pictures as one batch, whose last node is `images`."""
    graph: Graph = {}
    last = ""
    for name, picture in pictures.items():
        upload(comfy, f"{name}.png", picture)
        graph[name] = node("LoadImage", image=f"{name}.png")
        if last:
            graph[f"+{name}"] = node("ImageBatch", image1=[last, 0], image2=[name, 0])
        last = f"+{name}" if last else name
    return graph | {"images": node("RepeatImageBatch", image=[last, 0], amount=1)}


def score(**inputs: Any) -> Graph:
    """The Score node, what it says, and its pictures."""
    widgets = {"prompt": PROMPT, "n": 1, "combine": "standardized", "metadata": "", "sheet_px": 160}
    return {
        "score": node("NGRPO_Score", **({"images": ["images", 0], "rewards": ["reward", 0]} | widgets | inputs)),
        "best_score": node("PreviewAny", source=["score", 3]),
        "mean_score": node("PreviewAny", source=["score", 4]),
        "sorted": node("PreviewImage", images=["score", 0]),
        "best": node("PreviewImage", images=["score", 1]),
        "sheet": node("PreviewImage", images=["score", 5]),
    }


def reward(name: str = "jpeg", weight: float = 1.0, settings: str = "", **chain: Any) -> dict[str, Any]:
    return node("NGRPO_Reward", name=name, weight=weight, settings=settings, **chain)


def shown(comfy: Comfy, result: Result, at: str) -> list[Image.Image]:
    assert result.status == "success", result.error
    return [comfy.image(one).convert("RGB") for one in result.outputs[at]["images"]]


def table(result: Result) -> list[list[str]]:
    """Cells of the rows."""
    (text,) = result.outputs["score"]["text"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:] if line[0] == "|"]


def refused(comfy: Comfy, graph: Graph) -> str:
    with pytest.raises(Refused) as refusal:
        comfy.run(graph)
    assert refusal.value.status == 400
    return refusal.value.reasons


FLAT, STRIPED, NOISY = (
    Image.new("RGB", (64, 64), "white"),
    Image.fromarray(np.repeat(NOISE[:, :1], 64, 1)),
    Image.fromarray(NOISE),
)


def test_pictures_are_sorted_and_the_best_are_kept(comfy: Comfy):
    graph = batch(comfy, noisy=NOISY, flat=FLAT, striped=STRIPED) | {"reward": reward("jpeg")} | score(n=2)
    result = comfy.run(graph)
    assert [np.asarray(one).tolist() for one in shown(comfy, result, "sorted")] == [
        np.asarray(one).tolist() for one in (FLAT, STRIPED, NOISY)
    ]
    assert len(shown(comfy, result, "best")) == 2
    expected = jpeg.score([FLAT, STRIPED, NOISY])
    assert [row[1:] for row in table(result)] == [[n, f"{s:.3f}"] for n, s in zip("231", expected, strict=True)]
    assert float(result.outputs["best_score"]["text"][0]) == expected[0]
    assert float(result.outputs["mean_score"]["text"][0]) == pytest.approx(sum(expected) / 3)
    (sheet,) = shown(comfy, result, "sheet")
    assert sheet.width == 3 * 160


def test_several_rewards_are_weighted_as_in_training(comfy: Comfy):
    pictures = {"noisy": NOISY, "flat": FLAT, "striped": STRIPED}
    chain = {"first": reward("jpeg"), "reward": reward("jpeg", -3.0, "label=heavy", rewards=["first", 0])}
    raw = comfy.run(batch(comfy, **pictures) | chain | score(combine="raw"))
    sizes = np.array(jpeg.score([*pictures.values()]))
    assert [row[1] for row in table(raw)] == ["1", "3", "2"]
    assert [float(row[2]) for row in table(raw)] == pytest.approx(sorted(sizes - 3 * sizes, reverse=True), abs=1e-3)
    standardized = comfy.run(batch(comfy, **pictures) | chain | score())
    z = (sizes - sizes.mean()) / sizes.std()
    assert [float(row[2]) for row in table(standardized)] == pytest.approx(sorted(-2 * z, reverse=True), abs=1e-3)


def test_the_world_is_judged_picture_by_picture_of_its_own_prompt(comfy: Comfy):
    prompts = ["a star above a heart", "a red circle"]
    graph = drawing(batch=2) | {"images": node("RepeatImageBatch", image=["decode", 0], amount=1)}
    result = comfy.run(graph | {"reward": reward("world")} | score(prompt="\n".join(prompts)))
    pictures = shown(comfy, result, "show")
    expected = sorted(world.score(pictures, prompts, [{}, {}]), reverse=True)
    assert [float(row[2]) for row in table(result)] == pytest.approx(expected, abs=6e-4)


def test_text_is_read_by_the_real_model_and_metadata_may_say_what_is_wanted(comfy: Comfy):
    def sign(text: str) -> Image.Image:
        picture = Image.new("RGB", (320, 128), "white")
        ImageDraw.Draw(picture).text((20, 30), text, fill="black", font=ImageFont.load_default(56))
        return picture

    graph = batch(comfy, shut=sign("CLOSED"), opened=sign("OPEN")) | {"reward": reward("ocr", settings="exact: true")}
    quoted = comfy.run(graph | score(prompt='a shop sign that says "open"'))
    assert [(row[1], row[2]) for row in table(quoted)] == [("2", "1.000"), ("1", f"{similarity('closed', 'open'):.3f}")]
    described = comfy.run(graph | score(prompt="a shop sign", metadata='{"text": "closed"}'))
    assert [(row[1], row[2]) for row in table(described)][0] == ("1", "1.000")


def similarity(read: str, wanted: str) -> float:
    return ocr.similarity(read, wanted, exact=True)


def test_a_picture_without_a_score_comes_last_and_the_reason_is_said(comfy: Comfy):
    write_function(comfy, "half.py", "def score(image):\n    return 1 / (image.getpixel((0, 0))[0] == 255)")
    graph = batch(comfy, noisy=NOISY, flat=FLAT) | {"reward": function("half.py:score")}
    result = comfy.run(graph | score())
    assert table(result) == [["1", "2", "1.000"], ["2", "1", "failed"]]
    said = "reward half has no score for 1 of 2 images: ZeroDivisionError: division by zero"
    assert said in result.outputs["score"]["text"][0]
    assert float(result.outputs["mean_score"]["text"][0]) == 1


def test_where_all_fail_the_graph_stops_with_the_reason_and_the_server_goes_on(comfy: Comfy):
    write_function(comfy, "broken.py", "def score(image):\n    raise RuntimeError('the dog ate it')")
    graph = batch(comfy, noisy=NOISY, flat=FLAT) | {"reward": function("broken.py:score")}
    result = comfy.run(graph | score())
    assert (result.status, result.error_node) == ("error", "score")
    assert "no score for 2 of 2 images: RuntimeError: the dog ate it" in result.error
    assert comfy.run(graph | {"reward": reward("jpeg")} | score()).status == "success"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"settings": "wieght=2"}, "unknown key wieght; did you mean weight"),
        ({"name": "ocr", "settings": "exact=true\nmin_confidense=0.1"}, "did you mean min_confidence?"),
        ({"name": "ocr", "settings": "exact: maybe"}, "exact must be true or false, got 'maybe'"),
        ({"name": "wrld"}, "did you mean world?"),
        ({"weight": 0.0}, "weight must not be 0"),
        ({"settings": "weight=2"}, "settings must leave weight to its widget"),
        ({"settings": "label: [1"}, "is not valid YAML"),
        ({"settings": "hello"}, "settings must be lines of key=value, or YAML's key: value, got 'hello'"),
        ({"name": "judge", "settings": "api_key_env=HOME"}, "api_key_env must not be in a graph, got 'HOME'"),
        ({"name": "remote", "settings": "token_env=HOME"}, "token_env must not be in a graph"),
        ({"name": "pickscore", "settings": "path=/etc"}, "path must lie in one of ComfyUI's folders, got '/etc'"),
        ({"name": "pickscore", "settings": "processor: ../../x"}, "processor must lie in one of ComfyUI's folders"),
    ],
)
def test_a_bad_reward_is_refused_before_anything_runs(comfy: Comfy, given: dict[str, Any], reason: str):
    graph = batch(comfy, flat=FLAT) | {"reward": reward(**given)} | score()
    assert reason in refused(comfy, graph)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompt": "a\nb\nc"}, "prompt must have one line for all images or one line for each of the 2, got 3"),
        ({"prompt": " \n"}, "reward world needs the prompt of every image, got none"),
        ({"metadata": "text"}, "metadata must be lines of key=value, or YAML"),
        ({"metadata": "{"}, "metadata must be lines of key=value, or YAML"),
        ({"metadata": "tag: no"}, "metadata must say true or false, or put text in quotes, got no"),
        ({"metadata": "a: 1\nb: 2\nc: 3"}, "metadata must have one line"),
        ({"prompt": "no such scene"}, "reward world has no score for 2 of 2 images"),
    ],
)
def test_what_does_not_fit_the_pictures_is_said(comfy: Comfy, given: dict[str, Any], reason: str):
    result = comfy.run(batch(comfy, noisy=NOISY, flat=FLAT) | {"reward": reward("world")} | score(**given))
    assert (result.status, result.error_node) == ("error", "score")
    assert reason in result.error


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_pictures_of_any_channels_are_those_that_the_command_reads(mode: str, tmp_path: Path):
    from comfy_nodes._api import to_pictures

    with Image.open(Path(__file__).parents[2] / ".github" / "images" / "demo.png") as whole:
        picture = whole.convert("RGB").resize((64, 48)).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(Image.linear_gradient("L").resize((64, 48)))
    picture.save(tmp_path / "picture.png")
    pixels = np.asarray(picture).reshape(1, 48, 64, -1)
    (ours,) = to_pictures(torch.from_numpy((pixels + 0.125) / 255))
    with opened(tmp_path / "picture.png", "picture") as file:
        assert np.array_equal(np.asarray(ours), np.asarray(as_seen(file)))


def test_a_reward_twice_in_a_chain_needs_a_label(comfy: Comfy):
    chain = {"first": reward("jpeg"), "reward": reward("jpeg", rewards=["first", 0])}
    result = comfy.run(batch(comfy, flat=FLAT) | chain | score())
    assert (result.status, result.error_node) == ("error", "reward")
    assert "must name each reward once, got jpeg twice; give one of them a label" in result.error


# Functions ----------------------------------------------------------------------------------------------------------


def write_function(comfy: Comfy, name: str, source: str) -> Path:
    path = comfy.base / "models" / "ngrpo_rewards" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


def function(name: str, **inputs: Any) -> dict[str, Any]:
    return node("NGRPO_RewardFunction", function=name, **({"weight": 1.0, "settings": ""} | inputs))


def listed(comfy: Comfy) -> list[str]:
    definition = comfy.get("/object_info/NGRPO_RewardFunction")["NGRPO_RewardFunction"]
    kind, settings = definition["input"]["required"]["function"]
    return settings["options"] if kind == "COMBO" else kind


def test_a_function_appears_in_the_list_is_run_and_is_read_again_when_it_is_edited(comfy: Comfy):
    source = "import math\n\ndef helper(x):\n    return x\n\ndef brightness(image):\n    return helper(%s)\n"
    write_function(comfy, "mine.py", source % "image.getpixel((0, 0))[0]")
    assert "mine.py:brightness" in listed(comfy)
    assert not any("helper" in name for name in listed(comfy))
    graph = batch(comfy, flat=FLAT, noisy=NOISY) | {"reward": function("mine.py:brightness")}
    first = comfy.run(graph | score())
    assert [row[2] for row in table(first)] == ["255.000", f"{NOISE[0, 0, 0]:.3f}"]
    write_function(comfy, "mine.py", source % "-7")
    assert [row[2] for row in table(comfy.run(graph | score()))] == ["-7.000", "-7.000"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os:system", "graphs run no other code"),
        ("this.that:score", "graphs run no other code"),
        ("this.that", "must be one of"),
        ("../../evil.py:score", "graphs run no other code"),
        ("{base}/input/evil.py:score", "graphs run no other code"),
        ("mine.py:helper", "graphs run no other code"),
    ],
)
def test_no_other_code_is_run(comfy: Comfy, name: str, reason: str):
    """Neither files that were uploaded as pictures, nor modules of Python's path; `this` prints when it is imported."""
    write_function(comfy, "mine.py", "def helper(x): ...\ndef score(images): ...")
    trace, name = comfy.base / "ran", name.format(base=comfy.base)
    for folder in (comfy.base / "input", comfy.base):
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\ndef score(images): ...", encoding="utf-8")
    graph = batch(comfy, flat=FLAT) | {"reward": function(name)} | score()
    assert "function must be one of" in refused(comfy, graph)
    assert reason in refused(comfy, graph | {"reward": reward(name)})
    assert not trace.exists()
    assert "The Zen of Python" not in comfy.log.read_text(errors="replace")


def test_what_other_nodes_give_is_checked_when_it_is_known(comfy: Comfy):
    given = {
        "weight": node("PrimitiveFloat", value=2.0),
        "settings": node("PrimitiveString", value="label: small"),
        "wrong": node("PrimitiveString", value="labl: small"),
    }
    linked = reward(settings=["settings", 0], weight=["weight", 0])
    graph = batch(comfy, flat=FLAT, noisy=NOISY) | given | {"reward": linked} | score()
    result = comfy.run(graph)
    assert result.status == "success", result.error
    result = comfy.run(graph | {"reward": reward(settings=["wrong", 0])})
    assert (result.status, result.error_node) == ("error", "reward")
    assert "unknown key labl" in result.error


@pytest.mark.usefixtures("in_process")
def test_rewards_are_loaded_once_and_once_more_where_there_was_no_room(monkeypatch: pytest.MonkeyPatch):
    from comfy_nodes import rewards, scoring

    room: list[bool] = []
    made: list[object] = []

    def scorer(*arguments: Any) -> object:
        time.sleep(0.1)
        if not room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(object())
        return made[-1]

    monkeypatch.setattr(rewards, "Scorer", scorer)
    monkeypatch.setattr(scoring, "make_room", lambda device: room.append(True))
    chosen = rewards.Chosen()
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(scoring.loaded, [chosen, chosen]))
    assert results == made * 2
    chosen.unload()
    assert scoring.loaded(chosen) == made[1]


# Servers ------------------------------------------------------------------------------------------------------------


def judge(base_url: str, **widgets: Any) -> dict[str, Any]:
    own = {"judge": "judge", "base_url": base_url, "model": "", "question": "Is it {prompt}?", "answer": "number"}
    return node("NGRPO_VLMJudge", **(own | {"weight": 1.0, "settings": "max_retries=0\nconcurrency=1"} | widgets))


def test_a_judge_is_asked_about_every_picture_and_its_answers_are_the_scores(comfy: Comfy):
    with ScriptedServer({MODELS: [ONE_MODEL], CHAT: [says("Score: 3"), says("fine. Score: 7.5")]}) as server:
        graph = batch(comfy, flat=FLAT, noisy=NOISY) | {"reward": judge(f"{server.url}/v1")} | score()
        result = comfy.run(graph)
        assert sorted(row[2] for row in table(result)) == ["3.000", "7.500"]
        first = server.requests[CHAT][0]
        picture, question = first.body["messages"][0]["content"]
        assert (question["text"], first.body["model"]) == (f"Is it {PROMPT}?", "vlm")
        assert first.headers["authorization"] == "Bearer none"  # what the client sends where there is no key
        comfy.run(graph | {"n2": node("PreviewImage", images=["score", 1])} | score(n=2))
        assert len(server.requests[MODELS]) == 1  # the same reward is not loaded again


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("vqascore", says("Yes", {"Yes": 0.6, "No": 0.2}), "0.750"),
        ("unifiedreward", says("Alignment Score (1-5): 4.5\nCoherence Score (1-5): 1\nStyle Score (1-5): 2"), "4.500"),
    ],
)
def test_other_judges_have_questions_of_their_own(comfy: Comfy, kind: str, answer: Answer, expected: str):
    with ScriptedServer({MODELS: [ONE_MODEL], CHAT: [answer]}) as server:
        result = comfy.run(batch(comfy, flat=FLAT) | {"reward": judge(f"{server.url}/v1", judge=kind)} | score())
        assert table(result) == [["1", "1", expected]]
        assert "Is it" not in server.requests[CHAT][0].body["messages"][0]["content"][1]["text"]


def test_a_key_comes_from_the_environment_for_its_host_alone(comfy: Comfy):
    with ScriptedServer({MODELS: [ONE_MODEL], CHAT: [says("Score: 3")]}) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        graph = batch(comfy, flat=FLAT) | {"reward": judge(f"{url}/v1")} | score()
        assert comfy.run(graph).status == "success"
        assert {one.headers["authorization"] for one in server.requests[CHAT]} == {"Bearer the key of localhost"}
        assert "the key of localhost" not in json.dumps(comfy.get("/history"))


@pytest.mark.parametrize(
    ("widgets", "reason"),
    [
        ({"base_url": "localhost:8000"}, "base_url must start with http:// or https://, got 'localhost:8000'"),
        ({"question": "Nice?"}, "template must hold {prompt}"),
        ({"settings": "max_token=5"}, "did you mean max_tokens?"),
        ({"judge": "vqascore", "settings": "pattern=x"}, "unknown key pattern"),
        ({"settings": "api_key_env=HOME"}, "from the environment variable NGRPO_API_KEY_127_0_0_1"),
        ({"judge": "someone"}, "judge must be one of judge, unifiedreward, vqascore"),
    ],
)
def test_a_bad_judge_is_refused_before_anything_runs(comfy: Comfy, widgets: dict[str, Any], reason: str):
    graph = batch(comfy, flat=FLAT) | {"reward": judge(**({"base_url": "http://127.0.0.1:9/v1"} | widgets))} | score()
    assert reason in refused(comfy, graph)


def test_a_server_that_is_down_or_falls_silent_is_said(comfy: Comfy):
    graph = batch(comfy, flat=FLAT) | {"reward": judge("http://127.0.0.1:9/v1")} | score()
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "score")
    assert "reward judge reaches no server at http://127.0.0.1:9/v1" in result.error
    with ScriptedServer({MODELS: [ONE_MODEL], CHAT: [Answer({"error": "overloaded"}, 500)]}) as server:
        failed = comfy.run(graph | {"reward": judge(f"{server.url}/v1")})
    assert "no score for 1 of 1 images: InternalServerError" in failed.error
