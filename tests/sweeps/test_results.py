"""The cells of a sweep, the choice among them, and the report on it."""

import csv
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import pytest
from mlflow.entities import Run
from omegaconf import OmegaConf

from mnist_exp.config import schema
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import task_config
from mnist_exp.run.evaluate import evaluate
from mnist_exp.training import metrics
from tests.helpers import fresh_store
from tests.sweeps.helpers import SIZES, SMALL, Done, alone, same_points, swept, train_all


def cells(done: Done) -> dict[tuple[str, ...], list[Run]]:
    """Children by everything but their seed."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for child in done.children.values():
        own = swept(child)
        found.setdefault((own["lr"], own["momentum"]), []).append(child)
    return found


def accuracies(runs: Sequence[Run], key: str = "best/val_accuracy") -> list[float]:
    return [r.data.metrics[key] for r in runs]


def chosen_of(done: Done) -> tuple[str, ...]:
    means = {cell: statistics.fmean(accuracies(runs)) for cell, runs in cells(done).items()}
    assert len(set(means.values())) == len(means)  # else the choice is arbitrary
    return max(means, key=lambda cell: means[cell])


def test_seeds_are_one_cell(seeds: Done, tmp_path: Path) -> None:
    best = chosen_of(seeds)
    assert seeds.parent.data.tags["chosen"] == f"lr={best[0]} momentum={best[1]}"
    values, tests = (
        accuracies(cells(seeds)[best], key) for key in ("best/val_accuracy", "test/accuracy")
    )
    metrics = seeds.parent.data.metrics
    for key, own in (("best/val_accuracy", values), ("test/accuracy", tests)):
        assert metrics[key] == pytest.approx(statistics.fmean(own))
        assert metrics[f"{key}_std"] == pytest.approx(statistics.stdev(own))
        assert metrics[f"{key}_n"] == len(own) == 2
    with seeds.fetch(seeds.parent, "leaderboard.csv", tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        cell = (row["optimizer.lr"], row["optimizer.momentum"])
        runs = cells(seeds)[cell]
        own = accuracies(runs)
        assert float(row["val_accuracy_mean"]) == pytest.approx(statistics.fmean(own))
        assert float(row["val_accuracy_std"]) == pytest.approx(statistics.stdev(own))
        assert row["val_accuracy_n"] == "2"
        assert set(row["run_ids"].split()) == {r.info.run_id for r in runs}
        assert (row["chosen"] == "yes") == (cell == best)
        assert bool(row["test_accuracy_mean"]) == (cell == best)
    means = [float(row["val_accuracy_mean"]) for row in rows]
    assert means == sorted(means, reverse=True)
    mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    assert f"{mean:.3f} % ± {deviation:.3f} (2)" in seeds.out
    losses = [r.data.metrics["test/loss"] for r in cells(seeds)[best]]
    mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
    assert f"test loss {mean:.5f} ± {deviation:.5f} (2)" in seeds.out


def test_test_set_is_read_for_the_chosen_cell_alone(seeds: Done) -> None:
    best = chosen_of(seeds)
    for cell, runs in cells(seeds).items():
        for r in runs:
            assert ("test/accuracy" in r.data.metrics) == (cell == best)
            assert ("test/loss" in r.data.metrics) == (cell == best)
            assert r.info.status == "FINISHED"
            if cell == best:
                found = evaluate(seeds.store, seeds.store.get(r.info.run_id))
                recorded = {key: found.recorded[key] for key in found.scores}
                assert found.scores == pytest.approx(recorded, rel=1e-6)  # other threads add it up


def test_the_test_set_does_not_choose(
    seeds: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned upside down, all of it known at the time, it changes nothing."""
    score = metrics.score

    def inverted(logits: Any, split: Any, prefix: str) -> list[dict[str, float]]:
        found = score(logits, split, prefix)
        if prefix == "test":
            found = [{k: 1 - v if k == "test/accuracy" else v for k, v in m.items()} for m in found]
        return found

    monkeypatch.setattr(metrics, "score", inverted)
    done = train_all(tmp_path, *seeds.words, "sweep.test=all")
    assert chosen_of(done) == chosen_of(seeds)
    assert done.parent.data.tags["chosen"] == seeds.parent.data.tags["chosen"]
    by_test = {c: statistics.fmean(accuracies(r, "test/accuracy")) for c, r in cells(done).items()}
    assert max(by_test, key=lambda cell: by_test[cell]) != chosen_of(done)


