"""Training in the graph: to its end, cancelled, killed, resumed, and what stops it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import SEED
from comfy_client import Comfy, Graph, Refused, Result, start
from graphs import drawing, latents_of, node
from PIL import Image
from rounding import relative_error, with_rounding
from safetensors.torch import load_file

from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.sampling.sampler import Sampler, solve
from ngrpo_lora.sampling.settings import drawing_settings

SMALL = """
# seconds on one core
model.dtype=float32
prompts.train = world:train
rollout.num_steps=4
rollout.group_size=4
rollout.prompts_per_iteration=2
rollout.micro_batch_size=4
algorithm.num_anchors=2
algorithm.num_train_steps=2
algorithm.updates_per_rollout=2
algorithm.min_reward_spread=0
lora.rank=4
optimizer.learning_rate=1e-2

evaluation.num_prompts=2
evaluation.every=2
"""

# Rollouts and updates of a second or more, of several optimizer steps each.
LONG = (
    SMALL.replace("num_steps=4", "num_steps=16")
    .replace("train_steps=2", "train_steps=16")
    .replace("updates_per_rollout=2", "updates_per_rollout=8")
    .replace("rollout.micro_batch_size=4", "rollout.micro_batch_size=1")
    + "trainer.micro_batch_size=1\n"
)

REWARDS = """
import time

import numpy as np

def redness(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]

def slow(images, prompts):
    time.sleep(30)
    return redness(images, prompts)

def lingering(images, prompts):
    time.sleep(2)
    return redness(images, prompts)

def failing(images, prompts):
    raise RuntimeError("the scale is broken")
"""

# A custom node of the test's own: says in the file `phase` what a run is at, and lacks memory where there is a file.
HOOKS = """
from pathlib import Path

import torch

from ngrpo_lora.training import trainer
from diffusers import FluxTransformer2DModel

NODE_CLASS_MAPPINGS = {}
BASE = Path(__file__).parents[2]
forward = FluxTransformer2DModel.forward

def lacking(self, *args, **kwargs):
    if (BASE / "no_memory").exists() and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.21 GiB.")
    return forward(self, *args, **kwargs)

def telling(name):
    phase = getattr(trainer, name)
    def told(run, *args, **kwargs):
        (BASE / "phase").write_text(f"{name} {run.iteration}")
        return phase(run, *args, **kwargs)
    return told

