"""The embedded world: captioned scenes of coloured shapes, their renderer and an exact verifier.

It gives the embedded FLUX model something to draw and a reward that reads pixels, so that the whole
trainer runs on any laptop and its progress is provable.
"""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "model"
"""The diffusers folder behind `model.path: embedded`."""

EMBEDDED_EDIT = Path(__file__).parent / "edit_model"
"""The diffusers folder behind `model.path: embedded-edit`."""

EMBEDDED_TURBO = Path(__file__).parent / "turbo"
"""The folder of the LoRA behind `model.fuse: embedded-turbo`, which distils the embedded model into four steps."""

MODELS = {"embedded": EMBEDDED, "embedded-edit": EMBEDDED_EDIT}
"""The folders in the package, by `model.path`."""

ADAPTERS = {"embedded-turbo": EMBEDDED_TURBO}
"""The folders of LoRAs in the package, by the names that stand for them wherever an adapter is asked for."""

HELD_OUT = {"embedded": "world:held_out", "embedded-edit": "edits:held_out"}
"""Prompts that no training of these models has seen, by `model.path`."""
