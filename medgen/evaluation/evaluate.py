"""Judges the model on the test split: reconstructions and new images drawn through the prior, or the masks it finds.

medgen evaluate
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from medgen.config import Evaluate, Project, Tracking, seed_of
from medgen.data.store import Split, Store, open_store
from medgen.datasets.weights import WEIGHTS, checked_weights
from medgen.errors import UserError
from medgen.evaluation import label_accuracy, segmentation
from medgen.evaluation.data import EvaluationData, EvaluationInfo, group_numbers, save_evaluation
from medgen.io import hash_file, write_atomic
from medgen.metrics import generation, latent, privacy, reconstruction
from medgen.metrics.c2st import MIN_GROUPS, linear_auc, network_auc
from medgen.metrics.comparison import ImageSet
from medgen.metrics.features import DomainExtractor, load_extractor, unrecognised_classes
from medgen.metrics.inception import Inception, inception_score, load_inception
from medgen.metrics.intervals import Groups, Interval, group_rows, mean_interval
from medgen.metrics.local_network import LocalNetwork, load_local_network
from medgen.metrics.mmd import kid, median_distance, mmd, paired_mmd
from medgen.metrics.spectrum import band_ratios, log_power, radial_power, spectrum_distance
from medgen.models import GenerativeModel, ImageModel, bundle
from medgen.models.base import Decoder
from medgen.models.bundle import BundleInfo
from medgen.priors import Prior, iterate_samples, load_prior, sample_images, tells_classes_apart
from medgen.priors.generator import content_hash
from medgen.priors.refiner import Refiner, load_refiner
from medgen.reports.evaluation import (
    DECODED,
    NEXT_STEPS,
    NO_INCEPTION,
    PICTURES,
    REFINED_PICTURES,
    Row,
    findings,
    key_numbers,
    print_table,
    refiner_tables,
    unrecognised_finding,
    write_page,
)
from medgen.reports.figures import write_grid, write_images, write_stacks
from medgen.tracking import Tracker, history, lineage
from medgen.training.distributed import pick_device
from medgen.training.loader import Loader

MIN_IMAGES = 3  # of a set that is compared: KID leaves one out and needs two more
PCA_COMPONENTS = (128, 256, 1024)  # printed beside as many as the latent has numbers
MIN_CLASS_IMAGES = 20  # held-out images of a class, below which measures of it are left out
NUM_PAIRS = 16
MAX_COLUMNS = 12
SIGNIFICANT_DIGITS = 6
NEAREST = "nearest_train.png"
NUM_NEAREST = 10


@dataclass(frozen=True)
class Subject:
    """What is judged, and with what."""

    store: Store
    held_out: Split  # what it is judged on: test, or val while parameters are searched
    model: GenerativeModel
    info: BundleInfo
    prior: Prior
    refiner: Refiner | None
    extractor: DomainExtractor
    extractor_sha256: str
    unrecognised: tuple[str, ...]  # classes that the extractor does not tell from the others
    inception: Inception | None  # not asked for, or its weights are not here
    local: LocalNetwork | None
    device: torch.device
    params: Evaluate

    @property
    def num_latent(self) -> int:
        """How many numbers a latent has; with a codebook, how many codes: a code's vector follows from its number."""
        shape = self.model.latent_shape
        return math.prod(shape if self.model.codes is None else shape[1:])

    @property
    def conditional(self) -> bool:
        """Whether a label changes what is generated."""
        return tells_classes_apart(self.prior, self.model)

    @property
    def asked_labels(self) -> Tensor | None:
        """The label (num_generated,) that each judged sample is made for, in the train split's mix."""
        if not self.conditional:
            return None
        return proportional_labels(self.prior.frequencies, self.params.num_generated)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of each feature network."""
        known = {"domain": self.extractor_sha256}
        if self.inception:
            known["inception"] = WEIGHTS["inception"].sha256
        if self.local:
            known["local"] = self.local.params.sha256
        return known


class Views(NamedTuple):
    """The three sets as the measures see them: features (N, 128) by the domain extractor and radial power (N, R)."""

    samples: ImageSet
    train: ImageSet  # all of the split
    held_out: ImageSet

    @property
    def bandwidth(self) -> float:
        """Bandwidth of the RBF kernel, the same for every model of this dataset and extractor."""
        return median_distance(self.train.features)


class Samples(NamedTuple):
    """The samples that are measured, as they would be saved, in the train split's mix of classes."""

    images: Tensor  # (N, C, H, W) uint8, refined where there is a refiner
    decoded: Tensor | None  # (N, C, H, W) uint8, the same before they are refined; None without a refiner


