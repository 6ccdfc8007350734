"""What a person sees of a run in the terminal. The base class shows nothing: a null object."""

import time
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_exp.errors import BROKEN_PIPE, Terminated
from mnist_exp.training import events

NAMED = 16  # runs of a stack that get a line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more, as after `| head`: the run ends, as other programs do."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise Terminated(BROKEN_PIPE) from None


class Reporter:
    """Shows nothing."""

    def start(self, names: Sequence[str], device: str, epochs: int) -> None:
        """A stack of runs begins."""

    def progress(self, record: events.Progress) -> None:
        """A part of an epoch is done."""

    def epoch(self, record: events.Epoch) -> None:
        """An epoch is done."""

    def line(self, text: str) -> None:
        """Something worth a line."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """What belongs into columns."""

    def stop(self) -> None:
        """No more of this run: the terminal is given back."""


class Terminal(Reporter):
    """A line an epoch; in a terminal a live bar under them as well.

    With a `prefix` to its lines it is one of several processes, and there is no bar.
    """

    def __init__(self, prefix: str = "") -> None:
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

    def start(self, names: Sequence[str], device: str, epochs: int) -> None:
        for name in names[:NAMED]:
            self.line(f"{name}  on {device}")
        if len(names) > NAMED:
            self.line(f"and {len(names) - NAMED} more runs")
        self.epochs = epochs
        self.task = self.bar.add_task(
            "", total=epochs, epoch=1, epochs=epochs, loss=0.0, accuracy=0.0, rate=0.0
        )
        self.began, self.seen, self.right = time.perf_counter(), 0, 0
        if self.live and not self.prefix:
            self.bar.start()

    def progress(self, record: events.Progress) -> None:
        now = time.perf_counter()
        self.seen += record.images * len(record.active)
        self.right += int(record.correct.sum())
        if now - self.began < 0.2 and record.step < record.steps:
            return
        self.bar.update(
            self.task,
            completed=record.epoch - 1 + record.step / record.steps,
            epoch=record.epoch,
            loss=float(record.losses.mean()),
            accuracy=self.right / self.seen,
            rate=self.seen / (now - self.began),
        )
        self.began, self.seen, self.right = now, 0, 0

    def epoch(self, record: events.Epoch) -> None:
        live = [metrics for metrics in record.metrics if metrics]
        if len(record.metrics) > 1 and live:
            split = "val" if "val/accuracy" in live[0] else "train"
            found = [metrics[f"{split}/accuracy"] for metrics in live]
            rate = live[0]["images_per_second"] * len(live)
            self.line(
                f"{_epoch(record.epoch, self.epochs)}  {len(live)} runs  "
                f"{split} accuracy {min(found):.2%} to {max(found):.2%}  {rate:,.0f} images/s"
            )
        elif live:
            self.line(epoch_line(record.epoch, self.epochs, live[0]))

    def line(self, text: str) -> None:
        self.console.print(self.prefix + text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False)
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

    def stop(self) -> None:
        if self.bar.live.is_started:  # else it would print an empty line
            self.bar.stop()
        for task in self.bar.task_ids:
            self.bar.remove_task(task)


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """One epoch of one run, to be read by a person."""
    parts = [_epoch(epoch, epochs)]
    for split in ("train", "val"):
        if f"{split}/loss" in metrics:
            loss, accuracy = metrics[f"{split}/loss"], metrics[f"{split}/accuracy"]
            parts.append(f"{split} loss {loss:.4f}  {split} accuracy {accuracy:7.2%}")
    parts.append(f"{metrics['images_per_second']:,.0f} images/s")
    return "  ".join(parts)


def _epoch(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
