"""What a config's targets lead to, and their arguments, are checked before anything is created."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_exp.errors import ConfigError, Terminated
from mnist_exp.run.build import explaining
from tests.config.bad_input import NO_ARGUMENTS, Bad, Prepare, bad, beside, is_named
from tests.run.helpers import stack_of, train_two_batches


def test_a_signal_while_something_is_built_is_no_fault_of_it() -> None:
    with pytest.raises(Terminated, match="143"), explaining("optimizer", "SGD"):
        raise Terminated(143)
    with pytest.raises(ConfigError, match="optimizer: SGD: 3"), explaining("optimizer", "SGD"):
        raise SystemExit(3)


def test_modules_of_torch_nested_and_lazy(prepare: Prepare) -> None:
    layers = (
        "[{_target_:torch.nn.Flatten},{_target_:torch.nn.LazyLinear,out_features:16},"
        "{_target_:torch.nn.ReLU},{_target_:torch.nn.LazyLinear,out_features:10}]"
    )
    words = ["model._target_=torch.nn.Sequential", *NO_ARGUMENTS, f"+model._args_={layers}"]
    job = prepare(words)
    assert {name: tuple(p.shape) for name, p in stack_of(job).params.items()} == {
        "1.weight": (1, 16, 784),
        "1.bias": (1, 16),
        "3.weight": (1, 10, 16),
        "3.bias": (1, 10),
    }
    train_two_batches(job)


OWN_MODULE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=8):
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, num_classes))

def not_a_class():
    raise AssertionError
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current directory."""
    (tmp_path / "own_nets.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "own_nets"
    sys.modules.pop("own_nets", None)


def test_module_in_a_file_of_ones_own(prepare: Prepare, own_module: str) -> None:
    target = [f"model._target_={own_module}.Net", *NO_ARGUMENTS, "+model.width=12"]
    with pytest.raises(ConfigError, match=r"own_nets\.Net.*trusted_packages=\[PACKAGE\]"):
        prepare(target)
    job = prepare([*target, f"trusted_packages=[{own_module}]"])
    assert stack_of(job).params["1.weight"].shape == (1, 12, 784)
    assert sys.path.count(os.getcwd()) == 1
    train_two_batches(job)


def test_trusted_package_is_not_trusted_blindly(prepare: Prepare, own_module: str) -> None:
    words = [f"trusted_packages=[{own_module}]", *NO_ARGUMENTS]
    with pytest.raises(ConfigError, match="must be a class that extends Module"):
        prepare([*words, f"model._target_={own_module}.not_a_class"])
    with pytest.raises(ConfigError, match=rf"it cannot be imported.*Nett.*{os.getcwd()}"):
        prepare([*words, f"model._target_={own_module}.Nett"])


def model(target: str, *more: str) -> str:
    return " ".join([f"model._target_={target}", *NO_ARGUMENTS, *more])


def optimizer(target: str, *more: str) -> str:
    return " ".join(
        [f"optimizer._target_={target}", "~optimizer.momentum", "~optimizer.weight_decay", *more]
    )


GOOD_LAYERS = "{_target_:torch.nn.Flatten},{_target_:torch.nn.Linear,in_features:784,out_features:"
TARGETS = [
    bad("+model.width=3", "model.width", "MLP takes no such argument", "hidden, dropout",
        good="model.hidden=[3]"),
    bad("~model.hidden +model.hiden=[3]", "model.hiden", "Did you mean hidden?",
        good="~model.hidden +model.hidden=[3]"),
    bad("+optimizer.alpha=1", "optimizer.alpha", "SGD takes no such argument", "nesterov",
        good="+optimizer.maximize=true"),
    bad("+optimizer.params=1", "optimizer.params: it takes the parameters of the model",
        "'~optimizer.params'", good="+optimizer.maximize=true"),
    bad("model=cnn model.width=10000000000000", "model: StridedCNN: it needs more memory",
        good="model=cnn model.width=4"),
    bad("+optimizer._args_=[1]", "optimizer._args_", "by its name", good="optimizer.lr=1"),
    bad("+schedule.final=0", "schedule.final", "Constant takes no such argument", "warmup_epochs",
        good="schedule=cosine schedule.final=0"),
    bad(model("torch.nn.Linear"), "model.in_features", "Add +model.in_features=VALUE",
        good=model("mnist_exp.training.models.MLP")),
    bad(model("os.system"), "model._target_=os.system", "not allowed", "torch.nn",
        good=model("mnist_exp.training.models.LeNet5")),
    bad("model._target_=builtins.eval", "builtins.eval", "not allowed",
        good="model._target_=mnist_exp.training.models.MLP"),
    bad("~model._target_", "model._target_", "not allowed", good="~model.hidden"),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:os.system}}]",
        "model._args_.0._target_=os.system", "not allowed",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad("+model.act={_target_:os.system}", "model.act._target_=os.system", "not allowed",
        good="model.dropout=0.1"),
    bad("+model.act={deep:[{_target_:os.system}]}", "model.act.deep.0._target_=os.system",
        "not allowed", good="model.dropout=0.1"),
    bad(model("torch.nn.functional.torch.hub.load"), "torch.nn.functional.torch.hub.load",
        "leads to torch.hub.load", "not allowed",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.training.models.nn.modules.module.functools.partial"), "functools.partial",
        "not allowed", good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.run.provenance.subprocess.run"), "leads to subprocess.run", "not allowed",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.nn.modules.module.os"), "it cannot be imported", "'os'",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.training.models.LeNet"), "models.LeNet", "it cannot be imported",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.nn.functional.relu"), "model._target_", "a class that extends Module",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.optim.SGD"), "model._target_", "a class that extends Module",
        good=model("mnist_exp.training.models.LeNet5")),
    bad("optimizer._target_=torch.nn.Linear", "optimizer._target_", "extends Optimizer",
        good="optimizer._target_=torch.optim.SGD"),
    bad("optimizer._target_=torch.optim.lr_scheduler.StepLR", "extends Optimizer",
        good="optimizer._target_=torch.optim.SGD"),
    bad("schedule._target_=mnist_exp.training.schedules.Schedule", "schedule._target_",
        "extends Schedule", good="schedule._target_=mnist_exp.training.schedules.Cosine"),
    bad("schedule._target_=torch.optim.SGD", "schedule._target_", "extends Schedule",
        good="schedule._target_=mnist_exp.training.schedules.Cosine"),
    bad(optimizer("torch.optim.Muon"), "Muon cannot be used", "optimizer=muon",
        good="optimizer=muon optimizer.adamw_lr=0"),
    bad("optimizer=muon optimizer._target_=torch.optim.Muon", "Muon cannot be used",
        good="optimizer=muon"),
    bad("optimizer=muon optimizer.lr=0", "Muon: lr=0", "above 0", good="optimizer=muon"),
    bad("optimizer=muon optimizer.momentum=1", "Muon: momentum=1", "below 1",
        good="optimizer=muon optimizer.momentum=0"),
    bad("optimizer=muon +optimizer.eps=0", "Muon: eps=0", "above 0",
        good="optimizer=muon +optimizer.eps=1e-9"),
    bad("optimizer=muon optimizer.adamw_lr=-1", "Muon: adamw_lr=-1", "0 or more",
        good="optimizer=muon optimizer.adamw_lr=0"),
    bad(optimizer("torch.optim.LBFGS"), "LBFGS", "cannot be used", "several times a step",
        good=optimizer("torch.optim.Adadelta")),
    bad(optimizer("torch.optim.SparseAdam"), "SparseAdam", "cannot be used", "sparse",
        good=optimizer("torch.optim.NAdam")),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}11}}]", "Sequential",
        "[2, 11]", "[2, 10]",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad(model("torch.nn.Identity"), "Identity", "[2, 1, 28, 28]", "[2, 10]",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:torch.nn.Linear,"
        "in_features:3,out_features:10}]", "Sequential", "shapes cannot be multiplied",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad("model.hidden=[-3]", "MLP", "-3", good="model.hidden=[3]"),
    bad("optimizer=adam optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "a list of 2 numbers",
        "[0.9, 0.999]", good="optimizer=adam optimizer.betas=[0.9,0.99]"),
    bad("optimizer=adam optimizer.betas=[0.9,0.99,0.999]", "optimizer.betas=[0.9, 0.99, 0.999]",
        "a list of 2 numbers", good="optimizer=adam optimizer.betas=[0.9,1e-3]"),
    bad("optimizer=adam optimizer.betas=[[0.9],0.99]", "optimizer.betas=[[0.9], 0.99]",
        "a list of 2 numbers", good="optimizer=adamw optimizer.betas=[0.0,0.99]"),
    bad("optimizer=adam optimizer.betas=null", "optimizer.betas=null", "a list of 2 numbers",
        good="optimizer=adam +optimizer.foreach=null"),
    bad("optimizer.momentum=null", "optimizer.momentum=null", "a number",
        good="optimizer.momentum=0"),
    bad("+optimizer.nesterov=maybe", "optimizer.nesterov=maybe", "true or false",
        good="+optimizer.nesterov=false"),
    bad("schedule.warmup_epochs=[1]", "schedule.warmup_epochs=[1]", "a number",
        good="schedule.warmup_epochs=1"),
    bad("model.hidden=[64,wide]", "model.hidden=[64, \"wide\"]", "a list of whole numbers",
        good="model.hidden=[64,32]"),
    bad("model.hidden=[8.5]", "model.hidden=[8.5]", "a list of whole numbers",
        good="model.hidden=[]"),
    bad("+model._args_=3", "model._args_=3", "a list", good="model.hidden=[4]"),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:torch.nn.Linear,"
        "_args_:[784,ten]}]", "model._args_.0._args_.1=ten", "a whole number",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:torch.nn.Flatten}},"
        "{_target_:torch.nn.Linear,_args_:[784,10]}]"),
]  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_bad_input_is_named(case: Bad, prepare: Prepare) -> None:
    is_named(case, prepare)


@pytest.mark.parametrize("words, real", beside(TARGETS))
def test_what_is_beside_it_is_fine(words: list[str], real: bool, prepare: Prepare) -> None:
    prepare(words, real)


@pytest.mark.parametrize("part", ["schedule", "optimizer"])
def test_nothing_that_is_nested_is_built(part: str, prepare: Prepare, tmp_path: Path) -> None:
    built = tmp_path / "built"
    nested = f"{{_target_:pathlib.Path.touch,self:{{_target_:pathlib.Path,_args_:['{built}']}}}}"
    key = {"schedule": "schedule=cosine schedule.final", "optimizer": "optimizer.momentum"}[part]
    for value in (nested, f"[{nested}]", f"[[{nested}]]"):
        with pytest.raises(ConfigError, match=part):
            prepare(f"{key}={value}".split())
    assert not built.exists()
