"""The tests' own faulty server: it is no use if its faults are not those it claims."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from tests.faults.server import FaultyServer, Upstream

CREATE_RUN = ("POST", "/api/2.0/mlflow/runs/create")
LOG_BATCH = ("POST", "/api/2.0/mlflow/runs/log-batch")


@pytest.fixture
def proxy(faulty: FaultyServer) -> Iterator[FaultyServer]:
    yield faulty
    faulty.close()
    assert threads() == []


def threads() -> list[str]:
    """Those of a server that is not closed."""
    ours = "serve_forever", "process_request_thread"
    return [t.name for t in threading.enumerate() if any(name in t.name for name in ours)]


def new_run(uri: str) -> str:
    return str(mlflow.MlflowClient(uri).create_run("0").info.run_id)


def runs(uri: str) -> int:
    return len(mlflow.MlflowClient(uri).search_runs(["0"]))


def test_forwards(proxy: FaultyServer, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(proxy.uri)
    experiment = client.create_experiment("forwarded")
    run = client.create_run(experiment).info.run_id
    points = [Metric("loss", 1 / (step + 1), 0, step) for step in range(100)]
    client.log_batch(run, points, [Param("lr", "0.1")])
    contents = {"some.bin": bytes(range(256)) * 5000, "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        client.log_artifact(run, str(tmp_path / name), "folder")

    assert client.get_experiment_by_name("forwarded").experiment_id == experiment
    assert client.get_run(run).data.params == {"lr": "0.1"}
    assert [m.value for m in client.get_metric_history(run, "loss")] == [m.value for m in points]
    for name, content in contents.items():
        copy = client.download_artifacts(run, f"folder/{name}", str(tmp_path))
        assert Path(copy).read_bytes() == content
    assert proxy.requests[0] == ("POST", "/api/2.0/mlflow/experiments/create")
    assert proxy.requests.count(LOG_BATCH) == 1


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        ("refuse", "Connection refused"),
        ("hang", "timeout"),
        ("503", "too many 503 error responses"),
        ("drop", "without response"),
    ],
)
def test_faults(proxy: FaultyServer, upstream: Upstream, mode: str, complaint: str) -> None:
    before = runs(upstream.uri)
    proxy.mode = mode  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(MlflowException, match=complaint):
        new_run(proxy.uri)
    assert time.monotonic() - start < 5
    assert runs(upstream.uri) == before + (mode == "drop")  # it was committed
    assert proxy.requests == ([] if mode == "refuse" else [CREATE_RUN])

    proxy.mode = "ok"
    new_run(proxy.uri)


def test_a_503_does_not_say_when_to_come_back(proxy: FaultyServer) -> None:
    proxy.mode = "503"
    connection = http.client.HTTPConnection(proxy.uri.removeprefix("http://"), timeout=5)
    connection.request("POST", "/api", b"x" * 1_000_000)
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Retry-After")) == (503, None)
    answer.read()
    connection.close()


@pytest.mark.parametrize("end", ["ok", "hang", "refuse", "close"])
def test_a_hanging_connection_ends_with_its_mode(proxy: FaultyServer, end: str) -> None:
    proxy.mode = "hang"
    connection = http.client.HTTPConnection(proxy.uri.removeprefix("http://"), timeout=5)
    connection.request("GET", "/health")
    while not proxy.requests:
        time.sleep(0.01)
    if end == "close":
        proxy.close()
    else:
        proxy.mode = end  # type: ignore[assignment]
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


def test_closes_in_spite_of_a_connection_without_a_request(upstream: Upstream) -> None:
    proxy = FaultyServer(upstream.uri)
    host, port = proxy.uri.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as idle:
        while len(threads()) < 2:
            time.sleep(0.01)
        proxy.close()
        assert idle.recv(1) == b""


@pytest.mark.parametrize("mode", ["refuse", "hang", "503", "drop"])
def test_a_fault_in_the_middle(proxy: FaultyServer, upstream: Upstream, mode: str) -> None:
    client = mlflow.MlflowClient(proxy.uri)
    proxy.fail(mode, after=3, kind="log-batch")  # type: ignore[arg-type]
    run = client.create_run("0").info.run_id
    for step in range(3):
        assert proxy.mode == "ok"
        client.log_metric(run, "one", step)  # of another kind
        client.log_batch(run, [Metric("loss", 0.5, 0, step)])
    assert proxy.mode == mode
    with pytest.raises(MlflowException):
        client.log_metric(run, "one", 3)
    history = mlflow.MlflowClient(upstream.uri).get_metric_history(run, "one")
    assert [m.value for m in history] == [0, 1, 2, 3][: 4 if mode == "drop" else 3]


def test_a_fault_of_some_requests_only(proxy: FaultyServer) -> None:
    client = mlflow.MlflowClient(proxy.uri)
    run = client.create_run("0").info.run_id
    proxy.fail("503", only="PUT /api/2.0/mlflow-artifacts")
    with pytest.raises(MlflowException, match="503"):
        client.log_text(run, "text", "file")
    client.log_param(run, "lr", 0.1)
    with pytest.raises(ValueError, match="only=PUT"):
        proxy.fail("refuse", only="PUT")
    with pytest.raises(ValueError, match="mode=off: must be one of ok, refuse"):
        proxy.mode = "off"  # type: ignore[assignment]


def test_keeps_its_port_through_quick_changes(proxy: FaultyServer) -> None:
    for _ in range(20):
        proxy.mode = "refuse"
        proxy.mode = "ok"
    new_run(proxy.uri)


def test_says_when_upstream_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with FaultyServer(f"http://127.0.0.1:{port}") as proxy:
        connection = http.client.HTTPConnection(proxy.uri.removeprefix("http://"), timeout=5)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 502
        connection.close()
