"""Files and datasets: rows become prompts with metadata, and every kind of bad input is a message that helps."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.files import HPDV2_STYLES, HPDV2_TEST, HPDV2_TRAIN, Prompt, prompt_key, read_prompts

GENEVAL = (
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], '
    '"prompt": "a photo of two clocks"}'
)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """File names in messages are then short, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def unplaced(source: str) -> list[Prompt]:
    """The prompts of a source, without where each stands."""
    return [prompt._replace(place="") for prompt in read_prompts(source).prompts]


def texts(source: str, deduplicate: bool = True) -> list[str]:
    return [prompt.text for prompt in read_prompts(source, deduplicate).prompts]


def refused(source: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_prompts(source)
    (problem,) = error.value.problems
    return problem


def test_a_text_file_gives_one_prompt_a_line_without_blanks_and_byte_order_mark():
    Path("mine.txt").write_bytes("\ufeffa red star\r\n\r\n  ein grünes Herz \n\t\n三つの星\u2028two".encode())
    table = read_prompts("mine.txt")
    places = [f"line {number} of 'mine.txt'" for number in (1, 3, 5)]
    words = ["a red star", "ein grünes Herz", "三つの星\u2028two"]
    assert table.prompts == [Prompt(text, place=place) for text, place in zip(words, places, strict=True)]
    assert table.num_blank == 2


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
def test_a_file_without_prompts_is_an_error(content: bytes, suffix: str):
    Path(f"empty.{suffix}").write_bytes(content)
    assert refused(f"empty.{suffix}") == f"must hold at least one prompt, but 'empty.{suffix}' is empty"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_a_file_that_is_not_utf_8_is_an_error_that_names_the_byte(suffix: str):
    Path(f"latin.{suffix}").write_bytes("a café".encode("latin-1"))
    assert f"must be a UTF-8 text file, but byte 5 of 'latin.{suffix}' is not UTF-8" in refused(f"latin.{suffix}")


def test_a_source_that_does_not_exist_is_an_error_that_names_all_kinds_and_the_nearest():
    problem = refused("gone.txt")
    assert problem.startswith("must be world:train, world:held_out, edits:train, edits:held_out, one task of them (")
    assert "(world:train/single), hpdv2:train, hpdv2:test" in problem
    assert problem.endswith("but there is no file 'gone.txt'")
    assert refused("world:train/colour").endswith("did you mean world:train/color?")
    assert refused("hpdv2:test/photos").endswith("did you mean hpdv2:test/photo?")
    Path("folder").mkdir()
    assert refused("folder") == (
        "must be a file or a dataset, but 'folder' is a folder; name a file in it, or, where its metadata.jsonl says "
        "the prompt of each picture, hf:./folder, and to edit the pictures hf:./folder?source=image"
    )
    assert f", hf:{Path('folder').absolute()}, and" in refused(str(Path("folder").absolute()))


def test_json_lines_are_strings_or_objects_whose_other_keys_are_metadata():
    Path("mine.jsonl").write_text(f'{GENEVAL}\n\n"a bare string"\n{{"prompt": "x", "seed": null}}\n')
    table = read_prompts("mine.jsonl")
    include, exclude = [{"class": "clock", "count": 2}], [{"class": "clock", "count": 3}]
    assert unplaced("mine.jsonl") == [
        Prompt("a photo of two clocks", {"tag": "counting", "include": include, "exclude": exclude}),
        Prompt("a bare string"),
        Prompt("x"),
    ]
    assert table.num_blank == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('"a"\n{"prompt": "b"', "line 2 of 'bad.jsonl' is not JSON: Expecting ',' delimiter at column 15"),
        ("a red star", "line 1 of 'bad.jsonl' is not JSON"),
        ('\n{"prompt": 3}', "must hold prompts as text, but line 2 of 'bad.jsonl' holds 3"),
        ('["a"]', "line 1 of 'bad.jsonl' holds ['a']"),
        (
            '{"promt": "a", "n": 1}',
            "must have a column prompt, caption or text, but line 1 of 'bad.jsonl' has promt, n",
        ),
    ],
)
def test_a_faulty_line_of_json_is_named(lines: str, message: str):
    Path("bad.jsonl").write_text(lines)
    assert message in refused("bad.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "\\ud800"}', "half a character, the lone surrogate \\ud800; correct the line"),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' is given twice; correct the line"),
        ("[" * 100_000, "nested more than 100 deep; correct the line"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_json_that_no_one_could_use_is_refused(line: str, message: str):
    Path("bad.jsonl").write_text(line)
    assert message in refused("bad.jsonl")
    Path("bad.json").write_text(f"[{line}]")
    assert message.removesuffix(" the line") in refused("bad.json")


def test_text_of_utf_16_without_a_mark_is_refused():
    Path("wide.txt").write_bytes("a red star\n".encode("utf-16-le"))
    assert refused("wide.txt") == (
        "must be a UTF-8 text file, but byte 1 of 'wide.txt' is NUL, as in UTF-16; save it as UTF-8"
    )


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_column_twice_is_refused(suffix: str):
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = [pyarrow.array([text]) for text in ("a red star", "x", "a blue heart")]
        parquet.write_table(pyarrow.table(columns, names=["prompt", "style", "prompt"]), "two.parquet")
    else:
        lines = [["prompt", "style", "prompt"], ["a red star", "x", "a blue heart"]]
        between = {"csv": ",", "tsv": "\t"}[suffix]
        Path(f"two.{suffix}").write_text("\n".join(between.join(line) for line in lines))
    problem = f"must have every column once, but 'two.{suffix}' has 'prompt' twice; rename one of them"
    assert refused(f"two.{suffix}") == problem


def test_columns_without_a_name_are_no_prompts():
    Path("sheet.csv").write_text("prompt,,\na red star,,\n")
    assert [prompt.text for prompt in read_prompts("sheet.csv").prompts] == ["a red star"]


def test_parquet_that_holds_no_utf_8_is_refused():
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": texts}), "bad.parquet")
    assert refused("bad.parquet").startswith("must hold UTF-8 text, but 'bad.parquet' has text that is not")


def test_every_kind_of_table_gives_the_same_prompts_and_metadata():
    rows = [
        {"id": "1", "Prompt": 'a "red", star', "note": "é"},
        {"id": "2", "Prompt": "  ", "note": "blank"},
        {"id": "3", "Prompt": "two\nlines", "note": "x"},
    ]
    expected = [Prompt('a "red", star', {"id": "1", "note": "é"}), Prompt("two\nlines", {"id": "3", "note": "x"})]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("t.json").write_text(json.dumps(rows))
    Path("t.csv").write_text('id,Prompt,note\r\n1,"a ""red"", star",é\r\n2,  ,blank\r\n3,"two\nlines",x\r\n')
    Path("t.tsv").write_text('id\tPrompt\tnote\n1\ta "red", star\té\n2\t\tblank\n3\t"two\nlines"\tx\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "t.parquet")
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in ("t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "hf:./folder"):
        table = read_prompts(source)
        assert unplaced(source) == expected, source
        assert table.num_blank == 1, source


def test_the_column_is_the_first_known_one_or_the_one_that_the_source_names():
    Path("t.csv").write_text("text,Caption,Titel\na,b,c\n")
    assert texts("t.csv") == ["b"]
    assert texts("t.csv#text") == ["a"]
    assert unplaced("t.csv#Titel") == [Prompt("c", {"text": "a", "Caption": "b"})]
    assert refused("t.csv#titel") == (
        "must have the column 'titel', but line 2 of 't.csv#titel' has text, Caption, Titel; did you mean #Titel?"
    )
    Path("u.csv").write_text("id,Titel\n1,a\n")
    assert refused("u.csv") == (
        "must have a column prompt, caption or text, but line 2 of 'u.csv' has id, Titel; "
        "name another one after the source, with #COLUMN"
    )
    Path("a#b.txt").write_text("of a file whose name has a hash")
    assert texts("a#b.txt") == ["of a file whose name has a hash"]
    Path("t.txt").write_text("a")
    assert refused("t.txt#text") == "must name a column only of a table, but 't.txt' is a text file; drop #text"


@pytest.mark.parametrize(("suffix", "between"), [("csv", ","), ("tsv", "\t"), ("jsonl", ""), ("parquet", "")])
def test_columns_that_differ_in_case_or_spaces_alone_are_told_apart_by_the_user(suffix: str, between: str):
    name, row = f"v.{suffix}", {"Prompt": "first", "prompt ": "second"}
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), name)
    else:
        Path(name).write_text(
            json.dumps(row) if suffix == "jsonl" else f"Prompt{between}prompt \nfirst{between}second\n"
        )
    place = {"jsonl": "line 1", "parquet": "row 1"}.get(suffix, "line 2")
    assert refused(name) == (
        f"must have one column prompt, but {place} of {name!r} has 'Prompt' and 'prompt '; name the one of the prompts "
        "after the source, with #Prompt"
    )
    assert unplaced(f"{name}#Prompt") == [Prompt("first", {"prompt ": "second"})]


@pytest.mark.parametrize("column", ["source", "mask"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "hf"])
def test_two_columns_of_pictures_that_differ_in_case_alone_are_refused(suffix: str, column: str):
    name, other = f"two.{suffix}", f"{column.title()} "
    rows = [{"prompt": "a", column: "a.png", other: value} for value in ("b.png", None)]
    if suffix == "hf":
        name = "hf:./folder"
        Path("folder").mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "folder/train.parquet")
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), name)  # also where one is null
    elif suffix in ("jsonl", "json"):
        Path(name).write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    else:
        between = "\t" if suffix == "tsv" else ","
        Path(name).write_text("\n".join(between.join(line) for line in [rows[0], ["a", "a.png", ""]]))
    place = {"csv": "line 2", "tsv": "line 2", "jsonl": "line 1", "json": "entry 1"}.get(suffix, "row 1")
    assert refused(name) == (
        f"must have one column {column}, but {place} of {name!r} has {column!r} and {other!r}; rename one of them"
    )


