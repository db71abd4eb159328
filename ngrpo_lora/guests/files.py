"""Imports files and modules of the user's: with the files beside them, and with one message where that fails.

A file may import its neighbours as a script does, and no other file sees them: they are modules of a package that is
named for their folder, and `import` in them looks there first. `sys.path` stays as it is.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import importlib.util
import io
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ngrpo_lora.errors import ConfigError, first_line
from ngrpo_lora.guests.door import watched
from ngrpo_lora.guests.house import Changes, kept

__all__ = ["failure", "import_guest", "left_at_import"]

PREFIX = "ngrpo_beside_"
"""Of the packages that stand for folders of guests."""

_left: dict[str, Changes] = {}


def left_at_import(target: str) -> Changes:
    """What the file or module `target` changed of the process when it was imported, and may need when it is called."""
    return _left.get(_key(target), {})


def import_guest(target: str) -> ModuleType:
    """Import `file.py` or `package.module` of the user's; what it changes of the process is put back.

    Raises:
        ConfigError: it fails, or calls exit; the message begins with a verb, as `names the file 'x.py', ...`.
        ImportError: one of its own imports fails.
    """
    with watched(), kept({}) as changes, _as_a_library(target):
        is_new = not target.endswith(".py") or _module_name(Path(target)) not in sys.modules
        module = _load_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    if is_new and (changes or _key(target) not in _left):
        _left[_key(target)] = changes
    return module


def _key(target: str) -> str:
    return str(Path(target).resolve()) if target.endswith(".py") else target


@contextlib.contextmanager
def _as_a_library(target: str) -> Iterator[None]:
    """Hide the command line from what is imported, and put its failure into words."""
    arguments, sys.argv = sys.argv, [target]
    printed, stderr = io.StringIO(), sys.stderr
    interrupted = threading.Event()
    try:
        with contextlib.redirect_stderr(printed), _noticing_ctrl_c(interrupted):
            yield
    except (ImportError, ConfigError):
        raise
    except KeyboardInterrupt as error:
        if interrupted.is_set():
            raise
        raise failure(target, error) from error
    except BaseException as error:
        if isinstance(error, SystemExit):  # what it printed is how a script is used
            printed = io.StringIO()
        raise failure(target, error) from error
    finally:
        sys.argv = arguments
        stderr.write(printed.getvalue())


@contextlib.contextmanager
def _noticing_ctrl_c(interrupted: threading.Event) -> Iterator[None]:
    """Tell the user's Ctrl-C from a KeyboardInterrupt that a file raises itself."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def notice(signum: int, frame: Any) -> None:
        interrupted.set()
        before(signum, frame)

    signal.signal(signal.SIGINT, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def failure(target: str, error: BaseException) -> ConfigError:
    """Say in one line, which begins with a verb, where and why the file or module `target` failed at its import."""
    what = "file" if target.endswith(".py") else "module"
    message = re.sub(rf"{PREFIX}\w+\.", "", first_line(error))
    place, reason = _place(target, error), f"{type(error).__name__}: {message}"
    if isinstance(error, SystemExit):
        return ConfigError(
            f"names the {what} {target!r}, which ends the program when it is imported ({place}); put what it does as a "
            'script, such as reading arguments, under if __name__ == "__main__":'
        )
    return ConfigError(f"names the {what} {target!r}, which fails when it is imported ({place}: {reason}); correct it")


def _place(target: str, error: BaseException) -> str:
    """The last line of the user's own code on the way to an error, such as `mine.py, line 3`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    folder = Path(target).resolve().parent if target.endswith(".py") else None
    paths = [Path(one.filename).resolve() for one in frames]
    of_user = [folder in path.parents and "site-packages" not in path.parts for path in paths]
    own = [one for one, is_own in zip(frames, of_user, strict=True) if is_own]
    found = (own or frames)[-1]
    return f"{Path(found.filename).name}, line {found.lineno}"


def _module_name(path: Path) -> str:
    contents = str(path.resolve()).encode() + path.read_bytes()
    return f"ngrpo_user_{path.stem}_{hashlib.sha256(contents).hexdigest()[:8]}"


def _load_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once per contents, so that pickling and repeated look-ups work."""
    name = _module_name(path)
    if name not in sys.modules:
        importlib.invalidate_caches()  # files beside it may be new
        loader = _GuestLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class _GuestLoader(SourceFileLoader):
    """Runs a file so that its imports look beside it first."""

    def exec_module(self, module: ModuleType) -> None:
        inside = module.__name__.partition(".")[0]
        package = inside if inside.startswith(PREFIX) else _package_of(Path(self.path).resolve().parent)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _Import(package)}
        super().exec_module(module)


def _package_of(folder: Path) -> str:
    """The package, made when it is first asked for, whose modules are the files of a folder."""
    name = PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name, f"The files in {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return name


class _Finder:
    """Finds the modules of such packages, to be run by `_GuestLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as Python does; None where it is of no such package."""
        if not name.startswith(PREFIX) or path is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _GuestLoader(spec.loader.name, spec.loader.path)
        return spec


class _Import:
    """What `import` does in a guest's file: a neighbour comes before what is installed, but not before Python's own."""

    def __init__(self, package: str):
        self.package, self.importlib = package, _Importlib(self)

    def __call__(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or not self.is_beside(top):
            found = builtins.__import__(name, globals, locals, fromlist or (), level)
            return self.importlib if found is importlib else found
        own_name = f"{self.package}.{name}"
        if fromlist:
            return builtins.__import__(own_name, globals, locals, fromlist, 0)
        importlib.import_module(own_name)
        return sys.modules[f"{self.package}.{top}"]

    def is_beside(self, top: str) -> bool:
        """Whether a top-level name means a neighbour."""
        if top in sys.stdlib_module_names or top == "ngrpo_lora":
            return False
        if f"{self.package}.{top}" in sys.modules:
            return True
        spec = PathFinder.find_spec(top, sys.modules[self.package].__path__)
        if spec is None:
            return False
        # A folder without __init__.py is a module where nothing else has its name.
        return spec.origin is not None or (top not in sys.modules and importlib.util.find_spec(top) is None)


class _Importlib(ModuleType):
    """Python's importlib as a guest's file has it: its `import_module` finds neighbours too."""

    def __init__(self, imports: _Import):
        super().__init__(importlib.__name__, importlib.__doc__)
        self._imports = imports

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib, name)

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """Import a module by its name, a neighbour before what is installed."""
        beside = not name.startswith(".") and self._imports.is_beside(name.partition(".")[0])
        return importlib.import_module(f"{self._imports.package}.{name}" if beside else name, package)
