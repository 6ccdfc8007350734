"""Showing in a terminal how runs get on."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_exp.errors import BROKEN_PIPE, Terminated
from mnist_exp.formatting import printable_lines

if TYPE_CHECKING:  # what is coming is shown before torch is imported, which takes seconds
    from mnist_exp.training import events

SHORTEST = 8  # characters that are left of a text that is cut
NAMED_RUNS = 16  # of a stack get a line


class _Console(Console):
    """A console that ends the run where nobody reads any more, as after `| head`."""

    def on_broken_pipe(self) -> None:
        """Raise Terminated."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise Terminated(BROKEN_PIPE) from None


class Reporter:
    """A reporter that shows nothing: the null object."""

    verbose = False

    def announce(self, text: str) -> None:
        """Show what is coming, until there is something else to show."""

    def start(self, names: Sequence[str], device: str, epochs: int) -> None:
        """Show that a stack of runs begins."""

    def progress(self, event: "events.Progress") -> None:
        """Show that a part of an epoch is done."""

    def epoch(self, event: "events.Epoch") -> None:
        """Show that an epoch is done."""

    def line(self, text: str) -> None:
        """Show a line of text."""

    def notice(self, text: str) -> None:
        """Show a line of text that is no part of the output."""

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        cut: Sequence[str] = (),
    ) -> None:
        """Show a table."""

    def stop(self) -> None:
        """Give the terminal back: nothing more comes of these runs."""

    def tested(self, test: Mapping[str, float]) -> None:
        """Show the result of a run on the test set, and of its best epoch if there is one."""


class Terminal(Reporter):
    """A reporter that prints a line an epoch, in a terminal with a live bar under them."""

    verbose = True

    def __init__(self, prefix: str = "") -> None:
        """Print a prefix before each line, without a bar, where there are several processes."""
        self.prefix = prefix
        self.console = _Console(highlight=False, soft_wrap=True, force_jupyter=False)
        # a notebook asks for colours, as if it were a terminal, and cannot draw over a line
        self.live = self.console.is_terminal and self.console.file.isatty()
        if not self.live:
            self.console.width = 200  # nobody watches: a table is as wide as it needs to be
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("accuracy {task.fields[accuracy]:.2%}"),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.epochs = 0
        # drawn once, as a thread that draws must not be there when a process forks
        self.announcement = Live(console=self.console, auto_refresh=False, transient=True)

    def announce(self, text: str) -> None:
        """Show what is coming, in a terminal, until there is something else to show."""
        if self.live and not self.prefix:
            self.announcement.start()
            self.announcement.update(Text(text), refresh=True)

    def start(self, names: Sequence[str], device: str, epochs: int) -> None:
        """Print the names of the runs, and start the bar."""
        for name in names[:NAMED_RUNS]:
            self.line(f"{name}  on {device}")
        if len(names) > NAMED_RUNS:
            self.line(f"and {len(names) - NAMED_RUNS} more runs")
        self.epochs = epochs
        self.task = self.bar.add_task(
            "", total=epochs, epoch=1, epochs=epochs, loss=0.0, accuracy=0.0, rate=0.0
        )
        self.began, self.images, self.correct = time.perf_counter(), 0, 0
        if self.live and not self.prefix:
            self.bar.start()

    def progress(self, event: "events.Progress") -> None:
        """Move the bar, five times a second."""
        now = time.perf_counter()
        self.images += event.images * len(event.active)
        self.correct += int(event.correct.sum())
        if now - self.began < 0.2 and event.step < event.steps:
            return
        self.bar.update(
            self.task,
            completed=event.time,
            epoch=event.epoch,
            loss=float(event.losses.mean()),
            accuracy=self.correct / self.images,
            rate=self.images / (now - self.began),
        )
        self.began, self.images, self.correct = now, 0, 0

    def epoch(self, event: "events.Epoch") -> None:
        """Print the metrics of the one run, or the range of several."""
        live = [metrics for metrics in event.metrics if metrics]
        if len(event.metrics) > 1 and live:
            split = "val" if "val/accuracy" in live[0] else "train"
            accuracies = [metrics[f"{split}/accuracy"] for metrics in live]
            rate = live[0]["images_per_second"] * len(live)
            self.line(
                f"{_epoch(event.epoch, self.epochs)}  {len(live)} runs  "
                f"{split} accuracy {min(accuracies):.2%} to {max(accuracies):.2%}  "
                f"{rate:,.0f} images/s"
            )
        elif live:
            self.line(epoch_line(event.epoch, self.epochs, live[0]))

    def tested(self, test: Mapping[str, float]) -> None:
        """Print the test accuracy, and which weights have it."""
        self.line(f"test accuracy {test['test/accuracy']:.2%}  (loss {test['test/loss']:.4f})")
        if "best/epoch" in test:
            self.line(
                f"the weights are those of epoch {test['best/epoch']:.0f}, the best of "
                f"validation ({test['best/val_accuracy']:.2%})"
            )

    def line(self, text: str) -> None:
        """Print a line after the prefix."""
        self.announcement.stop()
        self.console.print(self.prefix + text, markup=False)

    def notice(self, text: str) -> None:
        """Print a line to the standard error."""
        self.announcement.stop()
        print(text, file=sys.stderr, flush=True)

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        cut: Sequence[str] = (),
    ) -> None:
        """Print a table with its title, if any.

        Where it is too wide, texts go on in a second line. But where columns are named in `cut`,
        the texts of those columns are cut first, so that a row is a line.
        """
        self.announcement.stop()
        all_columns = header
        # a note or a name may hold what would colour the terminal
        rows = [list(map(printable_lines, row)) for row in rows]
        if cut:
            header, rows = _fitted(header, rows, cut, self.console.width)
        shown = Text(title) if title else None
        table = Table(title=shown, title_justify="left", box=SIMPLE, pad_edge=False)
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)
        if missing := [name for name in all_columns if name not in header]:
            self.console.print(f"no room for: {', '.join(missing)}", markup=False)

    def stop(self) -> None:
        """Take the bar away, or the announcement."""
        self.announcement.stop()
        if self.bar.live.is_started:  # else it would print an empty line
            self.bar.stop()
        for task in self.bar.task_ids:
            self.bar.remove_task(task)


