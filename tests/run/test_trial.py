"""The trial: what a model or an optimizer cannot do is known before anything is created."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnist_exp
from mnist_exp.config.compose import compose
from mnist_exp.errors import ConfigError
from mnist_exp.run.job import CachedLoader, Job, prepare

LOAD = CachedLoader()


class Net(nn.Module):
    """Logistic regression; the others here differ in what their names say."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Any:
        return self.last(x.flatten(1))


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class PairInTraining(Net):
    """As torchvision's networks with auxiliary classifiers."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Rounding(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).long()


class Squeezing(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).squeeze()


class InTwos(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(2, -1))


class Detached(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).detach()


class ExtraState(Net):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Unsaved(Net):
    """What training changes is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.calls: Tensor

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.calls += 1
        return super().forward(x) + self.calls * torch.arange(10)


class Keeping(Net):
    """It keeps a part of a graph, which cannot be copied."""

    def forward(self, x: Tensor) -> Any:
        self.kept = super().forward(x)
        return self.kept


class Handle:
    """It is copied as itself, and cannot be pickled."""

    def __deepcopy__(self, memo: object) -> "Handle":
        return self

    def __reduce__(self) -> str:
        raise TypeError("a handle is of this process")


class Holding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.handle = Handle()


class Branching(Holding):
    """What it computes depends on values, so it cannot be exported either."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if float(x.sum()) > 0 else -x)


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        return None


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("cannot step")


class HalfPrecision(Net):
    """NumPy has no bfloat16: neither its weights nor its logits can be drawn as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.last.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.bfloat16())


class NoisyEvaluation(Net):
    """Random in evaluation too, which is its own affair."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.rand_like(x))


def job(*overrides: str) -> Job:
    return prepare(compose(["trusted_packages=[tests]", "debug=fast", *overrides]), LOAD)


def model(kind: type[nn.Module]) -> Sequence[str]:
    return "~model", f"+model={{_target_: {__name__}.{kind.__name__}}}"


def optimizer(kind: type[torch.optim.Optimizer]) -> Sequence[str]:
    return "~optimizer", f"+optimizer={{_target_: {__name__}.{kind.__name__}}}"


@pytest.mark.parametrize("batch_size", [64, 1])
@pytest.mark.parametrize("kind", [Net, HalfPrecision, NoisyEvaluation, Keeping, Holding])
def test_what_can_be_trained_is_accepted(kind: type[nn.Module], batch_size: int) -> None:
    random_state = torch.random.get_rng_state()
    job(*model(kind), f"training.batch_size={batch_size}")
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_what_is_accepted_comes_to_its_end(place: list[str]) -> None:
    words = [*place, "trusted_packages=[tests]", "training.label_smoothing=0.1"]
    result = mnist_exp.train([*words, *model(HalfPrecision)])
    again = mnist_exp.evaluate(result.run_id, place[1:2])
    assert again.scores["test/accuracy"] == result.test_accuracy > 0.2
    assert "first_layer" in again.draw()


NEEDED = "but the dataset needs logits [2, 10], a tensor of floats"


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Pair, f"it turns images [2, 1, 28, 28] into a tuple, {NEEDED}"),
        (Named, f"it turns images [2, 1, 28, 28] into a dict, {NEEDED}"),
        (PairInTraining, f"it turns images [2, 1, 28, 28] into a tuple, {NEEDED}"),
        (Rounding, f"it turns images [2, 1, 28, 28] into a tensor of torch.int64, {NEEDED}"),
        (Squeezing, "it turns images [1, 1, 28, 28] into [10], but the dataset needs logits [1"),
        (InTwos, "mat1 and mat2 shapes cannot be multiplied"),
        (Detached, "does not require grad"),
        (ExtraState, "its state_dict holds _extra_state, a dict, but only tensors are saved"),
        (
            Branching,
            "neither be pickled (a handle is of this process) nor exported by torch.export",
        ),
        (Unsaved, "training changes what its state_dict does not hold"),
    ],
)
def test_what_a_model_cannot_do_is_said(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        job(*model(kind))
    assert str(error.value).startswith(f"model: {kind.__name__}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "kind, reason",
    [(WithoutRate, "it has no lr, which a schedule sets"), (Failing, "cannot step")],
)
def test_what_an_optimizer_cannot_do_is_said(
    kind: type[torch.optim.Optimizer], reason: str
) -> None:
    with pytest.raises(ConfigError) as error:
        job(*optimizer(kind))
    assert str(error.value) == f"optimizer: {kind.__name__}: {reason}"


def test_a_last_batch_of_one_image_is_found_in_any_epoch() -> None:
    """Batch normalisation cannot train on one; 64 images first, and 33 of them later."""
    words = ["model=cnn_pooled", "dataset.train_size=64", "training.batch_size=32"]
    words += ["training.focus.after=1", "training.focus.random=0"]
    job(*words, "training.focus.hardest=0.5")
    with pytest.raises(ConfigError, match="one image for the last batch of 33 images"):
        job(*words, "training.focus.hardest=0.52")


def test_a_split_of_one_image_is_enough() -> None:
    job("dataset.train_size=1", "training.batch_size=2", "dataset.val_size=1")
