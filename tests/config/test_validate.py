"""A value of the wrong type, or out of range, is named in one message; no run is made."""

import os
from pathlib import Path

import pytest

from mnist_exp.config.compose import compose
from mnist_exp.config.schema import task_config
from mnist_exp.config.validate import likely_mistakes, validate
from mnist_exp.errors import ConfigError
from tests.config.bad_input import Bad, Prepare, bad, beside, is_named
from tests.helpers import write_idx
from tests.run.helpers import dataset_of


def focus(after: float, hardest: float, random: float) -> str:
    values = {"after": after, "hardest": hardest, "random": random}
    return " ".join(f"training.focus.{key}={value}" for key, value in values.items())


TYPES = [
    bad("training.epochs=many", "training.epochs=many: must be a whole number, 1 or more",
        good="training.epochs=3"),
    bad("training.epochs=1.5", "training.epochs", "1.5", "a whole number",
        good="training.epochs=2"),
    bad("training.epochs=null", "training.epochs=null: must be a whole number, 1 or more",
        good="training.threads=null"),
    bad("training.label_smoothing=some", "training.label_smoothing=some: must be a number, from 0",
        good="training.label_smoothing=0"),
    bad("training.clip_norm=", "training.clip_norm=: must be a number, from 1e-30", "or null",
        good="training.clip_norm=null"),
    bad("training.decay_norms=null", "training.decay_norms=null: must be true or false",
        good="training.decay_norms=no"),
    bad("training.precision=[float32]", "training.precision", "must be float32 or bfloat16",
        good="training.precision=float32"),
    bad("dataset.classes=3", "dataset.classes=3: must be a list of texts, as in [a,b], or null",
        good="dataset.classes=null"),
    bad("seed=[1]", "seed", good="seed=1"),
    bad("tracking.tags=[a]", "tracking.tags", good="+tracking.tags.a=b"),
    bad("trusted_packages=torch", "trusted_packages=torch: must be a list of texts",
        good="trusted_packages=[torch]"),
    bad("optimizer.lr=high", "optimizer.lr=high", "a number", good="optimizer.lr=1"),
    bad("optimizer.lr=true", "optimizer.lr=True", "a number", good="optimizer.lr=1"),
    bad("optimizer.lr=null", "optimizer.lr=null", "a number", good="optimizer.lr=0"),
    bad("optimizer=adam optimizer.betas=3", "optimizer.betas=3", "a list of 2 numbers",
        good="optimizer=adam optimizer.betas=[0.9,0.99]"),
    bad("model.hidden=wide", "model.hidden=wide", "a list of whole numbers",
        good="model.hidden=[8]"),
]  # fmt: skip
RANGES = [
    bad("optimizer.lr=-1", "optimizer.lr=-1", "0 or more", good="optimizer.lr=0"),
    bad("optimizer.lr=nan", "optimizer.lr=nan", "finite", good="optimizer.lr=1e-9"),
    bad("optimizer.lr=inf", "optimizer.lr=inf", "finite", good="optimizer.lr=1e9"),
    bad("optimizer=muon optimizer.lr=1e-320", "optimizer.lr=1e-320", "0, or from 1.2e-38",
        good="optimizer=muon optimizer.lr=1.3e-38"),
    bad("optimizer=adam +optimizer.eps=-1e-320", "optimizer.eps=-1e-320", "0, or from 1.2e-38",
        good="optimizer=adam +optimizer.eps=0"),
    bad("optimizer.momentum=-1", "optimizer", "momentum", "-1", good="optimizer.momentum=0"),
    bad("+optimizer.nesterov=true", "optimizer", "momentum",
        good="+optimizer.nesterov=true optimizer.momentum=0.9"),
    bad("optimizer=adam optimizer.betas=[1.0,0.9]", "optimizer", "beta", "1.0",
        good="optimizer=adam optimizer.betas=[0.0,0.9]"),
    bad("training.batch_size=0", "training.batch_size=0", "1 or more",
        good="training.batch_size=1"),
    bad("training.epochs=-1", "training.epochs=-1", "1 or more", good="training.epochs=1"),
    bad("training.epochs=0", "training.epochs=0", "1 or more", good="training.epochs=1"),
    bad("training.label_smoothing=1", "training.label_smoothing=1", "below 1",
        good="training.label_smoothing=0.99"),
    bad("training.label_smoothing=nan", "training.label_smoothing=nan", "below 1",
        good="training.label_smoothing=0"),
    bad("training.clip_norm=0", "training.clip_norm=0.0", "1e-30", good="training.clip_norm=1"),
    bad("training.clip_norm=1e-31", "training.clip_norm=1e-31", "from 1e-30 to 1e30, or null",
        good="training.clip_norm=1e-30"),
    bad("training.clip_norm=inf", "training.clip_norm=inf", "from 1e-30 to 1e30",
        good="training.clip_norm=1e30"),
    bad("training.ema=0", "training.ema=0.0", "above 0", good="training.ema=0.01"),
    bad("training.ema=nan", "training.ema=nan", "above 0", good="training.ema=null"),
    bad("training.ema=10.5", "training.ema=10.5", "training.epochs (10)",
        good="training.ema=10 training.epochs=10"),
    bad("augmentation.shift=15", "augmentation.shift=15.0", "from 0 to 14 pixels",
        good="augmentation.shift=14"),
    bad("augmentation.rotation=181", "augmentation.rotation=181.0", "0 to 180 degrees",
        good="augmentation.rotation=180"),
    bad("augmentation.scale=1", "augmentation.scale=1.0", "below 1",
        good="augmentation.scale=0.99"),
    bad("augmentation.shear=45", "augmentation.shear=45.0", "0 to below 45 degrees",
        good="augmentation.shear=44.9"),
    bad("augmentation.elastic=10.1", "augmentation.elastic=10.1", "from 0 to 10 pixels",
        good="augmentation.elastic=10"),
    bad("augmentation.elastic=nan", "augmentation.elastic=nan", good="augmentation.elastic=0"),
    bad("augmentation.erase=-1", "augmentation.erase=-1", "0 or more pixels",
        good="augmentation.erase=1"),
    bad("augmentation.erase=1.5", "augmentation.erase=1.5: must be a whole number, 0 or more",
        good="augmentation.erase=2"),
    bad("augmentation.erase=28", "augmentation.erase=28: must be below 28", "28x28 pixels",
        "augmentation.erase=0",
        good="augmentation.erase=27"),
    bad("augmentation.mixup=-0.1", "augmentation.mixup=-0.1", "0, or from 0.01 to 100",
        good="augmentation.mixup=0"),
    bad("augmentation.mixup=1e-320", "augmentation.mixup=1e-320", "0, or from 0.01 to 100",
        good="augmentation.mixup=0.01"),
    bad("augmentation.mixup=1e308", "augmentation.mixup=1e+308", "0, or from 0.01 to 100",
        good="augmentation.mixup=100"),
    bad("augmentation.flip=1.1", "augmentation.flip=1.1", "from 0 to 1",
        good="augmentation.flip=1"),
    bad("training.threads=0", "training.threads=0", "from 1", good="training.threads=1"),
    bad("training.compile=maybe", "training.compile=maybe", "auto, always or never",
        good="training.compile=always"),
    bad("training.focus.after=1epoch", "training.focus.after=1epoch: must be a number, more than",
        good="training.focus.after=null"),
    bad("training.focus=null", "training.focus=null: it holds keys. To switch it off: "
        "training.focus.after=null", good="training.focus.after=null"),
    bad("sweep=null", "sweep=null: it holds keys. sweep has: on_error", good="sweep.max_jobs=1"),
    bad("tracking.tags=null", "tracking.tags=null: it holds keys. For none: tracking.tags={}",
        good="tracking.tags={}"),
    bad("training.focus=1", "training.focus", good="training.focus.hardest=0.5"),
    bad("training.focus.afterwards=1", "training.focus.afterwards", "after",
        good="training.focus.random=0.5"),
    bad("training.focus.after=0", "training.focus.after=0", "more than 0",
        good=f"{focus(0.3, 1, 0)} training.epochs=2"),
    bad("training.focus.after=nan", "training.focus.after=nan", "more than 0",
        good="training.focus.after=null"),
    bad("training.focus.after=inf", "training.focus.after=inf", "below 2**31",
        good="training.focus.after=null"),
    bad("training.focus.after=9.5", "training.focus.after=9.5", "none of training.epochs (10)",
        "training.epochs=11, or training.focus.after=9",
        good=f"{focus(9, 0.2, 0.1)} training.epochs=10"),
    bad("training.focus.after=1 training.epochs=1", "training.focus.after=1: leaves none",
        "training.epochs=2, or training.focus.after=null",
        good=f"{focus(1, 0.2, 0.1)} training.epochs=2"),
    bad("training.focus.hardest=0", "training.focus.hardest=0", "above 0",
        good="training.focus.hardest=1"),
    bad("training.focus.hardest=1.01", "training.focus.hardest=1.01", "up to 1",
        good="training.focus.hardest=1"),
    bad("training.focus.random=1", "training.focus.random=1", "below 1",
        good="training.focus.random=0.99"),
    bad("training.focus.random=-0.1", "training.focus.random=-0.1", "from 0",
        good="training.focus.random=0"),
    bad(focus(1, 0.7, 0.3000001), "training.focus.random=0.3000001", "at most 0.3,",
        "training.focus.hardest (0.7)", good=f"{focus(1, 0.9, 0.1)} training.epochs=2"),
    bad(focus(1, 1, 0.1), "at most 0,", "Add training.focus.random=0",
        good=f"{focus(1, 1, 0)} training.epochs=2"),
    bad(focus(1, 0.003, 0.5), "training.focus.hardest=0.003", "none of the 128 training images",
        "0.0078", good=f"{focus(1, 0.0078, 0)} training.epochs=2 training.batch_size=64"),
    bad(focus(1.001, 0.2, 0.1), "training.focus.after=1.001: its last part of an epoch, 0.001, is "
        "none of the 128 training images. Choose 1, or 1.0078 or more",
        good=f"{focus(1.0078, 0.2, 0.1)} training.batch_size=64"),
    bad("training.focus.after=0.003", "training.focus.after=0.003", "none of the 128",
        "Choose 0.0078 or more",
        good=f"{focus(0.0078, 0.2, 0.1)} training.epochs=2 training.batch_size=64"),
    bad("training.precision=float16", "training.precision=float16", "float32 or bfloat16",
        good="training.precision=float32"),
    bad("seed=-1", "seed=-1", "0 or more", good="seed=0"),
    bad(f"seed={2**63}", "seed=9223372036854775808", "2**63", good=f"seed={2**63 - 1}"),
    bad("dataset.split_seed=-1", "dataset.split_seed=-1", good="dataset.split_seed=0"),
    bad("dataset.root=''", "dataset.root=: must be a folder", good="dataset.root=a"),
    bad("dataset.val_size=-1", "dataset.val_size=-1", "0 or more", good="dataset.val_size=0"),
    bad("dataset.val_size=60000", "dataset.val_size=60000", "0 to 59999",
        good="dataset.val_size=59999", real=True),
    bad("dataset.train_size=0", "dataset.train_size=0", "1 or more", good="dataset.train_size=1"),
    bad("dataset.train_size=55001", "dataset.train_size=55001", "1 to 55000",
        good="dataset.train_size=55000 dataset.val_size=5000", real=True),
    bad("tracking.experiment=''", "tracking.experiment", "a name", good="tracking.experiment=a"),
    bad("tracking.image_every=0", "tracking.image_every=0", "1 or more",
        good="tracking.image_every=1"),
    bad("schedule.warmup_epochs=10.5", "schedule.warmup_epochs=10.5", "training.epochs (10)",
        good="schedule.warmup_epochs=10 training.epochs=10"),
    bad("schedule.warmup_epochs=-1", "schedule", "warmup_epochs", "-1",
        good="schedule.warmup_epochs=0.5"),
    bad("schedule=cosine schedule.final=nan", "schedule.final=nan", "finite",
        good="schedule=cosine schedule.final=0.1"),
    bad("schedule=step schedule.every_epochs=0", "schedule", "every_epochs",
        good="schedule=step schedule.every_epochs=1"),
    bad("training.device=gpu", "training.device=gpu", "auto, cpu, cuda",
        good="training.device=cpu"),
    bad("training.device=cuda:99", "training.device=cuda:99", "This machine has: cpu",
        good="training.device=auto"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*TYPES, *RANGES])
