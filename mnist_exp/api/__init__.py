"""The package from Python: every command as a function.

Overrides are those of the command line. A run is named by `last`, its id, or the beginning of it.
Each function imports what is heavy when it is called, and prints nothing unless it is verbose.
"""

from mnist_exp.api.catalog import compare, field_names, list_records, runs
from mnist_exp.api.experiments import (
    build,
    default_store,
    ensemble,
    evaluate,
    list_runs,
    load,
    mark_dead_runs,
    predict,
    predictions_figure,
    report,
    reproduce,
    resume,
    save_figure,
    show,
    sync,
    train,
    train_composed,
    train_sweep,
    ui_page,
)
from mnist_exp.api.lifecycle import gc, plan_gc, plan_removal, rm, status, stop
from mnist_exp.api.records import export, history, note, tag

__all__ = [
    "build",
    "compare",
    "default_store",
    "ensemble",
    "evaluate",
    "export",
    "field_names",
    "gc",
    "history",
    "list_records",
    "list_runs",
    "load",
    "mark_dead_runs",
    "note",
    "plan_gc",
    "plan_removal",
    "predict",
    "predictions_figure",
    "report",
    "reproduce",
    "resume",
    "rm",
    "runs",
    "save_figure",
    "show",
    "status",
    "stop",
    "sync",
    "tag",
    "train",
    "train_composed",
    "train_sweep",
    "ui_page",
]