def test_a_header_may_have_spaces_and_blank_lines_before_it():
    Path("t.csv").write_text("\n\nid, Caption\n1,a star\n\n2,a heart\n")
    assert texts("t.csv") == ["a star", "a heart"]


def test_what_cannot_be_seen_is_no_part_of_a_prompt_and_no_prompt():
    Path("joined.txt").write_text("a star\n \u200b\n\ufeffa heart\u200b \na\u200bb\n")
    table = read_prompts("joined.txt")
    assert [prompt.text for prompt in table.prompts] == ["a star", "a heart", "a\u200bb"]
    assert table.num_blank == 1


def test_a_nul_character_is_refused():
    Path("nul.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a\\u0000b"}\n')
    assert refused("nul.jsonl") == "must hold text, but line 2 of 'nul.jsonl' holds a NUL character; leave it out"


def test_a_pipe_is_refused_and_not_waited_for():
    os.mkfifo("pipe.txt")
    assert refused("pipe.txt") == (
        "must be a file, which is read more than once, but 'pipe.txt' is a pipe or a device; save it to a file first"
    )


def test_text_as_polars_writes_it_is_text():
    table = pyarrow.table({"prompt": pyarrow.array(["a star"], pyarrow.string_view())})
    pyarrow.parquet.write_table(table, "t.parquet")
    assert texts("t.parquet") == ["a star"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt,n\na,1\na star, red,2\n",
            "line 3 of 'bad.csv' has more; put a cell that holds the separator in quotes",
        ),
        ('prompt,n\na,1\n"b,2\nc,3\n', "'bad.csv' is faulty after line 2: unexpected end of data"),
    ],
)
def test_a_faulty_row_of_csv_is_named(content: str, message: str):
    Path("bad.csv").write_text(content)
    assert message in refused("bad.csv")


