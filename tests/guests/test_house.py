"""Guests in the house: what they change is put back, and those that change something are alone."""

from __future__ import annotations

import builtins
import gc
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.guests.house import HOUSE, Guest


def visit(guest: Guest, call: Callable[[], object] = lambda: None) -> object:
    def inside() -> object:
        with guest.inside():
            return call()

    return in_thread(inside).result(60)


def set_wide() -> None:
    torch.set_default_dtype(torch.float64)


def test_one_that_changes_nothing_is_known_after_its_first_call():
    guest = Guest("mine")
    assert not guest.known
    visit(guest)
    assert guest.known
    assert not HOUSE.inside


def test_what_it_changes_is_put_back_worn_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    guest, seen = Guest("reward mine"), []

    def call() -> None:
        seen.append((torch.get_default_dtype(), os.environ.get("OF_A_GUEST"), os.getcwd()))
        torch.set_default_dtype(torch.float64)
        os.environ["OF_A_GUEST"] = "1"
        os.chdir("/")

    for _ in range(2):
        visit(guest, call)
        assert (torch.get_default_dtype(), os.environ.get("OF_A_GUEST")) == (torch.float32, None)
        assert os.getcwd() == str(tmp_path)
    assert seen == [(torch.float32, None, str(tmp_path)), (torch.float64, "1", "/")]
    assert not guest.known
    assert caplog.text.count("reward mine changes torch's default dtype, the working folder, os.environ for") == 1


CHANGES: dict[str, Callable[[], object]] = {
    "anomaly detection": partial(torch.autograd.set_detect_anomaly, True),
    "a function of builtins": partial(setattr, builtins, "print", None),
    "a function of json": partial(setattr, json, "dumps", str),
    "a function of os": partial(setattr, os, "replace", print),
    "recursion limit": partial(sys.setrecursionlimit, 200),
    "hook of errors": partial(setattr, sys, "excepthook", print),
    "hook of warnings": partial(setattr, warnings, "showwarning", print),
    "hook of threads": partial(setattr, threading, "excepthook", print),
    "timeout of sockets": partial(socket.setdefaulttimeout, 3),
    "permissions": partial(os.umask, 0o777),
    "garbage": gc.disable,
    "inference mode": lambda: torch.inference_mode().__enter__(),
}


@pytest.mark.parametrize("name", [*CHANGES])
def test_whatever_a_guest_changes_is_put_back(name: str):
    def now() -> list[object]:
        of_python = [builtins.print, json.dumps, os.replace, sys.getrecursionlimit(), gc.isenabled()]
        hooks = [sys.excepthook, warnings.showwarning, threading.excepthook, socket.getdefaulttimeout()]
        mask = os.umask(0o077)
        os.umask(mask)
        return [*of_python, *hooks, mask, torch.is_anomaly_enabled(), torch.is_inference_mode_enabled()]

    before, guest = now(), Guest("mine")
    visit(guest, CHANGES[name])
    assert now() == before
    assert guest.known is (name == "inference mode")  # which ends with its thread


def test_what_it_had_at_its_import_is_there_when_it_is_called():
    guest = Guest("mine", {"torch's default dtype": torch.float64, "sys.argv": ["x"]})
    assert visit(guest, torch.get_default_dtype) == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_what_a_first_call_loads_does_not_keep_it_alone(caplog: pytest.LogCaptureFixture):
    import warnings

    guest = Guest("mine")
    before = [*warnings.filters]
    visit(guest, lambda: warnings.simplefilter("error"))
    assert warnings.filters == before
    assert not guest.known
    visit(guest)
    assert guest.known
    assert "mine changes" not in caplog.text


def test_one_that_changes_something_later_is_alone_from_then_on():
    guest, other = Guest("mine"), Guest("other")
    visit(guest), visit(other)
    visit(guest, set_wide)
    assert torch.get_default_dtype() == torch.float32
    assert (guest.known, other.known) == (False, True)


def test_others_wait_while_one_is_alone_and_known_ones_are_there_together():
    one, two, new = Guest("one"), Guest("two"), Guest("new")
    visit(one), visit(two)
    together, order = threading.Barrier(2), []

    def meet(name: str) -> None:
        together.wait(60)
        time.sleep(0.1)
        order.append(name)

    calls = [in_thread(lambda guest=guest: visit(guest, lambda: meet("known"))) for guest in (one, two)]
    while len(HOUSE.inside) < 2:
        time.sleep(0.01)
    calls.append(in_thread(lambda: visit(new, lambda: order.append(f"new, beside {len(HOUSE.inside)}"))))
    for call in calls:
        call.result(60)
    assert order == ["known", "known", "new, beside 0"]


def test_a_guest_that_calls_another_does_not_wait_for_itself():
    assert visit(Guest("outer"), lambda: visit(Guest("inner"), lambda: 7)) == 7
