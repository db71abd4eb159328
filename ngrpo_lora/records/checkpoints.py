"""Checkpoints: everything that a run needs to go on exactly as if it had never stopped.

A folder `checkpoints/iteration-000050` holds `state.safetensors`, the tensors, and `state.json`, the rest, with the
SHA-256 of both. All randomness is a function of (seed, iteration, position), so there is no generator state to save.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import digest, no_room, written_folder

__all__ = [
    "checkpoint_dir",
    "checkpoints",
    "drop_after",
    "find",
    "iteration_of",
    "load",
    "newest_whole",
    "number",
    "resolve",
    "save",
]

log = logging.getLogger(__name__)

STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"
FORMER_FILE = "state.pt"  # of version 0.1.0: a pickle, read without running anything
FORMAT = 1
MARGIN_BYTES = 2**20  # for what is not tensors


def checkpoint_dir(output_dir: Path, iteration: int) -> Path:
    """Folder of the state after `iteration` iterations, such as `checkpoints/iteration-000050`."""
    return output_dir / "checkpoints" / f"iteration-{iteration:06d}"


def save(
    output_dir: Path,
    iteration: int,
    state: dict[str, Any],
    keep: int,
    beside: Callable[[Path], None] | None = None,
    kept: frozenset[int] = frozenset(),
) -> Path:
    """Write a checkpoint atomically, delete all but the newest `keep`, and return its folder.

    Args:
        beside: writes further files into the folder, before it takes its place.
        kept: iterations whose checkpoints stay as well.
    Raises:
        UserError: the disk has no room for it; the checkpoints before it are as they were.
    """
    from safetensors.torch import save_file  # torch takes longer to load than all that is done without a state

    from ngrpo_lora.records import trees

    tree, tensors = trees.split(state)
    final = checkpoint_dir(output_dir, iteration)
    needed = MARGIN_BYTES + sum(tensor.nbytes for tensor in tensors.values())
    with no_room(final, needed), written_folder(final) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS_FILE)
        if beside is not None:
            beside(partial)
        content = {"format": FORMAT, "tensors_sha256": digest(partial / TENSORS_FILE), "state": tree}
        (partial / STATE_FILE).write_text(json.dumps(content | {"sha256": own_digest(content)}), encoding="utf-8")
    for old in checkpoints(output_dir)[:-keep]:
        if number(old) not in kept:
            _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Remove a checkpoint, or the link to one elsewhere; what cannot be removed stays, as no run should end of it."""
    try:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    except OSError as error:  # such as a file that another machine holds open
        log.warning("checkpoint %s could not be removed: %s", folder, error)


def own_digest(content: dict[str, Any]) -> str:
    """SHA-256 of what `state.json` holds, but for this digest itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first; one that was not written to its end is none, nor is a copy."""
    folder = output_dir / "checkpoints"
    found = {path.parent for name in (STATE_FILE, FORMER_FILE) for path in folder.glob(f"iteration-*/{name}")}
    return sorted((one for one in found if re.fullmatch("iteration-[0-9]+", one.name)), key=number)


def number(folder: Path) -> int:
    """How many iterations a checkpoint's folder says it is after."""
    return int(folder.name.partition("-")[2])


def iteration_of(folder: Path) -> int | None:
    """How many iterations a whole checkpoint is after; None for a renamed one of version 0.1.0, which says it nowhere.

    A folder may have another name than the one that it was written with.
    """
    if (folder / STATE_FILE).is_file():
        return dict(json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["state"]["dict"])["iteration"]
    return number(folder) if re.fullmatch("iteration-[0-9]+", folder.name) else None