def _fitted(
    header: Sequence[str], rows: Sequence[Sequence[str]], cut: Sequence[str], width: int
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return a table that is no wider than a line, so that each row is one, if that can be.

    Args:
        header: The names of the columns.
        rows: The rows.
        cut: The columns whose texts can be cut; where that does not do, the last ones go.
        width: The characters of a line.
    """
    widths = [max(cell_len(text) for text in column) for column in zip(header, *rows, strict=True)]
    flexible = [i for i, name in enumerate(header) if name in cut]
    left_out = set()
    excess = sum(widths) + 3 * len(widths) - 1 - width
    while excess > 0 and flexible:
        longest = max(flexible, key=lambda i: widths[i])
        if widths[longest] > SHORTEST:
            widths[longest] -= 1
            excess -= 1
        elif len(flexible) == 1:
            break
        else:
            last = flexible.pop()
            left_out.add(last)
            excess -= widths[last] + 3
    kept = [i for i in range(len(header)) if i not in left_out]
    return [header[i] for i in kept], [[_cut(row[i], widths[i]) for i in kept] for row in rows]


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…"


@contextlib.contextmanager
def reporting(verbose: bool = True, announcement: str = "") -> Iterator[Reporter]:
    """Yield a reporter, which takes what is not for good from the terminal where the block ends.

    Args:
        verbose: It shows something.
        announcement: What is coming, if that is known already.
    """
    reporter = Terminal() if verbose else Reporter()
    if announcement:
        reporter.announce(announcement)
    try:
        yield reporter
    finally:
        reporter.stop()


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """Return an epoch of one run as a line to be read by a person."""
    parts = [_epoch(epoch, epochs)]
    for split in ("train", "val"):
        if f"{split}/loss" in metrics:
            loss, accuracy = metrics[f"{split}/loss"], metrics[f"{split}/accuracy"]
            parts.append(f"{split} loss {loss:.4f}  {split} accuracy {accuracy:7.2%}")
    parts.append(f"{metrics['images_per_second']:,.0f} images/s")
    return "  ".join(parts)


def _epoch(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
