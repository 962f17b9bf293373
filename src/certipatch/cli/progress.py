"""A progress bar with the time left, on stderr, so that stdout stays clean."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from certipatch.plumbing import distributed


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function of (done, total, text) that moves the bar. Off a terminal it prints a line now and then.

    Of several workers the first shows the bar of them all.
    """
    if distributed.rank() != 0:
        yield lambda done, total, text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, text="")
        tenth = -1

        def move(done: int, total: int, text: str) -> None:
            nonlocal tenth
            bar.update(task, completed=done, total=total, text=text)
            now = 10 * done // max(total, 1)
            if not console.is_terminal and now != tenth:  # also when the next of several parts begins
                tenth = now
                console.print(f"{title}: {done}/{total}  {text}", markup=False, highlight=False, soft_wrap=True)

        yield move
