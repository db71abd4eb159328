"""Pieces of the page escape what they are given."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ngrpo_lora.evaluation.report.markup import Html, escaped, picture, section, table, warning


def test_text_is_escaped_once_and_html_not_at_all():
    assert escaped('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert escaped(escaped("<b>")) == "&lt;b&gt;"
    assert escaped(Html("<b>")) == "<b>"
    assert escaped(3) == "3"


def test_tables_sections_and_warnings_escape_and_are_empty_without_contents():
    shown = table(("<i>", 2), [("<b>", Html("<em>x</em>"))])
    assert '<th dir="auto">&lt;i&gt;</th><th dir="auto">2</th>' in shown
    assert '<td dir="auto">&lt;b&gt;</td><td dir="auto"><em>x</em></td>' in shown
    assert table(("a",), []) == ""
    assert section("<s>", "", Html("")) == ""
    assert section("<s>", "<p>") == "<section>\n<h2>&lt;s&gt;</h2>\n<p>\n</section>"
    assert "&lt;s&gt;" in warning("<s>")


def test_a_picture_is_in_the_page_and_small_ones_keep_their_pixels(tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    Image.new("RGB", (640, 320), "red").save(tmp_path / "b.png")
    assert picture(tmp_path / "a.png", '"a"', 32).startswith('<img class="small" src="data:image/webp;base64,')
    assert picture(tmp_path / "a.png", '"a"', 32).endswith('alt="&quot;a&quot;">')
    assert picture(tmp_path / "b.png", "b", 32).startswith("<img src=")
