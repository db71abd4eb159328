"""A guest that ends the process has failed; its forked processes, and everybody else, may end so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.guests.door import watched


def test_a_guest_raises_where_it_would_end_the_process():
    with watched():
        with pytest.raises(SystemExit) as error:
            os._exit(3)
        assert error.value.code == 3
        with pytest.raises(SystemExit, match="abort"):
            os.abort()
        with pytest.raises(SystemExit):
            in_thread(lambda: os._exit(4)).result(60)


def test_a_process_that_a_guest_forks_ends_as_it_asks_to():
    with watched():
        child = os.fork()
        if child == 0:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_outside_of_guests_the_way_is_open():
    program = "import os\nfrom ngrpo_lora.guests.door import watched\nwith watched(): pass\nos._exit(5)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 5