FluxTransformer2DModel.forward = lacking
for name in ("evaluate", "roll_out", "update"):
    setattr(trainer, name, telling(name))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "custom_nodes" / "hooks").mkdir(parents=True)
    (folder / "custom_nodes" / "hooks" / "__init__.py").write_text(HOOKS)
    (folder / "models" / "ngrpo_rewards").mkdir(parents=True)
    (folder / "models" / "ngrpo_rewards" / "own.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def servers(base: Path) -> Iterator[list[Comfy]]:
    """The one that runs is the last."""
    started = [start(base)]
    yield started
    for server in started:
        server.stop()


@pytest.fixture
def server(servers: list[Comfy]) -> Comfy:
    return servers[-1]


def train(name: str, overrides: str = SMALL, **inputs: Any) -> Graph:
    """The node, and its outputs as pictures and text."""
    widgets = {"preset": "demo", "iterations": 2, "run_seed": 0, "earlier_run": "go on with it"}
    return {
        "train": node("NGRPO_Train", name=name, overrides=overrides, **(widgets | inputs)),
        "lora": node("PreviewAny", source=["train", 0]),
        "figures": node("PreviewAny", source=["train", 4]),
        "before": node("PreviewImage", images=["train", 2]),
        "after": node("PreviewImage", images=["train", 3]),
    }


def rewarded_by(function: str) -> Graph:
    return {"reward": node("NGRPO_RewardFunction", function=f"own.py:{function}", weight=1.0, settings="")}


def run_of(base: Path, name: str) -> Path:
    return base / "output" / "ngrpo" / name


def lora_of(base: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(base / "models" / "loras" / "ngrpo" / f"{name}.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def rows_of(base: Path, name: str) -> list[dict[str, Any]]:
    """The metrics but for wall times."""
    rows = [json.loads(line) for line in (run_of(base, name) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def succeeded(result: Result) -> Result:
    assert result.status == "success", result.error
    return result


def wait_for(phase: str, base: Path) -> None:
    """Until a run is at `phase`, as in `update 1`, and a little longer."""
    deadline = time.monotonic() + 180
    while not (base / "phase").exists() or (base / "phase").read_text() != phase:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)


def cancel_at(server: Comfy, graph: Graph, phase: str) -> float:
    """Queue a graph, cancel it there, and say after how many seconds it had ended."""
    (server.base / "phase").unlink(missing_ok=True)
    with server.listening() as (client, messages):
        prompt = server.submit(graph, client)
        wait_for(phase, server.base)
        asked = time.monotonic()
        server.interrupt()
        result = server.follow(prompt, messages)
        waited = time.monotonic() - asked
    assert result.status == "interrupted", result.error
    assert (server.base / "phase").read_text() == phase
    return waited


@contextmanager
def asking(server: Comfy) -> Iterator[list[float]]:
    """Meanwhile another client asks the server something all the time; how long each answer took."""
    answers: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.05):
            asked = time.monotonic()
            server.get("/queue")
            answers.append(time.monotonic() - asked)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def whole(servers: list[Comfy]) -> Result:
    """A run without interruptions, that others are compared with."""
    started = time.monotonic()
    with asking(servers[-1]) as answers:
        result = succeeded(servers[-1].run(train("whole", LONG)))
    assert len(answers) > 20
    assert max(answers) < (time.monotonic() - started) / 10  # a part of the run that holds the server up takes longer
    return result


def test_a_run_shows_how_it_goes_and_what_came_of_it(whole: Result, server: Comfy, base: Path):
    assert [value for name, value, _ in whole.progress if name == "train"] == [0, 1, 2, 2]
    assert {total for name, _, total in whole.progress if name == "train"} == {2}
    assert len(whole.previews) >= 3
    *curves, summary = whole.previews
    assert all(preview.size[0] == 640 for preview in curves)
    assert curves[-1].tobytes() != curves[0].tobytes()
    with Image.open(base / "output" / "ngrpo" / "whole" / "summary.png") as picture:
        assert summary.size == picture.size
    assert any("iteration 2 of 2, reward 0." in text for name, text in whole.texts if name == "train")
    assert whole.outputs["lora"]["text"] == ["ngrpo/whole.safetensors"]
    assert "held-out reward" in whole.outputs["figures"]["text"][0]
    (text,) = whole.outputs["train"]["text"]
    assert text.splitlines()[:3] == [
        "ngrpo/whole.safetensors: 2 iterations",
        "",
        "| held-out | before | after | change |",
    ]
    before, after = (whole.outputs[part]["images"] for part in ("before", "after"))
    assert len(before) == len(after) == 2
    pairs = [[np.asarray(server.image(picture)) for picture in pair] for pair in zip(before, after, strict=True)]
    assert any((one != other).any() for one, other in pairs)


def test_its_adapter_is_in_the_lora_lists(whole: Result, server: Comfy):
    for loader in ("LoraLoader", "LoraLoaderModelOnly"):
        inputs = server.get(f"/object_info/{loader}")[loader]["input"]["required"]
        assert "ngrpo/whole.safetensors" in inputs["lora_name"][0]


def with_lora(graph: Graph, name: Any) -> Graph:
    return graph | {
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0),
        "guider": node("BasicGuider", model=["lora", 0], conditioning=["text", 0]),
    }


def test_comfyui_draws_what_the_trainer_evaluated(server: Comfy, base: Path):
    succeeded(server.run(train("drawn", SMALL + f"evaluation.seed={SEED}\n")))
    picture = run_of(base, "drawn") / "samples" / "last" / "0.png"
    text = read_png_text(picture)
    prompt, seed = text["prompt"], int(text["seed"])
    plain = drawing(seed=seed, steps=4, prompt=prompt)
    untrained = latents_of(server, server.run(plain))
    result = server.run(with_lora(plain, "ngrpo/drawn.safetensors"))
    drawn = latents_of(server, result)
    assert (drawn - untrained).norm() > 1e-3 * untrained.norm()

    adapter = base / "models" / "loras" / "ngrpo" / "drawn.safetensors"
    sampler = Sampler(drawing_settings(adapter, None, "cpu"), adapter)
    sampler.family.pipeline.fuse_lora()  # as ComfyUI does: beside the weights, an adapter is rounded otherwise
    family = sampler.family
    encoded, noise = family.encode([prompt]), gaussian_noise((1, *family.latent_shape), seed)
    ours, rounding = with_rounding(
        family.transformer, lambda: solve(family, encoded, noise, sampler.solver, sampler.sigmas)
    )
    assert relative_error(drawn * family.vae.config.scaling_factor, ours) <= rounding
    shown = np.asarray(server.image(result.outputs["show"]["images"][0]), int)
    with Image.open(picture) as evaluated:
        assert np.abs(shown - np.asarray(evaluated, int)).max() <= 1


def test_the_adapter_goes_straight_into_a_loader(server: Comfy):
    """Both prompts are queued at once: the second waits, and neither disturbs the other."""
    graph = with_lora(drawing(steps=4), ["train", 0]) | {"train": train("straight")["train"]}
    with server.listening() as (client, messages):
        first = server.submit(train("before-it", iterations=1), client)
        second = server.submit(graph, client)
        succeeded(server.follow(first, messages))
        latents_of(server, server.follow(second, messages))
    # Once more: all of it is there.
    assert {node for node, *_ in succeeded(server.run(graph)).progress} == set()
    assert "lora_name must be a file" not in server.log.read_text(errors="replace")


def test_a_run_cancelled_anywhere_goes_on_bit_for_bit(whole: Result, server: Comfy, base: Path):
    graph = train("cancelled", LONG)
    waited = {}
    for phase, complete in (("evaluate 0", 0), ("roll_out 1", 1), ("update 1", 1), ("evaluate 2", 2)):
        if phase.startswith("evaluate"):
            own = base / "models" / "ngrpo_rewards" / "own.py"
            graph["train"]["inputs"]["overrides"] = f"{LONG}evaluation.rewards={own}:lingering\n"
        waited[phase] = cancel_at(server, graph, phase)
        graph["train"]["inputs"]["overrides"] = LONG
        newest = sorted((run_of(base, "cancelled") / "checkpoints").iterdir())[-1]
        assert newest.name == f"iteration-{complete:06d}"
        assert (base / "models" / "loras" / "ngrpo" / f"cancelled-{complete:06d}.safetensors").exists() == (
            complete > 0
        )
    result = succeeded(server.run(graph))
    assert result.seconds < whole.seconds
    # A stage takes seconds, more of them on a slow machine: its end is not waited for.
    assert max(waited.values()) < max(1.0, whole.seconds / 10), waited
    assert same(lora_of(base, "cancelled"), lora_of(base, "whole"))
    assert rows_of(base, "cancelled") == rows_of(base, "whole")


def test_cancel_while_a_reward_is_waited_for(whole: Result, server: Comfy):
    graph = train("waiting", rewards=["reward", 0]) | rewarded_by("slow")
    assert cancel_at(server, graph, "evaluate 0") < max(1.0, whole.seconds / 10)  # of the 30 s that it takes


def test_a_finished_run_is_neither_trained_again_nor_overwritten(whole: Result, server: Comfy, base: Path):
    adapter = run_of(base, "whole") / "adapter" / "pytorch_lora_weights.safetensors"
    written = adapter.stat().st_mtime_ns
    again = succeeded(server.run(train("whole", LONG)))
    assert again.seconds < 2
    assert adapter.stat().st_mtime_ns == written
    (base / "models" / "loras" / "ngrpo" / "whole.safetensors").unlink()
    succeeded(server.run(train("whole", LONG)))
    assert (base / "models" / "loras" / "ngrpo" / "whole.safetensors").exists()
    with pytest.raises(Refused, match=r"whole' already, and it has other settings.*lora.rank: 4 -> 8"):
        server.submit(train("whole", LONG.replace("rank=4", "rank=8")))
    with pytest.raises(Refused, match="seed: 0 -> 1"):
        server.submit(train("whole", LONG, run_seed=1))


def test_more_iterations_go_on_and_a_new_run_gets_a_name_of_its_own(server: Comfy, base: Path):
    succeeded(server.run(train("twice", iterations=1)))
    succeeded(server.run(train("twice", iterations=2)))
    assert [row["step"] for row in rows_of(base, "twice")] == [0, 1, 2]
    first = lora_of(base, "twice")
    result = succeeded(server.run(train("twice", iterations=1, run_seed=1, earlier_run="start anew beside it")))
    assert result.outputs["lora"]["text"] == ["ngrpo/twice-2.safetensors"]
    assert same(lora_of(base, "twice"), first)
    assert not same(lora_of(base, "twice-2"), first)


def test_prompts_and_rewards_of_the_graph(server: Comfy, base: Path):
    def graph(prompts: str) -> Graph:
        overrides = SMALL.replace("prompts.train", "# prompts.train")
        return train("own", overrides, prompts=prompts, rewards=["reward", 0]) | rewarded_by("redness")

    succeeded(server.run(graph("a red star\n\n  a blue heart \n")))
    assert "rollout/redness_mean" in rows_of(base, "own")[-1]
    (file,) = run_of(base, "own").glob("prompts-*.txt")
    assert file.read_text() == "a red star\na blue heart\n"
    result = server.run(graph("a green star"))
    assert result.status == "error"
    assert "has other settings" in result.error


@pytest.mark.parametrize("kind", ["prompts", "reward"])
def test_a_file_that_was_changed_since_is_told_and_a_new_run_takes_it(server: Comfy, base: Path, kind: str):
    """Neither ComfyUI's cache nor a finished run passes for one that was made with the file as it is now."""
    overrides, further = SMALL.replace("num_prompts=2", "num_prompts=1"), {}
    if kind == "prompts":
        file = base / "input" / "mine.txt"
        file.parent.mkdir(exist_ok=True)
        overrides, before, after = overrides.replace("world:train", "mine.txt"), "a red star\n", "a blue star\n"
        what = f"prompts.train ({file})"
    else:
        file = base / "models" / "ngrpo_rewards" / "changed.py"
        before = "def score(images):\n    return [sum(image.getpixel((9, 9))) / 765 for image in images]\n"
        after = before.replace("9", "8")
        reward = node("NGRPO_RewardFunction", function="changed.py:score", weight=1.0, settings="")
        further, what = {"reward": reward}, f"rewards.train.0 ({file}:score)"
    rewards = {"rewards": ["reward", 0]} if further else {}

    def trained(**widgets: Any) -> str:
        result = succeeded(server.run(train(f"of-{kind}", overrides, **rewards, **widgets) | further))
        return result.outputs["train"]["text"][0]

    file.write_text(before)
    assert "has changed" not in trained(iterations=1)
    rows = len(rows_of(base, f"of-{kind}"))
    file.write_text(after)
    for _ in range(2):
        assert f"- {what} has changed since this run: the adapter is of the file as it was; start" in trained(
            iterations=1
        )
    assert len(rows_of(base, f"of-{kind}")) == rows
    assert f"- {what} has changed since this run began: what follows is made with the file" in trained(iterations=2)
    assert "has changed" not in trained(iterations=1, earlier_run="start anew beside it")
    file.write_text(before)
    assert f"- {what} has changed" in trained(iterations=2)


def test_a_killed_server_goes_on_bit_for_bit(whole: Result, servers: list[Comfy], base: Path):
    graph = train("killed", LONG + "trainer.save_every=1\n")
    server = servers[-1]
    (base / "phase").unlink(missing_ok=True)
    server.submit(graph)
    wait_for("update 1", base)
    server.process.kill()
    server.process.wait()
    servers.append(start(base))
    result = succeeded(servers[-1].run(graph))
    assert [value for name, value, _ in result.progress if name == "train"] == [2, 2]
    assert same(lora_of(base, "killed"), lora_of(base, "whole"))
    assert rows_of(base, "killed") == rows_of(base, "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(server: Comfy, base: Path):
    folder = run_of(base, "early")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("lora: {rank: 2}\n")
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    succeeded(server.run(train("early")))
    assert [row["step"] for row in rows_of(base, "early")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"overrides": "rollout.num_step=8"}, "unknown key rollout.num_step; did you mean rollout.num_steps?"),
        ({"overrides": "rollout.group_size=1"}, "rollout.group_size must be at least 2, got 1"),
        ({"overrides": "rollout.group_size"}, "an override must look like key=value, got 'rollout.group_size'"),
        ({"overrides": "lora.rank=4\nlora.rank=8"}, "lora.rank is given twice; keep one"),
        ({"overrides": "trainer.num_iterations=4"}, "trainer.num_iterations is given twice"),
        ({"overrides": "output_dir=/tmp/x"}, "overrides must leave output_dir out"),
        ({"overrides": "resume=/tmp/x"}, "overrides must leave resume out"),
        ({"overrides": "hub.repo=a/b"}, "overrides must leave hub out"),
        ({"overrides": "prompts.train=/etc/passwd"}, "prompts.train must lie in one of ComfyUI's folders"),
        ({"overrides": "prompts.held_out={hf:/etc: 1}"}, "prompts.held_out must lie in one of ComfyUI's folders"),
        ({"overrides": "model.path=/"}, "model.path must lie in one of ComfyUI's folders"),
        ({"overrides": "lora.init_from=../../x.safetensors"}, "lora.init_from must lie in one of ComfyUI's folders"),
        ({"overrides": "rewards=/tmp/evil.py:score"}, "graphs run no other code"),
        ({"overrides": "evaluation.rewards=[{name: 'os:system'}]"}, "graphs run no other code"),
        ({"overrides": "evaluation.measures=os:system"}, "graphs run no other code"),
        ({"overrides": "evaluation.strict=os:system"}, "graphs run no other code"),
        ({"overrides": "evaluation.strict=this.that"}, "evaluation.strict must be one of"),
        ({"overrides": "algorithm.name=this.that"}, "algorithm.name must be one of"),
        ({"overrides": "model.family=this.that"}, "model.family must be one of"),
        (
            {"overrides": "model.path=nobody"},
            "model.path must be embedded, embedded-edit, a diffusers folder or a Hub id",
        ),
        ({"overrides": "model.quantization=nf4"}, "model.quantization"),
        ({"name": "../x"}, "name must be letters from a to z, digits"),
        ({"name": ""}, "name must be letters from a to z, digits"),
        ({"name": "a" * 200}, "name must be letters from a to z, digits"),
        ({"preset": "demon"}, "preset must be one of demo, demo-edit, demo-turbo, demo-vote, flux"),
        ({"preset": "/etc/passwd"}, "preset must be one of demo, demo-edit, demo-turbo, demo-vote, flux"),
        ({"iterations": -1}, "trainer.num_iterations must be at least 1, got -1"),
        ({"run_seed": -1}, "seed must be at least 0, got -1"),
        ({"earlier_run": "burn it"}, "earlier_run must be"),
        ({"prompts": "a star"}, "prompts.train is given twice"),
        ({"prompts": " \n\t\n"}, "prompts must have at least one line of text"),
    ],
)
def test_bad_input_is_refused_with_the_reason(inputs: dict[str, Any], reason: str, server: Comfy, base: Path):
    with pytest.raises(Refused) as refused:
        server.submit(train(**({"name": "bad"} | inputs)))
    assert refused.value.status == 400
    assert refused.value.reasons.count(reason) == 1, refused.value.reasons
    assert not run_of(base, "bad").exists()
    assert "The Zen of Python" not in server.log.read_text(errors="replace")  # which `this` prints when it is imported


