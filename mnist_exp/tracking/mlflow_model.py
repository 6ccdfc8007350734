"""The model of a run, as MLflow keeps and serves it: saved in a folder, and registered."""

import io
import json
import logging
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mnist_exp.errors import first_line
from mnist_exp.system import files

if TYPE_CHECKING:  # what registers a model does without them
    import numpy as np
    import torch
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_ROOM = 2**20  # bytes; a disk with less is full
_DESCRIPTION = """\
Takes float images {} with pixels from 0 to 1, gives logits {}.

```
model = mlflow.pytorch.load_model("runs:/{}/model")
```
"""


def save_model(
    folder: Path,
    model: "torch.nn.Module",
    shape: Sequence[int],
    classes: int,
    example: "np.ndarray",
) -> None:
    """Save a model in MLflow's format, with its signature and an example of its input.

    It is saved as an exported program, which loads where this package is not; a module that cannot
    be exported (its control flow depends on values) is pickled instead. MLflow itself, which takes
    seconds to import and looks through all that is installed, is not needed for an exported one.

    Args:
        folder: Where the model is saved; what an earlier, killed process left there is removed.
        model: Takes images [B, C, H, W] and gives logits [B, classes].
        shape: Of one image: (C, H, W).
        classes: How many there are.
        example: float32 [B, C, H, W], with B at least 2.
    """
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    try:
        batch = {0: torch.export.Dim.AUTO}
        program = torch.export.export(model, (torch.from_numpy(example),), dynamic_shapes=(batch,))
    except Exception as error:  # torch.export raises whatever it meets
        log.warning("the model is pickled, as it cannot be exported: %s", first_line(error))
        _save_pickled(folder, model, shape, classes, example)
    else:
        (folder / "data").mkdir(parents=True)
        archive = io.BytesIO()  # on a full disk, torch's own writing would end the process
        torch.export.save(program, archive)
        (folder / "data" / "model.pt2").write_bytes(archive.getbuffer())
        _describe(folder, shape, classes, example)


def _describe(folder: Path, shape: Sequence[int], classes: int, example: "np.ndarray") -> None:
    """Write the files with which MLflow loads and serves the program in a folder."""
    import torch
    from omegaconf import OmegaConf

    python, torch_version = platform.python_version(), str(torch.__version__)

    def tensors(*shape: int) -> str:
        tensor = {"dtype": "float32", "shape": list(shape)}
        return json.dumps([{"type": "tensor", "tensor-spec": tensor}])

    environment: dict[str, Any] = {
        "python": python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": ["-r requirements.txt"],
    }
    served = {
        "loader_module": "mlflow.pytorch",
        "data": "data",
        "env": {"virtualenv": "python_env.yaml"},
        "python_version": python,
        "config": {"device": None},
    }
    examples = {
        "type": "ndarray",
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
    }
    description = {
        "flavors": {
            "python_function": served,
            "pytorch": {"model_data": "data", "pytorch_version": torch_version, "code": None},
        },
        "mlflow_version": version("mlflow"),
        "model_size_bytes": (folder / "data" / "model.pt2").stat().st_size,
        "saved_input_example_info": examples,
        "signature": {"inputs": tensors(-1, *shape), "outputs": tensors(-1, classes)},
    }
    texts = {
        "MLmodel": OmegaConf.to_yaml(OmegaConf.create(description)),
        "python_env.yaml": OmegaConf.to_yaml(OmegaConf.create(environment)),
        "requirements.txt": "\n".join(_requirements()) + "\n",
        examples["artifact_path"]: json.dumps(example.tolist()),
        examples["serving_input_path"]: json.dumps({"inputs": example.tolist()}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _requirements() -> list[str]:
    """Return what an exported model needs to be loaded and served."""
    return [f"{name}=={version(name)}" for name in ("torch", "mlflow")]


def _save_pickled(
    folder: Path,
    model: "torch.nn.Module",
    shape: Sequence[int],
    classes: int,
    example: "np.ndarray",
) -> None:
    """Save a model as `save_model` does, but pickled."""
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    real = np.dtype("float32")
    signature = ModelSignature(
        Schema([TensorSpec(real, (-1, *shape))]), Schema([TensorSpec(real, (-1, classes))])
    )
    try:
        mlflow.pytorch.save_model(
            model,
            str(folder),
            signature=signature,
            input_example=example,
            # given outright, as MLflow would load the model in another process to find out
            pip_requirements=_requirements(),
            serialization_format="pickle",
        )
    except RuntimeError:  # torch's writing does not say why it fails
        files.check_room(folder.parent, _ROOM)
        raise


def log_model(client: "MlflowClient", run_id: str, saved: Path) -> None:
    """Register a model that `save_model` has saved as the model of a run, once.

    This is what `mlflow.pytorch.log_model` does, from the saved files instead of the module, so
    that it needs no torch. Each of its steps is left out where an earlier try has taken it.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    run = client.get_run(run_id)
    logged = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}' AND name = 'model'"
    )
    model = logged[0] if logged else _create_logged_model(client, run, saved)
    outputs = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if model.status != LoggedModelStatus.READY:
        with TemporaryDirectory() as folder:
            shutil.copytree(saved, folder, dirs_exist_ok=True)
            description = Model.load(folder)
            description.artifact_path = model.artifact_location
            description.run_id = run_id
            description.model_id = description.model_uuid = model.model_id
            description.save(f"{folder}/MLmodel")
            client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _create_logged_model(client: "MlflowClient", run: Any, saved: Path) -> Any:
    """Create MLflow's entry for the model of a run (MLflow's entity), and return it."""
    from mlflow.models import Model

    known = ("mlflow.user", "mlflow.source.")  # and not those of who uploads it
    tags = {key: value for key, value in run.data.tags.items() if key.startswith(known)}
    signature = Model.load(saved).signature
    shapes = [list(schema.inputs[0].shape) for schema in (signature.inputs, signature.outputs)]
    tags["mlflow.note.content"] = _DESCRIPTION.format(*shapes, run.info.run_id)
    return client.create_logged_model(
        run.info.experiment_id, "model", run.info.run_id, tags, run.data.params
    )
