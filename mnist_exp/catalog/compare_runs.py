"""Two runs or more beside each other: what differs, their metrics, curves and predictions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnist_exp.catalog import differences, significance
from mnist_exp.catalog.differences import ABSENT, Difference
from mnist_exp.catalog.records import Record
from mnist_exp.catalog.significance import McNemar
from mnist_exp.formatting import Table, count_of, finite, wilson
from mnist_exp.run.kept_predictions import KeptPredictions

PARTING = 1e-4  # relative: two runs whose train/loss differ by more are not the same up to rounding
PARTING_METRIC = "train/loss"
CURVES = ("val/accuracy", "train/loss", "val/loss")  # that are drawn
ALWAYS = ("test/accuracy", "best/val_accuracy")  # shown even where they are the same
_ORDER = (*ALWAYS, "test/loss", "best/epoch", "val/accuracy", "val/loss")
# metric -> the split of whose images it is a share
_SHARES = {"test/accuracy": "test", "best/val_accuracy": "val", "val/accuracy": "val"}


@dataclass(frozen=True)
class MetricRow:
    """The newest value of a metric in each run; None where a run has none."""

    name: str
    values: Sequence[float | None]
    images: Sequence[int | None]  # that an accuracy is a share of; None where that is not known
    intervals: Sequence[tuple[float, float] | None]  # Wilson's, 95 %, where the images are known


@dataclass(frozen=True)
class Parting:
    """The epoch at which the curve of a run leaves that of the first."""

    epochs: int  # that both have
    epoch: int | None  # the first one with values that differ by more than PARTING
    values: tuple[float, float] | None  # of the first run and of the other one, then


@dataclass(frozen=True)
class ClassChange:
    """The part that one class has in the difference of two runs."""

    name: str
    images: int
    first_right: int  # of the images
    other_right: int
    only_first: int
    only_other: int


@dataclass(frozen=True)
class PredictionTest:
    """The predictions of a run and of the first for the same test images."""

    images: int
    result: McNemar | None  # None where there is nothing to compare
    classes: Sequence[ClassChange]  # of which an image is right in one of both alone
    problem: str = ""  # why there is nothing to compare
    evaluate: Sequence[str] = ()  # the ids of the runs to evaluate before


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other; tests are of each against the first."""

    records: Sequence[Record]
    labels: Sequence[str]  # short ids, all different
    differences: Sequence[Difference]
    not_recorded: Sequence[str]
    metrics: Sequence[MetricRow]
    partings: Sequence[Parting]  # one for each run but the first
    predictions: Sequence[PredictionTest]  # likewise

    def titles(self) -> list[str]:
        """Return a line for each run: what it is."""
        return [
            f"{label}  {record.name}"
            for label, record in zip(self.labels, self.records, strict=True)
        ]

    def tables(self) -> list[tuple[str, Table]]:
        """Return the tables of what differs, of metrics and of classes, with their titles."""
        found = [("what differs", difference_table(self.differences, self.labels))]
        header = ["metric", *self.labels]
        rows = [
            [
                row.name,
                *(
                    _metric_text(row.name, *pair)
                    for pair in zip(row.values, row.intervals, strict=True)
                ),
            ]
            for row in self.metrics
        ]
        found.append(("metrics, accuracies with 95 % intervals", Table(header, rows)))
        first = self.labels[0]
        for label, test in zip(self.labels[1:], self.predictions, strict=True):
            header = ["class", "images", f"right in {first}", f"right in {label}"]
            header += [f"in {first} alone", f"in {label} alone"]
            rows = [[str(value) for value in asdict(each).values()] for each in test.classes]
            found.append(("classes that changed", Table(header, rows)))
        return [(title, table) for title, table in found if table.rows]

    def lines(self) -> list[str]:
        """Return what else there is to say, a line each."""
        found = differences.lines(self.differences, self.not_recorded)
        unknown = {
            _SHARES[row.name]
            for row in self.metrics
            for value, interval in zip(row.values, row.intervals, strict=True)
            if row.name in _SHARES and value is not None and interval is None
        }
        for split in sorted(unknown):
            words = {"val": "validation images"}.get(split, "test images")
            found.append(f"no interval where the number of {words} is not on record")
        first = self.labels[0]
        for label, parting in zip(self.labels[1:], self.partings, strict=True):
            found.append(f"{first} and {label}: {_parting_text(parting)}")
        for label, test in zip(self.labels[1:], self.predictions, strict=True):
            found.append(f"{first} and {label}: {_prediction_text(test, first, label)}")
        return found

    @property
    def to_evaluate(self) -> list[str]:
        """The ids of the runs whose predictions are not kept, and can be."""
        return list(dict.fromkeys(run_id for test in self.predictions for run_id in test.evaluate))

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain values, whose names are stable: docs/runs.md has them."""
        columns = [
            {"id": r.id, "name": r.name, "kind": r.kind, "sweep": r.parent or None}
            for r in self.records
        ]
        return {
            "kind": "runs",
            "columns": columns,
            "differences": [asdict(each) for each in self.differences],
            "not_recorded": list(self.not_recorded),
            "metrics": [finite(asdict(row)) for row in self.metrics],
            "curves": [
                {"metric": PARTING_METRIC, "threshold": PARTING, **finite(asdict(parting))}
                for parting in self.partings
            ],
            "predictions": [asdict(test) for test in self.predictions],
        }

    def draw(self) -> Any:
        """Return a figure of the curves of all runs."""
        from mnist_exp.figures.curves import comparison_curves

        curves = {
            f"{label} {record.name}": [differences.curves_of(record, CURVES)]
            for label, record in zip(self.labels, self.records, strict=True)
        }
        return comparison_curves(curves, {}, f"{len(curves)} runs")


def compare_runs(records: Sequence[Record]) -> RunComparison:
    """Return a comparison of two runs or more."""
    first, *others = records
    found, missing = differences.find_differences([[record] for record in records])
    kept = {record.id: KeptPredictions.load(record.id) for record in records}
    curves = [
        dict(differences.curves_of(record, [PARTING_METRIC]).get(PARTING_METRIC, ()))
        for record in records
    ]
    return RunComparison(
        records=records,
        labels=short_ids([record.id for record in records]),
        differences=found,
        not_recorded=missing,
        metrics=_metric_rows(records, kept),
        partings=[_parting(curves[0], curve) for curve in curves[1:]],
        predictions=[_prediction_test(first, other, kept) for other in others],
    )


def short_ids(ids: Sequence[str]) -> list[str]:
    """Return the beginnings of ids, of 8 characters or as many as tell them apart."""
    length = 8
    while len({run_id[:length] for run_id in ids}) < len(set(ids)):
        length += 4
    return [run_id[:length] for run_id in ids]


def difference_table(found: Sequence[Difference], labels: Sequence[str]) -> Table:
    """Return a table of what differs, a row each. Long digests are cut."""
    rows = [
        [
            each.name,
            *(ABSENT if text is None else _short_digest(each.name, text) for text in each.values),
        ]
        for each in found
    ]
    return Table(["", *labels], rows)


def _short_digest(name: str, text: str) -> str:
    return ",".join(part[:12] for part in text.split(",")) if name in ("commit", "data") else text


def _metric_rows(
    records: Sequence[Record], kept: Mapping[str, KeptPredictions | None]
) -> list[MetricRow]:
    names = {name for record in records for name in record.metrics}
    ordered = [name for name in _ORDER if name in names] + sorted(names - {*_ORDER})
    rows = []
    for name in ordered:
        values = [record.metrics.get(name) for record in records]
        if name not in ALWAYS and _is_same(values):
            continue
        images = [_images_of(record, name, kept[record.id]) for record in records]
        intervals = [_interval(*pair) for pair in zip(values, images, strict=True)]
        rows.append(MetricRow(name, values, images, intervals))
    return rows


def _is_same(values: Sequence[float | None]) -> bool:
    first = values[0]
    if first is not None and math.isnan(first):
        return all(value is not None and math.isnan(value) for value in values)
    return all(value == first for value in values)


def _images_of(record: Record, metric: str, kept: KeptPredictions | None) -> int | None:
    """Return how many images an accuracy of a run is a share of; None where that is not known."""
    split = _SHARES.get(metric, "")
    if split in record.dataset_sizes:
        return record.dataset_sizes[split]
    if split == "val":
        number = record.params.get("dataset.val_size", "")
        return int(number) if number.isdecimal() and int(number) else None
    return len(kept.labels) if split == "test" and kept is not None else None


def _interval(value: float | None, images: int | None) -> tuple[float, float] | None:
    if value is None or images is None or not 0 <= value <= 1:
        return None
    return wilson(round(value * images), images)


def _metric_text(name: str, value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ABSENT
    if name.endswith("accuracy"):
        if interval is None:
            return f"{value:.2%}"
        low, high = (100 * end for end in interval)
        return f"{value:.2%} ({low:.2f} to {high:.2f})"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:,.6g}"


def _parting(first: Mapping[int, float], other: Mapping[int, float]) -> Parting:
    common = sorted(first.keys() & other.keys())
    for epoch in common:
        a, b = first[epoch], other[epoch]
        if not (math.isclose(a, b, rel_tol=PARTING) or (math.isnan(a) and math.isnan(b))):
            return Parting(len(common), epoch, (a, b))
    return Parting(len(common), None, None)


def _parting_text(parting: Parting) -> str:
    if not parting.epochs:
        return f"they have no epoch of {PARTING_METRIC} in common"
    within = f"{PARTING:.2%}"
    if parting.epoch is None or parting.values is None:
        epochs = count_of(parting.epochs, "epoch")
        return f"{PARTING_METRIC} is the same to within {within} in all {epochs} that both have"
    a, b = parting.values
    return (
        f"{PARTING_METRIC} parts at epoch {parting.epoch}, {a:.6g} and {b:.6g} (by more than "
        f"{within})"
    )


def _prediction_test(
    first: Record, other: Record, kept: Mapping[str, KeptPredictions | None]
) -> PredictionTest:
    a, b = kept[first.id], kept[other.id]
    if a is None or b is None:
        missing = [record for record in (first, other) if kept[record.id] is None]
        untested = [record.id for record in missing if "test/accuracy" not in record.metrics]
        if untested:  # then no model is kept either
            names = " and ".join(run_id[:8] for run_id in untested)
            problem = f"no test on the same images, as {names} has not been tested"
            return PredictionTest(0, None, (), problem)
        ids = [record.id for record in missing]
        return PredictionTest(0, None, (), "their predictions are not kept", ids)
    if not a.has_images_of(b):
        return PredictionTest(0, None, (), "they were evaluated on other test images")
    right = [
        [true == said for true, said in zip(one.labels, one.predicted, strict=True)]
        for one in (a, b)
    ]
    changes = []
    for number, name in enumerate(a.classes):
        places = [i for i, label in enumerate(a.labels) if label == number]
        of_class = [[answers[i] for i in places] for answers in right]
        only_first = sum(x and not y for x, y in zip(*of_class, strict=True))
        only_other = sum(y and not x for x, y in zip(*of_class, strict=True))
        if only_first or only_other:
            both = sum(of_class[0]), sum(of_class[1])
            changes.append(ClassChange(name, len(places), *both, only_first, only_other))
    return PredictionTest(len(a.labels), significance.mcnemar(*right), changes)


def _prediction_text(test: PredictionTest, first: str, other: str) -> str:
    if test.result is None:
        return test.problem
    same = f"on the same {count_of(test.images, 'test image')}"
    if test.result.p_value is None:
        return f"{same}, the same ones are right"
    return (
        f"{same}, {test.result.only_first:,} right in {first} alone and "
        f"{test.result.only_other:,} in {other} alone; McNemar's exact test: "
        f"{significance.p_text(test.result.p_value)}"
    )