def test_no_prompts_from_another_node_are_an_error(server: Comfy):
    graph = train("bad", prompts=["text", 0]) | {"text": node("PrimitiveStringMultiline", value="")}
    result = server.run(graph)
    assert result.status == "error"
    assert "prompts must have at least one line of text" in result.error


def test_an_adapter_of_somebody_else_is_not_overwritten(server: Comfy, base: Path):
    foreign = base / "models" / "loras" / "ngrpo" / "foreign.safetensors"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(Refused, match="foreign.safetensors', but no such run"):
        server.submit(train("foreign"))
    assert foreign.read_bytes() == b"mine"


def test_out_of_memory_leaves_a_message_a_checkpoint_and_a_server_that_works(server: Comfy, base: Path):
    graph = train("memory")
    (base / "no_memory").touch()
    try:
        result = server.run(graph)
    finally:
        (base / "no_memory").unlink()
    assert (result.status, result.error_node) == ("error", "train")
    for part in (
        "Out of memory while training: CUDA out of memory. Tried",
        "micro_batch_size=1",
        "queue the graph again",
    ):
        assert part in result.error
    succeeded(server.run(graph))


def test_a_reward_that_fails_says_why(server: Comfy):
    result = server.run(train("failing", rewards=["reward", 0]) | rewarded_by("failing"))
    assert (result.status, result.error_node) == ("error", "train")
    assert "reward failing has no score for any image; see below; correct it" in result.error
    assert "the scale is broken" in result.error
    assert "resume=latest" not in result.error


def test_a_folder_that_cannot_be_written_stops_the_run_before_it_begins(server: Comfy, base: Path):
    folder = base / "models" / "loras" / "ngrpo"
    aside = folder.with_name("aside")
    if folder.exists():
        folder.rename(aside)
    folder.write_text("not a folder")
    try:
        result = server.run(train("nowhere"))
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)
    assert result.status == "error"
    assert "that is not possible: File exists. Nothing was trained yet" in result.error
    assert not run_of(base, "nowhere").exists()
