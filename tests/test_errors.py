"""What a user reads of an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ngrpo_lora.errors import ConfigError, SharedError, UserError, first_line

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("given", "problems"), [("one", ("one",)), (["one", "two"], ("one", "two"))])
def test_every_problem_of_a_configuration_is_a_line(given: str | list[str], problems: tuple[str, ...]):
    error = ConfigError(given)
    assert error.problems == problems
    assert str(error).splitlines() == [*problems]


def test_no_message_installs_this_package_from_an_index_that_has_it_not():
    wrong = re.compile(r"pip install [^\n]*ngrpo[-_]lora")
    sources = [path for folder in ("ngrpo_lora", "comfy_nodes") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    assert not [path for path in sources if wrong.search(path.read_text(encoding="utf-8"))]


def test_all_that_a_user_can_act_on_is_caught_as_one():
    assert all(issubclass(kind, UserError) for kind in (ConfigError, SharedError))
    assert issubclass(ConfigError, ValueError)  # which pydantic turns into a problem of its own


@pytest.mark.parametrize(
    ("error", "gist"), [(ValueError("one\ntwo"), "one"), (ValueError(""), "ValueError"), (KeyError(), "KeyError")]
)
def test_the_gist_is_the_first_line_else_what_it_is(error: Exception, gist: str):
    assert first_line(error) == gist
