"""Intervals against closed forms and simulation, paired differences, where pictures come from, what is drawn anew."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation import comparison, judging, runs, votes
from ngrpo_lora.evaluation.statistics import Estimate, compare_scores, mean_interval, share_interval
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.records.pictures import Picture, collect, save_png
from ngrpo_lora.sampling import sampler, settings
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import Scorer

NAN = math.nan


def numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


# Intervals ----------------------------------------------------------------------------------------------------------


def test_one_picture_per_prompt_gives_students_interval():
    values = np.random.default_rng(0).normal(3, 2, 17)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert numbers(mean_interval(values, range(17))) == pytest.approx([values.mean(), *expected], rel=1e-12)


def test_prompts_with_equally_many_pictures_give_students_interval_of_their_means():
    values = np.random.default_rng(1).normal(0, 1, (9, 4)) + np.arange(9)[:, None]
    means = values.mean(1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    found = mean_interval(values.ravel(), np.repeat(np.arange(9), 4).tolist())
    assert numbers(found) == pytest.approx([means.mean(), *expected], rel=1e-12)


def test_prompts_of_different_sizes_by_hand():
    # Mean 3; deviations add up to -3 and 3; se^2 = 2 / 1 * (9 + 9) / 9 = 4; t with one degree of freedom.
    half = 2 * math.tan(0.95 * math.pi / 2)
    assert numbers(mean_interval([1, 2, 6], "aab")) == pytest.approx([3, 3 - half, 3 + half], rel=1e-12)


def test_students_interval_agrees_with_a_bootstrap_of_prompts():
    rng = np.random.default_rng(2)
    values = rng.exponential(1, (150, 1)) + rng.normal(0, 0.3, (150, 3))
    found = mean_interval(values.ravel(), np.repeat(np.arange(150), 3).tolist())
    drawn = stats.bootstrap((values.mean(1),), np.mean, rng=np.random.default_rng(3)).confidence_interval
    assert [found.low, found.high] == pytest.approx(list(drawn), rel=0.04)


@pytest.mark.parametrize("wins", [0, 1, 7, 15, 20])
def test_one_pair_per_prompt_without_ties_gives_wilsons_interval(wins: int):
    expected = stats.binomtest(wins, 20).proportion_ci(0.95, method="wilson")
    found = share_interval([1.0] * wins + [0.0] * (20 - wins), range(20))
    assert numbers(found) == pytest.approx([wins / 20, *expected], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_pictures_that_repeat_those_of_their_prompt_add_nothing(interval: Callable[..., Estimate]):
    values = [1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0]
    once, thrice = interval(values, range(8)), interval(np.repeat(values, 3), np.repeat(range(8), 3).tolist())
    if interval is share_interval:  # where repeats count, ties would too: n is at most the number of pairs
        assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.05)
    else:
        assert numbers(thrice) == pytest.approx(numbers(once), rel=1e-12)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_an_interval_holds_the_truth_as_often_as_it_says(interval: Callable[..., Estimate]):
    """Pictures of a prompt are alike: counted one by one they would hold it in about 70% of cases."""
    rng = np.random.default_rng(4)
    prompts = np.repeat(np.arange(30), 6)
    held = []
    for _ in range(500):
        easy = rng.beta(0.6, 0.4, 30)  # the chance of a win differs between prompts; its mean is 0.6
        found = interval(rng.binomial(1, easy[prompts]).astype(float), prompts.tolist())
        held.append(found.low <= 0.6 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_every_pair_won_is_no_certainty():
    found = share_interval([1.0] * 12, [row // 4 for row in range(12)])
    assert found.value == 1
    assert found.high == 1
    assert found.low == pytest.approx(stats.binomtest(3, 3).proportion_ci(method="wilson").low, rel=1e-12)


def test_pictures_of_a_single_prompt_are_draws_of_their_own():
    values = [0.2, 0.5, 0.9, 0.4]
    assert mean_interval(values, ["a"] * 4) == mean_interval(values, range(4))
    assert share_interval([1.0, 0.0, 0.0, 1.0], ["a"] * 4) == share_interval([1.0, 0.0, 0.0, 1.0], range(4))


def test_what_failed_has_no_say_and_little_data_no_interval():
    assert mean_interval([1.0, NAN, 3.0, 8.0], "abcd") == mean_interval([1.0, 3.0, 8.0], "acd")
    assert numbers(mean_interval([2.0, NAN], "ab")) == pytest.approx([2, NAN, NAN], nan_ok=True)
    assert mean_interval([2.0, NAN], "ab").show() == "2.000"
    for interval in (mean_interval, share_interval):
        assert numbers(interval([NAN, NAN], "ab")) == pytest.approx([NAN] * 3, nan_ok=True)


def test_differences_are_of_pairs_that_have_both_scores():
    before = {"r": [1.0, 2.0, 3.0, NAN, 5.0], "only_here": [0.0] * 5}
    after = {"r": [2.0, 2.0, 7.0, 9.0, NAN]}
    (found,) = compare_scores("new", after, "old", before, "abcde")
    assert (found.label, found.reference, found.reward, found.pairs, found.failed) == ("new", "old", "r", 3, 2)
    assert (found.before, found.after) == (2.0, pytest.approx(11 / 3))
    assert found.difference == mean_interval([1.0, 0.0, 4.0], "abc")
    assert found.win_rate == share_interval([1.0, 0.5, 1.0], "abc")


# Rewards ------------------------------------------------------------------------------------------------------------


def test_rewards_are_given_by_name_or_as_mappings():
    found = judging.parse_rewards(["world", "{name: world_strict, weight: 1e-1, cache: true}"])
    assert [(reward.key, reward.weight, reward.cache) for reward in found] == [
        ("world", 1.0, False),
        ("world_strict", 0.1, True),
    ]


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["wrld"], "--reward name must be one of .*'wrld'; did you mean world"),
        (["{name: world, wieght: 2}"], "--reward unknown key wieght; did you mean weight"),
        (["world", "world"], "--reward must name each reward once, got world twice"),
        (["gone.py:score"], "--reward names the file 'gone.py', which does not exist"),
        (["{name: world"], "--reward .*must be a YAML value"),
    ],
)
def test_a_bad_reward_is_named(texts: list[str], part: str):
    with pytest.raises(ConfigError, match=part):
        judging.parse_rewards(texts)


# Pictures -----------------------------------------------------------------------------------------------------------


def paint(path: Path, *color: int, size: tuple[int, int] = (8, 8), **text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, Image.new("RGB", size, color), text)
    return path


def test_a_prompt_comes_from_the_text_beside_the_table_or_the_picture_itself(tmp_path: Path):
    for name in "abcde":
        paint(tmp_path / f"{name}.png", 0, 0, 0, prompt="its own, ünïcödé", seed="3")
    paint(tmp_path / "f.png", 0, 0, 0, prompt="a graph")  # ComfyUI's: no seed beside it
    (tmp_path / "a.txt").write_text("beside\n")
    rows = [{"file_name": "b.png", "prompt": "in the table", "count": 2}, {"file_name": "c.png", "count": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = {picture.path.stem: picture for picture in collect([tmp_path])}
    assert [found[name].prompt for name in "abcf"] == ["beside", "in the table", "its own, ünïcödé", None]
    assert [found[name].metadata for name in "abc"] == [{}, {"count": 2}, {"count": 3}]
    assert {picture.prompt for picture in collect([tmp_path], "for all")} == {"for all"}


def test_a_grid_is_read_row_by_row(tmp_path: Path):
    sheet = Image.new("RGB", (30, 20))
    for cell in range(6):
        sheet.paste((cell, 0, 0), (cell % 3 * 10, cell // 3 * 10, cell % 3 * 10 + 10, cell // 3 * 10 + 10))
    sheet.save(tmp_path / "grid.png")
    cells = collect([tmp_path / "grid.png"], "p", (2, 3))
    assert [cell.load().getcolors() for cell in cells] == [[(100, (cell, 0, 0))] for cell in range(6)]
    assert cells[4].name.endswith("grid.png#10,10")
    with pytest.raises(ConfigError, match=r"--grid 3x3 .*'.*grid.png' is 30 x 20 px"):
        collect([tmp_path / "grid.png"], "p", (3, 3))


def test_pictures_of_any_mode_are_read_upright(tmp_path: Path):
    turned = Image.new("RGB", (4, 2), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        Image.new(mode, (4, 2)).save(tmp_path / f"{mode[0]}{len(mode)}.tif")
    loaded = {picture.path.name: picture.load() for picture in collect([tmp_path])}
    assert loaded.pop("turned.jpg").size == (2, 4)
    assert {(image.mode, image.size) for image in loaded.values()} == {("RGB", (4, 2))}
    assert len(loaded) == 7


# Drawing ------------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt("a red star", {"n": 1}), Prompt("a blue heart")]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that were drawn."""
    seen: list[str] = []
    draw = sampler.draw

    def spy(family, text, seeds, *rest):
        seen.extend(map(str, seeds))
        return draw(family, text, seeds, *rest)

    monkeypatch.setattr(sampler, "draw", spy)
    return seen


