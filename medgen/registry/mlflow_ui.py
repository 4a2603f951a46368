"""MLflow's web UI: start it, and write the descriptions it shows of registered models, their versions and runs.

MLflow renders Markdown with images, but sets table columns without space between them, so tables are code blocks.
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlencode, urlsplit

from PIL import Image

from medgen.config import Project, Tracking, without_credentials
from medgen.console import say
from medgen.errors import UserError
from medgen.models import MODELS
from medgen.registry.artifacts import Artifacts
from medgen.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, mlflow_client
from medgen.tracking.mlflow_descriptions import VIEW, VIEW_TAG, escape
from medgen.tracking.mlflow_sync import store_uri

SAMPLES = "samples.png"  # in the artifacts of a version or run
FOLDER = "page"  # in a run's artifacts
MAX_WIDTH = 640  # pixels: MLflow shows images at their own size and cuts off what is wider than the column
SHOWN_METRICS = {  # metric: its name, the metric of its group to compare it with, how to read the two
    "reconstruction/ssim": ("SSIM of reconstructions", "pca_ssim", "PCA with as many dimensions; 1 is perfect"),
    "generation/c2st_auc": ("Realism (C2ST AUC)", "c2st_auc_floor", "train images; 0.5 is best, 1 worst"),
    "generation/spectrum_distance": ("Spectrum distance", "spectrum_distance_floor", "train images; 0 is best"),
    "generation/mmd_domain": ("MMD of samples", "mmd_domain_floor", "train images; 0 is best"),
    "generation/kid_domain": ("KID of samples", "kid_domain_floor", "train images; 0 is best"),
    "generation/precision": ("Precision of samples", "precision_real", "train images"),
    "generation/recall": ("Recall of samples", "recall_real", "train images"),
    "generation/label_accuracy": ("Label accuracy", "label_accuracy_real", "real test images"),
    "privacy/copy_rate": ("Copies of train images", "copy_rate_plausible", "highest rate by chance"),
    "segmentation/dice_foreground": (
        "Dice of masks",
        "dice_foreground_mean_mask",
        "most frequent train mask; 1 is perfect",
    ),
    "segmentation/iou_foreground": ("IoU of masks", "", ""),
}


def ui(project: Project, *, tracking: Tracking, port: int = 5000) -> NoReturn:
    """Start MLflow's web UI on this project's store at 127.0.0.1:`port`; the server replaces this process.

    Raises:
        UserError: the store is a server with its own UI, or does not answer, or the port is in use.
    """
    uri = store_uri(project, tracking)
    if urlsplit(uri).scheme in ("http", "https"):
        raise UserError(f"tracking.uri: {without_credentials(uri)} is a server with its own UI; open it in a browser")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port {port}: already in use; choose another port")
    with mlflow_client(project, tracking, "start it first") as (client, experiment):  # creates a new project's store
        has_view = VIEW_TAG in client.get_experiment(experiment).tags
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--artifacts-destination", str(project.root / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # Every account of the machine can read a command, and the address may contain a password.
    # Without the job runner the server has 2 processes instead of 15.
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = os.environ | settings
    # Without workflowType MLflow opens the view for language models.
    address = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    if has_view:
        address += f"&viewStateShareKey={VIEW}"
    say(f"MLflow on {address} (Ctrl-C ends it)")
    os.chdir(project.root)
    os.execve(sys.executable, command, environment)  # in place of this process, so that signals reach the server


def describe_model(name: str, promotions: Sequence[str]) -> str:
    """The description of a registered model, in Markdown.

    Args:
        promotions: lines of Markdown about the last promotions, newest first.
    """
    aliases = {
        CHAMPION: "the version in use",
        CANDIDATE: "the version that was registered last",
        PREVIOUS: "the former champion, for a rollback",
    }
    parts = [
        "Models of medical images, trained and evaluated by medgen. A version holds a model, its prior, its refiner "
        "and the code that runs them. Its tags hold its metrics on the test split and its lineage.",
        "\n".join(f"- `{alias}`: {meaning}" for alias, meaning in aliases.items()),
        _code(f"medgen generate --model {shlex.quote(f'models:/{name}@{CANDIDATE}')} --n 25 --out outputs/new"),
    ]
    if promotions:
        parts += ["**Last promotions**", "\n".join(promotions)]
    return "\n\n".join(parts) + "\n"


def describe_version(name: str, number: int, artifacts: Artifacts, tags: Mapping[str, str]) -> str:
    """The description of a version with these tags, in Markdown."""
    uri = shlex.quote(f"models:/{name}/{number}")
    commands = [
        f"medgen serve --model {uri}",
        f"medgen history --reproduce {number}    # prints the commands that rebuild it",
    ]
    if artifacts.prior is not None:
        commands.insert(0, f"medgen generate --model {uri} --n 25 --out outputs/{number}")
    parts = [_describe_parts(artifacts), *_metrics_table(tags)]
    if artifacts.samples:
        parts.append(_image("model-versions/get-artifact", {"path": SAMPLES, "name": name, "version": number}))
    return "\n\n".join([*parts, _code(*commands)]) + "\n"


def describe_run(training: str, artifacts: Artifacts, run_id: str) -> str:
    """The description of a run whose model was evaluated, in Markdown; `training` is what the training wrote."""
    setup = "" if artifacts.prior is None else f" with the prior {artifacts.prior}"
    setup += " and its refiner" if artifacts.refiner else ""
    parts = [training, f"Evaluated on the test split{setup}:", *_metrics_table(artifacts.metric_tags())]
    if artifacts.samples:
        parts.append(_image("get-artifact", {"path": f"{FOLDER}/{SAMPLES}", "run_uuid": run_id}))
    return "\n\n".join(parts) + "\n"


def write_preview(samples: Path, folder: Path) -> Path:
    """Write the image of samples to `folder`, no wider than MLflow's column."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(samples) as image:
        image.thumbnail((MAX_WIDTH, image.height), Image.Resampling.LANCZOS)
        image.save(folder / SAMPLES)
    return folder / SAMPLES


