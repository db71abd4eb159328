"""How rewards are called and checked, what happens where they fail, and how several are added up."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.scoring import scorer
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.combining import combine, correlations
from ngrpo_lora.scoring.scorer import BoundReward, Scorer, load_reward
from ngrpo_lora.types import Samples
from ngrpo_lora.world import scenes

IMAGES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 50, 100, 150, 200, 250)]
SAMPLES = Samples(IMAGES, ["a", "a", "a", "b", "b", "b"], [{"n": n} for n in range(6)], group_size=3)
NAN = math.nan


@pytest.fixture
def make_reward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BoundReward]:
    """A reward around a function of the test."""

    def make(function: Callable[..., Any], **settings: Any) -> BoundReward:
        monkeypatch.setattr(scorer, "load_reward", lambda config, device: function)
        return BoundReward(RewardConfig(name="mine.py:score", **settings), "cpu")

    return make


def red(image: Image.Image) -> float:
    return float(np.asarray(image)[0, 0, 0])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_scores(scores: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(scores, tensor(*expected), equal_nan=True, rtol=0, atol=0)


# Look-up ------------------------------------------------------------------------------------------------------------


def test_a_reward_is_a_file_of_the_package_or_a_function_anywhere(tmp_path: Path):
    own = tmp_path / "mine.py"
    own.write_text("def count(images, prompts, metadata):\n    return [7.0] * len(images)\n")
    assert load_reward(RewardConfig(name="world")).__module__ == "ngrpo_lora.rewards.world"
    elsewhere = load_reward(RewardConfig(name="ngrpo_lora.rewards.world_strict:score"))
    assert elsewhere.__module__ == "ngrpo_lora.rewards.world_strict"
    assert load_reward(RewardConfig(name=f"{own}:count"))(IMAGES, [], []) == [7.0] * 6


def test_a_function_that_is_not_there_names_the_nearest(tmp_path: Path):
    own = tmp_path / "mine.py"
    own.write_text("def count(images, prompts, metadata): ...\n")
    with pytest.raises(ConfigError, match="got 'cuont'; did you mean count"):
        load_reward(RewardConfig(name=f"{own}:cuont"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "world"}, "world"),
        ({"name": "folder/mine.py:score"}, "mine"),
        ({"name": "folder/mine.py:brightness"}, "brightness"),
        ({"name": "my.package:score"}, "package"),
        ({"name": "mine.py:score", "label": "better"}, "better"),
    ],
)
def test_a_reward_is_called_by_a_short_name(settings: dict[str, str], key: str):
    assert RewardConfig(**settings).key == key


@pytest.mark.parametrize("name", ["world", "world_strict"])
def test_the_worlds_rewards_are_1_for_what_the_caption_says(name: str):
    image = Image.fromarray(scenes.render(scenes.parse("a red star"), np.random.default_rng(0)))
    samples = Samples([image, image], ["a red star", "a photo of a blue circle"], [{}, {}])
    right, wrong = Scorer([RewardConfig(name=name)])(samples)[name].tolist()
    assert right == pytest.approx(1, abs=0.1)
    assert wrong < 0.6


# Signatures ---------------------------------------------------------------------------------------------------------


def test_the_parameters_say_how_a_reward_is_called(make_reward: Callable[..., BoundReward]):
    seen: list[Any] = []

    def batch(images, prompts, metadata):
        seen.append(("batch", len(images), prompts, metadata))
        return [red(image) for image in images]

    def pictures(images):
        seen.append(("pictures", len(images)))
        return [red(image) for image in images]

    def single(image, prompt):
        seen.append(("single", prompt))
        return red(image)

    def group(images, prompt, metadata):
        seen.append(("group", prompt, metadata))
        return [red(image) for image in images]

    class Object:
        def __call__(self, image, metadata):
            seen.append(("object", metadata["n"]))
            return torch.tensor(red(image))

    for function in (batch, pictures, single, group, Object()):
        assert_scores(make_reward(function)(SAMPLES), 0, 50, 100, 150, 200, 250)
    assert seen == [
        ("batch", 6, SAMPLES.prompts, SAMPLES.metadata),
        ("pictures", 6),
        *[("single", prompt) for prompt in SAMPLES.prompts],
        ("group", "a", {"n": 0}),
        ("group", "b", {"n": 3}),
        *[("object", n) for n in range(6)],
    ]


def test_what_has_a_default_is_not_given(make_reward: Callable[..., BoundReward]):
    reward = make_reward(functools.partial(lambda images, prompts, scale: [scale * red(i) for i in images], scale=2))
    assert_scores(reward(SAMPLES), 0, 100, 200, 300, 400, 500)


@pytest.mark.parametrize(
    "function",
    [
        lambda pictures, prompts, metadata: 0,
        lambda images, prompts, metadata, extra: 0,
        lambda image, prompts: 0,
        lambda *images: 0,
        lambda **samples: 0,
        lambda: 0,
    ],
)
def test_another_signature_is_refused_at_once(function: Callable[..., Any], make_reward: Callable[..., BoundReward]):
    with pytest.raises(UserError, match=r"must have the parameters \(images, prompts, metadata\), .*got \("):
        make_reward(function)


def test_a_batch_has_at_most_its_size(make_reward: Callable[..., BoundReward]):
    sizes = []
    reward = make_reward(lambda images: sizes.append(len(images)) or [red(i) for i in images], batch_size=4)
    assert_scores(reward(SAMPLES), 0, 50, 100, 150, 200, 250)
    assert sizes == [4, 2]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_no_images_have_no_scores(batch_size: int | None, make_reward: Callable[..., BoundReward]):
    reward = make_reward(lambda images: [red(i) for i in images], batch_size=batch_size)
    assert reward(Samples([], [], [])).shape == (0,)


def test_a_group_of_one_image_is_a_group(make_reward: Callable[..., BoundReward]):
    reward = make_reward(lambda images, prompt: [red(i) for i in images])
    assert_scores(reward(Samples(IMAGES[1:3], ["a", "b"], [{}, {}])), 50, 100)


def test_async_rewards_wait_at_the_same_time_up_to_their_concurrency(make_reward: Callable[..., BoundReward]):
    under_way, most = 0, 0

    async def score(image):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return red(image)

    assert_scores(make_reward(score)(SAMPLES), 0, 50, 100, 150, 200, 250)
    assert most == 6
    most = 0
    assert_scores(make_reward(score, concurrency=2)(SAMPLES), 0, 50, 100, 150, 200, 250)
    assert most == 2


def test_rewards_run_beside_each_other_without_gradient():
    """Each waits for the other, so one after the other would fail."""
    here, there = threading.Event(), threading.Event()
    scorer = Scorer([RewardConfig(name="world", label="a"), RewardConfig(name="world", label="b")])

    def meet(mine: threading.Event, other: threading.Event) -> Callable[..., Any]:
        def score(images: Any, prompts: Any, metadata: Any) -> Any:
            mine.set()
            assert other.wait(30)
            assert not torch.is_grad_enabled()
            return [1.0] * len(images)

        return score

    scorer.rewards["a"].function = meet(here, there)
    scorer.rewards["b"].function = meet(there, here)
    scores = scorer(SAMPLES)
    assert scores["a"].tolist() == scores["b"].tolist() == [1.0] * 6


def test_a_reward_that_is_not_async_is_never_called_twice_at_once():
    under_way, most = 0, 0
    scorer = Scorer([RewardConfig(name="world")])

    def score(images: Any, prompts: Any, metadata: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.02)
        under_way -= 1
        return [0.0] * len(images)

    scorer.rewards["world"].function = score
    for wait in [scorer.submit(SAMPLES) for _ in range(4)]:
        wait()
    assert most == 1


# What comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, NAN],
        (1.0, 2.5, NAN),
        np.array([1, 2.5, NAN], dtype=np.float32),
        torch.tensor([1, 2.5, NAN]),
        torch.tensor([1, 2.5, NAN], requires_grad=True),
        [torch.tensor(1.0), np.float64(2.5), NAN],
    ],
    ids=["list", "tuple", "array", "tensor", "tensor_with_gradient", "mixed"],
)
def test_numbers_of_any_kind_become_float64(returned: object, make_reward: Callable[..., BoundReward]):
    scores = make_reward(lambda images: returned)(SAMPLES[[0, 1, 2]])
    assert_scores(scores, 1, 2.5, NAN)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    "returned",
    [[1.0, 2.0], [1.0] * 4, 1.0, None, ["good"] * 3, [[1.0]] * 3, torch.zeros(3, 1), [None] * 3, {"a": 1}],
    ids=["short", "long", "scalar", "none", "words", "nested", "column", "nones", "dictionary"],
)
def test_anything_but_one_number_an_image_is_an_error_that_shows_it(
    returned: object, make_reward: Callable[..., BoundReward]
):
    with pytest.raises(UserError, match="reward mine must return 3 numbers for 3 images, got "):
        make_reward(lambda images: returned)(SAMPLES[[0, 1, 2]])
    with pytest.raises(UserError, match="reward mine must return a number, got "):
        make_reward(lambda image: "one" if isinstance(returned, float) else returned)(SAMPLES)


def test_a_first_score_outside_its_range_is_an_error_and_later_ones_are_masked(
    make_reward: Callable[..., BoundReward], caplog: pytest.LogCaptureFixture
):
    with pytest.raises(UserError, match=r"must lie in its range \[0, 1\], got 50"):
        make_reward(lambda images: [red(i) for i in images], range=(0, 1))(SAMPLES)
    reward = make_reward(lambda images: [red(i) for i in images], range=(0, 100))
    assert_scores(reward(SAMPLES[[0, 1, 2]]), 0, 50, 100)
    assert_scores(reward(SAMPLES), 0, 50, 100, NAN, NAN, NAN)
    assert "must lie in its range [0, 100], got 150; 3 images are masked" in caplog.text


# Failures -----------------------------------------------------------------------------------------------------------


def test_a_call_that_raises_masks_its_images_alone_and_says_why_once(
    make_reward: Callable[..., BoundReward], caplog: pytest.LogCaptureFixture
):
    def broken(images, prompt):
        if prompt == "b":
            raise RuntimeError("no such judge")
        return [red(i) for i in images]

    reward = make_reward(broken)
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        assert_scores(reward(SAMPLES), 0, 50, 100, NAN, NAN, NAN)
        assert_scores(reward(SAMPLES), 0, 50, 100, NAN, NAN, NAN)
    assert caplog.text.count("reward mine failed; 3 of 6 images are masked: RuntimeError: no such judge") == 2
    assert caplog.text.count("Traceback") == 1


def test_an_async_call_that_raises_masks_its_image_alone(make_reward: Callable[..., BoundReward]):
    async def broken(image):
        if red(image) == 50:
            raise RuntimeError("no such judge")
        return red(image)

    assert_scores(make_reward(broken)(SAMPLES), 0, NAN, 100, 150, 200, 250)


def test_a_call_that_takes_too_long_is_left_behind(
    make_reward: Callable[..., BoundReward], caplog: pytest.LogCaptureFixture
):
    release = threading.Event()

    def slow(image):
        if red(image) == 100:
            release.wait(60)
        return red(image)

    async def asynchronous(image):
        if red(image) == 100:
            await asyncio.sleep(60)
        return red(image)

    start = time.perf_counter()
    for function in (slow, asynchronous):
        assert_scores(make_reward(function, timeout_s=0.2)(SAMPLES), 0, 50, NAN, 150, 200, 250)
    assert time.perf_counter() - start < 20
    assert caplog.text.count("TimeoutError: no answer in 0.2 s") == 2
    release.set()


def test_no_time_limit_is_no_time_limit(make_reward: Callable[..., BoundReward]):
    assert_scores(make_reward(lambda image: red(image), timeout_s=None)(SAMPLES[[1]]), 50)


# Cache --------------------------------------------------------------------------------------------------------------


def test_the_cache_asks_once_for_every_image_prompt_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mine.py"
    path.write_text("")
    asked: list[str] = []

    def score(image, prompt):
        asked.append(prompt)
        return red(image)

    monkeypatch.setattr(scorer, "load_reward", lambda config, device: score)

    def run(samples: Samples = SAMPLES, **settings: Any) -> int:
        asked.clear()
        reward = BoundReward(RewardConfig(name=f"{path}:score", cache=True, **settings), "cpu")
        scores = reward(samples, ScoreCache(tmp_path / "scores.sqlite"))
        assert_scores(scores, *[red(image) for image in samples.images])
        return len(asked)

    assert run() == 6
    assert run() == run(weight=3.0, label="other") == 0
    assert run(Samples(IMAGES, ["a"] * 6, SAMPLES.metadata)) == 3
    assert run(Samples(IMAGES, SAMPLES.prompts, [{"n": 0}] * 6)) == 5
    assert run(Samples([IMAGES[0]], ["a"], [{"n": 0}])) == 0
    assert run(Samples([IMAGES[0].resize((4, 16))], ["a"], [{"n": 0}])) == 1  # the same bytes in another shape
    assert run(range=(0.0, 300.0)) == 6
    path.write_text("# mended\n")
    assert run() == 6


def test_the_cache_does_not_keep_failures(tmp_path: Path, make_reward: Callable[..., BoundReward]):
    calls = []

    def flaky(image):
        calls.append(1)
        return NAN if len(calls) == 1 else red(image)

    (tmp_path / "mine.py").write_text("")
    reward, cache = make_reward(flaky, cache=True), ScoreCache(tmp_path / "scores.sqlite")
    reward.config = reward.config.model_copy(update={"name": f"{tmp_path}/mine.py:score"})
    assert_scores(reward(SAMPLES[[1, 2]], cache), NAN, 100)
    assert_scores(reward(SAMPLES[[1, 2]], cache), 50, 100)
    assert len(calls) == 3


# Combine ------------------------------------------------------------------------------------------------------------


def named(**weights: float) -> list[RewardConfig]:
    return [RewardConfig(name="world", label=label, weight=weight) for label, weight in weights.items()]


@pytest.mark.parametrize("how", ["standardized", "raw"])
def test_a_single_reward_stays_raw_times_its_weight(how: Any):
    raw = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 9.0]], dtype=torch.float64)
    batch = combine({"a": raw}, named(a=-2), how)
    assert torch.equal(batch.rewards, -2 * raw)
    assert batch.valid.all()
    assert torch.equal(batch.scores["a"], raw)


def test_several_rewards_are_standardised_in_their_group_then_weighted():
    """Scale and offset of a reward do not matter, its weight does."""
    a, b = torch.rand(4, 6, dtype=torch.float64), 1000 + 500 * torch.rand(4, 6, dtype=torch.float64)
    batch = combine({"a": a, "b": b}, named(a=1, b=-0.5))
    za, zb = ((x - x.mean(1, True)) / x.std(1, correction=0, keepdim=True) for x in (a, b))
    torch.testing.assert_close(batch.rewards, za - 0.5 * zb)
    assert batch.valid.all()


def test_a_raw_sum_keeps_each_rewards_scale():
    a, b = torch.rand(4, 6, dtype=torch.float64), 1000 + 500 * torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(combine({"a": a, "b": b}, named(a=1, b=-0.5), "raw").rewards, a - 0.5 * b)


def test_a_clip_holds_scores_before_they_are_added_up_and_leaves_the_record():
    a, b = tensor(0.0, 1.0, 50.0)[None], tensor(3.0, 2.0, 1.0)[None]
    first, second = named(a=1, b=1)
    first = first.model_copy(update={"clip": (0.5, 2.0)})
    batch = combine({"a": a, "b": b}, [first, second], "raw")
    assert batch.rewards.tolist() == [[3.5, 3.0, 3.0]]
    assert torch.equal(batch.scores["a"], a)
    assert combine({"a": a}, [first]).rewards.tolist() == [[0.5, 1.0, 2.0]]


def test_a_reward_that_is_equal_all_over_a_group_adds_0():
    a, b = torch.tensor([[97.1] * 7]).double(), torch.rand(1, 7, dtype=torch.float64)
    with_flat = combine({"a": a, "b": b}, named(a=1, b=1))
    torch.testing.assert_close(with_flat.rewards, (b - b.mean()) / b.std(correction=0), rtol=1e-9, atol=1e-9)


def test_a_reward_on_a_tiny_scale_counts_as_any_other():
    a, b = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    tiny, plain = (combine({"a": scale * a, "b": b}, named(a=1, b=1)).rewards for scale in (1e-12, 1.0))
    torch.testing.assert_close(tiny, plain)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, (0.0, 10.0)])
def test_a_score_that_is_not_finite_masks_its_sample_in_every_reward(bad: float, clip: tuple[float, float] | None):
    a = torch.tensor([[1.0, 2.0, 3.0, bad], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, bad, 6.0, 9.0], [7.0, 7.5, 8.0, 9.0]], dtype=torch.float64)
    weighted = [config.model_copy(update={"clip": clip}) for config in named(a=1, b=2)]
    batch = combine({"a": a, "b": b}, weighted)
    assert batch.valid.tolist() == [[True, False, True, False], [True] * 4]
    # Of the first group 1 and 3, 5 and 6 are left: each standardised to -1 and 1.
    torch.testing.assert_close(batch.rewards[0, [0, 2]], tensor(-3, 3))
    alone = combine({"a": a[1:], "b": b[1:]}, weighted)
    assert torch.equal(batch.rewards[1:], alone.rewards)
    assert batch.rewards.isfinite().all()


def test_a_failed_score_of_a_single_reward_is_masked_not_a_number():
    batch = combine({"a": torch.tensor([[1.0, NAN], [NAN, NAN]]).double()}, named(a=1))
    assert batch.valid.tolist() == [[True, False], [False, False]]
    assert batch.rewards.isfinite().all()


# Correlation --------------------------------------------------------------------------------------------------------


def test_correlation_is_pearsons_within_groups():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    b[0, 2] = NAN
    kept = [(a[g, ~b[g].isnan()], b[g, ~b[g].isnan()]) for g in range(3)]
    x, y = (torch.cat([part - part.mean() for part in parts]) for parts in zip(*kept, strict=True))
    expected = np.corrcoef(x.numpy(), y.numpy())[0, 1]
    offsets = tensor(0, 100, -100)[:, None]  # between groups both differ alike, which must not count
    assert correlations({"a": a + offsets, "b": b + offsets}) == {"a~b": pytest.approx(expected)}


def test_correlation_of_opposites_is_minus_1_and_of_a_constant_is_none():
    a = torch.randn(2, 5, dtype=torch.float64)
    found = correlations({"a": a, "b": -3 * a + 7, "c": torch.full_like(a, 97.1)})
    assert found["a~b"] == pytest.approx(-1)
    assert math.isnan(found["a~c"])
    assert list(found) == ["a~b", "a~c", "b~c"]
