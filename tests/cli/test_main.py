"""The command line: exit status, what is printed where, and what is left behind.

Processes where the process is the point, and `cli.main` elsewhere.
"""

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import pytest
import torch
from mlflow.entities import Run
from PIL import Image

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.config import paths
from mnist_exp.data.dataset import Dataset
from mnist_exp.formatting import wilson
from mnist_exp.system import signals
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.store import Store
from mnist_exp.training import loop
from mnist_exp.training.events import Epoch
from tests.helpers import ROOT, command, finish, fresh_store, start, write_idx

Call = Callable[..., tuple[int, str, str]]
SMALL = ["debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`cli.main` on words: exit status, what it printed, what it complained of."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


def runs(store: str) -> list[Run]:
    """Newest first."""
    client = mlflow.MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time DESC"]))


def refused(answer: tuple[int, str, str], *parts: str) -> None:
    """One message, no traceback, exit status 2."""
    status, out, err = answer
    assert (status, out) == (2, ""), answer
    assert err.startswith("mnist-exp: ") and err.count("mnist-exp: ") == 1
    assert "Traceback" not in err
    assert [part for part in parts if part not in err] == [], err


def imported(importtime: str) -> set[str]:
    """The libraries in what PYTHONPROFILEIMPORTTIME printed."""
    names = re.findall(r"^import time:.*\| +([\w.]+)$", importtime, re.MULTILINE)
    return {name.split(".")[0] for name in names}


# processes that take a while: they run beside the other tests


class Started:
    """A process in a folder and with a store of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.store = fresh_store(folder)
        self.process = start([*words, f"tracking.uri={self.store}"], folder)

    def wait(self) -> None:
        self.status, self.out, self.err = finish(self.process)


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C, once an epoch is done."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            return process.send_signal(signal.SIGINT)


ENDLESS = [*SMALL, "training.epochs=100000", "tracking.image_every=100000"]


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Started]]:
    """An endless run, and one that comes to its end."""
    processes = []
    try:
        for words in (ENDLESS, [*SMALL, "tracking.run_name='a b'"]):
            folder = tmp_path_factory.mktemp("a run")
            output = f"hydra.run.dir='{folder}/its output'"
            processes.append(Started(folder, "train", *words, output))
        ctrl_c = threading.Thread(target=interrupt, args=[processes[0].process])
        ctrl_c.start()
        yield processes
    finally:
        for started in processes:
            started.process.kill()
            started.process.communicate()


@pytest.fixture
def hydras_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra's program leaves words, a variable and log handlers behind: they are put back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    handlers = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers:
        if handler not in handlers:
            handler.close()
    logging.root.handlers[:] = handlers


def test_sweep(call: Call, tmp_path: Path) -> None:
    """One run for each value, below one for the sweep; only what validation chooses is tested."""
    store = fresh_store(tmp_path)
    words = [f"tracking.uri={store}", f"hydra.sweep.dir='{tmp_path}/the jobs'"]
    status, _, err = call("train", "-m", *SMALL, *words, "optimizer.lr=0.01,0.1")
    assert status == 0, err
    (sweep,) = [run for run in runs(store) if run.data.tags.get("sweep") == "true"]
    children = [run for run in runs(store) if run.info.run_id != sweep.info.run_id]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {sweep.info.run_id}
    found = {run.data.params["optimizer.lr"]: run for run in children}
    assert {lr: run.info.status for lr, run in found.items()} == {
        "0.01": "FINISHED",
        "0.1": "FINISHED",
    }
    assert sweep.info.status == "FINISHED" and len(children) == 2
    assert found["0.01"].data.metrics["train/loss"] != found["0.1"].data.metrics["train/loss"]
    for job, lr in enumerate(("0.01", "0.1")):
        folder = tmp_path / "the jobs" / str(job)
        assert found[lr].data.tags["output_dir"] == str(folder)
        assert checkpoint.load(folder / "checkpoint.pt")["epochs"] == 2
    accuracy = {lr: run.data.metrics["best/val_accuracy"] for lr, run in found.items()}
    assert accuracy["0.01"] != accuracy["0.1"]
    tested = [lr for lr, run in found.items() if "test/accuracy" in run.data.metrics]
    assert tested == [max(accuracy, key=lambda lr: accuracy[lr])]


@pytest.mark.usefixtures("hydras_traces")
@pytest.mark.parametrize(
    "words, parts",
    [
        ("-m modle=cnn,mlp", ["modle", "Did you mean model?"]),
        ("-m model=cn,mlp", ["model=cn", "Did you mean cnn?"]),
        ("-m optimizer.lr", ["optimizer.lr", "KEY=VALUE"]),
        ("--cfg job model=cn", ["model=cn", "Did you mean cnn?"]),
    ],
)
def test_bad_words_with_flags_of_hydras(
    words: str, parts: list[str], call: Call, tmp_path: Path
) -> None:
    own = [f"tracking.uri=sqlite:///{tmp_path}/store.db", f"hydra.sweep.dir={tmp_path}/sweep"]
    refused(call("train", *words.split(), *own), *parts)
    assert not (tmp_path / "store.db").exists()


# quick processes


def test_help_is_quick(tmp_path: Path) -> None:
    status, out, err = command("--help", folder=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert status == 0
    assert out.startswith("usage: mnist-exp COMMAND")
    libraries = imported(err)
    assert "argparse" in libraries  # else nothing was read
    heavy = {"torch", "hydra", "omegaconf", "mlflow", "numpy", "matplotlib", "rich", "yaml"}
    assert libraries & heavy == set()


def test_config_is_printed_without_torch(tmp_path: Path) -> None:
    words = ["train", "--cfg", "job", "experiments=seed_mlp", "optimizer.lr=0.25"]
    status, out, err = command(*words, folder=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert status == 0
    assert "\n  lr: 0.25\n" in out and "\n  epochs: 100\n" in out
    libraries = imported(err)
    assert "omegaconf" in libraries
    assert libraries & {"torch", "mlflow", "numpy", "matplotlib", "torchvision"} == set()
    assert list(tmp_path.iterdir()) == []


def test_config_of_a_recipe_that_is_given_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a recipe.yaml"
    path.write_text("# @package _global_\ntraining: {epochs: 3}\n")
    status, out, err = command("train", f"experiments={path}", "--cfg", "job", folder=tmp_path)
    assert status == 0 and "\n  epochs: 3\n" in out, err
    missing = command("train", "--cfg", "job", "experiments=none.yaml", folder=tmp_path)
    refused(missing, "experiments=none.yaml: there is no such file")


def test_bad_value_in_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    words = ["train", "optimizer.lr=-1", f"tracking.uri=sqlite:///{tmp_path}/s.db"]
    words += [f"hydra.run.dir={tmp_path}/run"]
    refused(command(*words, folder=tmp_path / "here"), "optimizer.lr=-1", "0 or more")
    assert [p.name for p in tmp_path.rglob("*")] == ["here"]


# in this process


@pytest.mark.parametrize(
    "words, parts",
    [
        ("trian", ["trian", "Did you mean train?", "predict, report, resume, reproduce, sync"]),
        ("train optimizr.lr=1", ["optimizr", "Did you mean optimizer?"]),
        ("train model=cn", ["model=cn", "Did you mean cnn?"]),
        ("train dataset.val_size=60000", ["dataset.val_size=60000"]),
        ("train model._target_=os.system", ["os.system", "not allowed"]),
        ("train +optimizer.speed=1", ["optimizer.speed", "no such argument"]),
        ("train dataset.root=nowhere", ["dataset.root", "nowhere"]),
        ("train --config-dir nowhere", ["--config-dir nowhere"]),
        ("train --config-name nonsense", ["nonsense"]),
        ("show dataset=mnsit", ["dataset=mnsit", "Did you mean mnist?"]),
        ("show --output picture.docx", ["picture.docx", ".png"]),
        ("ui --port 99999 last", ["no runs yet"]),
    ],
)
def test_bad_words(
    words: str,
    parts: list[str],
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = words.split()
    if "--output" not in rest:
        rest.append(f"tracking.uri=sqlite:///{tmp_path}/store.db")
    if name == "train":
        rest += [f"hydra.run.dir={tmp_path}/run"]
    refused(call(name, *rest), *parts)
    assert list(tmp_path.iterdir()) == []


def test_full_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    status, out, err = call("train", "optimizer.lr=-1")
    assert (status, out) == (2, "")
    assert err.startswith("Traceback") and "in validate" in err
    assert err.endswith("\nmnist-exp: optimizer.lr=-1: must be a number of 0 or more\n")


@pytest.mark.parametrize("words", [["train", "--nonsense"], ["evaluate"], ["ui", "--port", "x"]])
def test_usage(words: list[str], call: Call) -> None:
    status, out, err = call(*words)
    assert (status, out) == (2, "")
    assert f"usage: mnist-exp {words[0]}" in err


def test_no_command(call: Call) -> None:
    status, out, _ = call()
    assert status == 2 and out.startswith("usage: mnist-exp COMMAND")
    assert call("--version") == (0, f"mnist-exp {mnist_exp.__version__}\n", "")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "uri, reason",
    [
        ("sqlite:///{here}/none/store.db", "there is no folder"),
        ("sqlite:///{here}/folder", "it is a folder"),
        ("sqlite:///{here}/text.db", "not a database"),
        ("file://{here}/mlruns", "plain folders"),
        ("{here}/mlruns", "plain folders"),
        ("http://127.0.0.1:{port} tracking.required=true", "no MLflow server answers"),
    ],
)
def test_store_that_cannot_be_opened(
    uri: str, reason: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look tells: MLflow, which may try for long, is not asked, and nothing is trained."""
    monkeypatch.setattr("mnist_exp.tracking.store.Store", None)
    monkeypatch.setattr(loop, "fit", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one\n" * 20)
    uri = uri.format(here=tmp_path, port=closed_port())
    words = [*SMALL, *f"tracking.uri={uri}".split(), f"hydra.run.dir={tmp_path}/run"]
    refused(call("train", *words), f"tracking.uri={uri.split()[0]}", reason)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "text.db"]


def test_store_of_the_environment_that_cannot_be_opened(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is typed would not count beside it."""
    for uri in (f"sqlite:///{tmp_path}/none/a.db", f"http://127.0.0.1:{closed_port()}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        answer = call("evaluate", "last")
        refused(answer, f"MLFLOW_TRACKING_URI={uri}: ", "or unset it")
        assert "tracking.uri=sqlite" not in answer[2]


def test_port_of_the_ui(call: Call, tmp_path: Path) -> None:
    store = f"tracking.uri={fresh_store(tmp_path)}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call("ui", "--port", str(port), store)
        refused(answer, f"--port {port}: cannot be used (Address already in use)", "--port 0")
    refused(call("ui", "--port", "99999", store), "--port 99999", "from 0 to 65535")


def test_server_of_the_ui_that_ends(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = {number: signal.getsignal(number) for number in signals.ENDING}
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    answer = call("ui", "--port", "0", f"tracking.uri={fresh_store(tmp_path)}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    said = "starting MLflow's server ...\nmnist-exp: MLflow's server does not start:\nout of luck\n"
    assert answer == (1, "", said)


def test_divergence(call: Call, tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    words = [*SMALL, "optimizer.lr=1e30", f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run"]
    status, out, err = call("train", *words)
    assert status == 1
    (run,) = runs(store)
    assert run.info.status == "FAILED"
    reason = run.data.tags["reason"]
    assert "diverged" in reason and "epoch 1" in reason and "learning rate of 1e+30" in reason
    assert err == f"mnist-exp: {reason}\n"
    assert "test accuracy" not in out
    path = tmp_path / "run" / "checkpoint.pt"
    assert str(path) in reason
    weights = checkpoint.load(path)["model"]
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    kept = mlflow.MlflowClient(store).list_artifacts(run.info.run_id, "checkpoint")
    assert {Path(f.path).name for f in kept} == {"checkpoint.pt", "checkpoint.pt.sha256"}


def killed(store: str) -> None:
    (run,) = runs(store)
    assert run.info.status == "KILLED"
    assert run.data.tags["reason"] == "interrupted"
    assert run.data.metrics["train/loss"] > 0  # what was measured is kept


def test_terminated(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = loop.fit

    def signalled(*arguments: Any, **more: Any) -> Iterator[Any]:
        for record in fit(*arguments, **more):
            yield record
            if isinstance(record, Epoch):
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "fit", signalled)
    store = fresh_store(tmp_path)
    answer = call("train", *ENDLESS, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run")
    assert answer[0] == 143
    killed(store)


def test_show(call: Call, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "my images", size=32, classes=26, count=130)
    picture = tmp_path / "new folder" / "a picture.png"
    words = ["dataset=idx", f"dataset.root='{folder}'", "dataset.val_size=30"]
    status, out, _ = call("show", "--output", str(picture), *words)
    assert status == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["dataset"] == f"idx ({folder})"
    assert facts["images"] == "100 training, 30 validation, 26 test"
    assert facts["size"] == "1 x 32 x 32, 8 bits a pixel"
    assert facts["classes"].startswith("26: 0, 1, 2,")
    assert re.match(r"mean 0\.(49|50)\d\d, std 0\.2[89]\d\d ", facts["pixels"])  # even noise
    assert facts["picture"] == str(picture)
    assert matplotlib.image.imread(picture).std() > 0.05


def test_show_mnist(call: Call, tmp_path: Path) -> None:
    status, out, _ = call("show", "-o", f"{tmp_path}/mnist.svg")
    assert status == 0
    assert "images   55,000 training, 5,000 validation, 10,000 test" in out
    assert "mean 0.130" in out and "std 0.308" in out
    assert (tmp_path / "mnist.svg").read_text().lstrip().startswith("<?xml")


def test_show_augmented(call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status, out, _ = call("show", "-o", f"{tmp_path}/augmented.png", "augmentation=flip")
    assert status == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["augmentation"] == "flip=0.5" and facts["dataset"] == "mnist (embedded)"
    assert matplotlib.image.imread(tmp_path / "augmented.png").std() > 0.05
    assert caplog.text.count("a mirrored digit or letter is another one") == 1


# of the processes that were started first


@pytest.fixture(scope="module")
def finished(started: list[Started]) -> Started:
    started[1].wait()
    return started[1]


def test_ctrl_c(started: list[Started]) -> None:
    endless = started[0]
    endless.wait()
    said, words = endless.err.splitlines()
    assert (endless.status, said) == (130, "mnist-exp: interrupted. To go on with it:")
    assert shlex.split(words)[-2:] == ["resume", f"{endless.folder / 'its output'}"]
    # any command brings there what the interrupted one had no time to say
    command("evaluate", "last", f"tracking.uri={endless.store}", folder=endless.folder)
    killed(endless.store)


def test_plain_lines_where_nobody_watches(finished: Started) -> None:
    assert finished.status == 0, finished.err
    assert "\r" not in finished.out and "\x1b" not in finished.out
    lines = finished.out.splitlines()
    (run,) = runs(finished.store)
    assert lines[0] == f"a b  on {run.data.tags['device']}"
    assert lines[1].startswith("epoch 1/2  train loss ")
    loss, accuracy = run.data.metrics["train/loss"], run.data.metrics["train/accuracy"]
    assert lines[2].startswith(f"epoch 2/2  train loss {loss:.4f}  train accuracy {accuracy:7.2%}")
    assert lines[3].startswith(f"test accuracy {run.data.metrics['test/accuracy']:.2%}")
    assert f"run {run.info.run_id}" in lines
    assert all(lines)


def test_where_the_output_went(finished: Started) -> None:
    """A folder with blanks in its name, and a command typed outside of the checkout."""
    assert (finished.folder / "its output" / "checkpoint.pt").exists()
    assert f"output {finished.folder / 'its output'}" in finished.out.splitlines()
    left = {p.name for p in finished.folder.iterdir()}
    assert left == {"its output", "store.db", "store.db.lock", "mlruns"}
    (run,) = runs(finished.store)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((finished.folder / "mlruns").as_uri())
    assert run.data.tags["command_line"].endswith(f"'tracking.uri={finished.store}'")


def test_command_that_opens_the_ui(finished: Started) -> None:
    (line,) = [s for s in finished.out.splitlines() if s.startswith("look at it: ")]
    words = shlex.split(line.removeprefix("look at it: "))
    (run,) = runs(finished.store)
    assert words[-3:] == ["ui", run.info.run_id[:8], f"tracking.uri={finished.store}"]
    answer = subprocess.run([*words[:-3], "--version"], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout.startswith("mnist-exp ")


@pytest.mark.parametrize("word", ["last", "prefix", "id"])
def test_evaluate(
    word: str, finished: Started, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    (run,) = runs(finished.store)
    known = {"prefix": run.info.run_id[:6], "id": run.info.run_id}
    words = ["evaluate", known.get(word, word), f"tracking.uri={finished.store}"]
    status, out, _ = call(*words, "--output", f"{tmp_path}/new/figures", "--format", "svg")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert lines["run"] == f"{run.info.run_id}  a b"
    loss, accuracy = run.data.metrics["test/loss"], run.data.metrics["test/accuracy"]
    assert lines["test/loss"] == f"{loss:.6f}  (recorded {loss:.6f})"
    low, high = wilson(round(10_000 * accuracy), 10_000)
    within = f"95 % interval {low:.2%} to {high:.2%}"
    assert lines["test/accuracy"] == f"{accuracy:.2%}  (recorded {accuracy:.2%})  {within}"
    assert re.fullmatch(r"\d+\.\d\d% expected error, 15 bins of confidence", lines["calibration"])
    assert re.search(r"^ *class +precision +recall +F1 +images *$", out, re.MULTILINE)
    assert {*"0123456789"} <= lines.keys()  # a row a class
    kept = tmp_path / "outputs" / "evaluations" / run.info.run_id[:8] / "predictions.json"
    assert lines["predictions"] == f"{kept}, for compare" and kept.is_file()
    files = {path.name for path in (tmp_path / "new" / "figures").iterdir()}
    names = ("mistakes", "confusion", "calibration", "curves", "first_layer")
    assert files == {f"{name}.svg" for name in names} == {*lines["figures"].split(", ")}


def test_evaluate_says_which_images_and_whether_they_were_shifted(
    finished: Started, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    (run,) = runs(finished.store)
    words = ["evaluate", "last", f"tracking.uri={finished.store}", "--tta"]
    kept = tmp_path / "outputs" / "evaluations" / run.info.run_id[:8]
    shifted = "TTA over 5 shifts"
    status, out, _ = call(*words)
    assert status == 0 and f"images         10,000 of the test set, {shifted}\n" in out
    assert f"  (recorded without --tta {run.data.metrics['test/accuracy']:.2%})  95 %" in out
    assert "predictions    not kept: compare takes those of the plain model on the test set" in out
    assert [path.name for path in kept.iterdir()] == ["tta"]
    status, out, _ = call(*words, "--split", "val")
    assert status == 0 and f" of the validation set, {shifted}\n" in out
    assert "recorded" not in out and "test/" not in out
    assert {path.name for path in kept.iterdir()} == {"tta", "val-tta"}


def picture(path: Path, digit: int = 0) -> Path:
    """A drawing of MNIST's own, dark on light."""
    image = load_embedded().test.images[digit, 0].numpy()
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(255 - image).resize((280, 280)).save(path)
    return path


def load_embedded() -> Dataset:
    return mnist_exp.load(["dataset.val_size=0"])


def test_predict(finished: Started, call: Call, tmp_path: Path) -> None:
    images = [picture(tmp_path / "two words" / f"{i}.png", i) for i in range(2)]
    words = ["predict", "last", *map(str, images), f"tracking.uri={finished.store}"]
    status, out, err = call(*words, "--figure", f"{tmp_path}/seen.pdf")
    assert (status, err) == (0, f"figure {tmp_path}/seen.pdf\n")
    assert (tmp_path / "seen.pdf").read_bytes().startswith(b"%PDF")
    for image in images:
        row = next(line for line in out.splitlines() if line.strip().startswith(str(image)))
        shares = re.findall(r"(\d)  (\d+\.\d\d)%", row)
        assert len({name for name, _ in shares}) == 3
        assert sorted(shares, key=lambda share: -float(share[1])) == shares
    assert "TTA" not in out
    shifted = call(*words, "--tta")[1]
    assert "TTA over 5 shifts" in " ".join(shifted.split())


def test_predict_as_json(finished: Started, call: Call, tmp_path: Path) -> None:
    image = picture(tmp_path / "0.bmp")
    words = ["predict", "last", str(image), f"tracking.uri={finished.store}", "--json"]
    status, out, err = call(*words)
    assert (status, err) == (0, "")
    (found,) = json.loads(out)
    assert found["file"] == str(image)
    shares = [found["probability"], *(each["probability"] for each in found["next"])]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert len({found["class"], *(each["class"] for each in found["next"])}) == 3
    assert json.loads(call(*words, "--tta")[1])[0]["tta"] is not found["tta"]
    raw = json.loads(call(*words, "--raw")[1])[0]  # dark ink, as it is: something else
    assert raw["probability"] != found["probability"]


def test_predict_what_is_no_image(finished: Started, call: Call, tmp_path: Path) -> None:
    text, missing = tmp_path / "a text.png", tmp_path / "missing.png"
    text.write_text("no image")
    image = picture(tmp_path / "0.png")
    files = [str(path) for path in (text, image, missing)]
    status, out, err = call("predict", "last", *files, f"tracking.uri={finished.store}")
    assert status == 1
    assert str(image) in out and str(text) not in out  # the rest is done
    complaints = err.splitlines()
    assert complaints[0].startswith(f"mnist-exp: {text}: ") and "PNG" in complaints[0]
    assert complaints[1] == f"mnist-exp: {missing}: there is no such file"
    status, out, _ = call("predict", "last", *files, f"tracking.uri={finished.store}", "--json")
    assert status == 1
    assert ["error" in each for each in json.loads(out)] == [True, False, True]


def test_predict_more_than_a_figure_shows(finished: Started, call: Call, tmp_path: Path) -> None:
    image, bad = str(picture(tmp_path / "0.png")), [str(tmp_path / "no.png")] * 61
    words = ["predict", "last", f"tracking.uri={finished.store}", "--figure", f"{tmp_path}/a.svg"]
    assert call(*words, *bad, image)[0] == 1  # what could not be read takes no room
    assert (tmp_path / "a.svg").exists()
    assert call(*words, *[image] * 61)[0] == 0


def test_predict_what_cannot_be(finished: Started, call: Call, tmp_path: Path) -> None:
    image, store = str(picture(tmp_path / "0.png")), f"tracking.uri={finished.store}"
    refused(call("predict", "last", store), "IMAGE", "mnist-exp predict RUN IMAGE ...")
    refused(call("predict", "last", "", store), "IMAGE", "an empty name")
    refused(call("predict", "x", image, store), "x: there is no such run")
    own = call("predict", "last", image, store, "--figure", image)
    refused(own, f"--figure {image}: it is one of the images")
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    unreadable = call("predict", "last", str(loop), store, "--figure", f"{tmp_path}/a.png")
    assert unreadable[0] == 1 and f"{loop}: it cannot be read" in unreadable[2]
    refused(call("predict", "last", image, store, "seed=1"), "seed=1: it would change nothing")
    refused(call("predict", "last", image, store, "--figure", "a.jpg"), "a.jpg", ".png, .svg")


def test_outputs_that_cannot_be_are_refused_before_the_work(
    finished: Started, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "a file", tmp_path / "folder.png"
    file.touch()
    folder.mkdir()
    monkeypatch.setattr("mnist_exp.run.saved_model.load_run", None)  # no model is looked at
    monkeypatch.setattr("mnist_exp.run.saved_model.load_model", None)
    store = f"tracking.uri={finished.store}"
    predict = ["predict", "last", str(picture(tmp_path / "0.png")), store, "--figure"]
    refused(call(*predict, f"{file}/a.png"), "--figure", "a file/a.png", "Not a directory")
    refused(call(*predict, str(folder)), "--figure", "folder.png", "it is a folder")
    refused(call("evaluate", "last", store, "--output", str(file)), f"--output {file}", "Not a dir")
    refused(call("report", "last", store, "--output", f"{file}/x"), "a file/x", "Not a directory")
    refused(call("show", "--output", str(folder)), "--output", "folder.png", "it is a folder")
    for words in (predict, ["evaluate", "last", store, "-o"], ["show", "-o"]):
        status, _, err = call(*words, "")
        assert (status, "it is empty: a file or a folder has to be named" in err) == (2, True)


def test_predict_names_what_a_name_can_hold(finished: Started, call: Call, tmp_path: Path) -> None:
    names = ["a\nb.png", "a\x1b[2Jb.png", "\udcff.png"]
    words = ["predict", "last", f"tracking.uri={finished.store}"]
    status, out, err = call(*words, *(f"{tmp_path}/{n}" for n in names), "--figure", "a.png")
    assert (status, out) == (1, "")
    ends = [line.rpartition("/")[2] for line in err.splitlines()]
    assert ends[1:] == [
        f"{name}: there is no such file" for name in (r"a\nb.png", r"a\x1b[2Jb.png", r"\udcff.png")
    ]
    assert ends[0] == "mnist-exp: --figure a.png: no image, no figure"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_run_survives_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    words = shlex.join([sys.executable, "-m", "mnist_exp"])
    own = {**os.environ, "PYTHONPATH": str(ROOT)}

    def typed(line: str) -> tuple[int, str]:
        done = subprocess.run(line, shell=True, env=own, capture_output=True, text=True)
        return done.returncode, done.stderr

    full = "mnist-exp: the output cannot be written: No space left on device\n"
    assert typed(f"{words} --help > /dev/full") == (1, full)
    assert typed(f"{words} --help >&-") == typed(f"{words} --help >&- 2>&-") == (0, "")
    assert typed(f"{words} nonsense 2> /dev/full") == (2, "")
    trained = []
    for name, redirected in (("full", "> /dev/full"), ("closed", ">&- 2>&- <&-")):
        uri = fresh_store(tmp_path / name)
        train = shlex.join(["train", *SMALL, f"tracking.uri={uri}"])
        output = shlex.quote(f"hydra.run.dir={tmp_path}/{name}/run")
        trained.append(typed(f"{words} {train} {output} {redirected}"))
        (run,) = runs(uri)
        assert run.info.status == "FINISHED"
    assert trained == [(1, full), (0, "")]


def test_reproduce(finished: Started, call: Call) -> None:
    status, out, _ = call("reproduce", "last", f"tracking.uri={finished.store}")
    assert status == 0
    assert out.splitlines()[-1] == "identical"
    assert re.search(r"train/loss +2 epochs +none: identical", out)


def test_reproduce_otherwise(finished: Started, call: Call) -> None:
    words = ["reproduce", "last", f"tracking.uri={finished.store}"]
    status, out, _ = call(*words, "--threads", "2")
    assert status == 0
    verdict, why = out.splitlines()[-2:]
    assert (verdict, why) == ("within tolerance. What is not as it was:", "  threads: 1, now 2")
    status, out, err = call(*words, "--device", "cuda:99")
    assert (status, "training.device=cuda:99: it is not there" in err) == (2, True)
    status, out, err = call(*words, "--threads", "0")
    assert (status, "training.threads=0: must be from 1 to 1024" in err) == (2, True)


def test_evaluate_what_is_not_there(finished: Started, call: Call, tmp_path: Path) -> None:
    (run,) = runs(finished.store)
    store = f"tracking.uri={finished.store}"
    refused(call("evaluate", "nonsense", store), "nonsense", "last", run.info.run_id[:8])
    nowhere = f"tracking.uri=sqlite:///{tmp_path}/none.db"
    refused(call("evaluate", "last", nowhere), "none.db", "no runs yet", "mnist-exp train")
    refused(call("evaluate", "last", f"tracking.uri={fresh_store(tmp_path / 'new')}"), "no runs")
    assert not (tmp_path / "none.db").exists()


def test_the_readmes_module_of_ones_own(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in no config group: the record names it by its class."""
    (tmp_path / "my_net.py").write_text(
        "from mnist_exp.training.models import MLP\n\n\nclass Net(MLP):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_net", raising=False)  # of another test
    uri = f"sqlite:///{tmp_path}/own.db"
    words = ["~model", "+model={_target_: my_net.Net}", "trusted_packages=[my_net]"]
    words += ["~optimizer", "+optimizer={_target_: torch.optim.NAdam}", f"tracking.uri={uri}"]
    call("train", *words, *SMALL, f"hydra.run.dir={tmp_path}/run")
    tags = Store(uri).find("last").tags
    assert tags["model"] == "Net" and tags["optimizer"] == "NAdam"
