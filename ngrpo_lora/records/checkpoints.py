"""Checkpoints: everything that a run needs to go on exactly as if it had never stopped.

All randomness is a function of (seed, iteration, position), so there is no generator state to save.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import written_folder

STATE_FILE = "state.pt"


def checkpoint_dir(output_dir: Path, iteration: int) -> Path:
    """Folder of the state after `iteration` iterations, such as `checkpoints/iteration-000050`."""
    return output_dir / "checkpoints" / f"iteration-{iteration:06d}"


def save(output_dir: Path, iteration: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically, delete all but the newest `keep`, and return its folder."""
    import torch  # takes longer to load than all that is done without a state

    final = checkpoint_dir(output_dir, iteration)
    with written_folder(final) as partial:
        partial.mkdir()
        torch.save(state, partial / STATE_FILE)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of a run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in (output_dir / "checkpoints").glob(f"iteration-*/{STATE_FILE}"))


def load(resume: str, output_dir: Path, device: str) -> dict[str, Any]:
    """Load the state of the `latest` checkpoint, or of the checkpoint at the path `resume`.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    if resume == "latest":
        found = checkpoints(output_dir)
        if not found:
            raise UserError(f"resume=latest needs a checkpoint in {str(output_dir / 'checkpoints')!r}; there is none")
        path = found[-1]
    else:
        path = Path(resume)
    import torch

    try:
        return torch.load(path / STATE_FILE if path.is_dir() else path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be read ({error}); resume from an older one") from error
    except Exception as error:  # pickle.UnpicklingError and what zipfile raises share no base but this
        # Their text is left out: PyTorch's advises to load without its safeguard.
        raise UserError(f"checkpoint {str(path)!r} is corrupt; resume from an older one") from error
