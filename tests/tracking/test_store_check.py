"""A store that will never take a record is refused before the start; an outage is waited for."""

import base64
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import mlflow_internals, store_check
from mnist_exp.tracking.address import normalised, store_uri
from mnist_exp.tracking.outages import may_pass
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from tests.faults.server import FaultyServer, Upstream
from tests.helpers import fresh_store
from tests.programs import Start

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], str]]
MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"})


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Yield the address of a server that gives these answers: status, headers, body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep MLflow, whose import takes seconds, out of it."""
    monkeypatch.setattr(store_check, "Store", None)


def test_a_server_is_accepted(upstream: Upstream, no_mlflow: None) -> None:
    for experiment in (None, "Default", "one that is not there, with ä and %"):
        check_store(upstream.uri, experiment)
        check_store(f"{upstream.uri}/", experiment)


def test_another_path_of_a_server_is_refused(upstream: Upstream, no_mlflow: None) -> None:
    for required in (True, False):
        with pytest.raises(
            ConfigError, match=rf"/mlflow: .*404.*but one answers at {upstream.uri}\."
        ):
            check_store(f"{upstream.uri}/mlflow", "x", required)


def test_a_deleted_experiment_of_a_server_is_refused(upstream: Upstream, no_mlflow: None) -> None:
    client = mlflow.MlflowClient(upstream.uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ConfigError, match=r"tracking\.experiment=gone: it was deleted"):
        check_store(upstream.uri, "gone", required=False)


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (200, {}, "<html>a router</html>", r"no MLflow server \(200 OK\)"),
        (404, {}, "not found", r"no MLflow server \(404 Not Found\)"),
        (405, {}, "{}", r"no MLflow server \(405"),
        (301, {"location": "https://other/ml/api/2.0/x"}, "", "another address, https://other/ml"),
        (401, {}, "who?", r"401.*MLFLOW_TRACKING_USERNAME=NAME"),
        (403, {}, json.dumps({"error_code": "PERMISSION_DENIED", "message": "not you"}), "not you"),
    ],
)
def test_what_a_server_refuses_for_good(
    status: int, headers: dict[str, str], body: str, message: str
) -> None:
    with serving(lambda _: (status, headers, body)) as uri:
        for required in (True, False):
            with pytest.raises(ConfigError, match=f"tracking.uri={uri}: .*{message}"):
                check_store(uri, "x", required)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_outage_is_an_error_only_where_the_store_is_required(
    status: int, no_mlflow: None
) -> None:
    with serving(lambda _: (status, {}, "busy")) as uri:
        check_store(uri, "x", required=False)
        with pytest.raises(ConfigError, match=f"no MLflow server answers there .*{status}"):
            check_store(uri, "x")


@pytest.mark.parametrize("mode", ["refuse", "drop", "hang"])
def test_a_server_that_does_not_answer(
    mode: str, faulty: FaultyServer, no_mlflow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_check, "_ASK_SECONDS", 0.5)
    faulty.fail(mode)  # type: ignore[arg-type]
    check_store(faulty.uri, "x", required=False)
    with pytest.raises(ConfigError, match="no MLflow server answers"):
        check_store(faulty.uri, "x")


def test_a_password_is_given_as_mlflow_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "Basic " + base64.b64encode(b"me:secret").decode()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], str]:
        if request.headers.get("Authorization") != expected:
            return 401, {}, "who?"
        return (404, {}, MISSING) if "get-by-name" in request.path else (200, {}, "{}")

    with serving(answer) as uri:
        check_store(uri.replace("://", "://me:secret@"), "x")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(ConfigError, match="401"):
            check_store(uri, "x", required=False)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        check_store(uri, "x")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql://me@127.0.0.1:1/db", "cannot be opened, No module named 'psycopg"),
        ("mysql+nosuch://me@127.0.0.1:1/db", "cannot be opened, Can't load plugin"),
        ("postgresql", "cannot be opened"),
        ("databricks", "databricks-sdk"),
        ("http://127.0.0.1:port", "no address of a server"),
        ("http://", "names no host"),
        ("http://[::1", "no address of a server"),
        ("https://a b/", "no address of a server"),
        ("ftp://127.0.0.1", "must be sqlite:"),
    ],
)
def test_what_is_missing_or_no_address_is_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_store(uri, "x", required=False)


def test_a_database_server_that_is_down_is_waited_for(
    no_mlflow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is there is asked, as it may want another password."""
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: None)  # no driver is installed
    opened: list[str] = []
    monkeypatch.setattr(store_check, "_check_through_mlflow", lambda uri, _: opened.append(uri))
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        uri = f"postgresql://me@127.0.0.1:{server.getsockname()[1]}/db"
        check_store(uri, "x", required=False)
    check_store(uri, "x", required=False)
    assert opened == [uri]
    with pytest.raises(ConfigError, match="no MLflow server answers"):
        check_store(uri, "x")


