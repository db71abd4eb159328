"""What scored pictures were edited from: where it is found, what is said where it is not, and what is not scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import paint

from ngrpo_lora.errors import UserError
from ngrpo_lora.evaluation import judging
from ngrpo_lora.evaluation.sources import with_sources
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import Picture, collect

(EDITS,) = judging.parse_rewards(["preservation"])
(LOOKS,) = judging.parse_rewards(["jpeg"])
SIZE = (40, 40)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `edited` in the working directory, with one grey picture."""
    monkeypatch.chdir(tmp_path)
    paint(Path("edited/a.png"), 51, 51, 51, size=SIZE)
    return Path("edited")


def table(folder: Path, *lines: dict[str, str]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def drawn(path: Path, source: Path) -> Path:
    """A picture as `ngrpo sample --source` leaves it."""
    recipe = {"source": {"name": str(source), "file": str(source.absolute()), "sha256": digest(source)}}
    return paint(path, 51, 51, 51, size=SIZE, prompt="lighter", seed="0", ngrpo=json.dumps(recipe))


def names(pictures: list[Picture]) -> list[str]:
    return [picture.path.name for picture in pictures]


def problem(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        with_sources(collect([folder]), [LOOKS, EDITS])
    assert with_sources(collect([folder]), [LOOKS])  # which asks for none
    return str(error.value)


def test_only_rewards_of_edits_need_sources():
    functions = judging.parse_rewards([f"{__file__}:names"])
    assert [one.judges_edits for one in (EDITS, LOOKS, *functions)] == [True, False, False]


def test_the_source_is_that_of_the_png_text(folder: Path, tmp_path: Path):
    drawn(folder / "a.png", paint(Path("before.png"), 0, 0, 0, size=SIZE))
    judging.score_pictures(collect([folder]), [EDITS], tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["pictures"][0]["preservation"] == pytest.approx(0.8)


def test_metadata_go_before_the_png_text(folder: Path):
    drawn(folder / "a.png", paint(Path("before.png"), 0, 0, 0, size=SIZE))
    paint(Path("other.png"), 0, 0, 0, size=SIZE)
    table(folder, {"file_name": "a.png", "source": "../other.png"})
    (picture,) = with_sources(collect([folder]), [EDITS])
    assert picture.metadata["source"] == "../other.png"


def test_a_source_that_is_gone_or_has_changed_is_named(folder: Path):
    source = paint(Path("before.png"), 0, 0, 0, size=SIZE)
    drawn(folder / "a.png", source)
    remedy = '; name its file in metadata.jsonl beside the picture, in a line such as {"file_name": "a.png", "source": '
    paint(source, 1, 0, 0, size=SIZE)
    changed = f"'edited/a.png' was edited from {str(source.absolute())!r}, which has changed since"
    assert problem(folder).startswith(changed + remedy)
    source.unlink()
    assert problem(folder).startswith(changed.replace("has changed since", "is not there any more") + remedy)
    recipe = {"source": {"name": "row 3", "file": None, "sha256": ""}}
    paint(folder / "a.png", 0, 0, 0, size=SIZE, ngrpo=json.dumps(recipe))
    within = "'edited/a.png' was edited from 'row 3', a picture within a dataset"
    assert problem(folder).startswith(within + remedy)


def test_a_file_that_metadata_name_and_that_is_missing_is_named_with_its_line(folder: Path):
    paint(folder / "b.png", 0, 0, 0, size=SIZE)  # has no source either, since nothing names it as one
    table(folder, {"file_name": "x.png"}, {"file_name": "a.png", "source": "nope.png"})
    assert problem(folder).startswith(
        "--reward preservation must have readable source pictures, but 'nope.png' (line 2 of 'edited/metadata.jsonl') "
        "is no file ("
    )


@pytest.mark.parametrize(("row", "found"), [({}, "none"), ({"source": "coco"}, "'coco'")])
def test_a_picture_without_a_source_is_named(row: dict[str, str], found: str, folder: Path):
    paint(Path("before.png"), 0, 0, 0, size=SIZE)
    paint(folder / "b.png", 0, 0, 0, size=SIZE)
    table(folder, {"file_name": "a.png", "source": "../before.png"}, {"file_name": "b.png"} | row)
    assert problem(folder) == (
        f"--reward preservation needs the source of every picture, but 'edited/b.png' has {found}; name its file in "
        'metadata.jsonl beside the picture, in a line such as {"file_name": "b.png", "source": "before/b.png"}, or '
        "leave the picture out"
    )


def test_sources_and_masks_in_the_same_folder_are_not_scored(folder: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("before", "mask", "recorded"):
        paint(folder / f"{name}.png", 0, 0, 0, size=SIZE)
    drawn(folder / "b.png", folder / "recorded.png")
    drawn(folder / "c.png", folder / "b.png")  # an edit of an edit
    table(folder, {"file_name": "a.png", "source": "before.png", "mask": "mask.png"})
    for reward in (EDITS, LOOKS):
        assert names(with_sources(collect([folder]), [reward])) == ["a.png", "b.png", "c.png"]
        told = "not scored, since others in the folder are edits of them: 'edited/before.png', 'edited/mask.png', "
        assert capsys.readouterr().err == f"{told}'edited/recorded.png'\n"


def test_a_source_is_scored_where_it_is_asked_for(folder: Path):
    """By itself, or as a picture of another folder."""
    paint(folder / "before.png", 0, 0, 0, size=SIZE)
    other = paint(Path("others/b.png"), 0, 0, 0, size=SIZE)
    table(folder, {"file_name": "a.png", "source": "before.png", "mask": "../others/b.png"})
    assert names(with_sources(collect([folder / "before.png"]), [LOOKS])) == ["before.png"]
    assert names(with_sources(collect([folder, other]), [LOOKS])) == ["a.png", "b.png"]


def test_two_sources_of_a_picture_are_refused(folder: Path):
    table(folder, {"file_name": "a.png", "source": "b.png", "Source": "c.png"})
    with pytest.raises(UserError) as error:
        with_sources(collect([folder]), [LOOKS])
    assert str(error.value) == (
        "SOURCE must have one column source, but line 1 of 'edited/metadata.jsonl' has 'source' and 'Source'; rename "
        "one of them"
    )
