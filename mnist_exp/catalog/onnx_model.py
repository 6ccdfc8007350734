"""The saved model of a run as an ONNX file, which has been compared with torch on the test set."""

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from mnist_exp.errors import ConfigError, RunFailed, first_line
from mnist_exp.run.saved_model import check_finite, load_run
from mnist_exp.system import files
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.training.forks import start_autograd
from mnist_exp.training.models import DeployedModel

INPUT, OUTPUT = "images", "logits"  # the names in the file
BATCH = 1000  # images that both compute at a time
# What the logits may differ by, relative and absolute: sums of float32 in another order.
RELATIVE, ABSOLUTE = 1e-3, 1e-3


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file, and how far its outputs are those of torch on the test set."""

    path: Path
    run_id: str
    name: str
    shape: tuple[int, ...]  # of an image
    images: int  # of the test set
    difference: float  # the greatest one of two logits
    same_classes: int  # images

    def lines(self) -> list[str]:
        """Return what a person is told."""
        size = ", ".join(map(str, self.shape))
        return [
            f"run      {self.run_id}  {self.name}",
            f"model    {self.path.resolve()}",
            f"input    {INPUT}: float32 [batch, {size}], pixels from 0 to 1",
            f"output   {OUTPUT}: float32 [batch, classes]",
            f"checked  {self.same_classes:,} of {self.images:,} test images have the same class as "
            f"in torch; the greatest difference of logits is {self.difference:.2g}",
        ]


def export_model(store: Store, run: StoredRun, root: str | None, path: Path) -> OnnxExport:
    """Write the model of a run, its normalisation inside, once it is found to agree with torch.

    Args:
        store: The store that has the run.
        run: The run.
        root: The folder of its data set, if not the recorded one.
        path: The file.

    Raises:
        ConfigError: The run has left no model, or its data set is not there.
        RunFailed: The model cannot be exported, or computes something else then. No file is left.
    """
    dataset, stack = load_run(store, run, root=root)
    model = DeployedModel(stack.model(0), dataset.mean, dataset.std).eval()
    images = dataset.test.images.float() / 255  # [N, C, H, W]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in images.split(BATCH)])
    check_finite(expected, run)
    with TemporaryDirectory() as folder:
        part = Path(folder, "model.onnx")
        try:
            _write(model, images[:2], part)
            logits = _compute(part, images)
        except Exception as error:  # whatever the exporter, or the runtime, has no operator for
            raise RunFailed(
                f"run {run.id}: its model cannot be exported to ONNX: {first_line(error)}"
            ) from error
        export = _compare(path, run, dataset.shape, logits, expected)
        with files.reporting_write_errors("--to", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, part.read_bytes())
    return export


def _write(model: nn.Module, images: Tensor, path: Path) -> None:
    """Export a model for batches of any size. `images`: a batch of two."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    start_autograd()  # else forks of this process could not train afterwards
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own future
            torch.onnx.export(
                model,
                (images,),
                path,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)


def _compute(path: Path, images: Tensor) -> Tensor:
    """Return the logits of images that ONNX's runtime computes; the last batch is an odd one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = [*images[:-1].split(BATCH), images[-1:]]
    return torch.cat(
        [torch.from_numpy(session.run([OUTPUT], {INPUT: b.numpy()})[0]) for b in batches]
    )


def _compare(
    path: Path, run: StoredRun, shape: tuple[int, ...], logits: Tensor, expected: Tensor
) -> OnnxExport:
    """Return how far two computations of logits [images, classes] agree, of images of a shape.

    Raise RunFailed where they do not.
    """
    difference = float((logits - expected).abs().max())
    same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    if not torch.allclose(logits, expected, rtol=RELATIVE, atol=ABSOLUTE):
        raise RunFailed(
            f"run {run.id}: its model computes something else as ONNX: logits differ by up to "
            f"{difference:.2g}, and {same:,} of {len(logits):,} test images have the same class. "
            f"{path} was not written"
        )
    return OnnxExport(path, run.id, run.name, shape, len(logits), difference, same)


def check_libraries() -> None:
    """Raise ConfigError if a library is missing, which only those need who export models."""
    names = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--to: an ONNX file needs packages that are not installed: {', '.join(missing)}. To "
            f"install them: pip install 'mnist-exp[onnx]'"
        )