@dataclass(frozen=True)
class DecodedToo:
    """A refiner that also keeps images as they are before it: one draw from the prior, which may be slow, gives both.

    Args:
        refiner: the refiner.
        decoded: gets each batch, (B, C, H, W) uint8 on the CPU.
    """

    refiner: Refiner
    decoded: list[Tensor]

    def draw(self, decoder: Decoder, latents: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """See `medgen.priors.ImageRefiner`."""
        self.decoded.append(quantised(decoder.decode(latents, labels).float().cpu()))
        return self.refiner.draw(decoder, latents, labels, generator)


class Reconstructions(NamedTuple):
    """The decoder's reconstructions of the held-out split, and how good each is."""

    images: Tensor  # (N, C, H, W) uint8
    ssim: Tensor  # (N,)
    metrics: dict[str, float]


def run(project: Project, *, evaluate: Evaluate, tracking: Tracking) -> dict[str, float]:
    """Writes reports/metrics.json, provenance.json, index.html and its figures; adds them to the training's run.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: a part is missing or damaged, parts do not belong together, or a set is too small.
    """
    store, device = open_store(project.dataset), pick_device("auto")
    model, info = bundle.load_for(store, project.model, device)
    for picture in (label_accuracy.PICTURE, NEAREST, DECODED):  # an earlier model's: this one may have none
        (project.figures / picture).unlink(missing_ok=True)
    shutil.rmtree(project.images, ignore_errors=True)
    if not isinstance(model, GenerativeModel):
        return judge_masks(project, store, model, info, evaluate, tracking)
    subject = load(project, store, model, info, evaluate)
    reconstructions = judge_reconstructions(subject)
    metrics = dict(reconstructions.metrics)
    samples, decoded = draw_samples(subject)
    train, test = pixels(store.split("train")), pixels(subject.held_out)
    pca = judge_pca(subject, train, test)
    metrics["reconstruction/pca_ssim"] = next(iter(pca.values()))
    views = Views(*(view(subject, images) for images in (samples, train, test)))
    metrics |= judge_samples(subject, samples, test, views)
    metrics |= judge_data(subject, samples, train, test, views)
    metrics |= judge_through_networks(subject, samples, train, test)
    refined = refine_reconstructions(subject)
    metrics |= judge_refiner(subject, views, reconstructions, refined, decoded) | judge_classes(subject, views)
    copies, pairs = judge_privacy(subject, views, samples, train, test)
    metrics |= copies
    swapped = swap_labels(subject)
    metrics |= judge_labels(subject, samples, swapped)
    counts = subject.store.counts
    metrics |= {"run/num_train": counts["train"], "run/num_test": counts["test"]}
    metrics["run/num_generated"] = evaluate.num_generated
    metrics = rounded(project, metrics)
    write_json(project, "metrics.json", metrics)
    kept = save_evaluation(project.evaluation, evaluation_data(subject, reconstructions, views))
    write_json(project, "provenance.json", provenance(project, store, info, evaluate, device, subject.hashes, kept))
    draw(project, subject, reconstructions.images, refined)
    draw_nearest(project, samples, train, pairs)
    if swapped:
        label_accuracy.draw(project.figures, swapped, store.classes)
    if evaluate.save_images:
        write_images(project.images / "generated", samples)
        write_images(project.images / "real", test)
    rows = key_numbers(metrics, pca, subject.num_latent)
    lines = findings(metrics)
    if subject.conditional and subject.unrecognised:
        lines.append(unrecognised_finding(subject.unrecognised))
    if "inception" in evaluate.extractors and subject.inception is None:
        lines.append(NO_INCEPTION)
    pictures = REFINED_PICTURES if subject.refiner else PICTURES
    tables = refiner_tables(metrics, store.classes)
    write_page(project.reports / "index.html", facts(subject), rows, lines, pictures, tables=tables)
    record(project, info, evaluate, tracking, metrics)
    print_table(rows)
    return metrics


def judge_validation(project: Project, *, evaluate: Evaluate) -> dict[str, float]:
    """The metrics of the model, its prior and its refiner on the val split, what a search may look at.

    Writes figures/samples.png. Those that are the same for every model, PCA's mark and the floors, are left out.

    Raises:
        UserError: as `run`.
    """
    store = open_store(project.dataset)
    model, info = bundle.load_for(store, project.model, pick_device("auto"))
    return judge(project, store, model, info, evaluate, "val")[0]


def judge_version(project: Project, *, folder: Path, evaluate: Evaluate) -> dict[str, float]:
    """Judges another model, such as a registered version, on this project's test split with its extractor.

    Of a model that was trained on other data, `privacy/` is left out: its train images are not here.

    Args:
        project: whose data and extractor judge.
        folder: holds artifacts/ with model/, prior/ and refiner/; metrics.json, provenance.json and figures/samples.png
            go to its reports/.
        evaluate: how.

    Returns:
        The metrics, without those that are the same for every model.

    Raises:
        UserError: as `run`, or the model makes images of other classes or another shape than the data has.
    """
    own, store, device = Project(project.root, apart=folder), open_store(project.dataset), pick_device("auto")
    model, info = bundle.load(own.model, device)
    for what, theirs, ours in (
        ("images of shape", info.image_shape, store.image_shape),
        ("classes", info.classes, tuple(store.classes)),
        ("masks of so many classes", info.preprocess.mask_classes, store.preprocess.mask_classes),
    ):
        if theirs != ours:
            raise UserError(
                f"{own.model}: made for {what} {theirs}, and {project.dataset} has {ours}: they cannot be judged with "
                "each other; expected a project whose data it fits"
            )
    metrics, hashes, kept = judge(own, store, model, info, evaluate, "test")
    if info.dataset != store.fingerprint:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("privacy/")}
        warning = (
            f"warning: trained on dataset {info.dataset}, judged on {store.fingerprint}: whether it copies its train "
            "images is not told here, and images that it may have been trained on flatter it"
        )
        Console(stderr=True, highlight=False).print(warning, style="yellow", markup=False, soft_wrap=True)
    counts = store.counts
    if isinstance(model, GenerativeModel):  # of masks only those are counted that there are, and they are in already
        metrics |= {"run/num_train": counts["train"], "run/num_test": counts["test"]}
        metrics["run/num_generated"] = evaluate.num_generated
    metrics = rounded(own, metrics)
    write_json(own, "metrics.json", metrics)
    write_json(own, "provenance.json", provenance(own, store, info, evaluate, device, hashes, kept))
    return metrics


