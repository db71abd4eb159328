"""Lets `python -m ngrpo_lora` run the command `ngrpo`."""

from ngrpo_lora.cli import app

app()
