"""Fits the prior to what the encoder says of the train split.

medgen prior
"""

import json
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from medgen import bundle, config
from medgen.bundle import BundleInfo
from medgen.config import Project, Tracking, unknown_name
from medgen.data.loader import Loader
from medgen.data.store import Split, open_store
from medgen.distributed import pick_device
from medgen.files import write_folder
from medgen.models import GenerativeModel
from medgen.priors import PRIORS, Prior, save_prior
from medgen.priors.gmm import RARE
from medgen.tracking import Tracker, history

BATCH_SIZE = 64
MAX_LATENT_NUMBERS = 1 << 28  # held at once, 1 GiB; of more, images spread over the split are used


def run(project: Project, *, prior: config.Prior, tracking: Tracking) -> Prior | None:
    """Encodes the train split, fits the prior, writes artifacts/prior and records the fit in the model's run.

    None for a model without a latent: what is written then says so, as DVC wants the folder.

    Raises:
        UserError: the store or the model is missing or damaged, they do not belong together, or the
            latents cannot be fitted.
    """
    if prior.name not in PRIORS:
        raise unknown_name("prior.name", prior.name, PRIORS)
    store = open_store(project.dataset)
    model, info = bundle.load_for(store, project.model, pick_device("auto"))
    if not isinstance(model, GenerativeModel):
        write_none(project, info)
        return None
    means, labels, variance = encode(model, store.split("train"))
    fitted = PRIORS[prior.name].fit(means, labels, len(store.classes), prior, variance)
    metrics = {"prior/train_log_likelihood": mean_log_likelihood(fitted, means, labels)}
    if store.counts["val"]:
        means, labels, _ = encode(model, store.split("val"))
        metrics["prior/val_log_likelihood"] = mean_log_likelihood(fitted, means, labels)
    save_prior(project.prior, fitted, bundle.digest(project.model))
    record(project, info, prior, tracking, metrics)
    report(fitted, store.classes, metrics)
    return fitted


def write_none(project: Project, info: BundleInfo) -> None:
    """Writes a prior.json that says why there is no prior."""
    reason = f"model.name {info.model.name} finds masks: it has no latent to draw from"
    plain = {"name": None, "reason": reason, "model": bundle.digest(project.model)}
    write_folder(project.prior, {"prior.json": (json.dumps(plain, indent=2) + "\n").encode()})
    Console(highlight=False).print(f"no prior: {reason}", markup=False)


@torch.no_grad()
def encode(model: GenerativeModel, split: Split) -> tuple[Tensor, Tensor, Tensor | None]:
    """Posterior means (N, *latent_shape), labels (N,) and mean posterior variance (*latent_shape), on the CPU.

    The variance is None for a deterministic encoder.
    """
    limit = max(1, MAX_LATENT_NUMBERS // torch.Size(model.latent_shape).numel())
    subset = limit if len(split.images) > limit else None
    device = next(model.parameters()).device
    means, labels = [], []
    variance: Tensor | None = None
    for batch in Loader(split, BATCH_SIZE, device, subset=subset).sequential():
        latent = model.encode(batch.image, batch.label)
        means.append(latent.mean.float().cpu())
        labels.append(batch.label.cpu())
        if latent.logvar is not None:
            total = latent.logvar.double().exp().sum(0).cpu()
            variance = total if variance is None else variance + total
    count = sum(len(part) for part in labels)
    return torch.cat(means), torch.cat(labels), None if variance is None else (variance / count).float()


def mean_log_likelihood(prior: Prior, means: Tensor, labels: Tensor) -> float:
    """Nats per number of the latent, mean over images whose class the prior knows."""
    if len(prior.frequencies):
        unseen = (prior.frequencies == 0).nonzero()[:, 0]  # of such a class no density was fitted
        labels = torch.where(torch.isin(labels, unseen), -1, labels)
    return float(prior.log_likelihood(means, labels).mean()) / means[0].numel()


def record(
    project: Project, info: BundleInfo, prior: config.Prior, tracking: Tracking, metrics: dict[str, float]
) -> None:
    """Adds parameters, metrics and prior.json to the record of the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"prior": prior})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        tracker.artifact(project.prior / "prior.json", "prior")


def report(prior: Prior, classes: tuple[str, ...], metrics: dict[str, float]) -> None:
    """Says what was chosen, and warns of classes with too few images."""
    console = Console(highlight=False)
    choices: list[dict[str, Any]] = prior.state()[1].get("choices", [])
    for choice in choices:
        name = classes[choice["class"]] if choice["class"] >= 0 else "all classes"
        if choice["held_out"] is None:
            console.print(
                f"warning: {name}: {choice['rows']} training images, fewer than {RARE}: one Gaussian with its own mean "
                "and the covariance of all classes",
                style="yellow",
                markup=False,
            )
        else:
            console.print(
                f"{name}: {choice['rows']} images, number of components {choice['components']}",
                markup=False,
            )
    values = ", ".join(f"{name.split('/')[1].split('_')[0]} {value:.3f}" for name, value in metrics.items())
    console.print(f"prior {prior.name}: log-likelihood in nats per latent number: {values}")
