"""The process that measures what waits in a part's file: `python -m ngrpo_lora.bench.gpu FILE`."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from ngrpo_lora.bench.gpu.measuring import MEASURES
from ngrpo_lora.bench.gpu.results import State, read_result, waiting, write_result
from ngrpo_lora.config import parse_config
from ngrpo_lora.devices import is_out_of_memory, release_memory
from ngrpo_lora.errors import OutOfMemory, UserError, first_line

log = logging.getLogger(__name__)


def main(path: Path) -> None:
    """Measure one waiting row after the other, each in the file as soon as it is measured.

    Raises:
        SystemExit: a row has failed in a way after which a GPU may not be usable; the others wait for a new process.
    """
    result = read_result(path)
    for row in waiting(result):
        start = time.monotonic()
        row["state"], row["reason"], row["found"] = measured(result["kind"], row)
        row["took_s"] = time.monotonic() - start
        write_result(path, result)
        if row["state"] == "failed":
            raise SystemExit(1)
        release_memory()


def measured(kind: Any, row: dict[str, Any]) -> tuple[State, str | None, dict[str, Any]]:
    """What has become of a row: its state, the reason where it is not measured, and its figures."""
    try:
        return "measured", None, MEASURES[kind](parse_config(row["config"]))
    except OutOfMemory as error:
        return "out of memory", error.reason, {}
    except UserError as error:  # a quantisation that is not available here, a package that is not installed
        return "left out", first_line(error), {}
    except Exception as error:
        if is_out_of_memory(error):
            return "out of memory", first_line(error), {}
        log.exception("%s", row["label"])
        return "failed", first_line(error), {}


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    main(Path(sys.argv[1]))
