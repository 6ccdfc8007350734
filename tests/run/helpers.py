"""Jobs as tests train them."""

import torch

from mnist_exp.data.dataset import Dataset
from mnist_exp.run.job import Job
from mnist_exp.training import loop, metrics
from mnist_exp.training.events import Epoch, Progress, StackSpec
from mnist_exp.training.stack import Stack


def dataset_of(job: Job) -> Dataset:
    return job.load(job.config.dataset)


def stack_of(job: Job) -> Stack:
    return Stack(job.build, [job.config.seed], job.device)


def train_two_batches(job: Job) -> None:
    """Trains and evaluates; the weights must change and everything be finite."""
    dataset, stack = dataset_of(job), stack_of(job)
    before = stack.snapshot()
    batch_size = -(-len(dataset.train) // 2)
    records = list(
        loop.fit(stack, dataset, [job.run_spec], StackSpec(job.optimizer, 1, batch_size))
    )
    progress = [r for r in records if isinstance(r, Progress)]
    assert progress[-1].step == progress[-1].steps == 2
    epoch = records[-1]
    assert isinstance(epoch, Epoch) and not epoch.failed
    after = stack.params
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    logits = metrics.predict(stack, dataset, dataset.test)
    assert logits.shape == (1, len(dataset.test), len(dataset.classes))
