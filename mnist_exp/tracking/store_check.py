"""The check of a store before a run starts: will it ever take the record?

An outage may pass, and is waited for. What the server or the file system refuses for good is better
known before the training than after it.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from mnist_exp.errors import ConfigError, first_line
from mnist_exp.system import files
from mnist_exp.tracking import mlflow_internals
from mnist_exp.tracking.address import (
    artifact_root,
    database_file,
    deleted_experiment,
    how_to_choose,
    named,
)
from mnist_exp.tracking.limits import shortened
from mnist_exp.tracking.outages import BUSY, Outage, Refusal, may_pass
from mnist_exp.tracking.store import Store

_LONGEST_REASON = 200  # characters of what MLflow says
_ASK_SECONDS = 3.0  # that a server may take to answer
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # of database servers, by their kind
_SERVICES = (*_PORTS, "databricks")  # beginnings of addresses
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)  # by another process, which will end
_AUTHORISED = (401, 403, 407)  # answers to who must say who they are, which MLflow knows how to
_PACKAGES = {"s3": "boto3", "gs": "google.cloud.storage", "wasbs": "azure.storage.blob"}


def check_store(
    uri: str, experiment: str | None = None, required: bool = True, option: str = ""
) -> None:
    """Raise ConfigError for a store that will never take a record, as far as a look can tell.

    Args:
        uri: The address of the store; creates nothing there, and imports mlflow only where nothing
            else can tell.
        experiment: The name of the one that runs are to be recorded in.
        required: It is an error as well where a server does not answer now.
        option: The option that named the store, if that is not tracking.uri or the environment.
    """
    try:
        if uri.startswith("sqlite:"):
            _check_database(uri, experiment)
        elif uri.startswith(("http://", "https://")):
            _check_server(uri, experiment)
        elif uri.startswith("databricks"):
            _check_through_mlflow(uri, experiment)
        elif uri.startswith(_SERVICES):
            _check_database_server(uri, experiment)
        else:
            raise ConfigError(
                f"{named(uri, option)}: must be sqlite:////ABSOLUTE/PATH.db, the http(s) address "
                f"of a server, or one of {', '.join(_SERVICES)}... (MLflow no longer keeps runs in "
                f"plain folders)"
            )
    except Refusal as error:
        raise ConfigError(
            f"{named(uri, option)}: {error}. To go on, {how_to_choose(uri, option)}"
        ) from error
    except Outage as error:
        if required:
            text = f"no MLflow server answers there ({error}). Start it"
            if uri.startswith("sqlite:"):
                text = f"another process does not let it be read ({error}). Wait for its end"
            raise ConfigError(
                f"{named(uri, option)}: {text}, or {how_to_choose(uri, option)}"
            ) from error


# SQLite


def _check_database(uri: str, experiment: str | None) -> None:
    """Do what `check_store` does for an SQLite database that is a file."""
    path = database_file(uri)
    if path is None or "?" in uri:
        raise Refusal("must name a file, sqlite:////ABSOLUTE/PATH.db")
    problem, stored = _file_problem(path), None
    if not problem and path.exists():
        try:
            problem, stored = mlflow_internals.inspect_database(path, experiment)
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0)
            if code & 0xFF in _LOCKED:  # the upper bytes tell apart errors of one kind
                raise Outage(error) from error
            problem = str(error)
    if problem:
        raise Refusal(f"cannot be opened, {problem}")
    if stored is None and experiment is not None:
        _check_artifacts(experiment, artifact_root(path))
    elif stored is not None:
        _check_experiment(uri, str(experiment), stored)
        if stored["artifact_location"].startswith("mlflow-artifacts:"):
            raise ConfigError(
                f"tracking.experiment={experiment}: its files go through the MLflow server that "
                f"made it ({stored['artifact_location']}). Give tracking.uri the address of that "
                f"server, or choose another name"
            )


def _file_problem(path: Path) -> str:
    """Return why the file of a database could not be written, or ""."""
    folder = path.parent
    try:
        path.exists()
    except OSError as error:
        return str(error.strerror)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if "%" in str(folder) or "?" in str(folder):
        return f"as MLflow cannot write to a folder with a % or ? in its name ({folder})"
    try:  # SQLite needs its journal beside the database
        files.check_writable_folder(folder)
    except OSError as error:
        return f"the folder {folder} cannot be written ({error.strerror})"
    for file in (path, Path(f"{path}.lock")):
        if file.is_dir():
            return "it is a folder" if file == path else f"{file} is a folder"
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            return "the file cannot be read and written" if file == path else f"nor {file} written"
    return ""


# servers


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A handler of redirects that follows none, as what is sent to MLflow would be lost."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request to follow with, so that the answer itself is an error."""


