"""The errors of a store: which ones may pass by themselves, and which ones never will."""

import errno

from mnist_exp.errors import ConfigError

BUSY = (408, 409, 429, 499)  # answers below 500 of a server that may take the same request later
_FOR_GOOD = ("SSLError", "InvalidURL", "NoSuchModuleError")  # errors of other libraries
_FILE_SYSTEM_REFUSES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


class Outage(Exception):
    """The store does not answer, which may pass."""


class Refusal(Exception):
    """The store will never take a record."""


def may_pass(error: BaseException) -> bool:
    """Return whether what MLflow or `check_store` raised may pass, as where a server is down."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for each in chain:
        if isinstance(each, Outage):
            return True
        if isinstance(each, Refusal | ImportError) or type(each).__name__ in _FOR_GOOD:
            return False
        if isinstance(each, OSError) and each.errno in _FILE_SYSTEM_REFUSES:
            return False
        status_of = getattr(each, "get_http_status_code", None)  # of what MLflow raises
        if status_of is not None and 400 <= status_of() < 500:
            return status_of() in BUSY
    return not isinstance(chain[-1], ConfigError)
