"""The terminal: what a command says beside its results, and the progress of a run."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class RunProgress(Progress):
    """Progress of a run: a bar with times, and below it the figures of the last iteration."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Give the lines of a progress display: the columns, then the status of each task."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(f"  {task.fields['status']}", no_wrap=True) for task in self.tasks)


def progress_bar() -> RunProgress:
    """Make the progress of a run: iterations, times, and a status of any length."""
    return RunProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )
