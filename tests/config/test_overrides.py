"""What is known of overrides without Hydra is what Hydra says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.overrides import tracking_uri
from mnist_exp.errors import ConfigError
from tests.helpers import ROOT

PLAIN = [
    *("sqlite:////tmp/a-b_c.d/x.db", "sqlite:///x.db", "http://127.0.0.1:5000", "file:/a/b"),
    *("sqlite:////tmp/a b c/x y.db", "sqlite:///true 1e3 null 7/x.db"),
]


@pytest.mark.parametrize(
    "uri",
    [
        *PLAIN,
        "null",
        "'sqlite:///a b.db'",
        "sqlite:///a%20b.db",
        "",
        "sqlite:///a  b.db",
        "sqlite:///a b.db ",
    ],
)
def test_it_is_what_hydra_composes(uri: str) -> None:
    words = [f"tracking.uri={uri}"]
    assert tracking_uri(words) == compose(words).tracking.uri
    assert tracking_uri([]) is compose([]).tracking.uri is None


def test_what_hydra_refuses_is_refused() -> None:
    for word in ("tracking.uri=sqlite:///{", "tracking.uri=[1]", "tracking.nonsense=1"):
        with pytest.raises(ConfigError):
            tracking_uri([word])


@pytest.mark.parametrize(
    "file, before, after",
    [
        ("tracking/default.yaml", "uri: null", "uri: sqlite:////data/ours.db"),
        ("config.yaml", "tracking: default", "tracking: ours"),
        ("config.yaml", "seed: 0 ", "tracking: {uri: 'sqlite:////data/ours.db'}\nseed: 0 "),
    ],
)
def test_a_store_that_conf_names_is_found(
    file: str, before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "experiments").mkdir()
    text = (tmp_path / "conf" / file).read_text()
    assert before in text
    (tmp_path / "conf" / file).write_text(text.replace(before, after))
    default = (tmp_path / "conf" / "tracking" / "default.yaml").read_text()
    (tmp_path / "conf" / "tracking" / "ours.yaml").write_text(
        default.replace("uri: null", "uri: sqlite:////data/ours.db")
    )
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    assert tracking_uri([]) == "sqlite:////data/ours.db"


def test_hydra_is_not_imported_for_it() -> None:
    program = (
        "import sys; from mnist_exp.config.overrides import tracking_uri\n"
        "tracking_uri([]); tracking_uri(['tracking.uri=sqlite:///a b/x.db'])\n"
        "print('hydra' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