def _check_server(uri: str, experiment: str | None) -> None:
    """Do what `check_store` does for an MLflow server."""
    status, other_address, body = _ask(uri, experiment or "Default")
    answer = _parse(body)
    if status == 200 and isinstance(answer.get("experiment"), dict):
        if experiment is not None:
            _check_experiment(uri, experiment, answer["experiment"])
    elif status == 404 and answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        pass
    elif status >= 500 or status in BUSY:
        raise Outage(f"it answers {status}")
    elif status in _AUTHORISED:
        _check_through_mlflow(uri, experiment)
    elif other_address:
        raise Refusal(f"it leads to another address, {other_address.partition('/api/')[0]}")
    else:
        reason = http.client.responses.get(status, "")
        raise Refusal(f"what answers there is no MLflow server ({status} {reason})" + _hint(uri))


def _ask(uri: str, experiment: str) -> tuple[int, str, bytes]:
    """Ask a server for an experiment; return the status, where it leads to, and the body."""
    query = urlencode({"experiment_name": experiment}, quote_via=quote)
    try:
        if not (host := urlsplit(uri).netloc):
            raise ValueError("it names no host")
        without_password = uri.replace(host, host.rpartition("@")[2], 1).rstrip("/")
        address = f"{without_password}/api/2.0/mlflow/experiments/get-by-name?{query}"
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(address, timeout=_ASK_SECONDS) as answer:
            return answer.status, "", answer.read()
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            return error.code, error.headers.get("Location", ""), error.read()
        return error.code, "", b""
    except (ValueError, http.client.InvalidURL) as error:
        raise Refusal(f"this is no address of a server, {error}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # MLflow may have been told which to trust
            return _AUTHORISED[0], "", b""
        raise Outage(reason) from error


def _parse(body: bytes) -> dict[str, Any]:
    """Return the members of a JSON object; none where it is something else."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _hint(uri: str) -> str:
    """Return that an MLflow server answers at the address without its path, or ""."""
    parts = urlsplit(uri)
    root = f"{parts.scheme}://{parts.netloc}"
    if root == uri.rstrip("/"):
        return ""
    try:
        _, _, body = _ask(root, "Default")
    except (Outage, Refusal):
        return ""
    answer = _parse(body)
    is_mlflow = "experiment" in answer or "error_code" in answer
    return f", but one answers at {root}" if is_mlflow else ""


def _check_database_server(uri: str, experiment: str | None) -> None:
    """Do what `check_store` does for a database server."""
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(uri)
        sqlalchemy.create_engine(url)  # which imports the driver, and connects to nothing
    except Exception as error:  # whatever a driver raises that is missing, or not whole
        raise Refusal(f"cannot be opened, {first_line(error)}{_how_to_install(error)}") from error
    port = url.port or _PORTS[url.get_backend_name()]
    try:
        socket.create_connection((url.host or "localhost", port), _ASK_SECONDS).close()
    except OSError as error:
        raise Outage(error) from error
    _check_through_mlflow(uri, experiment)


def _how_to_install(error: Exception) -> str:
    """Return what to do about a module that is missing, or ""."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return f" (install the package that has the module {error.name})"


def _check_through_mlflow(uri: str, experiment: str | None) -> None:
    """Do what `check_store` does where only MLflow knows how to ask: with passwords, for one."""
    try:
        client = Store(uri).client
        stored = None if experiment is None else client.get_experiment_by_name(experiment)
    except Exception as raised:  # whatever MLflow or a driver raises
        error = raised.__cause__ if isinstance(raised, ConfigError) else raised
        assert error is not None
        if may_pass(error) and not uri.startswith("databricks"):
            raise Outage(first_line(error)) from error
        reason = shortened(first_line(error), _LONGEST_REASON).strip(" .")
        raise Refusal(f"cannot be opened, {reason}{_how_to_log_in(error)}") from error
    if stored is not None:
        _check_experiment(uri, stored.name, dict(stored))


def _how_to_log_in(error: BaseException) -> str:
    """Return what to do about a server that wants a password, or ""."""
    if getattr(error, "error_code", "") not in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return ""
    return ". To log in: MLFLOW_TRACKING_USERNAME=NAME MLFLOW_TRACKING_PASSWORD=PASSWORD"


# experiments


def _check_experiment(uri: str, name: str, stored: Mapping[str, Any]) -> None:
    """Raise ConfigError for an experiment of a store that no run can be recorded in."""
    if stored["lifecycle_stage"] == "deleted":
        raise deleted_experiment(uri, name, stored["experiment_id"])
    _check_artifacts(name, stored["artifact_location"] or "")


def _check_artifacts(experiment: str, location: str) -> None:
    """Raise ConfigError where the files of an experiment cannot be put into their place."""
    scheme, problem = urlsplit(location).scheme, ""
    if scheme in ("", "file"):
        folder = Path(urllib.request.url2pathname(urlsplit(location).path))
        try:
            files.check_writable_folder(folder)
        except OSError as error:
            problem = f"cannot be written here ({error.strerror})"
    elif (package := _PACKAGES.get(scheme)) and not _is_installed(package):
        problem = f"needs the package {package}, which is not installed"
    if problem:
        raise ConfigError(
            f"tracking.experiment={experiment}: the place of its files, {location}, {problem}. "
            f"Choose another name, or mend that"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent
        return False
