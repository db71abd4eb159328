"""Which file a source names, whoever asks; what the tables hold is tested in test_files.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora.prompts.files import read_prompts
from ngrpo_lora.prompts.tables import file_rows, path_and_column


def test_a_file_of_the_whole_name_goes_before_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert path_and_column("x#y.csv") == ("x", "y.csv")
    Path("x#y.csv").write_text("prompt,Title\na,b\n")
    assert path_and_column("x#y.csv") == ("x#y.csv", "")
    assert path_and_column("x#y.csv#Title") == ("x#y.csv", "Title")
    assert [read_prompts(f"x#y.csv{column}").prompts[0].text for column in ("", "#Title")] == ["a", "b"]
    assert path_and_column("x.csv") == ("x.csv", "")


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("a.txt", b"x\ny\n", [("line 1", "x"), ("line 2", "y")]),
        ("a.JSON", b'["x"]', [("entry 1", "x")]),
        ("a.tsv", b"prompt\tn\nx\t1\n", [("line 2", {"prompt": "x", "n": "1"})]),
    ],
)
def test_rows_say_where_they_stand(name: str, data: bytes, rows: list[tuple[str, object]]):
    assert [*file_rows(data, name)] == rows