def draw(adapter: Path | None, folder: Path, seeds: list[int]) -> list[Picture]:
    info = settings.drawing_settings(adapter, None, "cpu")
    return comparison.draw(comparison.Contestant("x", adapter, info), PROMPTS, seeds, folder)


@pytest.fixture
def adapter(finished_run) -> Path:  # noqa: ANN001
    return finished_run.output_dir / "adapter" / "pytorch_lora_weights.safetensors"


def test_pictures_are_those_of_sample(adapter: Path, tmp_path: Path):
    pictures = draw(adapter, tmp_path, [5, 6])
    expected = sampler.sample_images(adapter, None, [PROMPTS[1].text], [6])[0]
    assert [picture.path.name for picture in pictures] == ["000-5.png", "001-6.png"]
    assert np.array_equal(pictures[1].load(), expected)
    assert pictures[0].metadata == {"n": 1}
    assert [picture.prompt for picture in collect([tmp_path])] == [prompt.text for prompt in PROMPTS]


def test_only_what_is_missing_or_of_other_weights_or_settings_is_drawn(
    adapter: Path, counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def drawn(weights: Path | None, *seeds: int) -> list[str]:
        counted.clear()
        draw(weights, tmp_path / "pictures", list(seeds))
        return list(counted)

    assert drawn(None, 1, 2, 3, 4) == ["1", "2", "3", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "load_family", lambda config: pytest.fail("a model was loaded"))
        assert drawn(None, 1, 2, 3, 4) == []
    (tmp_path / "pictures" / "001-3.png").unlink()
    torn = tmp_path / "pictures" / "001-4.png"
    torn.write_bytes(torn.read_bytes()[:60])
    assert drawn(None, 1, 2, 3, 4) == ["3", "4"]
    assert drawn(adapter, 1, 2, 3, 4) == ["1", "2", "3", "4"]
    other = tmp_path / "other.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert drawn(other, 1, 2, 3, 4) == ["1", "2", "3", "4"]


def test_candidates_are_named_by_run_or_file_and_never_alike(adapter: Path, tmp_path: Path):
    copies = [tmp_path / name for name in ("sky blue.safetensors", "base.safetensors", "deep/sky-blue.safetensors")]
    for copy in copies:
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(adapter.read_bytes())
    base, others = comparison.open_candidates([adapter, *copies], None, True, "cpu")
    found = [base, *others]
    run = adapter.parents[1].name
    assert [one.label for one in found] == ["base", run, "sky-blue", "base-2", "sky-blue-2"]
    assert [one.adapter for one in found] == [None, adapter, *copies]
    assert comparison.open_candidates([adapter, copies[0]], None, False, "cpu")[0].label == run
    with pytest.raises(ConfigError, match="twice or more with --no-base, got 1"):
        comparison.open_candidates([adapter], None, False, "cpu")


def test_adapters_that_draw_in_other_ways_are_not_compared(adapter: Path, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(adapter, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    own = json.loads(metadata["ngrpo"])
    own["rollout"]["num_steps"] = 9
    save_file(tensors, tmp_path / "nine.safetensors", metadata | {"ngrpo": json.dumps(own)})
    with pytest.raises(ConfigError, match="num_steps is 9 for nine and 4 for"):
        comparison.open_candidates([adapter, tmp_path / "nine.safetensors"], None, True, "cpu")


def test_prompts_are_all_different_and_as_many_as_there_are(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\nthree\n")
    found = comparison.distinct_prompts(str(tmp_path / "prompts.txt"), 10, 0)
    assert sorted(prompt.text for prompt in found) == ["one", "three", "two"]
    world = [prompt.text for prompt in comparison.distinct_prompts("world:held_out", 30, 7)]
    assert len(set(world)) == 30
    assert world[:5] == [prompt.text for prompt in comparison.distinct_prompts("world:held_out", 5, 7)]


# Votes --------------------------------------------------------------------------------------------------------------


def ballot(path: Path, choices: str, comparison_id: str = "abc") -> Path:
    names = {"w": "label", "t": "tie", "l": "reference"}
    votes = [
        {"label": "new", "reference": "base", "prompt": f"prompt {row // 2}", "seed": row, "choice": names[choice]}
        for row, choice in enumerate(choices)
    ]
    path.write_text(json.dumps({"format": "ngrpo-votes-1", "comparison": comparison_id, "votes": votes}))
    return path


def test_votes_of_several_people_are_counted_together(tmp_path: Path):
    paths = [ballot(tmp_path / "a.json", "wwtl"), ballot(tmp_path / "b.json", "wwww")]
    (found,) = votes.read_votes(paths)
    assert (found.label, found.reference, found.wins, found.ties, found.losses) == ("new", "base", 6, 1, 1)
    assert found.win_rate == share_interval([1, 1, 0.5, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1])
    assert "| new | base | 81% [" in votes.votes_table([found])


def test_other_files_and_other_comparisons_are_no_votes(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"format": "something"}')
    (tmp_path / "torn.json").write_text("{")
    for path in (tmp_path / "other.json", tmp_path / "torn.json"):
        with pytest.raises(ConfigError, match=rf"--votes must be a file that blind.html saved, but '.*{path.name}'"):
            votes.read_votes([path])
    with pytest.raises(ConfigError, match="--votes must be a file, but"):
        votes.read_votes([tmp_path / "gone.json"])
    with pytest.raises(ConfigError, match="must be of one comparison"):
        votes.read_votes([ballot(tmp_path / "a.json", "w"), ballot(tmp_path / "b.json", "w", "xyz")])


# A run --------------------------------------------------------------------------------------------------------------


def test_a_runs_evaluations_are_paired_by_prompt_and_seed(tmp_path: Path):
    first = [{"prompt": p, "seed": s, "r": 0.1 * s} for s, p in enumerate("aabbcc")]
    last = [{"prompt": p, "seed": s, "r": None if s == 5 else 0.3 * s} for s, p in enumerate("aabbcc")][::-1]
    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"'.*run' has 0 of them"):
        runs.compare_evaluations(run, tmp_path)
    for step, rows in ((0, first), (2, first[:1]), (10, last)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "evaluations" / f"{step:06d}.jsonl").write_text(lines)
    (found,) = runs.compare_evaluations(run, tmp_path)
    assert (found.label, found.reference, found.pairs, found.failed) == ("run @ 10", "@ 0", 5, 1)
    assert found.difference.value == pytest.approx(0.4)
    assert found.difference == mean_interval([0.3 * s - 0.1 * s for s in range(5)], "aabbc")
    assert found.win_rate.value == pytest.approx(0.9)
    assert (tmp_path / "run.csv").read_text().splitlines()[-1] == "run,c,5,r,0.5,"


# Judging ------------------------------------------------------------------------------------------------------------


def test_a_reward_that_fails_for_every_picture_is_an_error(tmp_path: Path):
    (tmp_path / "broken.py").write_text("def score(images):\n    raise RuntimeError('no such judge')\n")
    configs = judging.parse_rewards([f"{tmp_path}/broken.py:score"])
    with pytest.raises(UserError, match="reward broken failed for all 1 pictures"):
        judging.score_pictures([Picture(paint(tmp_path / "a.png", 0, 0, 0))], configs, tmp_path)


def test_groups_stay_whole_however_many_pictures_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "spread.py").write_text("def score(images, prompt):\n    return [len(images)] * len(images)\n")
    monkeypatch.setattr(judging, "IN_MEMORY", 4)
    picture = Picture(paint(tmp_path / "a.png", 0, 0, 0), "p")
    spread = Scorer(judging.parse_rewards([f"{tmp_path}/spread.py:score"]))
    kept = ScoreCache(tmp_path / "scores.sqlite")
    assert judging.judge(spread, [picture] * 9, kept, "pictures", 3) == {"spread": [3.0] * 9}
