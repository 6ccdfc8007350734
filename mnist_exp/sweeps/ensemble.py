"""The models of a sweep's chosen cell, which differ in their seeds, as one model."""

import math
from dataclasses import dataclass

import torch

from mnist_exp.errors import ConfigError
from mnist_exp.formatting import MeanStd, Table
from mnist_exp.run import saved_model
from mnist_exp.run.evaluate import Evaluation, evaluate_stack
from mnist_exp.run.job import CachedLoader
from mnist_exp.sweeps import results
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun


@dataclass(frozen=True)
class Ensemble:
    """The models of one cell of a sweep, which differ in their seeds, and all of them together."""

    members: list[Evaluation]
    whole: Evaluation

    def spread(self, key: str) -> MeanStd:
        """Return mean and deviation over the members of test/loss or test/accuracy."""
        return MeanStd.of([member.test[key] for member in self.members])

    def table(self) -> Table:
        """Return a table: a row a member, their mean, and all together."""
        header = ["run", "name", "test accuracy", "test loss", "calibration error"]
        rows = [
            [
                model.run_id[:8],
                model.name,
                f"{model.test['test/accuracy']:.2%}",
                f"{model.test['test/loss']:.4f}",
                f"{model.calibration.error:.2%}",
            ]
            for model in [*self.members, self.whole]
        ]
        rows[-1][0] = "together"
        accuracy, loss = (self.spread(key) for key in ("test/accuracy", "test/loss"))
        rows.insert(-1, ["mean", "± deviation (n)", accuracy.percent(), loss.loss(), ""])
        return Table(header, rows)

    def gain(self, key: str) -> float:
        """Return what the whole has more than the mean of its members."""
        return self.whole.test[key] - self.spread(key).mean


def ensemble(store: Store, parent: StoredRun, root: str | None = None) -> Ensemble:
    """Average the probabilities of a sweep's chosen cell over its seeds.

    Args:
        store: The store of the sweep.
        parent: The sweep's run.
        root: Where its data is by now, if not where it was.

    Raises:
        ConfigError: There is no such cell, or it has one model alone.
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
        members.append(evaluate_stack(run, *saved_model.load_run(store, run, load, root)))
    first = members[0]
    # the logarithm of the mean probability: logits as good as any
    shares = torch.stack([m.logits.double().log_softmax(-1) for m in members])
    logits = shares.logsumexp(0) - math.log(len(members))
    name = f"ensemble of {len(members)}, {chosen.label}"
    return Ensemble(members, Evaluation(run_id, name, first.dataset, logits))
