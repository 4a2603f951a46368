"""Describe a model, its data and its training for the report page and the model card.

The values are the same after identical trainings: commit, device and versions are in the run's record.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medgen.config import Beta, Model, Phase, Prior, Project, Schedule, Volume, Weights
from medgen.data.store import Split, Store
from medgen.datasets import catalog
from medgen.evaluation.context import EvaluationContext, labels_of
from medgen.io import hash_file
from medgen.metrics.intervals import mean_interval, select_groups
from medgen.models.bundle import BundleInfo
from medgen.reports.evaluation import Page, PageTable, Verdict
from medgen.reports.model_card import ModelCard
from medgen.tracking import PRIOR_ORIGIN
from medgen.training.report import Settings, read_settings

BY_CLASS = "Means over the test images of each class, with 95 % intervals by patient."
TRAINING_KEYS = (
    "seed",
    "batch_size",
    "clip_norm",
    "ema_decay",
    "horizontal_flip",
    "augment",
    "keep",
    "subset",
    "init_from",
    "freeze",
)


def model_name(store: Store, info: BundleInfo) -> str:
    """Name of the model for people: its family, data and image size."""
    return f"{info.model.name} of {store.name}, {' × '.join(map(str, store.image_shape[1:]))} px"


def describe_context(project: Project, context: EvaluationContext) -> dict[str, str]:
    """Names and values of the model, prior, refiner and extractors."""
    prior = _prior_settings(project, context.info)
    description = describe_model(project, context.store, context.info) | {
        "latent": " x ".join(map(str, context.model.latent_shape)),
        "prior": context.prior.name,
        **{f"prior.{name}": str(value) for name, value in prior.items() if name != "name" and value is not None},
        "extractor": "; ".join(f"{name}, {digest[:12]}" for name, digest in context.hashes.items()),
    }
    if context.refiner:
        return description | {f"refiner.{name}": str(value) for name, value in context.refiner.params}
    return description | {"refiner": "none"}


def describe_model(project: Project, store: Store, info: BundleInfo) -> dict[str, str]:
    """Names and values of the data, run and settings of any model; only keys that the model uses."""
    counts = ", ".join(f"{count:,} {name}" for name, count in store.counts.items())
    sections = {"model": info.model, "preprocess": info.preprocess}
    settings = {
        f"{section}.{name}": str(value)
        for section, values in sections.items()
        for name, value in values.model_dump(mode="json", exclude_none=True).items()
        if name != "volume" or info.preprocess.volume != Volume()
    }
    intensities = {"intensities": info.preprocess.intensities} if info.preprocess.scale else {}
    return {
        "images": f"{counts}; {' x '.join(map(str, store.image_shape))}",
        **intensities,
        "classes": ", ".join(store.classes) or "none",
        "dataset": f"{store.name} {store.fingerprint}",
        "run": info.run,
        "PyTorch": info.torch,
        **_training_values(read_settings(project.runs / info.run), info.model),
        **settings,
    }


def training_phases(project: Project, info: BundleInfo) -> PageTable:
    """The phases of the training; without rows if the run's folder is not here."""
    settings = read_settings(project.runs / info.run)
    if settings is None:
        text = f"The loss, learning rates and epochs are in runs/{info.run}/params.json, which is not in this project."
        return PageTable("Training", text, (), [])
    phases = [phase for phase in settings.train.phases if phase.epochs]
    columns: dict[str, Sequence[str]] = {
        "phase": [phase.name for phase in phases],
        "epochs": [str(phase.epochs) for phase in phases],
        "optimizer": [f"{phase.optimizer}, weight decay {phase.weight_decay:g}" for phase in phases],
        "learning rate": [_learning_rate(phase) for phase in phases],
    }
    if _has_kl(info.model):
        columns["β (weight of the KL term)"] = [_beta(phase.beta) for phase in phases]
    columns["loss weights"] = [_weights(phase.weights or settings.loss.weights) for phase in phases]
    total = sum(phase.epochs for phase in phases)
    text = f"{total} epochs in {len(phases)} phases." if len(phases) > 1 else f"{total} epochs."
    return PageTable("Training", text, tuple(columns), list(zip(*columns.values(), strict=True)))


def describe(
    project: Project,
    store: Store,
    info: BundleInfo,
    verdict: Verdict,
    findings: Sequence[str],
    settings: Mapping[str, str],
    tags: Sequence[str],
    generative: bool = True,
) -> Page:
    """The report page without figures, rows and tables; `settings` are names and values from `describe_model`."""
    phases = training_phases(project, info)
    training = {
        f"phase {row[0]}": "; ".join(f"{name} {cell}" for name, cell in zip(phases.head[1:], row[1:], strict=True))
        for row in phases.rows
    }
    card = ModelCard(
        name=model_name(store, info),
        dataset=store.name,
        license="unknown",
        generative=generative,
        tags=["medical", "medgen", info.model.name, *tags],
        sections=_card_sections(store, verdict, findings, generative, info.init_from),
        training=training | dict(settings),
    )
    return Page(verdict, findings, card, phases, settings, {}, ())


