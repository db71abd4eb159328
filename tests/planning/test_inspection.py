"""`ngrpo prompts inspect`: the figures that a user decides on, and the order that training really takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import load_config
from ngrpo_lora.planning.preflight import check_run


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        *(f"prompt {i}" for i in range(40)),
        "",
        "Prompt  1",
        "a red star and a blue star and a green star in a row",
    ]
    Path("mine.txt").write_text("\n".join(lines))
    Path("more.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"[bold] {i}", "tag": "x", "count": i}) for i in range(9))
    )


def inspect(*words: str) -> str:
    result = CliRunner().invoke(app, ["prompts", "inspect", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["prompts", "inspect", *words])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr


def figures(output: str, column: int = 0) -> dict[str, str]:
    """The table's lines up to the blank one, as name and cell."""
    lines = output.split("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1 + column] for cells in (re.split(r"\s{2,}", line.strip()) for line in lines)}


def shown(output: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in output.split("\n\n")[1].splitlines()[1:]]


def test_inspect_counts_prompts_duplicates_blanks_lengths_and_the_split():
    assert figures(inspect("mine.txt", "--held-out", "0.2")) == {
        "rows": "43",
        "distinct prompts": "41",
        "duplicates dropped": "1",
        "blank rows skipped": "1",
        "metadata": "none",
        "source pictures": "none",
        "words": "2 to 14, median 2",
        "characters": "8 to 52, median 9",
        "train / held out": "34 / 7",
    }


def test_inspect_has_a_column_for_every_source_and_counts_tokens():
    Path("more.jsonl").rename("[more].jsonl")
    output = inspect("mine.txt", "[more].jsonl", "world:train", "--model", "embedded", "--show", "3")
    mine, more, world = (figures(output, column) for column in range(3))
    assert more["metadata"] == "tag, count"
    assert world["rows"] == "endless"
    assert world["distinct prompts"].endswith("of the first 1,000")
    assert mine["tokens of tokenizer"] == "9 to 18, median 10; 1 (2.4%) over its limit of 12"
    assert world["tokens of tokenizer_2"].endswith("; 0 (0.0%) over its limit of 12")
    # A source each in turn, and what looks like rich's markup is left alone.
    assert "[more].jsonl" in output.splitlines()[0]
    assert shown(output)[1].startswith("[bold] ")
    assert re.search(r'\[bold\] (\d)  {"tag": "x", "count": \1}', output)


def edits(*sources: str) -> None:
    """A table of instructions with these sources, and three pictures."""
    for name, size in {"a.png": (64, 48), "b.png": (40, 40), "c.png": (80, 33)}.items():
        Image.new("RGB", size).save(name)
    Path("edits.csv").write_text("\n".join(["prompt,source", *(f"make it {i},{s}" for i, s in enumerate(sources))]))


def test_inspect_counts_sources_and_says_their_sizes_for_a_model():
    edits("a.png", "b.png", "c.png", "b.png")
    assert figures(inspect("edits.csv"))["source pictures"] == "3"
    output = inspect("edits.csv", "edits:train", "--model", "embedded-edit")
    assert figures(output)["source pictures"] == "3, 40 x 40 to 64 x 48 px"
    assert figures(output, 1)["source pictures"] == "1,000, 64 x 64 px"
    assert figures(inspect("mine.txt", "--model", "embedded"))["source pictures"] == "none"


@pytest.mark.parametrize(
    ("sources", "model", "message"),
    [
        (
            ["a.png", "", ""],
            "embedded-edit",
            "SOURCE must have a source picture with every prompt for 'embedded-edit', which starts from one, but 2 of "
            "3 have none, first 'make it 1' (line 3 of 'edits.csv'); name the files in a column source",
        ),
        (
            ["", "a.png"],
            "embedded",
            "SOURCE must have no source pictures for 'embedded', which edits none, but line 3 of 'edits.csv' has",
        ),
        (
            ["a.png", "gone.png"],
            "embedded-edit",
            "SOURCE must have readable source pictures, but 'gone.png' (line 3 of",
        ),
    ],
)
def test_inspect_refuses_sources_that_do_not_go_with_the_model(sources: list[str], model: str, message: str):
    edits(*sources)
    inspect("edits.csv")
    assert message in refused("edits.csv", "--model", model)


def test_inspect_refuses_a_model_of_no_family(tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    said = f"--model '{tmp_path / 'other'}' is a OtherPipeline, for which there is no family"
    assert said in refused("mine.txt", "--model", "other")


def test_inspect_takes_a_model_that_does_both_for_one_that_edits_where_there_are_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    edits("a.png")
    assert figures(inspect("edits.csv", "--model", "both"))["source pictures"] == "1, 64 x 48 px"
    assert figures(inspect("mine.txt", "--model", "both"))["source pictures"] == "none"
    edits("a.png", "")
    assert "but 1 of 2 has none, first 'make it 1'" in refused("edits.csv", "--model", "both")


def test_inspect_shows_the_prompts_in_the_order_in_which_training_takes_them(make_config, tmp_path: Path):
    from ngrpo_lora.training.setup import prepare

    config = make_config(
        tmp_path / "run", "prompts.train={mine.txt: 1, more.jsonl: 1}", "prompts.held_out=0.2", "seed=3"
    )
    run = prepare(config)
    expected = [run.prompts.prompt(i).text for i in range(12)]
    output = inspect("mine.txt", "more.jsonl", "--held-out", "0.2", "--seed", "3", "--show", "12")
    assert [line.split("  {")[0] for line in shown(output)] == expected
    assert shown(inspect("mine.txt", "--seed", "3")) != shown(inspect("mine.txt", "--seed", "4"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.txt"], "SOURCE must be world:train, world:held_out"),
        (["more.jsonl#tga"], "SOURCE must have the column 'tga'"),
        (["mine.txt", "--held-out", "1"], "--held-out must be more than 0 and less than 1, got 1"),
        (["more.jsonl", "--held-out", "0.0001"], "--held-out=0.0001 of 'more.jsonl' must leave prompts on both sides"),
        (["world:train", "--held-out", "0.1"], "--held-out must divide files or datasets, but world:train is neither"),
        (
            ["mine.txt", "--model", "./nowhere"],
            "--model must be embedded, embedded-edit, a diffusers folder or a Hub id",
        ),
    ],
)
def test_inspect_refuses_bad_input_with_a_message(words: list[str], message: str):
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts.train=gone.csv", "prompts.train must be world:train"),
        ("prompts.train=more.jsonl#tga", "prompts.train must have the column 'tga'"),
        ("prompts.held_out={mine.txt: 1, 'hf:owner/name?splt=x': 2}", "prompts.held_out must look like hf:owner/name"),
        ("prompts.held_out=0.5", "prompts.held_out=0.5 must divide files or datasets, but world:train/"),
    ],
)
def test_a_run_with_faulty_prompts_is_refused_before_it_starts(override: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_run(load_config(None, [override, f"output_dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize("value", ["0", "1", "1.5", "true", "[a]"])
def test_held_out_is_a_source_or_a_fraction(value: str):
    with pytest.raises(ValueError, match=r"^prompts\.held_out must be"):
        load_config(None, [f"prompts.held_out={value}"])


def test_sources_with_a_column_and_options_pass_through_yaml():
    config = load_config(None, ["prompts.train={'hf:a/b?split=test&revision=v2#title': 3, hf:a/b#x: 2, b.csv#x: 1}"])
    assert config.prompts.train == {"hf:a/b?split=test&revision=v2#title": 3, "hf:a/b#x": 2, "b.csv#x": 1}
    assert load_config(None, ["prompts.train=hf:a/b?split=test#title"]).prompts.train == "hf:a/b?split=test#title"
