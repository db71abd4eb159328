"""What a run is asked for from outside: signals, and its own time limit."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from ngrpo_lora.training.asking import MAX_HOURS, Asked, listening

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("first", STOPPING)
@pytest.mark.parametrize("second", STOPPING)
def test_a_first_signal_asks_to_stop_and_a_second_stops(
    first: signal.Signals, second: signal.Signals, capsys: pytest.CaptureFixture[str]
):
    before = [signal.getsignal(one) for one in STOPPING]
    with listening(tell=True) as asked:
        assert asked.stop is None
        signal.raise_signal(first)
        assert asked.stop == {"SIGINT": "Ctrl-C"}.get(first.name, first.name)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert [signal.getsignal(one) for one in STOPPING] == before
    said = capsys.readouterr().err
    assert said.count(f"{asked.stop}: stopping after this iteration; a second one stops at once") == 1


def test_sigusr1_asks_for_a_checkpoint_once_and_stops_nothing():
    with listening(tell=False) as asked:
        assert not asked.take_save()
        signal.raise_signal(signal.SIGUSR1)
        assert asked.take_save()
        assert not asked.take_save()
        assert asked.stop is None


def test_a_time_limit_stops_before_the_iteration_that_would_pass_it():
    age = time.time() - psutil.Process().create_time()
    asked = Asked(max_hours=(age + 100) / 3600)
    assert asked.stop is None
    asked.lap -= 60  # an iteration of a minute
    asked.next_lap()
    assert asked.longest_s == pytest.approx(60, abs=1)
    assert asked.stop is None
    asked.lap -= 120  # one of two minutes
    asked.next_lap()
    assert asked.stop == MAX_HOURS
    assert Asked(max_hours=(age - 1) / 3600).stop == MAX_HOURS
    assert Asked().stop is None
