"""The order of pictures by their rewards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from ngrpo_lora.config import parse_reward_entries, parse_settings
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.ranking import check_samples, each_its_own, rank
from ngrpo_lora.registry import resolve_function, split_reference
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

REWARDS = """
def red(image):
    return image.getpixel((0, 0))[0] / 255

def dark(image):
    return -image.getpixel((0, 0))[0]

def picky(image):
    if image.getpixel((0, 0))[0] > 100:
        raise ValueError("too bright")
    return 1.0

def silent(images):
    return [float("nan")] * len(images)

def together(images, prompt):
    return list(range(len(images)))
"""


def samples(*reds: int, prompts: str = "a") -> Samples:
    images = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in reds]
    texts = [prompts] * len(images) if len(prompts) == 1 else [*prompts]
    return Samples(images, texts, [{}] * len(images), len(images) if len(prompts) == 1 else 1)


def scorer(folder: Path, *functions: str, **settings: object) -> Scorer:
    (folder / "mine.py").write_text(REWARDS)
    return Scorer(parse_reward_entries([{"name": f"{folder}/mine.py:{name}", **settings} for name in functions]))


def test_the_best_is_first_and_equals_keep_their_order(tmp_path: Path):
    judge, pictures = scorer(tmp_path, "red"), samples(51, 255, 51, 0)
    ranking = rank(judge, judge(pictures), "standardized")
    assert ranking.order == [1, 0, 2, 3]
    assert ranking.best == 1.0
    assert ranking.mean == pytest.approx((0.2 + 1 + 0.2 + 0) / 4)
    assert ranking.table().splitlines() == [
        "| rank | image | red |",
        "| ---: | ---: | ---: |",
        "| 1 | 2 | 1.000 |",
        "| 2 | 1 | 0.200 |",
        "| 3 | 3 | 0.200 |",
        "| 4 | 4 | 0.000 |",
    ]
    assert ranking.sheet(pictures.images, pictures.prompts, 3, 100).size == (300, 2 * (100 + 3 * 11))


def test_several_rewards_are_added_up_raw_or_standardised(tmp_path: Path):
    judge, pictures = scorer(tmp_path, "red", "dark"), samples(0, 255)
    assert rank(judge, judge(pictures), "raw").totals == [0.0, 1 - 255]
    assert rank(judge, judge(pictures), "standardized").totals == pytest.approx([0, 0])
    assert rank(judge, judge(pictures), "raw").table().splitlines()[2] == "| 1 | 1 | 0.000 | 0.000 | 0.000 |"


def test_what_failed_is_last_and_its_reason_is_said(tmp_path: Path):
    judge, pictures = scorer(tmp_path, "picky"), samples(255, 7, 8)
    ranking = rank(judge, judge(pictures), "standardized")
    assert ranking.order == [1, 2, 0]
    assert math.isnan(ranking.totals[0])
    assert ranking.mean == 1.0
    assert ranking.table().endswith("\nreward picky has no score for 1 of 3 images: ValueError: too bright")
    assert "| 3 | 1 | failed |" in ranking.table()
    again = rank(judge, judge(samples(1, 2)), "standardized")
    assert again.failures == []  # those of the last call alone


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("picky", "no score for 2 of 2 images: ValueError: too bright"),
        ("silent", "gave 2 of 2 images a score that is not"),
    ],
)
def test_where_all_failed_there_is_no_order(tmp_path: Path, name: str, part: str):
    judge, pictures = scorer(tmp_path, name), samples(255, 254)
    with pytest.raises(UserError, match=f"no image has a score of every reward:\n.*{part}"):
        rank(judge, judge(pictures), "standardized")


def test_rewards_that_cannot_judge_these_pictures_are_refused(tmp_path: Path):
    check_samples(scorer(tmp_path, "red"), samples(1, 2, prompts="ab"))
    check_samples(scorer(tmp_path, "together"), samples(1, 2))
    with pytest.raises(ConfigError, match="reward together judges groups of one prompt, got several"):
        check_samples(scorer(tmp_path, "together"), samples(1, 2, prompts="ab"))
    bare = samples(1, 2)
    bare = Samples(bare.images, ["", ""], bare.metadata, 2)
    with pytest.raises(ConfigError, match="reward together needs the prompt of every image, got none"):
        check_samples(scorer(tmp_path, "together"), bare)


def test_one_line_is_for_all_and_as_many_as_images_are_for_each():
    assert each_its_own(["a"], 3, "prompt") == ["a", "a", "a"]
    assert each_its_own(["a", "b"], 2, "prompt") == ["a", "b"]
    with pytest.raises(
        ConfigError, match="prompt must have one line for all images or one line for each of the 3, got 2"
    ):
        each_its_own(["a", "b"], 3, "prompt")


# Settings as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("label=x\n\n weight = 1e-3 ", {"label": "x", "weight": 1e-3}),
        ("template=a = b", {"template": "a = b"}),
        ("label: x\nclip: [0, 1]", {"label": "x", "clip": [0, 1]}),
        ("template: |\n  two\n  lines", {"template": "two\nlines"}),
        ('{"text": "hi"}', {"text": "hi"}),
    ],
)
def test_settings_are_lines_or_yaml(text: str, settings: dict[str, object]):
    assert parse_settings(text) == settings


@pytest.mark.parametrize("text", ["hello", "a: [", "- a", "a=1\na=2", "a=["])
def test_other_texts_are_refused(text: str):
    with pytest.raises(ConfigError):
        parse_settings(text)


def test_problems_of_an_entry_are_named_without_their_section():
    with pytest.raises(ConfigError) as caught:
        parse_reward_entries(["jpeg", {"name": "world", "wieght": 1, "batch_size": 0}])
    assert sorted(caught.value.problems) == [
        "batch_size must be at least 1, got 0",
        "unknown key wieght; did you mean weight?",
    ]


# Functions ----------------------------------------------------------------------------------------------------------


def test_a_file_that_was_edited_is_read_again(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("def score(image):\n    return 1")
    first = resolve_function(f"{path}:score")
    assert resolve_function(f"{path}:score") is first
    path.write_text("def score(image):\n    return 2")
    assert (first(None), resolve_function(f"{path}:score")(None)) == (1, 2)


def test_a_file_may_be_on_a_drive():
    assert split_reference(r"C:\rewards\mine.py:sharp") == (r"C:\rewards\mine.py", "sharp")
    (config,) = parse_reward_entries([r"C:\rewards\mine.py:sharp"])
    assert config.key == "sharp"
