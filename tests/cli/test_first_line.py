"""A terminal is told what is coming before torch or MLflow is imported, and a pipe no more."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.first_minute import on_terminal
from tests.helpers import ROOT, fresh_store

# Python runs it when it starts
ENDING = """
import builtins, os, time

import_module, main = builtins.__import__, os.getpid()

def end_or_import(name, *arguments, **more):
    if name.partition(".")[0] in ("torch", "mlflow"):
        if os.getpid() == main:
            os._exit(7)
        while os.getppid() == main:  # the process that uploads ends with the main one
            time.sleep(0.05)
        os._exit(0)
    return import_module(name, *arguments, **more)

builtins.__import__ = end_or_import
"""
GRID = ["-m", "optimizer.lr=0.01,0.1", "training.batch_size=32,64", "seed=range(20)"]
Run = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """A store, and a program that ends where torch or MLflow would be imported."""
    (tmp_path / "sitecustomize.py").write_text(ENDING)
    return [f"tracking.uri={fresh_store(tmp_path)}"]


def shown(words: list[str], folder: Path) -> tuple[int, str]:
    """The exit status, and what a terminal shows."""
    program = [sys.executable, "-m", "mnist_exp", *words]
    session = on_terminal(*program, PYTHONPATH=f"{folder}:{ROOT}", TERM="xterm")
    return session.status, "".join(piece for _, piece in session.output)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "debug=fast", "seed=3"], "mlp-64-32 sgd lr=0.1 bs=64 seed=3: loading torch"),
        (["train", "tracking.run_name='my run'"], "my run: loading torch"),
        (["train", *GRID], "80 jobs, lr=0.01,0.1 x batch_size=32,64 x seed=0,1,2,...,19: loading"),
        (["show"], "the first images of a data set"),
    ],
)
def test_it_is_told_before_torch_is_imported(
    words: list[str], text: str, place: list[str], tmp_path: Path
) -> None:
    status, output = shown([*words, *place], tmp_path)
    assert status == 7 and text in output, output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["evaluate", "last"], "last on the test split"),
        (["predict", "last", "a.png", "b.png"], "2 images by the model of last"),
        (["report", "last"], "the report of sweep last"),
        (["reproduce", "last"], "run last, once more"),
        (["resume", "last"], "going on with last"),
        (["ui", "last"], "opening the store"),
        (["sync"], "looking for what waits"),
    ],
)
def test_the_first_to_be_shown_is_what_is_coming(
    words: list[str], text: str, place: list[str], tmp_path: Path
) -> None:
    """Whether or not torch is needed after it, as there is no run in the store."""
    _, output = shown([*words, *place] if words != ["sync"] else words, tmp_path)
    assert output.removeprefix("\x1b[?25l").startswith(text), output


@pytest.mark.parametrize("words", [["train", "debug=fast"], ["train", *GRID]])
def test_a_pipe_gets_nothing_of_it(words: list[str], place: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "mnist_exp", *words, *place]
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    answer = subprocess.run(program, env=variables, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (7, "", "")


@pytest.mark.parametrize(
    "words", [["train", "optimizer.lr=-1"], ["train", "-m", "seed=0,1", "training.epochs=0"]]
)
def test_what_is_refused_was_not_announced(
    words: list[str], place: list[str], tmp_path: Path
) -> None:
    status, output = shown([*words, *place], tmp_path)
    assert status == 2 and "loading" not in output, output


def test_the_announcement_is_gone_once_the_command_has_failed(tmp_path: Path) -> None:
    words = ["train", "model.dropout=2", f"tracking.uri=sqlite:///{tmp_path}/store.db"]
    status, output = shown(words, tmp_path)
    assert status == 2
    announced, _, rest = output.partition("loading torch ...\r\n")
    assert "mlp-64-32" in announced
    # the cursor is shown again, goes up a line, and the line is taken away
    assert rest.startswith("\x1b[?25h\r\x1b[1A\x1b[2Kmnist-exp: model: MLP"), rest


def test_the_result_is_shown_before_the_model_is_saved(tmp_path: Path) -> None:
    words = ["train", "debug=fast", f"hydra.run.dir={tmp_path}/run"]
    _, output = shown([*words, f"tracking.uri={fresh_store(tmp_path)}"], tmp_path)
    texts = [
        "epoch 2/2",
        "test accuracy",
        "drawing figures, saving the model",
        f"output {tmp_path}",
    ]
    places = [output.rindex(text) for text in texts]
    assert places == sorted(places), output
