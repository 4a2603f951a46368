"""What a version is made of: code, model/ and prior/, what it takes and gives, and what it needs installed."""

import importlib.metadata
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.bundle import BundleInfo
from medgen.config import Params, Project, Section, fingerprint
from medgen.models import MODELS
from medgen.tracking.mirror import store_uri

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

PACKAGE = Path(__file__).parent.parent
# by what the model is trained towards; MLflow wants the file, not a module
PYFUNC = {"image": PACKAGE / "pyfunc.py", "mask": PACKAGE / "pyfunc_masks.py"}
CONTENT_TAG = "medgen.content"
PARAMS = "params.json"  # of a version: the parameters that made it
PARAMS_TAG = "params.fingerprint"
ELSEWHERE = {"tracking", "registry", "tune"}  # sections that do not change what is made
# What the code imports that loads and generates (tests/test_registry.py holds it to that).
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml")
MASK_REQUIREMENTS = ("opencv-python-headless",)  # besides: what turns a picture into the model's input


def pack(client: "MlflowClient", project: Project, params: Params, info: BundleInfo, run_id: str, content: str) -> int:
    """Logs the model with code, model/, prior/ and params.json to its run, and makes it a version; its number."""
    import mlflow

    makes = MODELS[info.model.name].target
    requirements = REQUIREMENTS if makes == "image" else (*REQUIREMENTS, *MASK_REQUIREMENTS)
    mlflow.set_tracking_uri(store_uri(project, params.tracking))
    try:
        with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id, log_system_metrics=False):
            kept = Path(folder) / PARAMS
            kept.write_text(params.model_dump_json(indent=2), encoding="utf-8")
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(PYFUNC[makes]),
                artifacts={"model": str(project.model), "prior": str(project.prior), "params": str(kept)},
                # the whole package: a version loads where medgen is not installed
                code_paths=[str(PACKAGE)],
                signature=_signature(info) if makes == "image" else _mask_signature(info),
                input_example=_example() if makes == "image" else _mask_example(info),
                pip_requirements=[f"{name}=={_public_version(name)}" for name in requirements],
                registered_model_name=params.registry.model_name,
                tags={CONTENT_TAG: content, PARAMS_TAG: fingerprint(*making(params))},
            )
    except BaseException:
        client.set_terminated(run_id, "FINISHED")  # leaving start_run said FAILED, but the training is none the worse
        raise
    return int(logged.registered_model_version)


def making(params: Params) -> list[Section]:
    """The sections that decide what is made."""
    return [getattr(params, name) for name in Params.model_fields if name not in ELSEWHERE]


def _signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    channels, height, width = info.image_shape
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.long, "n"),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.long, "seed", required=False),
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


def _public_version(name: str) -> str:
    """The version without a local part such as +cu128, which no registry has."""
    return importlib.metadata.version(name).partition("+")[0]
