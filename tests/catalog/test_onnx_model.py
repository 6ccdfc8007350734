"""Models as ONNX files: they compute what torch computes, or there is no file."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import mnist_exp
from mnist_exp.catalog import onnx_model
from mnist_exp.catalog.onnx_model import OnnxExport
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.run.recorder import Result

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed"
)


@pytest.fixture(scope="module")
def result(store: str, folder: Path) -> Result:
    """A run of a model with batch normalisation and dropout, which behave otherwise in training."""
    words = ["debug=fast", "model=cnn_pooled", "model.channels=[4]", "training.compile=never"]
    words += [f"tracking.uri={store}", f"hydra.run.dir={folder}/run"]
    return mnist_exp.train([*words, "training.threads=1", "training.device=cpu"])


@pytest.fixture
def where(result: Result) -> dict[str, Any]:
    """The run, for `mnist_exp.export`."""
    return {"words": [result.run_id], "overrides": [f"tracking.uri={result.store}"]}


@needs_onnx
def test_it_computes_what_torch_computes_for_any_batch(
    result: Result, where: dict[str, Any], tmp_path: Path
) -> None:
    import onnxruntime

    path = tmp_path / "new" / "model.onnx"
    export = mnist_exp.export(path, **where)
    assert isinstance(export, OnnxExport)
    assert (export.images, export.same_classes) == (10_000, 10_000) and export.difference < 1e-4
    assert any("10,000 of 10,000 test images" in line for line in export.lines())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for count in (1, 2, 7):
        images = torch.rand(count, 1, 28, 28)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = result.model(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    with pytest.raises(ConfigError, match=r"exists already.*--force"):
        mnist_exp.export(path, **where)


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("_compute", lambda path, images: torch.zeros(len(images), 10), "something else as ONNX"),
        ("_compute", lambda path, images: 1 / 0, "cannot be exported to ONNX: division by zero"),
    ],
)
def test_no_file_is_left_where_it_does_not(
    name: str,
    fault: Any,
    message: str,
    where: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_model, "check_libraries", lambda: None)
    monkeypatch.setattr(onnx_model, "_write", lambda model, images, path: path.touch())
    monkeypatch.setattr(onnx_model, name, fault)
    with pytest.raises(RunFailed, match=message):
        mnist_exp.export(tmp_path / "model.onnx", **where)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_nothing_begins(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ConfigError, match=r"onnxruntime\. .*pip install 'mnist-exp\[onnx\]'"):
        mnist_exp.export(tmp_path / "model.onnx", **where)
    assert list(tmp_path.iterdir()) == []
