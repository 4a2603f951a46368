"""A version's parts: code, model/, prior/ and refiner/, its signature, and the packages that it needs."""

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.config import Params, Project, Section, fingerprint
from medgen.models import MODELS
from medgen.models.bundle import BundleInfo
from medgen.registry.mlflow_ui import about_model
from medgen.tracking import flatten
from medgen.tracking.mlflow_descriptions import marked
from medgen.tracking.mlflow_sync import MAX_PARAM, mlflow_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

PACKAGE = Path(__file__).parent.parent
# by what the model is trained towards; MLflow wants the file, not a module
PYFUNC = {
    "image": PACKAGE / "serving" / "pyfunc.py",
    "mask": PACKAGE / "serving" / "pyfunc_masks.py",
}
CONTENT_TAG = "medgen.content"
PARAMS = "params.json"  # of a version: the parameters that made it
PARAMS_TAG = "params.fingerprint"
ELSEWHERE = {"tracking", "registry", "tune"}  # sections that do not change what is made
# What the code imports that loads and generates (tests/test_registry.py holds it to that).
REQUIREMENTS = (
    *("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml"),
    *("opencv-python-headless", "pillow"),  # what turns a picture into the model's input
)


def pack(
    client: "MlflowClient",
    project: Project,
    params: Params,
    info: BundleInfo,
    experiment: str,
    run_id: str,
    tags: Mapping[str, str],
) -> "ModelVersion":
    """Logs the model with code, model/, prior/, refiner/ and params.json, and makes it a version with these tags.

    `mlflow.pyfunc.log_model` would do it too, but reopens the run, and asks the server for each metric's history.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    makes = MODELS[info.model.name].target
    logged = client.create_logged_model(
        experiment,
        name=f"{info.model.name}-{tags[CONTENT_TAG][:6]}",
        source_run_id=run_id,
        tags={CONTENT_TAG: tags[CONTENT_TAG]},
        params={name: str(value)[:MAX_PARAM] for name, value in flatten(params.model_dump(mode="json")).items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, PARAMS)
        kept.write_text(params.model_dump_json(indent=2), encoding="utf-8")
        mlflow.pyfunc.save_model(
            Path(folder, "model"),
            python_model=str(PYFUNC[makes]),
            artifacts={
                "model": str(project.model),
                "prior": str(project.prior),
                "refiner": str(project.refiner),
                "params": str(kept),
            },
            # the whole package: a version loads where medgen is not installed
            code_paths=[str(PACKAGE)],
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            signature=_signature(info) if makes == "image" else _mask_signature(info),
            input_example=_example() if makes == "image" else _mask_example(info),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        )
        client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    about = about_model(params.registry.model_name, ())
    try:
        client.create_registered_model(params.registry.model_name, marked(about), about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source, own = f"models:/{logged.model_id}", {**tags, PARAMS_TAG: fingerprint(*making(params))}
    with mlflow_store(store_uri(project, params.tracking)):  # where create_model_version looks for the logged model
        return client.create_model_version(params.registry.model_name, source, run_id, own, model_id=logged.model_id)


def making(params: Params) -> list[Section]:
    """The sections that decide what is made."""
    return [getattr(params, name) for name in Params.model_fields if name not in ELSEWHERE]


def _signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    channels, height, width = info.image_shape
    # of `long` MLflow makes 1 from 1.5, "1" and true, and refuses a column with gaps, as it does one of `boolean`
    anything: Any = AnyType()  # type: ignore[no-untyped-call]
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(anything, "n", required=False),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(anything, "seed", required=False),
                ColSpec(DataType.string, "image", required=False),
                ColSpec(anything, "refine", required=False),
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
