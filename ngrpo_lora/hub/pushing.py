"""Pushes runs to the Hub: access is checked before training, no push delays it, and no failure costs the adapter.

What the client does itself: it retries uploads, and sends no large file that the Hub has already, so that an
interrupted push goes on where it was. The rest is here: a push is one commit, tried again where that can help, within
`hub.timeout_s`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import HubConfig, dump_config, load_config
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.metrics import read_metrics

__all__ = ["Pusher", "check_access", "explain", "push", "push_run"]

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # where the Hub does not say how long
MAX_WAIT_S = 300.0  # of all waits together; the Hub counts requests in windows of five minutes
CHECK_TIMEOUT_S = 60.0
PICTURES = ("summary.png", "samples/*.png", "samples/first/*.png", "samples/last/*.png")


class Pushed(NamedTuple):
    """Result of a push: the address of its page, and the branch or pull request that the next push goes on with."""

    url: str
    revision: str | None


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def check_access(hub: HubConfig) -> None:
    """Make sure that `hub.repo` can be pushed to: token, repository and branch, which are made when missing.

    Raises:
        UserError: what stands in the way, with the remedy.
    """
    try:
        within(CHECK_TIMEOUT_S, lambda: _check_access(hub))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"hub.repo {hub.repo!r} cannot be pushed to: {explain(error)}") from None


def _check_access(hub: HubConfig) -> None:
    api, repo = HfApi(), str(hub.repo)
    api.whoami()
    if not hub.create_pr:  # for which reading is enough
        api.create_repo(repo, private=hub.private or None, exist_ok=True)
        api.auth_check(repo, write=True)
    if hub.private and not api.repo_info(repo).private:
        raise UserError(
            f"hub.private is true, but {repo!r} is there and public; make it private in its settings, "
            "or give another hub.repo"
        )
    if hub.revision is not None and not hub.revision.startswith("refs/"):
        api.create_branch(repo, branch=hub.revision, exist_ok=True)
    else:
        api.repo_info(repo, revision=hub.revision)


# ---------------------------------------------------------------------------------------------------------------------
# A push


def push(run: Path, hub: HubConfig) -> Pushed:
    """Push the newest adapter of a run, with its card, pictures and figures, as one commit.

    Raises:
        UserError: the run has no adapter yet.
        Exception: any error of the Hub's client; `explain` puts it into words.
    """
    with tempfile.TemporaryDirectory(prefix=".push-", dir=run, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        iterations = stage(run, folder, hub)
        message = hub.commit_message or f"LoRA after {iterations} iterations"
        return retried(lambda: _commit(folder, hub, message))


def _commit(folder: Path, hub: HubConfig, message: str) -> Pushed:
    api, repo = HfApi(), str(hub.repo)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    commit = api.create_commit(repo, operations, commit_message=message, revision=hub.revision, create_pr=hub.create_pr)
    if commit.pr_url is not None:
        return Pushed(commit.pr_url, commit.pr_revision)
    return Pushed(f"{api.endpoint}/{repo}" + (f"/tree/{hub.revision}" if hub.revision else ""), hub.revision)


def stage(run: Path, folder: Path, hub: HubConfig) -> int:
    """Copy into `folder` what is pushed, as it is now; training goes on and replaces the run's own files.

    Returns:
        How many iterations the adapter was trained for.
    """
    from ngrpo_lora.evaluation.runs import compare_evaluations
    from ngrpo_lora.hub.card import base_license, write_card
    from ngrpo_lora.hub.pipeline_file import PIPELINE, SCHEDULER, has_pipeline, pipeline_file, scheduler_file
    from ngrpo_lora.hub.usage import read_pushed

    adapter, repo = newest_adapter(run), str(hub.repo)
    link(adapter, folder / FILE_NAME)
    pushed = read_pushed(folder / FILE_NAME)
    if has_pipeline(pushed.pipeline):
        (folder / PIPELINE).write_text(pipeline_file(pushed.pipeline), encoding="utf-8")
    else:
        (folder / SCHEDULER).write_text(scheduler_file(), encoding="utf-8")
    found = re.fullmatch(r"iteration-(\d+)", adapter.parent.name)
    iterations = int(found[1]) if found else read_metrics(run / "metrics.jsonl")[-1]["step"]
    config = load_config(run / "config.yaml")
    # To whoever runs it again, this run's folders and repository are of no use.
    again = f"runs/{repo.partition('/')[2]}"
    public = config.model_copy(update={"hub": HubConfig(), "resume": None, "output_dir": again})
    (folder / "config.yaml").write_text(dump_config(public), encoding="utf-8")
    for path in (path for pattern in PICTURES for path in run.glob(pattern)):
        copy = folder / path.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    differences = []
    with tempfile.TemporaryDirectory() as figures, contextlib.suppress(ConfigError):  # one evaluation is no comparison
        differences = compare_evaluations(run, Path(figures))
        (table,) = Path(figures).glob("*.csv")
        shutil.copyfile(table, folder / "evaluation.csv")
    branch = None if (hub.revision or "").startswith("refs/") else hub.revision  # a pull request is for the main one
    license = base_license(config.model.path)
    card = write_card(folder, repo, config, iterations, differences, license, branch)
    card.save(folder / "README.md")
    return iterations


def newest_adapter(run: Path) -> Path:
    """The exported adapter, or that of the last checkpoint where it is newer.

    Raises:
        UserError: the run has no adapter yet.
    """
    found = adapters(run)
    if not found:
        raise UserError(f"{str(run)!r} holds no adapter yet; the first checkpoint of a run has one")
    return found[-1]


def adapters(run: Path) -> list[Path]:
    """Adapter files of the checkpoints, and the exported one, the newest last."""
    found = [*run.glob(f"checkpoints/iteration-*/{FILE_NAME}"), *run.glob(f"adapter/{FILE_NAME}")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def link(source: Path, target: Path) -> None:
    """Link a file, which is only ever replaced as a whole, under a second name; copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def push_run(run: Path, hub: HubConfig) -> str:
    """Push a finished or interrupted run, and wait for it; returns the address.

    Raises:
        UserError: what stood in the way, with the remedy.
    """
    from ngrpo_lora.reports.curves import write_summary

    newest_adapter(run)
    check_access(hub)
    metrics, summary = run / "metrics.jsonl", run / "summary.png"
    drawn = summary.exists() and summary.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    if not drawn and any(run.glob("samples/*.png")) and read_metrics(metrics):
        write_summary(run)
    return Pusher(run, hub).finish()


