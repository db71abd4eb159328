"""Finds the LoRA file that a user names: a file, a run's folder or a Hub repository, perhaps with a strength."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.world import ADAPTERS

__all__ = ["adapter_label", "find_adapter"]


FILE_NAME = "pytorch_lora_weights.safetensors"  # of every adapter that is written here
STANDARD_NAMES = (FILE_NAME, "adapter_model.safetensors")  # diffusers', PEFT's
PLACES = "a LoRA file, a run's folder or a repository of the Hub (owner/name)"
NO_OTHER = "no other safetensors file"
HUB_FILE = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_adapter(path: str | Path, what: str = "adapter") -> Path:
    """The path of a LoRA file, given that file, its folder, its run's folder or its repository on the Hub.

    A local path comes first; otherwise `embedded-turbo` is the package's own, `owner/name` a repository, and
    `owner/name/file.safetensors` a file of one.

    Raises:
        ConfigError: nothing there, or several adapters in a place that names none of them as diffusers or PEFT do.
        UserError: it cannot be had from the Hub.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        path = ADAPTERS.get(str(path), path)
    if not path.is_dir():
        if (found := re.fullmatch(HUB_FILE, path.as_posix())) is None:
            raise ConfigError(f"{what} must be {PLACES}, but {str(path)!r} does not exist")
        return _download(found[1], found[2], what)
    for folder in (path, path / "adapter"):
        if name := the_adapter((file.name for file in folder.glob("*")), str(folder), what):
            return folder / name
    raise ConfigError(f"{what} must be {PLACES}, but {str(path)!r} holds no {STANDARD_NAMES[0]} and {NO_OTHER}")


def the_adapter(names: Iterable[str], where: str, what: str) -> str | None:
    """The name of the one adapter among a folder's files, or None where there is none.

    Raises:
        ConfigError: several, of which none is named as diffusers or PEFT do.
        UserError: a pickle file and nothing else.
    """
    inside = sorted(names)
    named = [name for name in STANDARD_NAMES if name in inside]
    found = named or [name for name in inside if name.endswith(".safetensors")]
    if len(found) > 1:
        raise ConfigError(f"{what} must be one LoRA, but {where!r} holds {' and '.join(found[:3])}; give the file")
    if not found and (pickles := [name for name in inside if name.endswith(PICKLE_SUFFIXES)]):
        refuse_pickle(Path(where, pickles[0]))
    return found[0] if found else None


def _download(repo: str, name: str | None, what: str) -> Path:
    """The path of a Hub repository's file, or of its adapter where `name` is None, downloaded or from the cache."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from ngrpo_lora.downloads import download, hub_errors

    if name is not None:
        refuse_pickle(Path(repo, name))
    shown = repr(repo if name is None else f"{repo}/{name}")
    with hub_errors(f"{what} {shown} is no file or folder here, and the repository {repo!r}", repo, "a local file"):
        try:
            return Path(download(repo, name or STANDARD_NAMES[0]))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            inside = [file.rfilename for file in model_info(repo).siblings or [] if "/" not in file.rfilename]
        if name is None and (found := the_adapter(inside, repo, what)):
            if found == STANDARD_NAMES[1] and "adapter_config.json" in inside:
                download(repo, "adapter_config.json")  # where PEFT says alpha
            return Path(download(repo, found))
    missing = f"{STANDARD_NAMES[0]} and {NO_OTHER}" if name is None else name
    raise ConfigError(f"{what} must be {PLACES}, but {repo!r} on the Hub holds no {missing}")


def adapter_label(path: Path) -> str:
    """A short name for an adapter: its file's, or its run's or repository's where the file has a standard name."""
    folder = Path(os.path.abspath(path)).parent  # the Hub's cache has links, to files with numbers for names
    run = folder.parent if folder.name == "adapter" else folder
    if folder.parent.name == "snapshots":
        run = Path(folder.parent.parent.name.rpartition("--")[2])
    return re.sub(r"[^\w.-]+", "-", run.name if path.name in STANDARD_NAMES else path.stem)


def refuse_pickle(path: Path) -> None:
    """Raise UserError for a pickle file, by its name or its first bytes; nothing of it is unpickled."""
    pickled = path.suffix in PICKLE_SUFFIXES
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(8)  # of torch.save's archive, or of a bare pickle; of safetensors the header's length
        pickled = pickled or start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and any(start[4:]))
    if pickled:
        raise UserError(
            f"adapter {str(path)!r} is a pickle file, which can run any code when it is loaded; give a .safetensors "
            "file, or have whoever made this one convert it"
        )
