"""Create a registered version: code, model/, prior/, refiner/, parameters, signature and required packages."""

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.config import Params, Section, fingerprint
from medgen.models import MODELS
from medgen.models.bundle import BundleInfo
from medgen.registry.artifacts import Artifacts
from medgen.registry.mlflow_ui import describe_model
from medgen.registry.signatures import SIGNATURE_TAG, sign
from medgen.registry.verification import FILES_TAG, list_files, signed_text
from medgen.registry.versions import CONTENT_TAG, PARAMS_TAG
from medgen.tracking import flatten
from medgen.tracking.mlflow_descriptions import hash_tags
from medgen.tracking.mlflow_sync import MAX_PARAM, mlflow_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

PACKAGE = Path(__file__).parent.parent
PARAMS_FILE = "params.json"  # in a version: the parameters that it was made with
BOOKKEEPING = {"tracking", "registry", "tune"}  # sections that do not change the result
# Imports of the code that loads a version and generates (checked by tests/registry/test_registry.py).
REQUIREMENTS = (
    *("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml"),
    *("opencv-python-headless", "pillow"),  # to read an image file
    "rich",  # messages
)


def create_version(
    client: "MlflowClient", artifacts: Artifacts, params: Params, experiment: str, run_id: str, tags: Mapping[str, str]
) -> "ModelVersion":
    """Log the model with code, model/, prior/, refiner/ and params.json, and register it as a version with `tags`.

    Unlike `mlflow.pyfunc.log_model` it does not reopen the run, nor request the history of each metric.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    project, info = artifacts.project, artifacts.info
    is_generative = MODELS[info.model.name].target == "image"
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
            python_model=str(PACKAGE / "serving" / ("pyfunc.py" if is_generative else "pyfunc_masks.py")),
            artifacts={
                "model": str(project.model),
                "prior": str(project.prior),
                "refiner": str(project.refiner),
                "params": str(params_file),
            },
            # the whole package, so that the version can be loaded without an installed medgen
            code_paths=[str(PACKAGE)],
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            signature=_signature(info, is_generative),
            input_example=_example(info, is_generative),
            # without a local part such as +cu128, which package indexes do not have
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
        _remove_local_paths(Path(folder, "model", "MLmodel"))
        digest = list_files(Path(folder, "model"))
        client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    description = describe_model(params.registry.model_name, ())
    try:
        client.create_registered_model(params.registry.model_name, hash_tags(description), description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {**tags, PARAMS_TAG: fingerprint(*result_sections(params)), FILES_TAG: digest}
    if signature := sign(signed_text(params.registry.model_name, digest)):
        tags[SIGNATURE_TAG] = signature
    source = f"models:/{logged.model_id}"
    with mlflow_store(store_uri(project, params.tracking)):  # create_model_version looks here for the logged model
        return client.create_model_version(params.registry.model_name, source, run_id, tags, model_id=logged.model_id)


def result_sections(params: Params) -> list[Section]:
    """The sections of the parameters that determine the result."""
    return [getattr(params, name) for name in Params.model_fields if name not in BOOKKEEPING]


def _remove_local_paths(file: Path) -> None:
    """Replace the paths of this machine in an MLmodel file, which MLflow does not need, by paths inside the version."""
    from mlflow.models import Model

    model = Model.load(str(file))
    model.artifact_path = "model"
    flavor = model.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(file))


def _signature(info: BundleInfo, is_generative: bool) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    channels, *sides = info.image_shape
    uint8 = np.dtype(np.uint8)
    if not is_generative:
        inputs = Schema([TensorSpec(uint8, (-1, *[-1] * len(sides), channels))])
        return ModelSignature(inputs, Schema([TensorSpec(uint8, (-1, *sides, 1))]))
    # With `long` MLflow converts 1.5, "1" and true to 1. Columns of `long` and `boolean` may have no missing values.
    anything: Any = AnyType()  # type: ignore[no-untyped-call]
    columns = {"n": anything, "label": DataType.string, "seed": anything, "image": DataType.string, "refine": anything}
    if info.conditions:
        columns["condition"] = DataType.string
    inputs = Schema([ColSpec(kind, name, required=False) for name, kind in columns.items()])
    stored = np.dtype(f"u{info.preprocess.bits // 8}")
    return ModelSignature(inputs, Schema([TensorSpec(stored, (-1, *sides, channels))]))


def _example(info: BundleInfo, is_generative: bool) -> Any:
    """An example request; without a label, since an unconditional prior or model does not accept one."""
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]

    channels, *sides = info.image_shape
    if not is_generative:
        return np.zeros((1, *sides, channels), np.uint8)
    return pd.DataFrame({"n": [2], "seed": [0]})
