"""What a user reads of an error."""

from __future__ import annotations

import pytest

from ngrpo_lora.errors import ConfigError, SharedError, UserError, first_line


@pytest.mark.parametrize(("given", "problems"), [("one", ("one",)), (["one", "two"], ("one", "two"))])
def test_every_problem_of_a_configuration_is_a_line(given: str | list[str], problems: tuple[str, ...]):
    error = ConfigError(given)
    assert error.problems == problems
    assert str(error).splitlines() == [*problems]


def test_all_that_a_user_can_act_on_is_caught_as_one():
    assert all(issubclass(kind, UserError) for kind in (ConfigError, SharedError))
    assert issubclass(ConfigError, ValueError)  # which pydantic turns into a problem of its own


@pytest.mark.parametrize(
    ("error", "gist"), [(ValueError("one\ntwo"), "one"), (ValueError(""), "ValueError"), (KeyError(), "KeyError")]
)
def test_the_gist_is_the_first_line_else_what_it_is(error: Exception, gist: str):
    assert first_line(error) == gist
