"""Pieces of HTML that the report is made of; whatever text comes in is escaped here or marked as `Html`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ngrpo_lora.evaluation.pages import data_uri, webp_uri

__all__ = ["Html", "escaped", "picture", "section", "table", "warning"]

SMALL_PX = 128  # pictures up to this size are enlarged without smoothing


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def escaped(text: object) -> Html:
    """Text as HTML, in which no character has a meaning of its own; `Html` passes unchanged."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def section(title: str, *parts: str) -> Html:
    """A heading and what stands below it, which is HTML; empty without anything."""
    body = "\n".join(part for part in parts if part)
    return Html(f"<section>\n<h2>{escaped(title)}</h2>\n{body}\n</section>" if body else "")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table that scrolls sideways where it is too wide; empty without rows."""
    if not rows:
        return Html("")

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} dir="auto">{escaped(cell)}</{tag}>' for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return Html(f'<div class="wide" tabindex="0"><table>\n{line(head, "th")}\n{body}\n</table></div>')


def warning(text: str) -> Html:
    """A sentence that should not be missed."""
    return Html(f'<p class="warning" role="note"><b aria-hidden="true">!</b> {escaped(text)}</p>')


def picture(path: Path, alt: str, longest_px: int) -> Html:
    """A picture of a file, within the page; of a video the clip that lies beside its frame."""
    with Image.open(path) as image:
        small = ' class="small"' if max(image.size) <= SMALL_PX else ""
    clip = path.with_suffix(".webp")
    uri = webp_uri(clip.read_bytes()) if clip.is_file() else data_uri(path, longest_px)
    return Html(f'<img{small} src="{uri}" alt="{escaped(alt)}">')