def test_parquet_keeps_the_types_of_metadata_and_leaves_out_what_json_cannot_hold():
    table = pyarrow.table(
        {
            "caption": pyarrow.array(["a", "b"]).dictionary_encode(),
            "n": [3, None],
            "score": [0.5, 1.0],
            "include": [[{"class": "cat"}], []],
            "image": [{"bytes": b"\x89PNG", "path": "a.png"}] * 2,
            "day": [datetime.date(2024, 1, 1)] * 2,
        }
    )
    pyarrow.parquet.write_table(table, "t.parquet")
    prompts = read_prompts("t.parquet").prompts
    assert unplaced("t.parquet") == [
        Prompt("a", {"n": 3, "score": 0.5, "include": [{"class": "cat"}]}),
        Prompt("b", {"score": 1.0, "include": []}),
    ]
    assert [json.loads(json.dumps(prompt.metadata)) for prompt in prompts] == [prompt.metadata for prompt in prompts]
    assert "row 1 of 't.parquet#n' holds 3" in refused("t.parquet#n")
    Path("bad.parquet").write_text("no parquet")
    assert refused("bad.parquet").startswith("must be a parquet file, but 'bad.parquet' is not: ")


def test_duplicates_differ_in_case_spaces_or_unicode_form_only_and_the_first_is_kept():
    lines = [
        {"prompt": text, "i": i} for i, text in enumerate(["A  Red Star", "b", "a red star", "ａ red\u00a0STAR", "B "])
    ]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = read_prompts("t.jsonl")
    assert unplaced("t.jsonl") == [Prompt("A  Red Star", {"i": 0}), Prompt("b", {"i": 1})]
    assert table.num_duplicates == 3
    everything = read_prompts("t.jsonl", deduplicate=False)
    assert [prompt.metadata["i"] for prompt in everything.prompts] == [0, 1, 2, 3, 4]
    assert everything.num_duplicates == 0
    assert prompt_key("Cafe\u0301") == prompt_key("café") != prompt_key("cafe")