def class_table(
    store: Store, test: Split, scores: Tensor, title: str, label_accuracy: Mapping[int, float] | None = None
) -> list[PageTable]:
    """The table of a score of each image (N,) of a test split by class, with its interval by patient; none without.

    `scores` of a model that predicts masks are of the images that have one.
    """
    rows = torch.arange(len(test.labels)) if len(scores) == len(test.labels) else torch.from_numpy(test.masked_rows)
    labels, patients = labels_of(test)[rows], select_groups(test.patients, rows)
    train_labels = labels_of(store.split("train"))
    body = []
    for label, name in enumerate(store.classes):
        chosen = (labels == label).nonzero()[:, 0]
        interval = mean_interval(scores[chosen], select_groups(patients, chosen)) if len(chosen) else None
        cells = [name, f"{int((train_labels == label).sum()):,}", f"{len(chosen):,}"]
        cells.append("–" if interval is None else f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
        if label_accuracy:
            cells.append(f"{label_accuracy[label]:.1%}" if label in label_accuracy else "–")
        body.append(tuple(cells))
    head = ("class", "train images", "test images", title, *(["label accuracy of samples"] if label_accuracy else []))
    return [PageTable("By class", BY_CLASS, head, body)] if body else []


def _card_sections(
    store: Store, verdict: Verdict, findings: Sequence[str], generative: bool, init_from: str | None
) -> dict[str, Sequence[str]]:
    """Sentences of the model card by heading."""
    channels, *sides = store.image_shape
    kind = "volumes" if store.preprocess.has_volumes else "grey images" if channels == 1 else "colour images"
    kind += f" of {' × '.join(map(str, sides))} px"
    classes = f" of the classes {', '.join(store.classes)}" if store.classes else ""
    use = f"Generates {kind} like those of the dataset {store.name}{classes}."
    command = "`medgen generate --n 25 --out outputs/new` generates images"
    if not generative:
        use = f"Predicts masks of {kind} like those of the dataset {store.name}."
        command = "`medgen reconstruct FILE --out outputs/masks` predicts masks"
    entry = catalog.load().get(store.name)
    data_license = "not recorded; ask the owner of the images before you publish the model or its images."
    if entry:
        data_license = (
            f"{entry.license} (of the dataset named {store.name} in medgen's catalog). Cite {entry.citation}."
        )
    terms = "No licence of the model is recorded. Its weights are derived from the images, so their terms may apply."
    if init_from:
        terms += f" Training started from the weights {init_from}: their terms may apply too."
    counts = ", ".join(f"{count:,} {name}" for name, count in store.counts.items())
    scale = [f"Intensities: {store.preprocess.intensities}."] if store.preprocess.scale else []
    privacy = "The report page shows images of the dataset where it says so: publish it only if they are public."
    if generative:
        privacy += " The search for copies does not find images that are rotated or warped."
    return {
        "Intended use": [
            use,
            "For research on models of medical images, for teaching, and for tests of software.",
            "Not for diagnosis, treatment or any other decision about a patient. It is not a medical device.",
            f"{command} in the project's folder.",
        ],
        "Limits": [
            verdict.text,
            verdict.power,
            "It has seen images of this dataset only: other devices, views, body parts and groups of patients are not "
            "covered, and neither is detail below one pixel of its images.",
            "docs/measures.md of medgen shows which faults each metric finds and which it misses.",
        ],
        "Findings": list(findings),
        "Data": [
            f"Dataset {store.name}, version {store.fingerprint}: {counts} images"
            + (f", classes {', '.join(store.classes)}." if store.classes else ", without classes."),
            *scale,
            "All images of a patient are in the same split, as far as patients are known.",
            f"Licence of the images: {data_license}",
        ],
        "Licence": [terms],
        "Privacy": [privacy],
    }


def _training_values(settings: Settings | None, model: Model) -> dict[str, str]:
    """Values of the loss and of the whole training that the model uses."""
    if settings is None:
        return {}
    loss, train = settings.loss, settings.train.model_dump(mode="json")
    values: dict[str, Any] = {"loss.weights": _weights(loss.weights)}
    if _has_kl(model):
        values |= {"loss.kl_reduction": loss.kl_reduction, "loss.free_bits": f"{loss.free_bits:g}"}
    if "num_embeddings" in model.model_dump():
        values["loss.commitment_cost"] = f"{loss.commitment_cost:g}"
    values |= {f"train.{name}": train[name] for name in TRAINING_KEYS if train.get(name) is not None}
    return {name: str(value) for name, value in values.items()}


def _prior_settings(project: Project, info: BundleInfo) -> dict[str, Any]:
    """The parameters that the prior was fitted with; empty if the run's folder does not have them."""
    try:
        origin = json.loads((project.runs / info.run / PRIOR_ORIGIN).read_text(encoding="utf-8"))
        if origin["sha256"] != hash_file(project.prior / "prior.json"):
            return {}
        return Prior.model_validate(origin["prior"]).model_dump(mode="json")
    except (OSError, ValueError, KeyError):
        return {}


def _has_kl(model: Model) -> bool:
    return model.name == "autoencoder_kl" or "logvar_bound" in model.model_dump()


def _weights(weights: Weights) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights if weight)


def _learning_rate(phase: Phase) -> str:
    parts = [f"{phase.learning_rate:g}", _schedule(phase.schedule)]
    parts += [f"{phase.warmup_steps} warm-up steps"] if phase.warmup_steps else []
    return ", ".join(part for part in parts if part)


def _schedule(schedule: Schedule) -> str:
    match schedule.name:
        case "cosine_restarts":
            return f"cosine over {schedule.period} epochs to {schedule.min_factor:g} of it"
        case "plateau":
            return f"times {schedule.factor:g} after {schedule.patience} epochs without progress"
    return ""


def _beta(beta: Beta) -> str:
    if beta.schedule == "constant":
        return f"{beta.end:g}"
    return f"{beta.start:g} to {beta.end:g} over {beta.epochs} epochs" + ", cyclical" * (beta.schedule == "cyclical")
