"""What is said of source pictures that do not go with a model, before it is loaded."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.checking import check_sources, warn_of_cropping
from ngrpo_lora.prompts.files import Prompt, read_prompts
from ngrpo_lora.prompts.pictures import SourcePicture


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """File names in messages are then short, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)


def painted(name: str, size: tuple[int, int] = (48, 32)) -> SourcePicture:
    Image.new("RGB", size, "red").save(name)
    return SourcePicture(Path(name), name, "line 1 of 'edits.jsonl'")


def problem(sources: list[Any], edits: bool = True) -> str:
    """What `check_sources` says of a file of prompts with these sources."""
    rows = [{"prompt": f"make it {i}"} | ({} if one is None else {"source": one}) for i, one in enumerate(sources)]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError) as error:
        check_sources("prompts.train", read_prompts("edits.jsonl").prompts, edits, "owner/model")
    (found,) = error.value.problems
    return found


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("gone.png", "is no file ('HERE/gone.png'); correct the path"),
        ("folder.png", "is a folder, a pipe or a device; name a file"),
        ("pipe.png", "is a folder, a pipe or a device; name a file"),
        ("https://example.org/a.png", "is no file ('HERE/https:/example.org/a.png'); download it, and name the file"),
        ("file:///gone/a.png", "is no file ('/gone/a.png'); correct the path"),
        (f"{'a' * 300}.png", "cannot be read (["),
    ],
)
def test_a_source_that_cannot_be_read_is_named_with_its_line(source: str, why: str):
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    start = f"prompts.train must have readable source pictures, but {source!r} (line 1 of 'edits.jsonl') "
    assert problem([source]).replace(os.getcwd(), "HERE").startswith(start + why)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, ""),
        ("  ", ""),
        ("coco", ", whose source 'coco' is no picture"),
        (3, ", whose source 3 is no picture"),
        (["a.png"], ", whose source ['a.png'] is no picture"),
        ({"bytes": "abc", "path": None}, ", whose source {'bytes': 'abc', 'path': None} is no picture"),
        ({"bytes": "abc", "path": 3}, ", whose source {'bytes': 'abc', 'path': 3} is no picture"),
    ],
)
def test_the_first_prompt_without_the_source_that_it_needs_is_named_with_its_line(source: Any, found: str):
    painted("a.png")
    assert problem(["a.png", source]) == (
        "prompts.train must have a source picture with every prompt for 'owner/model', which starts from one, but 1 of "
        f"2 has none, first 'make it 1' (line 2 of 'edits.jsonl'){found}; name the files in a column source, as in a "
        ".csv or .jsonl file"
    )


def test_prompts_without_a_source_are_counted():
    painted("a.png")
    assert "but 3 of 5 have none, first 'make it 1' (line 2 of 'edits.jsonl'); " in problem(
        ["a.png", None, None, "a.png", None]
    )
    with pytest.raises(ConfigError, match=r"--prompt .* but 1 of 1 has none, first 'a'; .* or one with --source$"):
        check_sources("--prompt", [Prompt("a")], True, "owner/model", ", or one with --source")


def test_what_a_column_says_counts_in_any_case():
    painted("a.png")
    Path("edits.csv").write_text("prompt,Source, MASK\na,coco,\n")
    with pytest.raises(ConfigError, match="whose source 'coco' is no picture"):
        check_sources("prompts.train", read_prompts("edits.csv").prompts, True, "owner/model")
    Path("edits.csv").write_text("prompt,Source, MASK\na,a.png,left half\n")
    with pytest.raises(ConfigError, match=r"but 'a' \(line 2 of 'edits.csv'\) has 'left half'; name files"):
        check_sources("prompts.train", read_prompts("edits.csv").prompts, True, "owner/model")


