"""The records of runs from Python: their numbers as tables, their models, notes and tags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from mnist_exp.catalog.annotate import Annotated
    from mnist_exp.catalog.onnx_model import OnnxExport
    from mnist_exp.catalog.records import Record
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

    records, uri = _records(overrides)
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
    tables.check_target(path, (*tables.SUFFIXES, ".onnx"), force=force)
    if path.suffix.lower() == ".onnx":
        return _export_model(path, words, filters, overrides)
    records, uri = _records(overrides)
    chosen = tables.choose(records, words, filters)
    if not chosen:
        raise ConfigError(f"there are no such runs in {uri}, and nothing to export")
    return tables.write(chosen, tables.points_of(chosen, uri), path)


def _export_model(
    path: Path, words: Sequence[str], filters: Sequence[str], overrides: Sequence[str]
) -> "OnnxExport":
    if len(words) != 1 or filters:
        raise ConfigError(
            f"--to {path}: a model is that of one run, which has to be named: "
            f"mnist-exp export last --to {path}"
        )

    from mnist_exp.catalog import onnx_model
    from mnist_exp.run.lookup import find_run

    onnx_model.check_libraries()
    store, run, root = find_run(words[0], overrides, data=True)
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

    records, uri = _records(overrides)
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

    records, uri = _records(overrides)
    record = find(records, run)
    if not tags:
        return annotate.annotated(record)
    return annotate.set_tags(record, tags, uri, lookup.open_runs())


def _records(overrides: Sequence[str]) -> "tuple[list[Record], str]":
    """Return all runs of the store that the overrides name, and its address. Raise ConfigError."""
    from mnist_exp.catalog.records import load_records
    from mnist_exp.run import lookup

    uri = lookup.store_uri(overrides, required=False)
    return load_records(uri, lookup.open_runs()), uri
