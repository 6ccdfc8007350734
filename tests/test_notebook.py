"""The notebook: it runs, shortened by its parameters, and what is committed has run as a whole."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT, fresh_store

NOTEBOOK = ROOT / "experiments" / "digit_classifier.ipynb"
FIGURES = 8


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    """All that its cells have printed or returned as text."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    texts = [o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in outputs]
    return "\n".join(texts)


def figures(notebook: Any) -> list[str]:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parameters,) = [c for c in code(notebook) if "parameters" in c.metadata.get("tags", [])]
    store = [f"tracking.uri={fresh_store(tmp_path)}"]
    overrides = [
        f"hydra.run.dir={tmp_path}/run",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "dataset.train_size=3000",
        "training.compile=never",
    ]
    parameters.source = (
        f"epochs = 2\noverrides = {json.dumps(overrides)}\nstore = {json.dumps(store)}"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    assert len(figures(notebook)) == FIGURES
    text = printed(notebook)
    assert "epoch 2/2  train loss" in text
    assert re.search(r"^test accuracy +\d\d\.\d\d%  \(", text, re.MULTILINE)
    assert text.rstrip().endswith("identical")
    assert "1 (chosen)" in text and text.count("0 of 2") == 6


def test_it_is_committed_with_its_outputs(notebook: Any) -> None:
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert len(figures(notebook)) == FIGURES
    text = printed(notebook)
    epochs = re.findall(r"^epoch +(\d+)/(\d+)  train loss", text, re.MULTILINE)
    assert [(int(n), int(of)) for n, of in epochs] == [(n, 10) for n in range(1, 11)]
    assert "identical" in text
    outputs = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in outputs
    assert "stderr" not in [output.get("name") for cell in cells for output in cell.outputs]
    assert os.path.expanduser("~") not in text and str(ROOT) not in text


def test_it_has_no_framework_code(notebook: Any) -> None:
    source = "\n".join(cell.source for cell in code(notebook))
    assert "import mnist_exp" in source
    assert re.findall(r"\b(torch|hydra|mlflow|matplotlib|numpy)\b", source) == []
