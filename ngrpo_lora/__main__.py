"""`python -m ngrpo_lora` is `ngrpo`."""

from ngrpo_lora.cli.app import app

app()
