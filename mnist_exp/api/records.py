"""The records of runs from Python: their numbers as tables, their models, notes and tags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp.api.catalog import load_records
from mnist_exp.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from mnist_exp.catalog.annotate import Annotated
    from mnist_exp.catalog.onnx_model import OnnxExport
    from mnist_exp.catalog.tables import TableFiles


def history(
    words: Sequence[str] = (), filters: Sequence[str] = (), overrides: Sequence[str] = ()
) -> "pd.DataFrame":
    """Return a pandas table of the metrics of runs: run (its id), key, step, time, value.

    `history(["last"])` has a row for each point that the newest run has recorded. From a server it
    takes a call for each metric of each run.

    Args:
        words: Runs, and sweeps with their jobs; without any, all runs on record.
        filters: Conditions that hold for all runs, as in `optimizer.lr>0.05 and model=cnn`.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run, a filter is at fault, or the store cannot be read.
    """
    from mnist_exp.catalog import tables

    _check_lists(words, filters)
    records, uri = load_records(overrides)
    chosen = tables.choose(records, words, filters)
    return tables.metrics_table(tables.points_of(chosen, uri))


def export(
    to: str | Path,
    words: Sequence[str] = (),
    filters: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
) -> "TableFiles | OnnxExport":
    """Write the tables of `history` and `runs`, or the model of a run as ONNX; return what it is.

    Args:
        to: The file. NAME.csv and NAME.parquet hold the metrics, and NAME.runs.csv beside it the
            runs; NAME.json holds both. NAME.onnx is the model of one run.
        words: Runs, and sweeps with their jobs; without any, all runs on record.
        filters: Conditions that hold for all runs.
        overrides: `tracking.uri=...`, the store to look into, and for a model `dataset.root=...`.
        force: Replace files that exist.

    Raises:
        ConfigError: There is no such run, or the file exists or cannot be written.
        RunFailed: A model does not compute the same as ONNX.
    """
    from mnist_exp.catalog import tables

    path = Path(to)
    _check_lists(words, filters)
    tables.check_target(path, (*tables.SUFFIXES, ".onnx"), force=force)
    if path.suffix.lower() == ".onnx":
        return _export_model(path, words, filters, overrides)
    records, uri = load_records(overrides)
    chosen = tables.choose(records, words, filters)
    if not chosen:
        raise ConfigError(f"there are no such runs in {uri}, and nothing to export")
    return tables.write(chosen, tables.points_of(chosen, uri), path)


def _check_lists(words: Sequence[str], filters: Sequence[str]) -> None:
    """Raise ConfigError for a text in place of a list of texts."""
    from mnist_exp.errors import check_list

    check_list("words", words)
    check_list("filters", filters)


def _export_model(
    path: Path, words: Sequence[str], filters: Sequence[str], overrides: Sequence[str]
) -> "OnnxExport":
    if filters:
        raise ConfigError(f"--to {path}: a model is that of one run. Name the run, without -f")
    if len(words) != 1:
        raise ConfigError(
            f"--to {path}: a model is that of one run, which has to be named: "
            f"mnist-exp export last --to {path}"
        )

    from mnist_exp.catalog import onnx_model
    from mnist_exp.catalog.records import find
    from mnist_exp.run.lookup import find_run

    onnx_model.check_libraries()
    records, _ = load_records([word for word in overrides if word.startswith("tracking.uri=")])
    record = find(records, words[0], ("run", "job"))
    store, run, root = find_run(record.id, overrides, data=True)
    return onnx_model.export_model(store, run, root, path)


def note(run: str = "last", text: str | None = None, overrides: Sequence[str] = ()) -> "Annotated":
    """Give a run or a sweep a note, which its description in MLflow begins with.

    Args:
        run: The run, the sweep, or a job of one.
        text: The note; "" removes the one that is there, and None leaves it as it is.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run, or MLflow would refuse the note. Nothing has changed.
    """
    from mnist_exp.catalog import annotate
    from mnist_exp.catalog.records import find
    from mnist_exp.run import lookup

    if text is not None and not isinstance(text, str):
        raise ConfigError(f"text: must be a text, and is {text!r}")
    records, uri = load_records(overrides)
    record = find(records, run)
    if text is None:
        return annotate.annotated(record)
    return annotate.set_note(record, text, uri, lookup.open_runs())


def tag(
    run: str = "last", tags: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> "Annotated":
    """Give a run or a sweep tags: `tag("last", {"team": "vision"})`.

    Args:
        run: The run, the sweep, or a job of one.
        tags: The tags, in place of those of the same names; None leaves all as they are.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run, or a tag cannot be given. Nothing has changed.
    """
    from mnist_exp.catalog import annotate
    from mnist_exp.catalog.records import find
    from mnist_exp.run import lookup

    is_text = isinstance(tags, Mapping) and all(
        isinstance(text, str) for pair in tags.items() for text in pair
    )
    if tags is not None and not is_text:
        raise ConfigError(f"tags: must be texts by their names, and is {tags!r}")
    records, uri = load_records(overrides)
    record = find(records, run)
    if not tags:
        return annotate.annotated(record)
    return annotate.set_tags(record, tags, uri, lookup.open_runs())
