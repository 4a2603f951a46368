"""MLflow's page: showing it, and what it tells of a model, its versions and their runs.

The page shows Markdown with pictures, but tables without space between their columns: tables here are code blocks.
"""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlencode, urlsplit

from PIL import Image
from rich.console import Console

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.models import MODELS
from medgen.models.bundle import BundleInfo
from medgen.registry.versions import CANDIDATE, CHAMPION, PREVIOUS
from medgen.tracking.mlflow_sync import connect, store_uri, without_password

PICTURE = "samples.png"
FOLDER = "page"  # of a run's artifacts
MAX_WIDTH = 640  # pixels: the page shows pictures at their own size, and cuts off what is wider than its column
MARKS = (  # metric, its name, its reference, and how to read the two
    (
        "reconstruction/ssim",
        "SSIM of reconstructions",
        "reconstruction/pca_ssim",
        "PCA with as many numbers; 1 is perfect",
    ),
    ("generation/c2st_auc", "Realism (C2ST AUC)", "generation/c2st_auc_floor", "train images; 0.5 is best, 1 worst"),
    (
        "generation/spectrum_distance",
        "Spectrum distance",
        "generation/spectrum_distance_floor",
        "train images; 0 is best",
    ),
    ("generation/mmd_domain", "MMD of samples", "generation/mmd_domain_floor", "train images; 0 is best"),
    ("generation/kid_domain", "KID of samples", "generation/kid_domain_floor", "train images; 0 is best"),
    ("generation/precision", "Precision of samples", "generation/precision_real", "train images"),
    ("generation/recall", "Recall of samples", "generation/recall_real", "train images"),
    ("generation/label_accuracy", "Label accuracy", "generation/label_accuracy_real", "of real test images"),
    ("privacy/copy_rate", "Copies of train images", "privacy/copy_rate_plausible", "the largest rate by chance"),
    (
        "segmentation/dice_foreground",
        "Dice of masks",
        "segmentation/dice_foreground_mean_mask",
        "the commonest train mask; 1 is perfect",
    ),
    ("segmentation/iou_foreground", "IoU of masks", "", ""),
)


