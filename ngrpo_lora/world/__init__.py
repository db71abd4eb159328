"""The embedded world: captioned scenes of coloured shapes, their renderer and an exact verifier.

It gives the embedded FLUX model something to draw and a reward that reads pixels, so that the whole
trainer runs on any laptop and its progress is provable.
"""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "model"
"""The diffusers folder behind `model.path: embedded`."""

EMBEDDED_EDIT = Path(__file__).parent / "edit_model"
"""The diffusers folder behind `model.path: embedded-edit`."""

MODELS = {"embedded": EMBEDDED, "embedded-edit": EMBEDDED_EDIT}
"""The folders in the package, by `model.path`."""
