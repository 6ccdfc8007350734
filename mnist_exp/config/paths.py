"""Where the project's own files are, and where its outputs go."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
IS_CHECKOUT = not (_PACKAGE / "conf").exists()


def project_root() -> Path:
    """Return the folder of conf/ and experiments/: the checkout, or the installed package."""
    return _PACKAGE.parent if IS_CHECKOUT else _PACKAGE


def output_root() -> Path:
    """Return where outputs and the default store go: the checkout, or else the current folder."""
    return _PACKAGE.parent if IS_CHECKOUT else Path.cwd()
