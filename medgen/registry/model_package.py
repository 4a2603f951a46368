"""Create a registered version: code, model/, prior/, refiner/, parameters, signature and required packages."""

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.config import Params, Project, Section, fingerprint
from medgen.models import MODELS
from medgen.models.bundle import BundleInfo
from medgen.registry.mlflow_ui import describe_model
from medgen.tracking import flatten
from medgen.tracking.mlflow_descriptions import hash_tags
from medgen.tracking.mlflow_sync import MAX_PARAM, mlflow_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

PACKAGE = Path(__file__).parent.parent
# By the model's training target. MLflow takes the path of a file, not a module.
PYFUNC = {
    "image": PACKAGE / "serving" / "pyfunc.py",
    "mask": PACKAGE / "serving" / "pyfunc_masks.py",
}
CONTENT_TAG = "medgen.content"
PARAMS_FILE = "params.json"  # in a version: the parameters that it was made with
PARAMS_TAG = "params.fingerprint"
BOOKKEEPING = {"tracking", "registry", "tune"}  # sections that do not change the result
# Imports of the code that loads a version and generates (checked by tests/registry/test_registry.py).
REQUIREMENTS = (
    *("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml"),
    *("opencv-python-headless", "pillow"),  # to read an image file
)


def create_version(
    client: "MlflowClient",
    project: Project,
    params: Params,
    info: BundleInfo,
    experiment: str,
    run_id: str,
    tags: Mapping[str, str],
) -> "ModelVersion":
    """Log the model with code, model/, prior/, refiner/ and params.json, and register it as a version with `tags`.

    Unlike `mlflow.pyfunc.log_model` it does not reopen the run, nor request the history of each metric.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    target = MODELS[info.model.name].target
    logged = client.create_logged_model(
        experiment,
        name=f"{info.model.name}-{tags[CONTENT_TAG][:6]}",
        source_run_id=run_id,
        tags={CONTENT_TAG: tags[CONTENT_TAG]},
        params={name: str(value)[:MAX_PARAM] for name, value in flatten(params.model_dump(mode="json")).items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        params_file = Path(folder, PARAMS_FILE)
        params_file.write_text(params.model_dump_json(indent=2), encoding="utf-8")
        mlflow.pyfunc.save_model(
            Path(folder, "model"),
            python_model=str(PYFUNC[target]),
            artifacts={
                "model": str(project.model),
                "prior": str(project.prior),
                "refiner": str(project.refiner),
                "params": str(params_file),
            },
            # the whole package, so that the version can be loaded without an installed medgen
            code_paths=[str(PACKAGE)],
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            signature=_signature(info) if target == "image" else _mask_signature(info),
            input_example=_example() if target == "image" else _mask_example(info),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        )
        client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    description = describe_model(params.registry.model_name, ())
    try:
        client.create_registered_model(params.registry.model_name, hash_tags(description), description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source, tags = f"models:/{logged.model_id}", {**tags, PARAMS_TAG: fingerprint(*result_sections(params))}
    with mlflow_store(store_uri(project, params.tracking)):  # create_model_version looks here for the logged model
        return client.create_model_version(params.registry.model_name, source, run_id, tags, model_id=logged.model_id)


def result_sections(params: Params) -> list[Section]:
    """The sections of the parameters that determine the result."""
    return [getattr(params, name) for name in Params.model_fields if name not in BOOKKEEPING]


def _signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    channels, height, width = info.image_shape
    # With `long` MLflow converts 1.5, "1" and true to 1. Columns of `long` and `boolean` may have no missing values.
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
    """An example request without a label, since an unconditional prior or model does not accept one."""
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
    """The package's version without a local part such as +cu128, which package indexes do not have."""
    return importlib.metadata.version(name).partition("+")[0]