def test_bad_input_is_named(case: Bad, prepare: Prepare) -> None:
    is_named(case, prepare)


@pytest.mark.parametrize("words, real", beside([*TYPES, *RANGES]))
def test_what_is_beside_it_is_fine(words: list[str], real: bool, prepare: Prepare) -> None:
    prepare(words, real)


def test_folder_of_data(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "my images")
    words = ["dataset=idx", "dataset.val_size=0"]

    def message(root: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            prepare([*words, f"dataset.root={root}"], real=True)
        return str(caught.value)

    with pytest.raises(ConfigError, match=r"dataset\.root"):
        prepare(words, real=True)
    nowhere = tmp_path / "nowhere"
    assert message(nowhere).startswith(f"dataset.root={nowhere}: there is no such folder")
    assert "is not a folder" in message(folder / "train-images-idx3-ubyte")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read (Too many levels" in message(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    assert "a file is missing: train-images" in message(tmp_path / "empty")
    job = prepare([*words, f"dataset.root={folder}"], real=True)
    assert dataset_of(job).source == str(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folder_that_may_not_be_read(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "locked")
    file = folder / "train-labels-idx1-ubyte"
    file.chmod(0)
    with pytest.raises(ConfigError, match=f"{file}: cannot be read"):
        prepare(["dataset=idx", "dataset.val_size=0", f"dataset.root={folder}"], real=True)


def test_shares_of_hard_images_without_such_epochs_are_warned_of_once() -> None:
    commands = "", focus(1, 0.5, 0.1), "training.focus.hardest=0.5 training.focus.random=0.3"
    plain, focused, idle = (validate(task_config(compose(words.split()))) for words in commands)
    assert likely_mistakes([plain]) == likely_mistakes([idle, focused]) == []
    (warning,) = likely_mistakes([plain, idle, idle])
    assert warning.startswith("training.focus.hardest=0.5: it has no effect without")
