"""The logged model in the hands of others: behind HTTP, and loaded where this package is not."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mnist_exp
from mnist_exp.run.recorder import Result

MODELS = ("mlp", "cnn_pooled")  # that has dropout and batch normalisation
START = 90.0  # seconds that a server may take; it takes 6 where nothing else runs
LOAD = """
import json, sys
sys.modules["mnist_exp"] = None  # its import fails, as where it is not installed
import mlflow, numpy as np, torch
images = torch.from_numpy(np.load("images.npy"))
models = [mlflow.pytorch.load_model(uri) for uri in sys.argv[1:]]
with torch.no_grad():
    print(json.dumps([model(images).tolist() for model in models]))
"""


@pytest.fixture(scope="module")
def results(folder: Path, store: str) -> dict[str, Result]:
    words = ["debug=fast", "training.device=cpu", "training.compile=never", f"tracking.uri={store}"]
    return {
        model: mnist_exp.train([*words, f"model={model}", f"hydra.run.dir='{folder}/{model}'"])
        for model in MODELS
    }


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)


@torch.no_grad()
def logits(result: Result, images: np.ndarray) -> np.ndarray:
    return np.asarray(result.model(torch.from_numpy(images)))


def environment(store: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    ours = {"MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    # MLflow starts uvicorn by its name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, **ours, "PATH": path}


class Served:
    """`mlflow models serve` of a run's model, as a process."""

    def __init__(self, run_id: str, store: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = ["models", "serve", "-m", f"runs:/{run_id}/model", "--env-manager", "local"]
        words += ["-h", "127.0.0.1", "-p", str(self.port)]
        self.log = folder / f"{run_id}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                cwd=folder,
                env=environment(store),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        late = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < late:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/health")[0] == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the model is not served: {self.log.read_text()[-2000:]}")

    def ask(self, method: str, path: str, content: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = None if content is None else json.dumps(content)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)


@pytest.fixture(scope="module")
def started(results: dict[str, Result], store: str, folder: Path) -> Iterator[dict[str, Served]]:
    """Servers, which take a while: they start beside the first test."""
    servers = {name: Served(result.run_id, store, folder) for name, result in results.items()}
    yield servers
    for server in servers.values():
        server.end()


@pytest.fixture(scope="module")
def served(started: dict[str, Served]) -> dict[str, Served]:
    for server in started.values():
        server.wait()
    return started


@pytest.mark.usefixtures("started")
def test_loaded_without_this_package(
    results: dict[str, Result], store: str, images: np.ndarray, tmp_path: Path
) -> None:
    """With it: test_recorder.py, and the servers below."""
    np.save(tmp_path / "images.npy", images)
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, *(f"runs:/{results[model].run_id}/model" for model in MODELS)],
        cwd=tmp_path,
        env=environment(store),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    for model, found in zip(MODELS, json.loads(answer.stdout.splitlines()[-1]), strict=True):
        expected = logits(results[model], images)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_over_http(
    model: str, batch: int, served: dict[str, Served], results: dict[str, Result], images: Any
) -> None:
    some = images[:batch]
    status, body = served[model].ask("POST", "/invocations", {"inputs": some.tolist()})
    assert status == 200, body
    answer = np.array(json.loads(body)["predictions"])
    assert answer.shape == (batch, 10)
    np.testing.assert_allclose(answer, logits(results[model], some), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 27, 28), (2, 28, 28), (2, 784)])
def test_wrong_shape_is_the_askers_fault(shape: tuple[int, ...], served: dict[str, Served]) -> None:
    status, body = served["mlp"].ask("POST", "/invocations", {"inputs": np.zeros(shape).tolist()})
    assert status == 400
    assert b"(-1, 1, 28, 28)" in body