class Pusher:
    """Pushes a run in a thread of its own, one push at a time; one more may wait, and takes the newest files then.

    The thread is a daemon, unlike that of the client's `run_as_future`, which Python waits for at its end: an upload
    that hangs would keep the process beyond `hub.timeout_s`.
    """

    def __init__(self, run: Path, hub: HubConfig):
        self.run, self.hub = run, hub
        self.waiting: queue.Queue[Future[str]] = queue.Queue(1)
        self.warned = False
        threading.Thread(target=self._work, name="push", daemon=True).start()

    def start(self) -> None:
        """Ask for a push of the last checkpoint, and return at once; a failure is logged once and stops nothing."""
        from ngrpo_lora.reports.curves import write_summary

        if self.waiting.full():
            return  # the one that waits will do
        disable_progress_bars()  # training shows its own
        with contextlib.suppress(OSError):  # an older picture will do
            write_summary(self.run)
        future: Future[str] = Future()
        future.add_done_callback(self._report)
        self.waiting.put_nowait(future)

    def finish(self) -> str:
        """Push a last time, wait for it, and return its address.

        Raises:
            UserError: it failed; says why, where the adapter is, and how to try again.
        """
        with contextlib.suppress(queue.Empty):
            self.waiting.get_nowait()
        console.print(f"pushing to                {self.hub.repo}")
        if sys.stderr.isatty():
            enable_progress_bars()
        else:
            disable_progress_bars()
        future: Future[str] = Future()
        self.waiting.put(future)
        try:
            return future.result(self.hub.timeout_s)
        except KeyboardInterrupt:
            why = "it was interrupted"
        except Exception as error:
            timed_out = not future.done()
            why = f"it took longer than hub.timeout_s ({self.hub.timeout_s:g} s)" if timed_out else explain(error)
        raise UserError(self._failure(why))

    def _work(self) -> None:
        while True:
            future = self.waiting.get()
            try:
                pushed = push(self.run, self.hub)
            except Exception as error:
                future.set_exception(error)
            else:
                self.hub = self.hub.model_copy(update={"create_pr": False, "revision": pushed.revision})
                future.set_result(pushed.url)

    def _report(self, future: Future[str]) -> None:
        error = future.exception()
        if error is None:
            log.info("pushed to %s", future.result())
        elif not self.warned:
            log.warning("%s; training goes on, and the next checkpoint is pushed again", self._failure(explain(error)))
        self.warned = error is not None

    def _failure(self, why: str) -> str:
        where = "".join(f"; the adapter is safe in {path}" for path in adapters(self.run)[-1:])
        return f"push to {self.hub.repo} failed: {why}{where}; try again with {command(self.run, self.hub)}"