def test_a_mask_is_a_picture_of_the_size_of_its_source():
    a, wide = painted("a.png"), painted("wide.png", (64, 32))
    gone, named = SourcePicture(Path("gone.png"), "gone.png", "there"), Prompt("a", {"mask": "left half"}, a)
    check_sources("prompts.train", [Prompt("a", {"mask": ""}, a), Prompt("a", {}, a, a)], True, "owner/model")
    check_sources("prompts.train", [Prompt("a", {}, None, gone)], False, "embedded")  # of no edit: any column's text
    assert Prompt("a", {"mask": "gone.png"}, None, gone).shown((8, 8)) == {"mask": "gone.png"}
    for prompt, why in (
        (Prompt("a", {}, a, wide), r"'wide.png' \(.*\) is a mask of 64 x 32 px for a source of 48 x 32 px"),
        (Prompt("a", {}, a, gone), r"'gone.png' \(there\) is no file"),
        (named, "must have pictures in the column mask, but 'a' has 'left half'; name files, or leave it out"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_sources("prompts.train", [prompt], True, "owner/model")


def test_a_mask_that_leaves_nothing_is_refused_for_a_reward_that_compares_it():
    a, white, spot, black = painted("a.png"), painted("w.jpg"), painted("s.png"), painted("b.png")
    for name, ground, corner in (("w.jpg", 255, 254), ("s.png", 255, 0), ("b.png", 0, 0)):
        image = Image.new("L", (48, 32), ground)
        image.putpixel((0, 0), corner)
        image.save(name)
    good = [Prompt("a", {}, a, mask) for mask in (spot, black, None)]
    check_sources("prompts.train", good, True, "owner/model", keeper="preservation")
    check_sources("prompts.train", [Prompt("a", {}, a, white)], True, "owner/model")
    with pytest.raises(ConfigError, match=r"'w.jpg' \(line .*\) is a mask that is white all over, which leaves pr"):
        check_sources("prompts.train", [*good, Prompt("a", {}, a, white)], True, "owner/model", keeper="preservation")


def test_a_model_that_does_not_edit_takes_no_source():
    assert problem(["coco", "a.png"], edits=False) == (
        "prompts.train must have no source pictures for 'owner/model', which edits none, but line 2 of 'edits.jsonl' "
        "has 'a.png'; rename the column source, or give a model that edits, such as embedded-edit, "
        "FLUX.1-Kontext, or FLUX.2 with model.edits=true"
    )


@pytest.mark.parametrize(
    ("place", "remedy"),
    [("--source", "leave out --source, or give a model that edits"), ("prompt 0", "give a model that edits")],
)
def test_a_source_of_no_column_is_not_a_column_to_rename(place: str, remedy: str):
    source = SourcePicture(Path("a.png"), "a.png", place)
    with pytest.raises(ConfigError) as error:
        check_sources("--prompt", [Prompt("a", {}, source)], False, "embedded")
    assert f"but {place} has 'a.png'; {remedy}, such as " in str(error.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("hf:./folder", "name the dataset's column of pictures, as in hf:./folder?source=image"),
        ("hf:a/b?split=x#y", "name the dataset's column of pictures, as in hf:a/b?split=x&source=image"),
        ("hf:a/b?source=x", "give every row a picture in the column that ?source= names"),
        ("a.csv", "name the files in a column source, as in a .csv or .jsonl file"),
    ],
)
def test_a_source_that_is_lacking_is_given_as_its_prompts_are(name: str, remedy: str):
    with pytest.raises(ConfigError) as error:
        check_sources("SOURCE", [Prompt("a", place=f"row 1 of {name!r}")], True, "owner/model")
    assert str(error.value).endswith(f"; {remedy}")


def test_each_picture_is_read_once_in_a_check(monkeypatch: pytest.MonkeyPatch):
    source, other = painted("a.png"), painted("b.png", (64, 40))
    loads: list[str] = []
    load = SourcePicture.load
    monkeypatch.setattr(SourcePicture, "load", lambda self: (loads.append(self.name), load(self))[1])
    prompts = [Prompt("a", {}, source), Prompt("b", {}, source), Prompt("b", {}, other)] * 3
    sizes = check_sources("prompts.train", prompts, True, "owner/model")
    assert sorted(loads) == ["a.png", "b.png"]
    assert sizes == {source: (48, 32), other: (64, 40)}


def test_pictures_are_read_side_by_side_and_the_first_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch):
    met, load = threading.Barrier(2, timeout=60), SourcePicture.load
    monkeypatch.setattr(SourcePicture, "load", lambda self: (met.wait(), load(self))[1])
    painted("a.png")
    painted("b.png", (8, 8))
    Path("c.png").write_bytes(b"")
    assert "'b.png' (line 2 of 'edits.jsonl') is 8 x 8 px, below 32 px" in problem(["a.png", "b.png", "c.png", "d.png"])


@pytest.mark.parametrize("turned", [False, True])
def test_sources_of_which_less_than_half_is_drawn_are_counted(turned: bool, caplog: pytest.LogCaptureFixture):
    strip, wide, half = painted("strip.png"), painted("wide.png"), painted("half.png")
    sizes = {half: (128, 64), strip: (3872, 32), wide: (160, 64)}
    if turned:
        sizes = {picture: (height, width) for picture, (width, height) in sizes.items()}
    warn_of_cropping("prompts.train", sizes, (64, 64))
    shape = "32 x 3872" if turned else "3872 x 32"
    assert caplog.messages == [
        "prompts.train: of 2 of 3 source pictures less than half is left, as they are cropped to the shape of 64 x 64 "
        f"px, first 'strip.png' (line 1 of 'edits.jsonl') of {shape} px, of which 1% is left; crop them as you wish, "
        "or set width and height to their shape"
    ]
    caplog.clear()
    warn_of_cropping("prompts.train", {half: sizes[half]}, (64, 64))
    warn_of_cropping("prompts.train", {}, (64, 64))
    assert not caplog.messages
