"""One process at a time owns a run's folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ngrpo_lora.errors import UserError
from ngrpo_lora.records.ownership import making, owned, owner

HOLDER = """
import sys, time
from pathlib import Path
from ngrpo_lora.records.ownership import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_owner_who_is_named(tmp_path: Path):
    folder = tmp_path / "run"
    assert owner(folder) is None
    with owned(folder):
        expected = (
            rf"is in use \(process {os.getpid()} on .*, since \d{{4}}-.*\); wait for it or end it, or give another"
        )
        with pytest.raises(UserError, match=expected), owned(folder):
            pass
        said = owner(folder)
        assert said is not None
        assert f"process {os.getpid()} on" in said
    assert owner(folder) is None
    with owned(folder):
        pass


def test_a_killed_process_owns_nothing(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        said = owner(tmp_path)
        assert said is not None
        assert f"process {holder.pid} on" in said
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 5
    while owner(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert owner(tmp_path) is None
    with owned(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("ngrpo_lora.records.ownership.FileLock.acquire", none)
    with owned(tmp_path):
        assert "cannot be locked (FileSystem does not appear" in caplog.text
    assert owner(tmp_path) is None


@pytest.mark.parametrize("ending", [None, UserError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [0, 1, 2])
@pytest.mark.parametrize("left", [None, "config.yaml"])
def test_an_owned_folder_goes_again_where_nothing_came_into_it(
    ending: type[BaseException] | None, existed: int, left: str | None, tmp_path: Path
):
    folder = tmp_path / "runs" / "one"
    folders = [folder.parent, folder]
    for one in folders[:existed]:
        one.mkdir()
    with contextlib.suppress(*([ending] if ending else [])), owned(folder):
        if left:
            (folder / left).touch()
        if ending:
            raise ending
    assert [one.exists() for one in folders] == [left is not None or existed > at for at in range(2)]
    if folder.exists():
        assert sorted(path.name for path in folder.iterdir()) == ([".lock", left] if left else [])


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_is_made_to_try_it_goes_again(existed: bool, tmp_path: Path):
    folder = tmp_path / "a" / "b"
    if existed:
        folder.mkdir(parents=True)
    with making(folder):
        assert folder.is_dir()
    assert folder.exists() == folder.parent.exists() == existed
