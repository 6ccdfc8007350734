"""A tracking server on loopback that misbehaves on command: a proxy in front of a real one."""

import contextlib
import http.client
import os
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal, get_args

from tests.helpers import fresh_store

Mode = Literal["ok", "refuse", "hang", "503", "drop"]
_START = 60.0  # seconds that MLflow may take; it takes 5 where nothing else runs
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Upstream:
    """A real MLflow server in a process of its own, with its store and artifacts in `folder`."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.store = fresh_store(folder)
        # its maker kept the artifacts of experiment 0 on disk, where clients would write themselves
        with contextlib.closing(sqlite3.connect(folder / "store.db")) as store, store:
            store.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
        self._log = folder / "server.log"
        words = ["--backend-store-uri", self.store, "--serve-artifacts"]
        words += ["--artifacts-destination", str(folder / "artifacts")]
        words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        # without jobs, which are nine more processes
        ours = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=folder,
                env=inherited | ours,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + _START
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the MLflow server did not start: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Kills the server and its worker, as asking takes it a second; SQLite survives that."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> "Upstream":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class FaultyServer:
    """A server at `uri` that does what the one at `upstream` does, until told otherwise.

    `mode` may be set at any time:

    ok      forwards the request and answers
    refuse  does not listen: connections are refused, at the same port as before and after
    hang    accepts, and never answers; the connection closes when the mode is set again
    503     answers 503, without a Retry-After; upstream sees nothing
    drop    forwards the request, and closes the connection instead of answering

    A request is treated by the mode at its arrival. `requests`: (method, path) of all that arrived,
    whatever became of them, in their order; the path is without its query.
    """

    def __init__(self, upstream: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self._upstream = upstream.removeprefix("http://")
        self._mode: Mode = "ok"
        self._only = ""  # what of "METHOD /path" the mode is for
        self._plan: tuple[Mode, str, str, int] | None = None  # mode, only, kind, how many to come
        self._lock = threading.RLock()  # of the mode
        self._changed = threading.Event()  # of this mode: set when another follows
        self._listener = _Listener(self)
        self.uri = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._listener.open()

    @property
    def mode(self) -> Mode:
        """The one in force: "ok" until what `fail` planned has begun."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.fail(mode)

    def fail(self, mode: Mode, only: str = "", after: int | None = None, kind: str = "") -> None:
        """Sets the mode: at once, or as soon as `after` more requests of a kind were forwarded.

        only: a part of "METHOD /path"; the mode is for requests that have it, the others are "ok".
        kind: likewise, the requests that `after` counts.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode}: must be one of {', '.join(get_args(Mode))}")
        if only and mode == "refuse":
            raise ValueError(f"only={only}: a connection is refused before its request is known")
        with self._lock:
            if after:
                self._switch("ok", "")
                self._plan = (mode, only, kind, after)
            else:
                self._plan = None
                self._switch(mode, only)

    def _switch(self, mode: Mode, only: str) -> None:
        before, self._mode, self._only = self._mode, mode, only
        self._changed.set()
        self._changed = threading.Event()
        if (before == "refuse") != (mode == "refuse"):
            if mode == "refuse":
                self._listener.refuse()
            else:
                self._listener.open()

    def arrived(self, method: str, path: str) -> tuple[Mode, threading.Event]:
        """The mode for a request, and what is set when the mode changes."""
        with self._lock:
            self.requests.append((method, path))
            return self._mode if self._only in f"{method} {path}" else "ok", self._changed

    def forward(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Upstream's answer, and its body. What was planned begins before the client has it."""
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            answer = response, response.read()
        with self._lock:
            if self._plan and self._plan[2] in f"{method} {target.partition('?')[0]}":
                mode, only, kind, left = self._plan
                self._plan = (mode, only, kind, left - 1) if left > 1 else None
                if self._plan is None:
                    self._switch(mode, only)
        return answer

    def close(self) -> None:
        """Drops every connection, and returns when no thread is left."""
        self.mode = "refuse"
        self._listener.server_close()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, proxy: FaultyServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.server_bind()
        self.proxy = proxy
        self._connections: set[socket.socket] = set()

    def open(self) -> None:
        self.server_activate()
        self._accepting = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._accepting.start()

    def refuse(self) -> None:
        """Stops listening, and keeps the port: a bound socket refuses until it listens."""
        self.shutdown()
        self._accepting.join()  # a thread that has only just started outlives shutdown()
        with contextlib.suppress(OSError):  # a process that was forked has it open as well
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()  # which waits for the threads


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client did not wait
            self.handle_one_request()  # one a connection, so that none outlives its mode

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        proxy = self.server.proxy
        body = self._body()
        mode, changed = proxy.arrived(self.command, self.path.partition("?")[0])
        if mode == "hang":
            changed.wait()
        elif mode == "503":
            self._send(503, "Service Unavailable", [], b"no server is available\n")
        elif mode != "refuse":  # which it is for one that was accepted just before
            kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
            try:
                response, content = proxy.forward(self.command, self.path, kept, body)
            except (OSError, http.client.HTTPException) as error:
                self._send(502, "Bad Gateway", [], f"{error!r}\n".encode())
                return
            if mode == "ok":
                self._send(response.status, response.reason, response.getheaders(), content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":  # an empty file is
            chunks = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                chunks.append(self._read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return b"".join(chunks)
        return self._read(int(self.headers.get("Content-Length", 0)))

    def _read(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("the client left in the middle of its request")
        return content

    def _send(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status, reason)
        for key, value in headers:
            if key.lower() not in _HOP_BY_HOP:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