def _describe_parts(artifacts: Artifacts) -> str:
    info = artifacts.info
    channels, *sides = info.image_shape
    size = "×".join(map(str, sides))
    if MODELS[info.model.name].target == "mask":
        return (
            f"{info.model.name}: predicts masks of {info.preprocess.mask_classes} classes, {size} uint8. "
            f"Input: images uint8 of any size, N × {'D × ' * (len(sides) == 3)}H × W × {channels}."
        )
    classes = ", ".join(map(escape, info.classes)) or "none"
    text = (
        f"{info.model.name} with the prior {artifacts.prior}: generates images {size}×{channels} "
        f"uint{info.preprocess.bits}; "
        f"classes: {classes}. Input: n, label and seed of new images, or an image (base64) to reconstruct."
    )
    if info.preprocess.scale:
        text += f" Intensities of the train images: {info.preprocess.intensities}."
    if artifacts.refiner:
        text += " A refiner adds detail that the decoder omits to new images, unless refine is false."
    return text


def _metrics_table(tags: Mapping[str, str]) -> list[str]:
    """The main metrics as a code block; nothing if there are none."""
    lines = []
    for key, (name, reference, reading) in SHOWN_METRICS.items():
        if key in tags:
            compared_with = tags.get(f"{key.partition('/')[0]}/{reference}", "")
            lines.append(f"{name:25}{tags[key]:10}{compared_with:13}{reading}".rstrip())
    return [_code(f"{'':25}{'value':10}reference", *lines)] if lines else []


def _image(route: str, query: Mapping[str, object]) -> str:
    """An image from MLflow's own server; the address is relative, so that it works behind a proxy's path prefix."""
    return f"![samples]({route}?{urlencode(query, quote_via=quote)})"


def _code(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])
