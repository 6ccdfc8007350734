"""The view of an experiment in MLflow's UI: the columns of its list of runs, and its charts.

It is a saved view, a tag of the experiment in the form that the UI itself writes. Without it, the
list has no metric and no parameter, and the charts come in the order of the alphabet.
"""

import json
from typing import Any

KEY = "mnist-exp"  # of the view, and its name in the UI's menu
TAG = f"mlflow.sharedViewState.{KEY}"
_USUAL = "workflowType=machine_learning"  # MLflow's other view shows prompts and traces
_SECTION = "by epoch"
_CURVES = ("val/accuracy", "val/loss", "train/loss", "train/accuracy")
_PICTURES = "val/predictions"
_COLUMNS = {  # as MLflow calls them: pixels
    "attributes.`Run Name`": 285,
    "runDateAndNestInfo": 135,
    "duration": 70,
    "metrics.`best/val_accuracy`": 140,
    "metrics.`test/accuracy`": 115,
    "params.`optimizer.lr`": 90,
    "params.`training.batch_size`": 145,
    "params.`seed`": 50,
    "tags.`dataset`": 75,
    "tags.`model`": 70,
}


def tag() -> str:
    """Return the value of the tag."""
    section = {"uuid": _SECTION, "name": _SECTION, "display": True, "isReordered": True}
    state = {
        "selectedColumns": [c for c in _COLUMNS if c.startswith(("metrics.", "params.", "tags."))],
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
        "isAccordionReordered": True,  # the sections that the UI adds come behind this one
        "compareRunSections": [{**section, "deleted": False, "isGenerated": False}],
        "compareRunCharts": [*map(_curve, _CURVES), _pictures(_PICTURES)],
    }
    return json.dumps({"name": KEY, "createdAt": 0, "state": json.dumps(state)})


def _chart(kind: str, key: str) -> dict[str, Any]:
    """Return what charts of every kind have."""
    return {
        "type": kind,
        "uuid": key,
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
    }


def _curve(metric: str) -> dict[str, Any]:
    axes = {"xAxisKey": "step", "useGlobalXaxisKey": True}
    unsmoothed = {"lineSmoothness": 0, "useGlobalLineSmoothing": True}
    return {**_chart("LINE", metric), "metricKey": metric, **axes, **unsmoothed}


def _pictures(key: str) -> dict[str, Any]:
    # the fifty parameters of a run would stand before its picture
    return {**_chart("IMAGE", key), "imageKeys": [key], "step": 1, "showRunParams": False}


def run_page(experiment: str, run_id: str) -> str:
    """Return the page of a run, behind the UI's address."""
    return f"#/experiments/{experiment}/runs/{run_id}?{_USUAL}"


def list_page(experiment: str, saved: bool) -> str:
    """Return the page of an experiment's runs; `saved`: with the view, whose tag is there."""
    page = f"#/experiments/{experiment}/runs?{_USUAL}"
    return f"{page}&viewStateShareKey={KEY}" if saved else page