def judge(
    project: Project, store: Store, model: ImageModel, info: BundleInfo, params: Evaluate, split: str
) -> tuple[dict[str, float], dict[str, str], str]:
    """The metrics that differ between models, the SHA-256 of each extractor, and that of the per-image values.

    Writes figures/samples.png and artifacts/evaluation.
    """
    if not isinstance(model, GenerativeModel):
        found = segmentation.judge(store, model, next(model.parameters()).device, params.batch_size, split)
        segmentation.draw(project.figures, found, params.grid_images)
        return found.metrics, {}, save_evaluation(project.evaluation, mask_evaluation(store, found, split))
    subject = load(project, store, model, info, params, split)
    reconstructions = judge_reconstructions(subject)
    metrics = dict(reconstructions.metrics)
    samples, decoded = draw_samples(subject)
    write_grid(project.figures / "samples.png", generation.thin(samples, min(len(samples), params.grid_images)))
    train, held_out = pixels(store.split("train")), pixels(subject.held_out)
    views = Views(*(view(subject, images) for images in (samples, train, held_out)))
    metrics |= judge_samples(subject, samples, held_out, views)
    metrics |= judge_through_networks(subject, samples, train, held_out)
    if split == "test":  # a search has no use for them, and they take time
        metrics |= judge_refiner(subject, views, reconstructions, refine_reconstructions(subject), decoded)
        metrics |= judge_classes(subject, views)
    metrics |= judge_privacy(subject, views, samples, train, held_out)[0]
    kept = save_evaluation(project.evaluation, evaluation_data(subject, reconstructions, views))
    return metrics | judge_labels(subject, samples, swap_labels(subject)), subject.hashes, kept


def mask_evaluation(store: Store, found: segmentation.Found, split: str) -> EvaluationData:
    """What a later comparison with another model that finds masks needs of this evaluation."""
    held_out = store.split(split)
    keys, rows = held_out.patients, held_out.masked_rows.tolist()
    groups = group_numbers(None if keys is None else [keys[row] for row in rows], len(rows))
    return EvaluationData(EvaluationInfo(store.fingerprint, "", split, 0, 0, 0.0), found.dice, groups)


def judge_masks(
    project: Project, store: Store, model: ImageModel, info: BundleInfo, params: Evaluate, tracking: Tracking
) -> dict[str, float]:
    """As `run`, for a model that finds masks."""
    device = next(model.parameters()).device
    found = segmentation.judge(store, model, device, params.batch_size)
    metrics = rounded(project, found.metrics)
    write_json(project, "metrics.json", metrics)
    kept = save_evaluation(project.evaluation, mask_evaluation(store, found, "test"))
    write_json(project, "provenance.json", provenance(project, store, info, params, device, {}, kept))
    segmentation.draw(project.figures, found, params.grid_images)
    rows = [Row(*cells) for cells in segmentation.key_numbers(metrics)]
    write_page(
        project.reports / "index.html",
        described(store, info),
        rows,
        segmentation.findings(metrics),
        segmentation.PICTURES,
        NEXT_STEPS,
    )
    record(project, info, params, tracking, metrics)
    print_table(rows)
    return metrics