# SQLite


def test_an_escaped_address_is_the_file_that_mlflow_opens(tmp_path: Path) -> None:
    uri = store_uri(f"sqlite:///{tmp_path}/a%20b%25.db", tmp_path)
    check_store(uri, "x")
    Store(uri).experiment("x")
    assert (tmp_path / "a b%.db").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a b%.db", "a b%.db.lock"}
    check_store(uri, "x")


def test_a_folder_that_mlflow_cannot_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "100% mine").mkdir()
    with pytest.raises(ConfigError, match=r"a folder with a % or \? in its name"):
        check_store(store_uri(None, tmp_path / "100% mine"))
    assert list((tmp_path / "100% mine").iterdir()) == []


def test_a_relative_path_means_the_folder_where_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a.db")
    assert store_uri(None, Path("/")) == f"sqlite:///{tmp_path}/a.db"
    for uri in ("sqlite://", "sqlite:///", "sqlite:///a.db?mode=ro", "http://host"):
        assert normalised(uri) == uri


def test_files_that_have_no_place_are_refused(tmp_path: Path) -> None:
    """Of an experiment that another program has made, or whose usual folder is a file."""
    uri = fresh_store(tmp_path)
    (tmp_path / "mlruns").write_text("no folder")
    with pytest.raises(ConfigError, match=r"tracking\.experiment=new: .*mlruns, cannot be written"):
        check_store(uri, "new", required=False)
    client = mlflow.MlflowClient(uri)
    client.create_experiment("served", "mlflow-artifacts:/7")
    with pytest.raises(ConfigError, match="go through the MLflow server that made it"):
        check_store(uri, "served")
    client.create_experiment("cloud", "gs://bucket/7")
    with pytest.raises(ConfigError, match=r"needs the package google\.cloud\.storage"):
        check_store(uri, "cloud")
    client.create_experiment("elsewhere", (tmp_path / "elsewhere").as_uri())
    check_store(uri, "elsewhere")
    check_store(uri)  # to read


def test_a_file_that_another_user_made_is_refused(tmp_path: Path) -> None:
    """As its lock, without which MLflow would not be asked."""
    uri = fresh_store(tmp_path)
    (tmp_path / "store.db.lock").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_store(uri)


def test_a_database_that_another_process_has_locked_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = fresh_store(tmp_path)
    monkeypatch.setattr(mlflow_internals, "LOCK_SECONDS", 0.0)
    with closing(sqlite3.connect(tmp_path / "store.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_store(uri, "x", required=False)
        with pytest.raises(ConfigError, match=r"is locked\)\. Wait for its end") as raised:
            check_store(uri, "x")
        assert may_pass(raised.value)
    check_store(uri, "x")


def test_what_a_killed_process_left_half_committed_is_undone(tmp_path: Path, start: Start) -> None:
    uri, database = fresh_store(tmp_path), tmp_path / "store.db"
    experiments = [run.name for run in Store(uri).client.search_experiments()]
    program = """
import signal, sqlite3
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")  # what does not fit is written before the commit
database.execute("BEGIN")
database.execute("UPDATE experiments SET name = 'half'")
database.execute("CREATE TABLE much AS SELECT zeroblob(1000000)")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert start(program, database).wait() == -signal.SIGKILL
    journal = tmp_path / "store.db-journal"
    with (
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as unable,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        unable.execute("SELECT * FROM experiments")
    assert journal.exists()
    check_store(uri, "x")
    assert not journal.exists()
    assert [run.name for run in Store(uri).client.search_experiments()] == experiments


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    program = (
        "import os, sys\nfrom mnist_exp.tracking.store_check import check_store\n"
        "os.setuid(65534)\ncheck_store(sys.argv[1], 'x')"
    )
    uri = f"sqlite:///{tmp_path}/theirs/a.db"
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-c", program, uri], capture_output=True, text=True, check=False
    )
    assert "cannot be written (Permission denied)" in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_database_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    store.client.create_run(store.experiment("x"), run_name="a run")
    program = (
        "import os, sys\nfrom mnist_exp.tracking.store import list_runs\n"
        "os.setuid(65534)\nprint(list_runs(sys.argv[1], None))"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "store.db").chmod(0o444)
    ended = subprocess.run(
        [sys.executable, "-c", program, store.uri], capture_output=True, text=True, check=False
    )
    assert "a run" in ended.stdout, ended.stderr