@pytest.mark.parametrize(("package", "source"), [("datasets", "hf:owner/name"), ("pyarrow", "t.parquet")])
def test_a_missing_package_is_an_error_that_says_what_to_install(
    package: str, source: str, monkeypatch: pytest.MonkeyPatch
):
    Path("t.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(source) == (
        f"must be readable here, but '{source}' needs {package}, which is not installed; pip install datasets"
    )


def test_a_dataset_in_a_folder_has_splits():
    Path("folder").mkdir()
    Path("folder/train.csv").write_text("text\na\nb\nc\n")
    Path("folder/test.csv").write_text("text\nd\n")
    assert texts("hf:./folder") == ["a", "b", "c"]
    assert texts("hf:./folder?split=test") == ["d"]
    assert texts("hf:./folder?split=test+train[1:]#text") == ["d", "b", "c"]
    assert "'hf:./folder?split=val' cannot: Unknown split \"val\"" in refused("hf:./folder?split=val")
    assert "BuilderConfig 'en' not found" in refused("hf:./folder?config=en")


@pytest.mark.parametrize("source", ["hf:", "hf:owner/name?splt=train", "hf:owner/name?train"])
def test_a_dataset_with_unknown_options_is_an_error_that_shows_the_form(source: str):
    assert refused(source) == (
        f"must look like hf:owner/name?split=train&config=en#column (split, config, revision, source), got '{source}'"
    )


# The Hub's protocol, spoken by a server here to the real clients in a process of their own