def load(
    project: Project, store: Store, model: GenerativeModel, info: BundleInfo, evaluate: Evaluate, split: str = "test"
) -> Subject:
    """Opens the other parts and refuses those that do not belong together."""
    device = next(model.parameters()).device
    weights = bundle.digest(project.model)
    prior = load_prior(project.prior, weights, device)
    refiner = load_refiner(project.refiner, weights, device)
    extractor, digest = load_extractor(project.features, store.fingerprint)
    for name in ("train", split):
        if store.counts[name] < MIN_IMAGES:
            raise UserError(
                f"{project.dataset}: {store.counts[name]} images in the {name} split, expected at least {MIN_IMAGES}; "
                f"change preprocess.{split}_fraction or bring more images"
            )
    if evaluate.num_generated < MIN_IMAGES:
        raise UserError(f"evaluate.num_generated: found {evaluate.num_generated}, expected at least {MIN_IMAGES}")
    return Subject(
        store=store,
        held_out=store.split(split),
        model=model,
        info=info,
        prior=prior,
        refiner=refiner,
        extractor=extractor.to(device),
        extractor_sha256=digest,
        unrecognised=unrecognised_classes(project.features),
        inception=find_inception(evaluate, device),
        local=find_local_network(evaluate, project.root, device),
        device=device,
        params=evaluate,
    )


def find_inception(params: Evaluate, device: torch.device) -> Inception | None:
    """The Inception network, where it is asked for; without its weights, a line that says how to get them."""
    if "inception" not in params.extractors:
        return None
    try:
        return load_inception(checked_weights("inception")).to(device)
    except UserError as error:
        warning = f"warning: no Inception Score and no FID: {error}"
        Console(stderr=True, highlight=False).print(warning, style="yellow", markup=False, soft_wrap=True)
        return None


def find_local_network(params: Evaluate, root: Path, device: torch.device) -> LocalNetwork | None:
    """The network that evaluate.local describes, where evaluate.extractors holds it."""
    if "local" not in params.extractors or params.local is None:
        return None
    return load_local_network(params.local, root).to(device)


@torch.no_grad()
def judge_reconstructions(subject: Subject) -> Reconstructions:
    """Reconstructions of the whole held-out split, compared with the originals."""
    originals, results, means, divergences, codes = [], [], [], [], []
    for batch in Loader(subject.held_out, subject.params.batch_size, subject.device).sequential():
        encoded = subject.model.encode(batch.image, batch.label)
        originals.append(batch.image.cpu())
        results.append(subject.model.decode(encoded.mean, batch.label).float().cpu())
        means.append(encoded.mean.cpu())
        if encoded.logvar is not None:
            divergences.append(latent.kl_nats(encoded.mean, encoded.logvar).cpu())
        if encoded.codes is not None:
            codes.append(encoded.codes.cpu())
    scores = reconstruction.compare(zip(originals, results, strict=True))
    metrics = {f"reconstruction/{name}": float(values.mean()) for name, values in scores.items()}
    interval = mean_interval(scores["ssim"], subject.held_out.patients)
    metrics |= {"reconstruction/ssim_ci_low": interval.low, "reconstruction/ssim_ci_high": interval.high}
    images = torch.cat([quantised(result) for result in results])
    metrics |= spectrum_metrics("reconstruction", radial_power(images), radial_power(torch.cat(originals)))
    if divergences:  # means are measured against N(0, I)
        metrics["latent/active_units"] = latent.active_units(torch.cat(means))
        metrics["latent/kl_nats"] = float(torch.cat(divergences).mean())
    if codes:
        used = latent.codebook_use(torch.cat(codes), subject.info.model.num_codes)
        metrics |= {f"latent/{name}": value for name, value in used.items()}
    return Reconstructions(images, scores["ssim"], metrics)


def spectrum_metrics(group: str, power: Tensor, real: Tensor) -> dict[str, float]:
    """Ratio of radial power (N, R) to that of real images (M, R) by band, and the distance of the whole spectra."""
    ratios = {f"{group}/spectrum_ratio_{band}": ratio for band, ratio in enumerate(band_ratios(power, real), start=1)}
    return {**ratios, f"{group}/spectrum_distance": spectrum_distance(power, real)}


def judge_pca(subject: Subject, train: Tensor, test: Tensor) -> dict[int, float]:
    """SSIM of PCA by number of components: first as many as the latent has numbers, then some round ones."""
    most = min(len(train) - 1, test[0].numel())
    return reconstruction.pca_ssim(train, test, [min(count, most) for count in (subject.num_latent, *PCA_COMPONENTS)])


@torch.no_grad()
def draw_samples(subject: Subject) -> Samples:
    """The samples that are measured.

    Raises:
        UserError: the model, its prior or its refiner gives values that are not finite.
    """
    params, decoded = subject.params, list[Tensor]()
    parts = iterate_samples(
        subject.prior,
        subject.model,
        params.num_generated,
        subject.asked_labels,
        params.seed,
        params.batch_size,
        DecodedToo(subject.refiner, decoded) if subject.refiner else None,
    )
    images = torch.cat([quantised(part) for part, _ in parts])
    return Samples(images, torch.cat(decoded) if decoded else None)


