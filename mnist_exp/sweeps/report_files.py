"""The report of a sweep as files and in the terminal: at its end, or again from the store.

Nothing here needs torch, which takes seconds to import.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from mnist_exp.figures import style
from mnist_exp.run.console import Reporter
from mnist_exp.run.stored_config import fetch_config
from mnist_exp.sweeps import report
from mnist_exp.sweeps.recipe import recipe
from mnist_exp.sweeps.report import Cell
from mnist_exp.sweeps.results import Report, load_from_store, summarise
from mnist_exp.system import files
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun

BEST = "best.yaml"  # the recipe of the chosen cell


def report_again(
    store: Store, parent: StoredRun, output: Path | None, suffix: str, reporter: Reporter
) -> Report:
    """Report on a sweep from the store alone, and put the report onto its parent run.

    Args:
        store: The store that has the sweep.
        parent: The sweep's run.
        output: A folder that the report is written to as well.
        suffix: The format of the figures in there.
        reporter: Shows the report.
    """
    summary, best_recipe = summarise(load_from_store(store, parent.id)), ""
    with TemporaryDirectory() as temporary:
        if summary.chosen is not None:
            best = summary.chosen.finished[0].run_id
            config = fetch_config(store, best, Path(temporary))
            choices = store.get(best).choices()
            best_recipe = best_recipe_of(summary.chosen, parent.id, config, choices)
        figures = summary.draw()
        if output is not None:
            with files.reporting_write_errors("--output", output):
                output.mkdir(parents=True, exist_ok=True)
                write(summary, figures, best_recipe, output, suffix)
        written = write(summary, figures, best_recipe, Path(temporary))
        show(summary, reporter)
        for file in written:
            store.put(parent.id, file)
    return replace(summary, run_id=parent.id, files=tuple(file.name for file in written))


def show(summary: Report, reporter: Reporter) -> None:
    """Show every job, the leaderboard, and the choice."""
    reporter.table("jobs", *report.job_table(summary.jobs))
    reporter.table("leaderboard", *summary.table())
    chosen = summary.chosen
    if chosen is None:
        if sum(bool(cell.finished) for cell in summary.ranked) > 1:
            reporter.line(
                "no cell is chosen, as there is no validation split and the test set must not "
                "choose: dataset.val_size=5000"
            )
        return
    is_choice = chosen.val_accuracy is not None
    text = f"{'chosen on validation' if is_choice else 'the only cell'}: {chosen.label}"
    if val := chosen.val_accuracy:
        text += f"  validation accuracy {val.percent()}"
    if test := chosen.test_accuracy:
        text += f"  test accuracy {test.percent()}"
    if loss := chosen.test_loss:
        text += f"  test loss {loss.loss()}"
    reporter.line(text)


def write(
    summary: Report,
    figures: Mapping[str, Any],
    best_recipe: str,
    folder: Path,
    suffix: str = "png",
) -> list[Path]:
    """Write a report into a folder, and return its files.

    Args:
        summary: The report.
        figures: Its figures, by name.
        best_recipe: The recipe of its chosen cell; "" where there is none.
        folder: The folder.
        suffix: The format of the figures.
    """
    texts = {
        "leaderboard.md": summary.table().markdown(),
        "leaderboard.csv": report.csv_text(summary.ranked, summary.chosen),
    }
    if best_recipe:
        texts[BEST] = best_recipe
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        style.save(figure, folder / f"{name}.{suffix}")
    return [folder / name for name in (*texts, *(f"{name}.{suffix}" for name in figures))]


def best_recipe_of(
    chosen: Cell, sweep: str, config: DictConfig, choices: Mapping[str, str | None]
) -> str:
    """Return the recipe of the chosen cell of a sweep.

    Args:
        chosen: The cell.
        sweep: The name of the sweep.
        config: The config of the cell's first run.
        choices: The option of each group, in that run.
    """
    comment = f"The best of sweep {sweep[:8]}: {chosen.label}"
    if val := chosen.val_accuracy:
        comment += f", validation accuracy {val.percent()}"
    return recipe(config, choices, comment)
