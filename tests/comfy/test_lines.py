"""Texts of nodes that hold a prompt, a mapping or a setting a line: lines end where those of files do."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ngrpo_lora.prompts.tables import file_rows

WITHIN = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]
"""What ends a line for `str.splitlines`, and may come with a prompt that was copied from a page."""


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("within", WITHIN)
def test_lines_of_a_text_are_those_of_a_file(within: str, end: str):
    from comfy_nodes.runs import prompt_lines
    from comfy_nodes.scoring import samples_of

    prompts = [f"a red star{within}on a table", "a cat"]
    text = f"{end}{prompts[0]}{end}  {end}{prompts[1]}{end}"
    assert [line.strip() for _, line in file_rows(text.encode(), "prompts.txt") if line.strip()] == prompts
    assert prompt_lines(text) == prompts
    escaped = within == "\x85"  # in YAML, as which nodes read metadata, it is a space
    metadata = end.join(json.dumps({"text": prompt}, ensure_ascii=escaped) for prompt in prompts)
    samples = samples_of([Image.new("RGB", (8, 8))] * 2, text, metadata)
    assert [*samples.prompts] == prompts
    assert [row["text"] for row in samples.metadata] == prompts


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("within", WITHIN)
def test_a_setting_may_hold_what_is_no_end_of_a_line(within: str):
    from comfy_nodes.runs import configure

    setting = f"model.negative_prompt=grey{within}dull"
    assert configure("demo", "a", f"# a note\n{setting}\n", 1, 0).model.negative_prompt == f"grey{within}dull"