def quantised(images: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8, like every real image: a classifier would tell the two apart by that alone.

    Raises:
        UserError: a value is not finite.
    """
    if not bool(torch.isfinite(images).all()):
        raise UserError("the model's images hold values that are not finite; train the model again")
    return (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def judge_samples(subject: Subject, samples: Tensor, held_out: Tensor, views: Views) -> dict[str, float]:
    """Samples against held-out images, by every measure, with 95 % intervals by patient."""
    groups = subject.held_out.patients
    intervals = distances(views.samples, views.held_out, views.bandwidth, groups)
    intervals |= generation.manifold_intervals(views.held_out.content, views.samples.content, groups)
    if subject.held_out.name == "test":  # a search has no use for it, and it trains networks
        intervals |= realism(subject, samples, views.samples, held_out, views.held_out)
    return with_bounds(intervals) | spectrum_metrics("generation", views.samples.power, views.held_out.power)


def refine_reconstructions(subject: Subject) -> Reconstructions | None:
    """Reconstructions of the held-out split, refined without noise on their latents; None without a refiner."""
    if subject.refiner is None:
        return None
    generator = torch.Generator().manual_seed(seed_of(subject.params.seed, 4))
    originals, results = [], []
    for batch in Loader(subject.held_out, subject.params.batch_size, subject.device).sequential():
        with torch.no_grad():
            decoded = subject.model.reconstruct(batch.image, batch.label).float()
        levels = torch.zeros(len(decoded), device=decoded.device)
        originals.append(batch.image.cpu())
        results.append(subject.refiner.refine(decoded, levels, batch.label, generator).cpu())
    scores = reconstruction.compare(zip(originals, results, strict=True))
    metrics = {f"refined/{name}": float(scores[name].mean()) for name in ("ssim", "psnr")}
    return Reconstructions(torch.cat([quantised(result) for result in results]), scores["ssim"], metrics)


def judge_refiner(
    subject: Subject,
    views: Views,
    reconstructions: Reconstructions,
    refined: Reconstructions | None,
    decoded: Tensor | None,
) -> dict[str, float]:
    """Metrics that separate the faults of decoder, refiner and prior; empty without a refiner.

    `decoded/` is of the samples before they are refined, `refined/` of refined reconstructions, and the decoder's
    reconstructions get the distances that they lack.
    """
    if refined is None or decoded is None:
        return {}
    of_decoded, real = view(subject, decoded), views.held_out
    groups, bandwidth = subject.held_out.patients, views.bandwidth
    metrics = spectrum_metrics("decoded", of_decoded.power, real.power)
    metrics["decoded/mmd_domain"] = mmd(real.features, of_decoded.features, bandwidth, groups).interval.value
    metrics["decoded/fd_domain"] = generation.frechet_distance(real.features, of_decoded.features)
    of_refined = view(subject, refined.images)
    metrics |= refined.metrics | spectrum_metrics("refined", of_refined.power, real.power)
    sets = {"refined": of_refined, "reconstruction": view(subject, reconstructions.images)}
    for name, images in sets.items():
        metrics[f"{name}/mmd_domain"] = paired_mmd(real.features, images.features, bandwidth, groups)
        metrics[f"{name}/fd_domain"] = generation.frechet_distance(real.features, images.features)
    if len(group_rows(len(real.power), groups)) >= MIN_GROUPS:
        # an image and its reconstruction are in the same fold: both sets have the same patients in the same order
        auc = linear_auc(log_power(real.power), log_power(of_refined.power), groups, groups)
        metrics["refined/c2st_auc_spectrum"] = auc.value
        metrics["refined/c2st_auc_domain"] = linear_auc(real.features, of_refined.features, groups, groups).value
    return metrics


def judge_classes(subject: Subject, views: Views) -> dict[str, float]:
    """Spectrum and MMD of each class's refined samples against its held-out images; nothing without a refiner.

    Classes with fewer than 20 held-out images are left out. Keys name a class by its index, as trackers refuse some
    characters that a class's name may hold.
    """
    asked, labels = subject.asked_labels, torch.from_numpy(subject.held_out.labels.copy())
    if subject.refiner is None or asked is None:
        return {}
    metrics: dict[str, float] = {}
    for label in range(len(subject.store.classes)):
        rows, own = (labels == label).nonzero()[:, 0], (asked == label).nonzero()[:, 0]
        groups = keys_of(subject.held_out.patients, rows)
        if len(rows) < MIN_CLASS_IMAGES or min(len(own), len(group_rows(len(rows), groups))) < MIN_IMAGES:
            continue
        name = f"class_{label}"
        metrics |= spectrum_metrics(f"generation/{name}", views.samples.power[own], views.held_out.power[rows])
        distance = mmd(views.held_out.features[rows], views.samples.features[own], views.bandwidth, groups)
        metrics |= with_bounds({f"{name}/mmd_domain": distance.interval})
    return metrics


def keys_of(groups: Groups, rows: Tensor) -> Groups:
    """The keys of some rows; None where the images have none."""
    return None if groups is None else [groups[row] for row in rows.tolist()]


def judge_data(subject: Subject, samples: Tensor, train: Tensor, test: Tensor, views: Views) -> dict[str, float]:
    """The same measures of as many train images as there are samples, or all; and how diverse samples and tests are."""
    seed = seed_of(subject.params.seed)
    rows, groups = train_reference(subject)
    real = ImageSet(views.train.features[rows], views.train.power[rows])
    floors = distances(real, views.held_out, views.bandwidth, subject.held_out.patients, groups)
    floors |= realism(subject, train[rows], real, test, views.held_out, groups)
    metrics = {f"generation/{name}_floor": interval.value for name, interval in floors.items()}
    spectrum = spectrum_metrics("generation", real.power, views.held_out.power)
    metrics["generation/spectrum_distance_floor"] = spectrum["generation/spectrum_distance"]
    if subject.refiner:
        metrics |= {f"{key}_floor": value for key, value in spectrum.items()}
    metrics["generation/ms_ssim_diversity"] = generation.ms_ssim_diversity(samples, seed=seed)
    metrics["generation/ms_ssim_diversity_real"] = generation.ms_ssim_diversity(test, seed=seed)
    shares = generation.manifold(views.held_out.content, real.content)._asdict()
    return metrics | {f"generation/{name}_real": value for name, value in shares.items()}


def distances(
    images: ImageSet, held_out: ImageSet, bandwidth: float, groups: Groups, own_groups: Groups = None
) -> dict[str, Interval]:
    """Distances of a set from the held-out images through the domain extractor."""
    return {
        "kid_domain": kid(held_out.features, images.features, groups, own_groups),
        "mmd_domain": mmd(held_out.features, images.features, bandwidth, groups, own_groups).interval,
        "fd_domain": generation.frechet_interval(held_out.features, images.features, groups, own_groups),
    }


def realism(
    subject: Subject,
    images: Tensor,
    view: ImageSet,
    held_out: Tensor,
    held_out_view: ImageSet,
    own_groups: Groups = None,
) -> dict[str, Interval]:
    """How well classifiers tell a set from the held-out images, by what they look at; nothing where those are few."""
    groups = subject.held_out.patients
    if min(len(group_rows(len(images), own_groups)), len(group_rows(len(held_out), groups))) < MIN_GROUPS:
        return {}
    seed = seed_of(subject.params.seed, 3) % 2**31
    found = {
        "spectrum": linear_auc(log_power(held_out_view.power), log_power(view.power), groups, own_groups),
        "domain": linear_auc(held_out_view.features, view.features, groups, own_groups),
        "pixels": network_auc(held_out, images, groups, own_groups, seed, subject.device),
    }
    highest = max(found.values(), key=lambda interval: interval.value)
    return {"c2st_auc": highest} | {f"c2st_auc_{name}": interval for name, interval in found.items()}


def with_bounds(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Metrics NAME, NAME_ci_low and NAME_ci_high of each interval."""
    ends = {"": "value", "_ci_low": "low", "_ci_high": "high"}
    return {
        f"generation/{name}{suffix}": getattr(interval, end)
        for name, interval in intervals.items()
        for suffix, end in ends.items()
    }


def evaluation_data(subject: Subject, reconstructions: Reconstructions, views: Views) -> EvaluationData:
    """What a later comparison with another model needs of this evaluation."""
    info = EvaluationInfo(
        dataset=subject.store.fingerprint,
        extractor=subject.extractor_sha256,
        split=subject.held_out.name,
        seed=subject.params.seed,
        num_generated=subject.params.num_generated,
        bandwidth=views.bandwidth,
    )
    groups = group_numbers(subject.held_out.patients, len(reconstructions.ssim))
    return EvaluationData(info, reconstructions.ssim, groups, views.samples, views.held_out)


def judge_privacy(
    subject: Subject, views: Views, samples: Tensor, train: Tensor, held_out: Tensor
) -> tuple[dict[str, float], privacy.Pairs]:
    """The `privacy/` metrics of samples (N, C, H, W) with held-out images as the reference, and the closest pairs."""
    names, of_train = subject.held_out.patients, views.train.content  # what is shown; a blurred copy is one too
    by_features = privacy.find_copies(
        privacy.nearest_by_features(views.samples.content, of_train),
        privacy.nearest_by_features(views.held_out.content, of_train),
        names,
    )
    by_pixels = privacy.find_copies(
        privacy.nearest_by_pixels(samples, train), privacy.nearest_by_pixels(held_out, train), names
    )
    metrics = {f"privacy/{name}": value for name, value in privacy.metrics(by_features, by_pixels).items()}
    return metrics, privacy.closest_pairs(by_features, by_pixels, NUM_NEAREST)


def judge_through_networks(subject: Subject, samples: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Distances, with floors, through the networks that were trained on other images, and Inception's score."""
    metrics: dict[str, float] = {}
    rows, train_groups = train_reference(subject)
    sets = (samples, train[rows], held_out)
    if subject.inception:
        outputs = [subject.inception(images) for images in sets]
        metrics |= network_distances(subject, "inception", [output.features for output in outputs], train_groups)
        seed = seed_of(subject.params.seed)
        metrics["generation/inception_score"] = inception_score(outputs[0].logits, seed)
        metrics["generation/inception_score_real"] = inception_score(outputs[2].logits, seed)
    if subject.local:
        metrics |= network_distances(subject, "local", [subject.local(images) for images in sets], train_groups)
    return metrics


def network_distances(
    subject: Subject, name: str, features: Sequence[Tensor], train_groups: Groups
) -> dict[str, float]:
    """KID, MMD and Fréchet distance from the held-out images: of the samples, and of the train images as floors.

    The Fréchet distance has no interval: it would take the eigenvalues of 2,048 features a hundred times.

    Args:
        subject: whose held-out split gives the patients.
        name: of the network, in the metrics' keys.
        features: (N, D) of samples, train and held-out images.
        train_groups: the train images' patients.
    """
    samples, train, held_out = features
    groups = subject.held_out.patients
    bandwidth = median_distance(train)
    intervals = {
        f"kid_{name}": kid(held_out, samples, groups),
        f"mmd_{name}": mmd(held_out, samples, bandwidth, groups).interval,
    }
    plain = {
        f"fd_{name}": generation.frechet_distance(held_out, samples),
        f"fd_{name}_floor": generation.frechet_distance(held_out, train),
        f"kid_{name}_floor": kid(held_out, train, groups, train_groups).value,
        f"mmd_{name}_floor": mmd(held_out, train, bandwidth, groups, train_groups).interval.value,
    }
    return with_bounds(intervals) | {f"generation/{key}": value for key, value in plain.items()}


def train_reference(subject: Subject) -> tuple[Tensor, Groups]:
    """Rows of as many train images as there are samples, or of all, and their patients."""
    split = subject.store.split("train")
    rows = generation.thin(torch.arange(len(split.images)), min(len(split.images), subject.params.num_generated))
    return rows, keys_of(split.patients, rows)


def swap_labels(subject: Subject) -> label_accuracy.Swapped | None:
    """Test images decoded with a wrong label; None for a model without labels or data without classes."""
    if not subject.model.conditional or len(subject.prior.frequencies) == 0:
        return None
    known, seed = subject.prior.frequencies > 0, seed_of(subject.params.seed, 2)
    return label_accuracy.swap_labels(subject.model, subject.held_out, known, subject.params.batch_size, seed)


def judge_labels(subject: Subject, samples: Tensor, swapped: label_accuracy.Swapped | None) -> dict[str, float]:
    """Balanced accuracy of the domain classifier on samples, wrongly labelled and real images, with intervals.

    All are means over the same classes: those that the extractor recognises and that samples and real images have.
    With fewer than two of them there is no metric; wrongly labelled images need all of them too.
    """
    labels, groups = torch.from_numpy(subject.held_out.labels.copy()), subject.held_out.patients
    if subject.asked_labels is None:
        return {}
    sets: dict[str, tuple[Tensor, Tensor, Groups]] = {
        "": (samples, subject.asked_labels, None),
        "_real": (pixels(subject.held_out), labels, groups),
    }
    recognised = {i for i, name in enumerate(subject.store.classes) if name not in subject.unrecognised}
    classes = sorted(recognised.intersection(*(wanted.tolist() for _, wanted, _ in sets.values())))
    if len(classes) < 2:
        return {}
    if swapped and set(classes) <= set(swapped.given.tolist()):
        sets["_wrong"] = (swapped.decoded, swapped.given, keys_of(groups, swapped.rows))
    return with_bounds(
        {
            f"label_accuracy{of}": label_accuracy.balanced_accuracy(
                label_accuracy.answers(subject.extractor, images, wanted, subject.params.batch_size),
                wanted,
                classes,
                keys,
            )
            for of, (images, wanted, keys) in sets.items()
        }
    )


def view(subject: Subject, images: Tensor) -> ImageSet:
    """Images (N, C, H, W) uint8 as the measures see them."""
    return ImageSet(features(subject, images), radial_power(images))


@torch.no_grad()
def features(subject: Subject, images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 -> features (N, 128) on the CPU."""
    parts = torch.split(images, subject.params.batch_size)
    return torch.cat([subject.extractor(part.to(subject.device).float() / 255.0).cpu() for part in parts])


def pixels(split: Split) -> Tensor:
    """All images of a split, (N, C, H, W) uint8."""
    return torch.from_numpy(split.images.copy())


def proportional_labels(frequencies: Tensor, n: int) -> Tensor:
    """`n` sorted labels in the proportions of `frequencies` (K,), rounded by largest remainder."""
    exact = frequencies.double() / frequencies.sum() * n
    counts = exact.floor().long()
    left_over = (exact - counts).argsort(descending=True, stable=True)[: n - int(counts.sum())]
    counts[left_over] += 1
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def rounded(project: Project, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as they are written: sorted, of six digits, all finite."""
    if broken := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
        raise UserError(f"{project.model}: gives {', '.join(broken)} that are not finite; train the model again")
    return {name: float(f"{metrics[name]:.{SIGNIFICANT_DIGITS}g}") for name in sorted(metrics)}


def draw(project: Project, subject: Subject, reconstructions: Tensor, refined: Reconstructions | None) -> None:
    """Writes samples.png, as many of each class where there are classes, and reconstructions.png.

    With a refiner also samples_decoded.png, the same samples before they are refined. No stage of dvc.yaml declares
    it, for label_accuracy.draw's reason.
    """
    num_images, seed = subject.params.grid_images, seed_of(subject.params.seed, 1)
    labels = captions = columns = None
    if subject.conditional:
        known = subject.prior.frequencies.nonzero().flatten()
        labels = known.repeat_interleave(max(1, num_images // len(known)))
        captions = [subject.store.classes[label] for label in labels.tolist()]
        columns = len(labels) // len(known)
        while columns > MAX_COLUMNS:
            columns = (columns + 1) // 2
        num_images = len(labels)
    refiners = {"samples.png": subject.refiner} | ({DECODED: None} if subject.refiner else {})
    for name, refiner in refiners.items():
        images = sample_images(
            subject.prior, subject.model, num_images, labels, seed, subject.params.batch_size, refiner
        )
        write_grid(project.figures / name, images, columns, captions)
    lines = {"original": pixels(subject.held_out), "reconstruction": reconstructions}
    if refined:
        lines["refined"] = refined.images
    size = min(NUM_PAIRS, len(reconstructions))
    shown = {name: generation.thin(images, size) for name, images in lines.items()}
    write_stacks(project.figures / "reconstructions.png", shown)


def draw_nearest(project: Project, samples: Tensor, train: Tensor, pairs: privacy.Pairs) -> None:
    """Writes nearest_train.png: the samples closest to a train image over that image. Not to be published.

    No stage of dvc.yaml declares it, for label_accuracy.draw's reason: a model that finds masks has none.
    """
    measures = ["pixels" if by_pixels else "features" for by_pixels in pairs.by_pixels.tolist()]
    captions = [f"{near:.2f} of limit\nby {by}" for near, by in zip(pairs.nearness.tolist(), measures, strict=True)]
    lines = {"sample": samples[pairs.sample], "nearest train": train[pairs.train]}
    write_stacks(project.figures / NEAREST, lines, columns=NUM_NEAREST, captions=captions)


def facts(subject: Subject) -> dict[str, str]:
    """What was trained, for the page: nothing in it changes from one identical run to the next."""
    known = described(subject.store, subject.info) | {
        "latent": " x ".join(map(str, subject.model.latent_shape)),
        "prior": subject.prior.name,
        "extractor": "; ".join(f"{name}, {digest[:12]}" for name, digest in subject.hashes.items()),
    }
    if subject.refiner:
        known |= {f"refiner.{name}": str(value) for name, value in subject.refiner.params}
    return known


def described(store: Store, info: BundleInfo) -> dict[str, str]:
    """What is to be said of any model: data, run and settings."""
    counts = ", ".join(f"{count:,} {name}" for name, count in store.counts.items())
    sections = {"model": info.model, "preprocess": info.preprocess}
    settings = {f"{section}.{name}": str(value) for section, values in sections.items() for name, value in values}
    return {
        "images": f"{counts}; {' x '.join(map(str, store.image_shape))}",
        "classes": ", ".join(store.classes) or "none",
        "dataset": store.fingerprint,
        "run": info.run,
        **settings,
    }


def provenance(
    project: Project,
    store: Store,
    info: BundleInfo,
    params: Evaluate,
    device: torch.device,
    hashes: Mapping[str, str],
    evaluation: str,
) -> dict[str, object]:
    """Where the numbers come from; unlike metrics.json it differs from machine to machine.

    `content` is the SHA-256 of all that was judged, `metrics` that of metrics.json, which must be there; `hashes` are
    those of the extractors it was judged through, `evaluation` that of the per-image values.
    """
    return {
        "model": bundle.digest(project.model),
        "content": content_hash(project.model, project.prior, project.refiner),
        "metrics": hash_file(project.reports / "metrics.json"),
        "run": info.run,
        "dataset": store.fingerprint,
        "extractors": {name: {"sha256": digest} for name, digest in hashes.items()},
        "evaluate": params.model_dump(mode="json"),
        "evaluation": evaluation,
        "lineage": lineage(project, params, device=str(device), precision="fp32"),
    }


def write_json(project: Project, name: str, content: Mapping[str, object]) -> None:
    """Writes a file of reports/ with sorted keys; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    write_atomic(project.reports / name, f"{text}\n".encode())


def record(project: Project, info: BundleInfo, params: Evaluate, tracking: Tracking, metrics: dict[str, float]) -> None:
    """Adds parameters, metrics, figures and reports to the record of the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"evaluate": params})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for name in ("samples.png", DECODED, "reconstructions.png", label_accuracy.PICTURE, NEAREST):
            if (project.figures / name).exists():
                tracker.artifact(project.figures / name, "figures")
        for name in ("metrics.json", "provenance.json", "index.html"):
            tracker.artifact(project.reports / name, "reports")
