"""The models of a sweep's chosen cell, which differ in their seeds, as one model."""

from dataclasses import dataclass, replace

from mnist_exp.errors import ConfigError
from mnist_exp.formatting import MeanStd, Table
from mnist_exp.run import saved_model
from mnist_exp.run.evaluate import Evaluation, evaluate_stack
from mnist_exp.run.job import CachedLoader
from mnist_exp.sweeps import results
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.training import metrics


@dataclass(frozen=True)
class Ensemble:
    """The models of one cell of a sweep, which differ in their seeds, and all of them together."""

    members: list[Evaluation]
    whole: Evaluation

    def spread(self, key: str) -> MeanStd:
        """Return mean and deviation over the members of one of their scores."""
        return MeanStd.of([member.scores[key] for member in self.members])

    def table(self) -> Table:
        """Return a table: a row a member, their mean, and all together."""
        loss, accuracy = self.whole.scores
        header = ["run", "name", accuracy, loss, "calibration error"]
        rows = [
            [
                model.run_id[:8],
                model.name,
                f"{model.scores[accuracy]:.2%}",
                f"{model.scores[loss]:.4f}",
                f"{model.calibration.error:.2%}",
            ]
            for model in [*self.members, self.whole]
        ]
        rows[-1][0] = "together"
        means = self.spread(accuracy).percent(), self.spread(loss).loss()
        rows.insert(-1, ["mean", "± deviation (n)", *means, ""])
        return Table(header, rows)

    def gain(self, key: str) -> float:
        """Return what the whole has more than the mean of its members."""
        return self.whole.scores[key] - self.spread(key).mean


def ensemble(
    store: Store,
    parent: StoredRun,
    root: str | None = None,
    *,
    split: str = "test",
    tta: bool = False,
) -> Ensemble:
    """Average the probabilities of a sweep's chosen cell over its seeds.

    Args:
        store: The store of the sweep.
        parent: The sweep's run.
        root: Where its data is by now, if not where it was.
        split: The images: "test" or "val".
        tta: Average over the views of each image that suit the runs as well.

    Raises:
        ConfigError: There is no such cell or split, or the cell has one model alone.
    """
    run_id = parent.id
    chosen = results.summarise(results.load_from_store(store, run_id)).chosen
    if chosen is None:
        raise ConfigError(
            f"sweep {run_id}: validation has chosen no cell, so there is nothing to average. A "
            f"sweep with finished runs and dataset.val_size=5000 has one"
        )
    if len(chosen.finished) < 2:
        raise ConfigError(
            f"sweep {run_id}: the chosen cell, {chosen.label}, has one finished run; an ensemble "
            f"needs two or more. Sweep over seeds: seed=0,1,2"
        )
    load = CachedLoader()
    members = []
    for job in chosen.finished:
        run = store.get(job.run_id)
        dataset, stack = saved_model.load_run(store, run, load, root)
        members.append(evaluate_stack(run, dataset, stack, split, tta))
    first = members[0]
    if split == "val" and any(m.dataset is not first.dataset for m in members):
        raise ConfigError(
            f"--split val: sweep {run_id}: the runs of {chosen.label} have different validation "
            f"images, which others of them were trained on: dataset.split_seed must be the same "
            f"for all. For the test set: --split test"
        )
    whole = replace(
        first,
        run_id=run_id,
        name=f"ensemble of {len(members)}, {chosen.label}",
        logits=metrics.average([m.logits for m in members]),
        recorded={},
    )
    return Ensemble(members, whole)
