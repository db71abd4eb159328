"""Source pictures: every kind is taken as people see it, or refused with a message that helps."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.checking import check_sources
from ngrpo_lora.prompts.files import Prompt, read_prompts
from ngrpo_lora.prompts.pictures import MAX_PIXELS, SourcePicture
from ngrpo_lora.prompts.sources import divide

SIZE = (48, 32)
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """File names in messages are then short, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def halves(left: Any = (255, 0, 0), right: Any = (0, 0, 255), mode: str = "RGB") -> Image.Image:
    """A picture of two colours, in which what is turned or lost can be seen."""
    image = Image.new(mode, SIZE, left)
    image.paste(right, (SIZE[0] // 2, 0, *SIZE))
    return image


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def written(name: str, data: bytes) -> SourcePicture:
    Path(name).write_bytes(data)
    return SourcePicture(Path(name), name, "line 1 of 'edits.jsonl'")


def corners(image: Image.Image) -> tuple[Any, Any]:
    return image.getpixel((2, 2)), image.getpixel((image.width - 3, image.height - 3))


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by a quarter
    return saved(halves(), "JPEG", exif=exif, quality=100, subsampling=0)


def sixteen_bit() -> bytes:
    levels = np.full(SIZE[::-1], 0x4000, np.uint16)
    levels[:, SIZE[0] // 2 :] = 0xFFFF
    return saved(Image.fromarray(levels))


def palette_with_a_transparent_colour() -> bytes:
    image = halves(0, 1, "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return saved(image, transparency=0)


TAKEN: dict[str, tuple[Callable[[], bytes], Any, Any]] = {
    "plain.png": (lambda: saved(halves()), (255, 0, 0), (0, 0, 255)),
    "photo.jpg": (lambda: saved(halves(), "JPEG", quality=100, subsampling=0), (254, 0, 0), (0, 0, 254)),
    "lossless.webp": (lambda: saved(halves(), "WEBP", lossless=True), (255, 0, 0), (0, 0, 255)),
    "still.gif": (lambda: saved(halves(), "GIF"), (255, 0, 0), (0, 0, 255)),
    "grey.png": (lambda: saved(halves(64, 255, "L")), (64,) * 3, (255,) * 3),
    "bits.png": (lambda: saved(halves(0, 1, "1")), (0,) * 3, (255,) * 3),
    "deep.png": (sixteen_bit, (64,) * 3, (255,) * 3),
    "print.tif": (lambda: saved(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK"), "TIFF"), (255, 0, 0), (0, 0, 0)),
    "clear.png": (lambda: saved(halves((9, 9, 9, 0), (0, 0, 255, 255), "RGBA")), (255,) * 3, (0, 0, 255)),
    "half.png": (lambda: saved(halves((0, 0, 0, 128), (0, 0, 255, 255), "RGBA")), (127,) * 3, (0, 0, 255)),
    "veiled.png": (lambda: saved(halves((0, 0), (64, 255), "LA")), (255,) * 3, (64,) * 3),
    "palette.png": (palette_with_a_transparent_colour, (255,) * 3, (0, 0, 255)),
    "keyed.png": (lambda: saved(halves(), transparency=(255, 0, 0)), (255,) * 3, (0, 0, 255)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_picture_is_what_people_see_in_8_bit_rgb(name: str):
    make, left, right = TAKEN[name]
    image = written(name, make()).load()
    assert (image.mode, image.size) == ("RGB", SIZE)
    np.testing.assert_allclose(corners(image), (left, right), atol=2)


def test_a_photograph_is_turned_as_its_exif_data_say():
    image = written("turned.jpg", turned()).load()
    assert image.size == SIZE[::-1]
    np.testing.assert_allclose(corners(image), ((255, 0, 0), (0, 0, 255)), atol=3)
    assert image.getexif().get(ORIENTATION) is None


def test_the_first_picture_of_a_phone_counts():
    """Its photographs hold previews and depth maps as further frames."""
    data = saved(halves(), "MPO", save_all=True, append_images=[halves((0, 0, 0), (0, 0, 0))], quality=100)
    np.testing.assert_allclose(corners(written("phone.jpg", data).load()), ((255, 0, 0), (0, 0, 255)), atol=60)


def bomb() -> bytes:
    """A file of a few bytes whose header says 20,000 x 20,000 pixels."""
    data = bytearray(saved(Image.new("1", SIZE)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def animated(form: str) -> bytes:
    return saved(halves(), form, save_all=True, append_images=[halves((0, 255, 0))])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "is empty; save it anew"),
    "text.png": (lambda: b"a red star\n" * 9, "is no picture of a known format; save it as PNG, JPEG or WebP"),
    "page.jpg": (lambda: b"%PDF-1.4\n" * 9, "is no picture of a known format"),
    "script.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is no picture of a known format"),
    "cut.png": (lambda: saved(Image.effect_noise((64, 64), 50))[:2000], "is broken ("),
    "cut.jpg": (lambda: saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "is broken ("),
    "cut.webp": (lambda: saved(Image.effect_noise((64, 64), 50), "WEBP")[:900], "is broken ("),
    "narrow.png": (lambda: saved(Image.new("RGB", (31, 400))), "is 31 x 400 px, below 32 px a side"),
    "dot.png": (lambda: saved(Image.new("RGB", (1, 1))), "is 1 x 1 px, below 32 px a side"),
    "bomb.png": (bomb, f"has more than {MAX_PIXELS:,} pixels; make it smaller"),
    "large.png": (lambda: saved(Image.new("1", (8192, 8193))), f"is 8192 x 8193 px, more than {MAX_PIXELS:,} pixels"),
    "larger.png": (lambda: saved(Image.new("1", (10_000, 10_000))), "is 10000 x 10000 px, more than"),
    "moves.gif": (lambda: animated("GIF"), "has 2 frames or pages; save the one to be edited"),
    "moves.webp": (lambda: animated("WEBP"), "has 2 frames or pages"),
    "moves.png": (lambda: animated("PNG"), "has 2 frames or pages"),
    "pages.tif": (lambda: animated("TIFF"), "has 2 frames or pages"),
    "float.tif": (lambda: saved(Image.new("F", SIZE, 0.5), "TIFF"), "has 32-bit pixels (mode F)"),
    "whole.tif": (lambda: saved(Image.new("I", SIZE, 70_000), "TIFF"), "has 32-bit pixels (mode I)"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_cannot_be_used_is_refused(name: str):
    make, why = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        written(name, make()).load()
    start = f"must have readable source pictures, but {name!r} (line 1 of 'edits.jsonl') "
    assert str(error.value).startswith(start + why)


def test_rewards_are_shown_the_middle_of_a_source_and_its_mask():
    (folder := Path("edits")).mkdir()
    written("edits/a.png", saved(halves()))
    written("edits/m.png", saved(halves((0,) * 3, (255,) * 3)))
    (folder / "edits.jsonl").write_text(json.dumps({"prompt": "a", "source": "a.png", "Mask": "m.png", "n": 1}))
    (prompt,) = read_prompts("edits/edits.jsonl").prompts
    shown = prompt.shown((16, 16))  # of 48 x 32 pixels the middle 32 x 32
    assert (shown["n"], shown["source"].size, shown["mask"].size) == (1, (16, 16), (16, 16))
    assert corners(shown["source"]) == ((255, 0, 0), (0, 0, 255))
    assert corners(shown["mask"]) == ((0,) * 3, (255,) * 3)
    assert abs(np.asarray(shown["mask"])[..., 0].mean() - 127.5) < 2


def test_other_text_in_a_column_of_that_name_is_metadata_as_ever():
    Path("mine.csv").write_text("prompt,source\na,coco\nb,https://example.org\nc,\n")
    table = read_prompts("mine.csv")
    assert [prompt.source for prompt in table.prompts] == [None] * 3
    assert [prompt.metadata.get("source") for prompt in table.prompts] == ["coco", "https://example.org", ""]
    check_sources("prompts.train", table.prompts, False, "embedded")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_path_counts_from_the_folder_of_the_prompts_whatever_the_table(suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(Path.cwd() / "there"))
    (folder := Path("there/pictures")).mkdir(parents=True)
    written(str(folder / "a b.png"), saved(halves()))
    absolute = folder.absolute() / "a b.png"
    sources = ["pictures/a b.png", str(absolute), absolute.as_uri(), f"file://localhost{absolute.as_uri()[7:]}"]
    sources += [f"FILE://{absolute.as_uri()[7:]}", " pictures/a b.png ", "~/pictures/a b.png"]
    rows = [{"prompt": "make it blue", "source": source} for source in sources]
    file = f"there/edits.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == "jsonl":
        Path(file).write_text("\n".join(map(json.dumps, rows)))
    else:
        between = "\t" if suffix == "tsv" else ","
        Path(file).write_text(
            "\n".join(between.join(row) for row in [["prompt", "Source"], *(r.values() for r in rows)])
        )
    prompts = read_prompts(file).prompts
    assert len(prompts) == len(sources)  # the same words of another picture are another prompt
    check_sources("prompts.train", prompts, True, "owner/model")
    found = [prompt.source for prompt in prompts if prompt.source is not None]
    assert len({source.digest for source in found}) == 1
    assert [source.name for source in found] == sources
    assert len({prompt.condition for prompt in prompts}) == 1


@pytest.mark.parametrize("name", ["source", "before"])
def test_pictures_in_a_dataset_are_sources(name: str):
    """As the Hub has them: their bytes in parquet files, in a column of any name."""
    Path("folder").mkdir()
    pictures = [halves(), halves((0, 255, 0))]
    rows = {"prompt": ["make it blue", "make it red"], name: pictures}
    features = datasets.Features({"prompt": datasets.Value("string"), name: datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet("folder/train.parquet")
    option = "" if name == "source" else f"?source={name}"
    for source in (f"hf:./folder{option}", *(["folder/train.parquet"] if name == "source" else [])):
        prompts = read_prompts(source).prompts
        check_sources("prompts.train", prompts, True, "owner/model")
        assert [corners(p.source.load()) for p in prompts if p.source] == [corners(image) for image in pictures]
        assert all(isinstance(prompt.metadata["source"], str) for prompt in prompts)
    with pytest.raises(
        ConfigError, match="must be a dataset that can be loaded, but 'hf:./folder.source=after' cannot"
    ):
        read_prompts("hf:./folder?source=after")


def test_json_holds_no_bytes_of_pictures_but_may_name_them():
    """As what was written of a parquet file's rows."""
    written("a.png", saved(halves()))
    rows = [{"prompt": "a", "source": {"bytes": data, "path": "a.png"}} for data in (None, "abc", [1])]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for prompt in read_prompts("edits.jsonl", deduplicate=False).prompts:
        assert prompt.source == SourcePicture(Path("a.png"), "a.png", "")


def test_an_edit_with_another_mask_is_another_prompt_and_no_duplicate():
    for name, fill in (("a.png", 0), ("m.png", 0), ("n.png", 255)):
        written(name, saved(halves(fill, 255, "L")))
    Path("edits.csv").write_text("prompt,source,mask\na,a.png,m.png\na,a.png,n.png\nA,a.png,m.png\na,a.png,\n")
    table = read_prompts("edits.csv")
    assert {one.mask and one.mask.name for one in table.prompts} == {"m.png", "n.png", None}
    assert table.num_duplicates == 1
    assert len({one.asked for one in table.prompts}) == 1  # what a model sees: on one side of what is held out
    source, mask = (SourcePicture(Path(name), name, "") for name in ("a.png", "m.png"))
    masked = [Prompt(f"p{i}", {}, source, mask) for i in range(99)]
    bare = [one._replace(mask=None) for one in masked]
    assert [one.text for one in divide(masked, 0.3)[1]] == [one.text for one in divide(bare, 0.3)[1]]


def test_pictures_of_an_edit_are_told_by_what_they_hold():
    a, m = written("a.png", saved(halves())), written("m.png", saved(halves(0, 255, "L")))
    edit = Prompt("a", {}, a, m, "line 1")
    assert edit.pictures == f"{a.digest[:16]}+{m.digest[:16]}"
    assert edit._replace(mask=None).pictures == a.digest[:16]
    assert edit._replace(source=None).pictures == ""
    assert edit._replace(place="").pictures == ""  # rendered by the package, whose seed tells it
    other_a, other_m = (written(name, saved(halves((0, 1, 0)))) for name in ("a.png", "m.png"))
    others = [edit._replace(source=other_a), edit._replace(mask=other_m)]
    assert len({one.pictures for one in (edit, *others)}) == 3
    prompts = [Prompt("make it red", {}, SourcePicture(Path(f"{i}.png"), f"{i}.png", "")) for i in range(1000)]
    train, held_out = divide(prompts, 0.1)
    assert 60 < len(held_out) < 140
    moved = [
        Prompt(p.text, {}, SourcePicture(Path("/else") / p.source.name, p.source.name, "")) for p in prompts if p.source
    ]
    assert [p.key for p in divide(moved, 0.1)[1]] == [p.key for p in held_out]
    assert len(train) + len(held_out) == 1000
