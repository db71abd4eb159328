"""Trials in a process of their own: real ones, and some that fail, crash and hang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ngrpo_lora.devices import resolve_device, resolve_dtype
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.doctor import trials
from ngrpo_lora.planning.doctor.findings import Finding

DEVICE = resolve_device("auto")


def child(code: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setattr(trials, "CHILD", code)
    return trials.tried("x", "anything", "mend it")


def test_the_embedded_model_computes_here():
    (finding,) = trials.embedded_model()
    said = f"a forward pass on {DEVICE} in {resolve_dtype('auto', DEVICE)} gives finite numbers"
    assert finding == Finding("embedded model", "ok", said)


def test_bitsandbytes_computes_here():
    pytest.importorskip("bitsandbytes")
    (finding,) = trials.eight_bit()
    assert finding == Finding("8-bit", "ok", f"AdamW and NF4 compute on {DEVICE}")


def test_a_wrong_step_and_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *stored: torch.full((), torch.nan))
        with pytest.raises(UserError, match="wrong numbers in NF4"):
            trials.optimizer_step()
    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", lambda *a, **k: SimpleNamespace(step=lambda: None))
    with pytest.raises(UserError, match="wrong step of AdamW"):
        trials.optimizer_step()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.0])
def test_a_forward_pass_without_sense_is_seen(wrong: float, monkeypatch: pytest.MonkeyPatch):
    class Family(SimpleNamespace):
        def velocity(self, latents: torch.Tensor, sigma: float, text: Any) -> torch.Tensor:
            return latents * wrong

    family = Family(latent_shape=(4, 8, 8), device="cpu", dtype=torch.float32, encode=lambda prompts: prompts)
    monkeypatch.setattr("ngrpo_lora.models._loading.load_family", lambda config: family)
    with pytest.raises(UserError, match="not finite, or all the same"):
        trials.forward_pass()


def test_an_error_is_its_first_line_and_no_traceback():
    finding = trials.tried("x", "no_such_trial", "mend it")
    said = "AttributeError: module 'ngrpo_lora.planning.doctor.trials' has no attribute 'no_such_trial'"
    assert finding == Finding("x", "problem", said, "mend it")


def test_a_process_that_crashes_hangs_or_ends_silently(monkeypatch: pytest.MonkeyPatch):
    crash = child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    assert crash == Finding("x", "problem", "crashed (SIGSEGV)", "mend it")
    assert child("raise SystemExit(7)", monkeypatch) == Finding("x", "problem", "ended with status 7", "mend it")
    monkeypatch.setattr(trials, "LIMIT_S", 1)
    hang = child("import time; time.sleep(60)", monkeypatch)
    assert hang == Finding("x", "problem", "did not end within 1 seconds", "mend it")
