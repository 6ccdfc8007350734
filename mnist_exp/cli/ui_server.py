"""MLflow's UI, served on this machine alone: its server is a child of this process."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time

from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.system import signals

HOST = "127.0.0.1"
START_SECONDS = 120.0  # that the server may take until it answers; 5 where nothing else runs
END_SECONDS = 5.0  # that it may take to end, before it is killed
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nine processes, for what prompts are used by
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}


def free_port(port: int) -> int:
    """Return a port if it is free, or, for 0, any that is. Raise ConfigError if it is not."""
    with socket.socket() as probe:
        # what a server that has just ended has left is no obstacle
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "a port is a number from 0 to 65535"
            other = min(max(port, 1024), 65000) + 1
            raise ConfigError(
                f"--port {port}: cannot be used ({reason}). Choose another, --port {other}, or "
                f"any that is free: --port 0"
            ) from error
        return int(probe.getsockname()[1])


def serve(uri: str, port: int, page: str) -> None:
    """Serve a store until a signal ends this process. Raise RunFailed if the server ends."""
    server = _start(uri, port)
    try:
        print("starting MLflow's server ...", file=sys.stderr, flush=True)
        _wait(server, port)
        print(f"the page is up: http://{HOST}:{port}/{page}\nCtrl-C ends it", flush=True)
        assert server.stdout is not None
        for line in server.stdout:  # only warnings and errors come
            print(line, end="", file=sys.stderr, flush=True)
        raise RunFailed(f"MLflow's server has ended, with status {server.wait()}")
    finally:
        _end(server)


def _start(uri: str, port: int) -> "subprocess.Popen[str]":
    names = (HOST, "localhost")  # a page of elsewhere, whose name leads here, gets nothing
    hosts = [f"{name}:{port}" for name in names]
    if port == 80:
        hosts += names
    words = ["--backend-store-uri", uri, "--host", HOST, "--port", str(port), "--workers", "1"]
    words += ["--allowed-hosts", ",".join(hosts), "--uvicorn-opts", "--log-level warning"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        env=os.environ | _SETTINGS,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes here, and from here the server is ended
        preexec_fn=signals.follow_parent,  # also where this process is killed
    )


def _wait(server: "subprocess.Popen[str]", port: int) -> None:
    """Wait until the server answers, and drop its output by then. Raise RunFailed."""
    assert server.stdout is not None
    late = time.monotonic() + START_SECONDS
    while not _answers(port):
        if server.poll() is not None:
            output = "".join(server.stdout.readlines()[-20:]).strip()
            raise RunFailed(f"MLflow's server does not start:\n{output}")
        if time.monotonic() > late:
            raise RunFailed(f"MLflow's server does not answer after {START_SECONDS:.0f} s")
        time.sleep(0.1)
    os.set_blocking(server.stdout.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        os.read(server.stdout.fileno(), 2**16)
    os.set_blocking(server.stdout.fileno(), True)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: "subprocess.Popen[str]") -> None:
    """End the server, and whatever it has started."""
    signals.ignore()  # it does not take long
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)
    assert server.stdout is not None
    server.stdout.close()
