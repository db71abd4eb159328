"""The README files: their links lead somewhere, their commands exist, and the first one stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from ngrpo_lora.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [page for room in ("comfy_nodes", "ngrpo_lora", "pipelines") for page in (ROOT / room).rglob("README.md")]
)
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    """The links of a page whose file, or whose heading in it, is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        file = target / "README.md" if target.is_dir() else target
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    return broken


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's code blocks that call `ngrpo`, as words."""
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    lines = [
        line
        for language, block in blocks
        if not language
        for line in block.splitlines()
        if re.match(r"([A-Z_]+=\S+ )*ngrpo ", line)
    ]
    return [(words := shlex.split(line, comments=True))[words.index("ngrpo") + 1 :] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path):
    (tmp_path / "other.md").write_text("# A Head, & more\n")
    page = tmp_path / "README.md"
    page.write_text("# x\n[a](other.md#a-head--more) [b](other.md#b) [c](none.md) [d](#x) [e](https://example.org)\n")
    assert broken_links(page) == ["other.md#b", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page: Path):
    for words in commands(page):
        command = COMMANDS[words.pop(0)]
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, "--help")}
        assert {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} <= known, words


def test_the_first_page_is_short_and_has_commands():
    page = ROOT / "README.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 200
    assert len(commands(page)) >= 8
