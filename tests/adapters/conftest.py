"""What the tests of LoRA files share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """What diffusers warns of is not what tests look for in the log."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