def command(run: Path, hub: HubConfig) -> str:
    """The command line that makes this push."""
    words = ["ngrpo", "push", str(run), "--repo", str(hub.repo)]
    words += ["--private"] if hub.private else []
    words += ["--revision", hub.revision] if hub.revision else []
    words += ["--pull-request"] if hub.create_pr else []
    words += ["--message", hub.commit_message] if hub.commit_message else []
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do `work()`, with a TimeoutError after so many seconds: the client itself waits for an answer without end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def retried(work: Callable[[], T]) -> T:
    """Do `work()`, again after each refusal that may pass: as much later as the Hub asks, up to MAX_WAIT_S in all."""
    waited = 0.0
    for usual_s in RETRY_WAITS_S:
        try:
            return work()
        except Exception as error:
            wait_s = wait_after(error, usual_s)
            if wait_s is None or waited + wait_s > MAX_WAIT_S:
                raise
            log.info("push: %s; trying again in %.0f s", explain(error), wait_s)
        time.sleep(wait_s)
        waited += wait_s
    return work()


def wait_after(error: Exception, usual_s: float) -> float | None:
    """Seconds after which the same request may succeed; None where it will not."""
    cause = root_cause(error)
    status = refusal(cause)[0]
    if status is None:
        return usual_s if is_network(cause) else None
    if status not in (408, 409, 429) and status < 500:
        return None
    headers = cause.response.headers if isinstance(cause, HfHubHTTPError) else {}
    asked = re.search(r"^\d+|(?<=t=)\d+", headers.get("Retry-After") or headers.get("ratelimit", ""))
    return float(asked[0]) if asked and status in (429, 503) else usual_s


def root_cause(error: BaseException) -> BaseException:
    """The error that the client wraps in errors of its own, which say only that an upload failed."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def refusal(error: BaseException) -> tuple[int | None, str]:
    """Status and words of the Hub's answer; None where there was no answer."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code, one_line(error.server_message or "")
    found = re.search(r"HTTP status \w+ error \((\d{3})", str(error))  # of Xet's client, a plain ConnectionError
    return int(found[1]) if found else None, ""


def is_network(error: BaseException) -> bool:
    """Whether an error means that no answer came: refused, reset, no such host, timed out."""
    return isinstance(error, HTTPError | ConnectionError | TimeoutError) and not isinstance(error, OfflineModeIsEnabled)


def explain(error: BaseException) -> str:
    """Say in words what went wrong with a push, and the remedy."""
    cause = root_cause(error)
    status, said = refusal(cause)
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it; unset it"
    if isinstance(cause, LocalTokenNotFoundError):
        return "there is no token; `hf auth login` with one that may write, or set HF_TOKEN"
    if isinstance(cause, RevisionNotFoundError):
        return f"the Hub answered {status}: there is no such branch; check --revision (hub.revision)"
    if status is not None:
        return explain_status(status, said)
    if isinstance(cause, OSError) and (cause.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause)):
        return f"the local disk is full ({cause.filename or one_line(str(cause))}); make room"
    if is_network(cause):
        return f"the Hub cannot be reached ({one_line(str(cause)) or 'no answer'}); check the network, or HF_ENDPOINT"
    return one_line(str(cause)) or type(cause).__name__


def explain_status(status: int, said: str) -> str:
    """Say in words what a refusal of the Hub means, and the remedy."""
    answer = f"the Hub answered {status}" + (f" ({said})" if said else "")
    if status in (402, 413, 507) or (
        status == 403 and re.search(r"quota|storage|billing|payment", said, re.IGNORECASE)
    ):
        return f"{answer}: its storage limit is reached; make room, or see https://huggingface.co/settings/billing"
    remedy = {
        401: "the token is wrong or has expired; `hf auth login`, or set HF_TOKEN anew",
        403: "this token may not write there; take one that may (https://huggingface.co/settings/tokens)",
        404: "there is no such repository, or this token may not see it; check its name",
        409: "something else changes the repository at the same time; try again in a minute",
        429: "too many requests; try again in a few minutes",
    }.get(status, "it has trouble of its own; try again later (https://status.huggingface.co)" if status >= 500 else "")
    return f"{answer}: {remedy}" if remedy else answer


def one_line(text: str) -> str:
    """The first 300 characters of a message, on one line."""
    return " ".join(text.split())[:300]