def find(resume: str, output_dir: Path) -> Path:
    """The folder of the newest whole checkpoint for `latest`, else that of the checkpoint at the path `resume`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if resume == "latest":
        folder = newest_whole(output_dir)
        if folder is None:
            raise UserError(f"resume=latest needs a checkpoint in {str(output_dir / 'checkpoints')!r}; there is none")
        return folder
    path = Path(resume)
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in (STATE_FILE, FORMER_FILE)):
        raise UserError(f"resume must be latest or the path of a checkpoint, but {resume!r} is none")
    if problem := damage(folder):
        raise UserError(f"checkpoint {str(folder)!r} is damaged ({problem}); resume from an older one")
    return folder


def resolve(resume: str | None, output_dir: Path) -> str | None:
    """What `resume=auto` means here: `latest` where there is a checkpoint, else None; other values mean themselves."""
    if resume != "auto":
        return resume
    return "latest" if checkpoints(output_dir) else None


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, None where there is no checkpoint; damaged ones after it are named.

    Raises:
        UserError: all are damaged.
    """
    found = checkpoints(output_dir)
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is damaged (%s); looking for the one before it", folder.name, problem)
    if found:
        raise UserError(
            f"all checkpoints in {str(output_dir / 'checkpoints')!r} are damaged; give another output_dir, with "
            f"lora.init_from={output_dir / 'adapter'} where its adapter is whole"
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with the contents of a checkpoint by its checksums; None where it is whole."""
    if not (folder / STATE_FILE).is_file():
        return None  # of version 0.1.0, which has no checksums
    stamps = tuple(
        (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
        for path in (folder / STATE_FILE, folder / TENSORS_FILE)
    )
    return _damage(folder, stamps)


@functools.lru_cache(32)  # the digest of a large one takes seconds
def _damage(folder: Path, stamps: tuple[object, ...]) -> str | None:
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        own = content.pop("sha256")
        if own != own_digest(content):
            return f"{STATE_FILE} is not what was written"
        if content["tensors_sha256"] != digest(folder / TENSORS_FILE):
            return f"{TENSORS_FILE} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{STATE_FILE} or {TENSORS_FILE} cannot be read: {error}"
    return None


def load(resume: str, output_dir: Path, device: str) -> dict[str, Any]:
    """Load the state of the `latest` whole checkpoint, or of the checkpoint at the path `resume`.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    folder = find(resume, output_dir)
    try:
        if not (folder / STATE_FILE).is_file():
            return _load_former(folder / FORMER_FILE, device)
        from safetensors.torch import load_file

        from ngrpo_lora.records import trees

        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"checkpoint {str(folder)!r} has format {content['format']}, this version reads {FORMAT}; update "
                "ngrpo-lora"
            )
        return trees.join(content["state"], load_file(folder / TENSORS_FILE, device))
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"checkpoint {str(folder)!r} cannot be read ({error}); resume from an older one") from error


def _load_former(path: Path, device: str) -> dict[str, Any]:
    """The state of a checkpoint of version 0.1.0."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError):
        raise
    except Exception as error:  # pickle.UnpicklingError and what zipfile raises share no base but this
        # Their text is left out: PyTorch's advises to load without its safeguard.
        raise UserError(f"checkpoint {str(path.parent)!r} is corrupt; resume from an older one") from error


def drop_after(output_dir: Path, iteration: int) -> None:
    """Remove what a run left after an iteration from which it goes on: checkpoints, evaluations, sample grids.

    What was half written when the run was killed goes as well. Lines of `metrics.jsonl` are its writer's.

    Args:
        iteration: the last one that stays; -1 for a run that starts anew.
    """
    later = [folder for folder in checkpoints(output_dir) if number(folder) > iteration]
    if later:
        names = ", ".join(folder.name for folder in later)
        log.info("going on after iteration %d; dropped, as they came later: %s", iteration, names)
    for folder in (*later, *(output_dir / "checkpoints").glob(".*.partial")):
        _remove(folder)
    for path in (*(output_dir / "evaluations").glob("*.jsonl"), *(output_dir / "samples").glob("*.png")):
        if path.stem.isdigit() and int(path.stem) > iteration:
            path.unlink()
