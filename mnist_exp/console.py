"""What a person sees of a run in the terminal. The base class shows nothing: a null object."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mnist_exp import training


class Reporter:
    """Shows nothing."""

    def start(self, title: str, epochs: int) -> None:
        """A run begins."""

    def progress(self, record: training.Progress) -> None:
        """A part of an epoch is done."""

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """An epoch is done."""

    def line(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """No more of this run: the terminal is given back."""


class Terminal(Reporter):
    """A line an epoch; in a terminal a live bar under them as well."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
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

    def start(self, title: str, epochs: int) -> None:
        self.line(title)
        self.epochs = epochs
        self.task = self.bar.add_task(
            "", total=epochs, epoch=1, epochs=epochs, loss=0.0, accuracy=0.0, rate=0.0
        )
        self.began, self.seen, self.right = time.perf_counter(), 0, 0
        if self.console.is_terminal:
            self.bar.start()

    def progress(self, record: training.Progress) -> None:
        now = time.perf_counter()
        self.seen += record.images
        self.right += int(record.correct[:, 0].sum())
        if now - self.began < 0.2 and record.step < record.steps:
            return
        self.bar.update(
            self.task,
            completed=record.epoch - 1 + record.step / record.steps,
            epoch=record.epoch,
            loss=float(record.losses[:, 0].mean()),
            accuracy=self.right / self.seen,
            rate=self.seen / (now - self.began),
        )
        self.began, self.seen, self.right = now, 0, 0

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        parts = [f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs}"]
        for split in ("train", "val"):
            if f"{split}/loss" in metrics:
                loss, accuracy = metrics[f"{split}/loss"], metrics[f"{split}/accuracy"]
                parts.append(f"{split} loss {loss:.4f}  {split} accuracy {accuracy:7.2%}")
        parts.append(f"{metrics['images_per_second']:,.0f} images/s")
        self.line("  ".join(parts))

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def stop(self) -> None:
        if self.bar.live.is_started:  # else it would print an empty line
            self.bar.stop()
