"""What a version is made of: code, model/ and prior/, what it takes and gives, and what it needs installed."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.bundle import BundleInfo
from medgen.config import Project, Registry, Tracking
from medgen.models import MODELS
from medgen.tracking.mirror import store_uri

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

PACKAGE = Path(__file__).parent.parent
# by what the model is trained towards; MLflow wants the file, not a module
PYFUNC = {"image": PACKAGE / "pyfunc.py", "mask": PACKAGE / "pyfunc_masks.py"}
CONTENT_TAG = "medgen.content"
# What the code imports that loads and generates (tests/test_registry.py holds it to that).
REQUIREMENTS = (
    *("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml"),
    *("opencv-python-headless", "pillow"),  # what turns a picture into the model's input
)


def pack(
    client: "MlflowClient",
    project: Project,
    tracking: Tracking,
    registry: Registry,
    info: BundleInfo,
    run_id: str,
    content: str,
) -> int:
    """Logs the model with code, model/ and prior/ to its run, and makes it a version; its number."""
    import mlflow

    makes = MODELS[info.model.name].target
    mlflow.set_tracking_uri(store_uri(project, tracking))
    try:
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(PYFUNC[makes]),
                artifacts={"model": str(project.model), "prior": str(project.prior)},
                # the whole package: a version loads where medgen is not installed
                code_paths=[str(PACKAGE)],
                signature=_signature(info) if makes == "image" else _mask_signature(info),
                input_example=_example() if makes == "image" else _mask_example(info),
                pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
                registered_model_name=registry.model_name,
                tags={CONTENT_TAG: content},
            )
    except BaseException:
        client.set_terminated(run_id, "FINISHED")  # leaving start_run said FAILED, but the training is none the worse
        raise
    return int(logged.registered_model_version)


def _signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    channels, height, width = info.image_shape
    whole: Any = AnyType()  # type: ignore[no-untyped-call]  # of `long` MLflow makes 1 from 1.5, "1" and true, and refuses a column with gaps
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(whole, "n", required=False),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(whole, "seed", required=False),
                ColSpec(DataType.string, "image", required=False),
            ]
        ),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))]),
    )


def _example() -> Any:
    """Without a label: it may be left out, and a prior or model that tells no classes apart refuses one."""
    import pandas as pd  # type: ignore[import-untyped]

    return pd.DataFrame({"n": [2], "seed": [0]})


def _mask_signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    channels, height, width = info.image_shape
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, channels))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, 1))]),
    )


def _mask_example(info: BundleInfo) -> Any:
    import numpy as np

    channels, height, width = info.image_shape
    return np.zeros((1, height, width, channels), np.uint8)


def content_hash(*folders: Path) -> str:
    """SHA-256 of names and bytes of all files."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _public_version(name: str) -> str:
    """The version without a local part such as +cu128, which no registry has."""
    return importlib.metadata.version(name).partition("+")[0]