def test_without_validation_nothing_is_chosen(tmp_path: Path) -> None:
    words = ["dataset.val_size=0", "training.epochs=1", "optimizer.lr=0.01,0.1"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert "chosen" not in done.parent.data.tags
    assert all("test/accuracy" not in c.data.metrics for c in done.children.values())
    assert not (done.own / "best.yaml").exists()
    assert "best.yaml" not in done.out  # no command that cannot work


def leaves(config: Any) -> dict[str, Any]:
    return {k: v for k, v in schema.leaves(config) if not k.startswith("tracking.")}


def best_run(done: Done) -> Run:
    """The first of the chosen cell."""
    return next(c for c in done.children.values() if "test/accuracy" in c.data.metrics)


def test_best_recipe(seeds: Done, tmp_path: Path) -> None:
    kept = seeds.fetch(seeds.parent, "best.yaml", tmp_path)
    assert kept.read_text() == (seeds.own / "best.yaml").read_text()
    recorded = OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml")
    assert " " in str(seeds.own)
    for path in (kept, seeds.own / "best.yaml"):
        for word in (f"experiments={path}", f"experiments='{path}'"):
            again = task_config(compose([word]))
            assert leaves(again) == leaves(recorded)


@pytest.mark.parametrize("name", ["lr=0.1,seed=0", "it's (a) [folder] {x}", "a: ${b} 100%", "ü"])
def test_best_recipe_from_a_folder_of_any_name(name: str, seeds: Done, tmp_path: Path) -> None:
    path = tmp_path / name / "best.yaml"
    path.parent.mkdir()
    path.write_text((seeds.own / "best.yaml").read_text())
    again = task_config(compose([f"experiments={path}"]))
    recorded = OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml")
    assert leaves(again) == leaves(recorded)


def test_best_recipe_trains_the_same(seeds: Done, tmp_path: Path) -> None:
    best = best_run(seeds)
    uri = fresh_store(tmp_path)
    result = alone(tmp_path / "run", uri, f"experiments={seeds.own}/best.yaml")
    again = Done(tmp_path, [], 0, "", "", mlflow.MlflowClient(uri))
    same_points(seeds.curves(best), again.curves(again.runs[0]), SIZES)
    assert result.test_accuracy == pytest.approx(best.data.metrics["test/accuracy"], abs=2e-4)


def test_best_recipe_can_be_changed(seeds: Done) -> None:
    words = [f"experiments={seeds.own}/best.yaml", "seed=99", "training.epochs=7"]
    again = leaves(task_config(compose(words)))
    recorded = leaves(OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml"))
    assert again == recorded | {"seed": 99, "training.epochs": 7}


def test_best_recipe_of_swept_groups(mixed: Done) -> None:
    recorded = OmegaConf.load(mixed.own / best_run(mixed).data.tags["job"] / "config.yaml")
    again = task_config(compose([f"experiments={mixed.own}/best.yaml"]))
    assert leaves(again) == leaves(recorded)
    assert again.schedule == recorded.schedule


@pytest.fixture(scope="module")
def issue(tmp_path_factory: pytest.TempPathFactory, images: list[str]) -> Done:
    """The grid that people type most, on noise."""
    words = [*images, "training.epochs=2"]
    words += ["model.hidden=[8]", "training.compile=never", "training.threads=1"]
    words += ["optimizer.lr=0.01,0.03,0.1,0.3", "training.batch_size=32,64,128,256"]
    return train_all(tmp_path_factory.mktemp("issue"), *words)


def test_learning_rate_by_batch_size(issue: Done) -> None:
    assert issue.status == 0, issue.err
    assert "16 jobs, 4 stacks of 4" in issue.out
    values = ["0.01", "0.03", "0.1", "0.3"], ["32", "64", "128", "256"]
    found = {
        (c.data.params["optimizer.lr"], c.data.params["training.batch_size"])
        for c in issue.children.values()
    }
    assert found == set(itertools.product(*values))
    assert len(issue.children) == 16
    for child in issue.children.values():
        assert child.info.status == "FINISHED"
        assert [step for step, _ in issue.curves(child)["train/loss"]] == [1, 2]
    rows = [line for line in issue.out.splitlines() if " FINISHED " in line]
    assert [int(line.split()[0]) for line in rows] == list(range(16))  # in the order of the jobs


@pytest.mark.parametrize(
    "name, heat_maps", [("seeds", ["heat_map_lr_momentum"]), ("issue", ["heat_map_lr_batch_size"])]
)
def test_report_on_the_parent(
    name: str, heat_maps: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done: Done = request.getfixturevalue(name)
    run_id = done.parent.info.run_id
    kept = {f.path for f in done.client.list_artifacts(run_id)}
    figures = {"learning_curves", *heat_maps}
    tables = {"leaderboard.md", "leaderboard.csv", "best.yaml"}
    assert kept >= tables | {f"{figure}.png" for figure in figures}
    assert {path for path in kept if path.startswith("heat_map")} == {f"{f}.png" for f in heat_maps}
    for file in (*tables, *(f"{figure}.png" for figure in figures)):
        own = done.own / file
        assert own.read_bytes() == done.fetch(done.parent, file, tmp_path).read_bytes()
    images = [Path(f.path).name for f in done.client.list_artifacts(run_id, "images")]
    drawn = {image.split("+")[0] for image in images if image.endswith(".png")}
    assert drawn == {f"sweep~{figure}" for figure in figures}
    for figure in figures:
        assert matplotlib.image.imread(done.own / f"{figure}.png").std() > 0.05
    lines = (done.own / "leaderboard.md").read_text().splitlines()
    assert len(lines) == 2 + len({str(sorted(swept(c).items() - {("seed", swept(c).get("seed"))}))
                                  for c in done.children.values()})  # fmt: skip
    assert "(chosen)" in lines[2] and "(chosen)" not in "".join(lines[3:])