TRAIN_JSON = [
    {"prompt": "a", "file_path": ["1.png", "2.png"], "human_preference": [1, 0]},
    {"prompt": "b", "file_path": ["3.png", "4.png"], "human_preference": [0, 1]},
    {"prompt": "a", "file_path": ["5.png", "6.png"], "human_preference": [0, 1]},
]
REPOSITORIES: dict[str, dict[str, Any]] = {
    "owner/name": {"train.jsonl": {"Title": "a title", "n": 1}, "test.jsonl": {"Title": "a test", "n": 2}},
    HPDV2_TRAIN[0]: {"train.json": TRAIN_JSON},
    HPDV2_TEST[0]: {f"benchmark/{style}.json": [f"{style} one", f"{style} two"] for style in HPDV2_STYLES},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What clients asked for, and what `read_prompts` made of the answers: [text, metadata] pairs, or the message."""

    requests: list[str]
    answers: dict[str, Any]


def answer(path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a request: files, and the two questions that `datasets` has about a repository."""
    for repo, files in REPOSITORIES.items():
        content = {name: json.dumps(data).encode() for name, data in files.items()}
        if path.startswith(f"/datasets/{repo}/resolve/"):
            revision, _, name = path.removeprefix(f"/datasets/{repo}/resolve/").partition("/")
            if name not in content:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            commit = COMMIT if revision in ("main", "v2") else revision
            headers = {"ETag": f'"{hashlib.sha1(content[name]).hexdigest()}"', "X-Repo-Commit": commit}
            return 200, headers, content[name]
        if path.startswith(f"/api/datasets/{repo}/tree/"):
            in_folder = "/" in path.removeprefix(f"/api/datasets/{repo}/tree/").partition("?")[0]
            entries = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in content.items()]
            return 200, {}, json.dumps([] if in_folder else entries).encode()
        if path.startswith(f"/api/datasets/{repo}"):
            return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode()
    return 404, {"X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, headers, body = answer(self.path)
            requests.append(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sources = ["hf:owner/name#Title", "hf:owner/name?revision=v2&split=test#Title", "hf:owner/name", "hf:no/body"]
    sources += ["hpdv2:train", "hpdv2:test/photo", "hpdv2:test"]
    code = """if True:
        import json, sys
        from ngrpo_lora.errors import ConfigError
        from ngrpo_lora.prompts.files import read_prompts
        answers = {}
        for source in sys.argv[1:]:
            try: answers[source] = [prompt[:2] for prompt in read_prompts(source).prompts]
            except ConfigError as error: answers[source] = str(error)
        print(json.dumps(answers))
    """
    home = tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}

    command = [sys.executable, "-c", code, *sources]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert result.returncode == 0, result.stderr
    return Hub(requests, json.loads(result.stdout))


def test_a_dataset_of_the_hub_by_name_with_split_and_revision(hub: Hub):
    assert hub.answers["hf:owner/name#Title"] == [["a title", {"n": 1}]]
    assert hub.answers["hf:owner/name?revision=v2&split=test#Title"] == [["a test", {"n": 2}]]
    assert any(path.startswith("/datasets/owner/name/resolve/v2/") for path in hub.requests)
    assert "has Title, n; name another one" in hub.answers["hf:owner/name"]
    assert "'hf:no/body' cannot: Dataset 'no/body' doesn't exist on the Hub" in hub.answers["hf:no/body"]


def test_hpdv2_has_every_training_prompt_once_and_the_test_prompts_of_four_styles(hub: Hub):
    assert hub.answers["hpdv2:train"] == [["a", {}], ["b", {}]]
    assert hub.answers["hpdv2:test/photo"] == [["photo one", {"style": "photo"}], ["photo two", {"style": "photo"}]]
    assert [metadata["style"] for _, metadata in hub.answers["hpdv2:test"]] == [s for s in HPDV2_STYLES for _ in "12"]
    for (repo, revision), file in ((HPDV2_TRAIN, "train.json"), (HPDV2_TEST, "benchmark/concept-art.json")):
        assert f"/datasets/{repo}/resolve/{revision}/{file}" in hub.requests


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/name", "'hf:owner/name' cannot: Couldn't reach 'owner/name' on the Hub"),
        ("hpdv2:train", "must be reachable, but 'hpdv2:train' needs train.json of the Hub's ymhao/HPDv2, which cannot"),
        ("hpdv2:test/photo", "needs benchmark/photo.json of the Hub's zhwang/HPDv2, which cannot be had"),
    ],
)
def test_offline_a_dataset_that_is_not_in_the_cache_is_an_error(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert message in refused(source)


def test_a_table_of_excel_with_semicolons_is_read():
    Path("excel.csv").write_bytes("\ufeffPrompt;Note\r\na red star, large;x\r\n".encode())
    (prompt,) = read_prompts("excel.csv").prompts
    assert (prompt.text, prompt.metadata) == ("a red star, large", {"Note": "x"})