def ui(project: Project, *, tracking: Tracking, port: int = 5000) -> NoReturn:
    """Shows MLflow's page on this project's store at 127.0.0.1:`port`; this process becomes the server.

    Raises:
        UserError: the store is a server with a page of its own, or the port is taken.
    """
    uri = store_uri(project, tracking)
    if urlsplit(uri).scheme in ("http", "https"):
        raise UserError(f"tracking.uri: {without_password(uri)} is a server with its own page; open it in a browser")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port {port}: something answers there already; choose another port")
    _, experiment = connect(project, tracking)  # an empty project gets its store first
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(project.root / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # Without its job runner the server is 2 processes in place of 15.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # without the last words the page opens as one for language models
    address = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    Console(highlight=False, soft_wrap=True).print(f"MLflow on {address} (Ctrl-C ends it)")
    os.chdir(project.root)
    os.execve(sys.executable, command, environment)  # in place of this process: signals reach the server


def about_model(name: str, promotions: Sequence[str]) -> str:
    """The description of a registered model: what its versions and aliases are.

    Args:
        promotions: lines of Markdown on the last promotions, newest first.
    """
    aliases = {
        CHAMPION: "the version in use",
        CANDIDATE: "the version registered last",
        PREVIOUS: "the champion before, to go back to",
    }
    parts = [
        "Models of medical images, trained and judged by medgen. A version holds a model, its prior, its "
        "refiner and the code that runs them; its tags are its metrics on the test split and where it comes from.",
        "\n".join(f"- `{alias}`: {meaning}" for alias, meaning in aliases.items()),
        _code(f"medgen generate --model {shlex.quote(f'models:/{name}@{CANDIDATE}')} --n 25 --out outputs/new"),
    ]
    if promotions:
        parts += ["**Last promotions**", "\n".join(promotions)]
    return "\n\n".join(parts) + "\n"


def about_version(
    name: str,
    number: int,
    info: BundleInfo,
    prior: str | None,
    is_refined: bool,
    tags: Mapping[str, str],
    has_picture: bool,
) -> str:
    """The description of a version, in Markdown.

    Args:
        name: of the registered model.
        prior: its name; None of a model that finds masks.
        is_refined: whether there is a refiner.
        tags: the version's, its metrics among them.
        has_picture: whether samples were drawn when it was judged (`preview`).
    """
    uri = shlex.quote(f"models:/{name}/{number}")
    commands = [
        f"medgen serve --model {uri}",
        f"medgen history --reproduce {number}    # the commands that make it again",
    ]
    if prior is not None:
        commands.insert(0, f"medgen generate --model {uri} --n 25 --out outputs/{number}")
    parts = [_what_it_is(info, prior, is_refined), *_judged(tags)]
    if has_picture:
        parts.append(_picture("model-versions/get-artifact", {"path": PICTURE, "name": name, "version": number}))
    return "\n\n".join([*parts, _code(*commands)]) + "\n"


def about_run(
    made: str, prior: str | None, is_refined: bool, tags: Mapping[str, str], run_id: str, has_picture: bool
) -> str:
    """The description of a run whose model has been judged.

    Args:
        made: what the training says of itself.
        prior: as of `about_version`, like the refiner, the tags and the picture.
    """
    judged = "Judged on the test split" if prior is None else f"Judged on the test split with the prior {prior}"
    judged += " and its refiner" if is_refined else ""
    parts = [made, f"{judged}:", *_judged(tags)]
    if has_picture:
        parts.append(_picture("get-artifact", {"path": f"{FOLDER}/{PICTURE}", "run_uuid": run_id}))
    return "\n\n".join(parts) + "\n"


def picture_of(project: Project) -> Path:
    """The samples that the evaluation drew."""
    return project.figures / PICTURE


def preview(project: Project, folder: Path) -> Path:
    """Writes `picture_of` to `folder`, no wider than the page's column."""
    path = folder / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(picture_of(project)) as image:
        image.thumbnail((MAX_WIDTH, image.height), Image.Resampling.LANCZOS)
        image.save(path)
    return path


def _what_it_is(info: BundleInfo, prior: str | None, is_refined: bool) -> str:
    channels, height, width = info.image_shape
    if MODELS[info.model.name].target == "mask":
        return (
            f"{info.model.name}: finds masks of {info.preprocess.mask_classes} classes, {height}×{width} uint8. "
            f"Input: images uint8 of any size, N × H × W × {channels}."
        )
    classes = ", ".join(map(plain, info.classes)) or "none"
    text = (
        f"{info.model.name} with the prior {prior}: draws images {height}×{width}×{channels} uint8; "
        f"classes: {classes}. Input: n, label and seed of new images, or an image (base64) to reconstruct."
    )
    if is_refined:
        text += " A refiner adds the detail that the decoder leaves out to new images, unless refine is false."
    return text


def _judged(tags: Mapping[str, str]) -> list[str]:
    """The key metrics; nothing where nothing was evaluated."""
    rows = [("", "here", "reference", "")]
    for key, name, beside, reading in MARKS:
        if key in tags:
            rows.append((name, tags[key], tags.get(beside, ""), reading))
    if len(rows) == 1:
        return []
    return [_code(*(f"{name:25}{value:10}{beside:13}{reading}".rstrip() for name, value, beside, reading in rows))]


def _picture(route: str, words: Mapping[str, object]) -> str:
    """A picture that the page's own server brings; relative, so that it is found behind a proxy's prefix too."""
    return f"![samples]({route}?{urlencode(words, quote_via=quote)})"


def _code(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])


def plain(text: str) -> str:
    """Text from outside that Markdown and HTML show as it is."""
    return re.sub(r"[^\w .-]|\b_|_\b", lambda found: f"&#{ord(found[0])};", text)
