"""Evaluate a model on the test split: its reconstructions and the samples of its prior, or its masks.

medgen evaluate
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from medgen.config import Evaluate, Project, Tracking
from medgen.console import warn
from medgen.data.images import StoredImages, split_images
from medgen.data.store import Store, open_store
from medgen.errors import UserError
from medgen.evaluation import figures
from medgen.evaluation.anomaly import evaluate_anomalies, score_anomalies
from medgen.evaluation.conditions import (
    Agreement,
    condition_findings,
    condition_metrics,
    condition_rows,
    condition_table,
    evaluate_conditions,
)
from medgen.evaluation.context import EvaluationContext, FeatureSets, describe_images, load_context
from medgen.evaluation.data import EvaluationData, EvaluationInfo, save_evaluation
from medgen.evaluation.description import class_table, describe, describe_context, describe_model
from medgen.evaluation.fairness import (
    collect_measures,
    compare_groups,
    fairness_findings,
    fairness_metrics,
    fairness_tables,
)
from medgen.evaluation.findings import (
    NO_INCEPTION,
    image_findings,
    image_verdict,
    mask_findings,
    mask_verdict,
    unrecognised_finding,
)
from medgen.evaluation.generation import (
    describe_sets,
    draw_samples,
    evaluate_classes,
    evaluate_networks,
    evaluate_reference,
    evaluate_samples,
    network_outputs,
)
from medgen.evaluation.label_accuracy import LabelSwap, evaluate_labels, swap_labels
from medgen.evaluation.privacy import (
    NearestTrain,
    attack_splits,
    evaluate_membership,
    evaluate_privacy,
    search_train,
)
from medgen.evaluation.reconstruction import (
    Reconstructions,
    RefinedReconstructions,
    evaluate_pca,
    evaluate_reconstructions,
    evaluate_refiner,
    refine_reconstructions,
)
from medgen.evaluation.results import record_results, write_results
from medgen.evaluation.segmentation import SegmentationResult, evaluate_masks, mask_data
from medgen.evaluation.training_sets import UtilityResult, utility_metrics, utility_tables, write_figures
from medgen.evaluation.utility import load_utility
from medgen.io import write_atomic
from medgen.metrics.comparison import ImageSet
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import group_indices, mean_interval
from medgen.metrics.membership import AttackedImages
from medgen.metrics.privacy import ClosestPairs
from medgen.models import GenerativeModel, ImageModel, bundle
from medgen.models.bundle import BundleInfo
from medgen.reports import evaluation as report
from medgen.reports.figures import write_grid, write_images
from medgen.reports.model_card import MODEL_CARD, render_card
from medgen.training.distributed import World, join, pick_device


@dataclass(frozen=True)
class Computed:
    """Values of images for the metrics, which all processes compute together and all get."""

    reconstructions: Reconstructions
    samples: Tensor  # (M, C, H, W) as stored; of volumes the middle planes
    features: FeatureSets
    networks: dict[str, list[Tensor]]
    refined: RefinedReconstructions | None
    unrefined: ImageSet | None  # the samples before refinement
    nearest: NearestTrain
    attacked: dict[str, AttackedImages]  # images of each split; empty in a search
    anomalies: Tensor | None  # (N, 3) scores of the held-out images; None without a normal class, and in a search


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a generative model on a held-out split."""

    metrics: dict[str, float]  # those that differ between models of the same data
    computed: Computed
    pairs: ClosestPairs
    swap: LabelSwap | None
    label_accuracy: dict[int, float]  # of the samples, by class
    agreements: list[Agreement]  # with conditions; empty in a search


def run(project: Project, *, evaluate: Evaluate, tracking: Tracking) -> dict[str, float] | None:
    """Write reports/ (summary.json, metrics.json, provenance.json, index.html, MODEL_CARD.md, figures/), and record it.

    Processes that torchrun starts share the computation; the main one writes.

    Returns:
        The content of metrics.json; None in a process that is not the main one.

    Raises:
        UserError: a part is missing or damaged, parts do not belong together, or a set is too small.
    """
    store = open_store(project.dataset)
    with join("auto") as world:
        model, info = bundle.load_for(store, project.model, world.device)
        if isinstance(model, GenerativeModel):
            context = load_context(project, store, model, info, evaluate, world)
            utility = load_utility(project, store.fingerprint)
            computed = compute(context)
        else:
            masks = evaluate_masks(store, model, evaluate.batch_size, world)
    if not world.is_main:
        return None
    with FileLock(project.evaluation.with_name("evaluation.lock")):  # of several evaluations one at a time writes
        shutil.rmtree(project.figures, ignore_errors=True)  # of an earlier model; this one may have fewer
        if isinstance(model, GenerativeModel):
            metrics, page = _report_images(project, context, computed, utility)
        else:
            metrics, page = _report_masks(project, store, info, evaluate, masks)
        report.write_page(project.reports / "index.html", page)
        write_atomic(project.reports / MODEL_CARD, render_card(page.card, metrics))
        record_results(project, info, evaluate, tracking, metrics)
    report.print_table(page.rows)
    return metrics


def evaluate_validation(project: Project, *, evaluate: Evaluate) -> dict[str, float]:
    """Metrics of the model, its prior and its refiner on the val split, for a search.

    Writes figures/samples.png and artifacts/evaluation. Metrics that are the same for every model, of PCA and of train
    images, are left out.

    Raises:
        UserError: as in `run`.
    """
    store = open_store(project.dataset)
    model, info = bundle.load_for(store, project.model, pick_device("auto"))
    metrics, data, _ = _evaluate_split(project, store, model, info, evaluate, "val")
    save_evaluation(project.evaluation, data)
    return metrics


def evaluate_version(project: Project, *, folder: Path, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate another model, such as a registered version, on this project's test split with its extractor.

    `privacy/` is left out for a model that was trained on other data, whose train images are not available.

    Args:
        project: has the data and the extractor.
        folder: has artifacts/ with model/, prior/ and refiner/; metrics.json, provenance.json and figures/samples.png
            are written to its reports/.
        evaluate: the settings.

    Returns:
        The metrics, without those that are the same for every model.

    Raises:
        UserError: as in `run`, or the model's classes or image shape differ from the data's.
    """
    version, store = Project(project.root, apart=folder), open_store(project.dataset)
    model, info = bundle.load(version.model, pick_device("auto"))
    for name, expected, found in (
        ("image shape", info.image_shape, store.image_shape),
        ("classes", info.classes, tuple(store.classes)),
        ("conditions", info.space, store.conditions),
        ("number of mask classes", info.preprocess.mask_classes, store.preprocess.mask_classes),
    ):
        if expected != found:
            raise UserError(
                f"{project.dataset}: {name} {found}, but {version.model} was made for {expected}; evaluate it in a "
                "project with matching data"
            )
    metrics, data, hashes = _evaluate_split(version, store, model, info, evaluate, "test")
    if info.dataset != store.fingerprint:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("privacy/")}
        warn(
            f"trained on dataset {info.dataset}, evaluated on {store.fingerprint}: copies of its train images cannot "
            "be searched for, and metrics are too good if it was trained on images of this test split"
        )
    if isinstance(model, GenerativeModel):
        metrics |= _counts(store, evaluate)
    return write_results(version, store, info, evaluate, metrics, data, hashes)


@torch.no_grad()
def compute(context: EvaluationContext) -> Computed:
    """Reconstruct, sample, extract features and search for copies; the processes share the work."""
    reconstructions = evaluate_reconstructions(context)
    samples, decoded = draw_samples(context)
    features = describe_sets(context, samples)
    refined = unrefined = None
    if decoded is not None and context.held_out.name == "test":  # slow, and a search does not use them
        refined, unrefined = refine_reconstructions(context), describe_images(context, decoded)
    networks = network_outputs(context, samples)
    nearest = search_train(context, features, samples)
    attacked, anomalies = {}, None
    if context.held_out.name == "test":
        attacked, anomalies = attack_splits(context, samples), score_anomalies(context)
    return Computed(reconstructions, samples, features, networks, refined, unrefined, nearest, attacked, anomalies)


def evaluate_model(context: EvaluationContext, computed: Computed) -> Evaluation:
    """Metrics of a generative model on the context's held-out split."""
    samples, features = computed.samples, computed.features
    metrics = computed.reconstructions.metrics | evaluate_samples(context, samples, features)
    metrics |= evaluate_networks(context, computed.networks)
    if computed.refined and computed.unrefined:
        metrics |= evaluate_refiner(context, features, computed.refined, computed.unrefined)
        metrics |= evaluate_classes(context, features)
    privacy, pairs = evaluate_privacy(context, computed.nearest)
    privacy |= evaluate_membership(computed.attacked)
    metrics |= evaluate_anomalies(context, computed.anomalies)
    swap = swap_labels(context)
    labels = evaluate_labels(context, samples, swap)
    agreements = evaluate_conditions(context, samples) if context.held_out.name == "test" else []  # trains networks
    metrics |= privacy | labels.metrics | condition_metrics(agreements)
    return Evaluation(metrics, computed, pairs, swap, labels.by_class, agreements)


def image_data(context: EvaluationContext, ssim: Tensor, features: FeatureSets) -> EvaluationData:
    """The values for a later comparison with another model; `ssim` (N,) is of the reconstructions."""
    info = EvaluationInfo(
        dataset=context.store.fingerprint,
        extractor=context.extractor_sha256,
        split=context.held_out.name,
        seed=context.params.seed,
        num_generated=context.params.num_generated,
        bandwidth=features.bandwidth,
    )
    groups = group_indices(len(ssim), context.patients)
    return EvaluationData(info, ssim, groups, features.samples, features.held_out)


def _report_images(
    project: Project, context: EvaluationContext, computed: Computed, utility: Sequence[UtilityResult]
) -> tuple[dict[str, float], report.Page]:
    """Compute the metrics of a generative model and write its results and figures; the metrics and the report page."""
    store, info, params = context.store, context.info, context.params
    result, pca = evaluate_model(context, computed), evaluate_pca(context)
    metrics = result.metrics | {"reconstruction/pca_ssim": next(iter(pca.values()))} | _counts(store, params)
    metrics |= evaluate_reference(context, computed.samples, computed.features)
    metrics |= utility_metrics(store, utility)
    write_figures(project.figures, store, utility)
    ssim = computed.reconstructions.ssim
    data = image_data(context, ssim, computed.features)
    measures = collect_measures(context, ssim, utility)
    groups = compare_groups(context.held_out, measures)
    metrics |= fairness_metrics(groups)
    metrics = write_results(project, store, info, params, metrics, data, context.hashes)
    drawn = context.to_drawn(computed.samples)
    figures.write_samples(project.figures, context)
    figures.write_conditions(project.figures, context, drawn)
    figures.write_reconstructions(project.figures, context)
    figures.write_cases(project.figures, context, ssim)
    figures.write_latents(project.figures, context)
    train = StoredImages(store.split("train"))
    figures.write_closest_pairs(project.figures, drawn, train, result.pairs)
    if result.swap:
        figures.write_label_swaps(project.figures, result.swap, store.classes)
    if params.save_images:
        write_images(project.images / "generated", drawn)
        originals = split_images(StoredImages(context.held_out), params.batch_size)
        write_images(project.images / "real", (image for batch in originals for image in batch))
    findings = image_findings(metrics) + condition_findings(result.agreements) + fairness_findings(groups, measures)
    if context.conditional and context.unrecognised:
        findings.append(unrecognised_finding(context.unrecognised))
    if "inception" in params.extractors and context.inception is None:
        findings.append(NO_INCEPTION)
    tags = [context.prior.name, *(["refiner"] if context.refiner else [])]
    page = describe(project, store, info, image_verdict(metrics), findings, describe_context(project, context), tags)
    by_class = class_table(store, context.held_out, ssim, "SSIM of reconstructions", result.label_accuracy)
    return metrics, page._replace(
        figures=report.image_figures(context.refiner is not None),
        rows=report.image_rows(metrics, pca, context.num_latent) + condition_rows(result.agreements),
        tables=[
            *by_class,
            *condition_table(result.agreements),
            *report.refiner_tables(metrics, store.classes),
            *utility_tables(store, utility),
            *fairness_tables(groups, measures),
        ],
    )


def _report_masks(
    project: Project, store: Store, info: BundleInfo, params: Evaluate, result: SegmentationResult
) -> tuple[dict[str, float], report.Page]:
    """As `_report_images`, for a model that predicts masks."""
    data = mask_data(store, result, "test")
    metrics = write_results(project, store, info, params, result.metrics, data, {})
    figures.write_masks(project.figures, result, params.grid_images)
    verdict = mask_verdict(metrics, mean_interval(data.similarity, data.groups.tolist()))
    description, tags = describe_model(project, store, info), ["segmentation"]
    page = describe(project, store, info, verdict, mask_findings(metrics), description, tags, generative=False)
    rows = report.mask_rows(metrics)
    tables = class_table(store, store.split("test"), result.dice, "Dice of masks")
    return metrics, page._replace(figures=report.mask_figures(), rows=rows, tables=tables)


def _evaluate_split(
    project: Project, store: Store, model: ImageModel, info: BundleInfo, params: Evaluate, split: str
) -> tuple[dict[str, float], EvaluationData, dict[str, str]]:
    """Metrics that differ between models, the values for comparisons, and the SHA-256 of each extractor.

    Writes figures/samples.png.
    """
    world = World(0, 1, next(model.parameters()).device)
    if not isinstance(model, GenerativeModel):
        masks = evaluate_masks(store, model, params.batch_size, world, split)
        figures.write_masks(project.figures, masks, params.grid_images)
        return masks.metrics, mask_data(store, masks, split), {}
    context = load_context(project, store, model, info, params, world, split)
    computed = compute(context)
    result = evaluate_model(context, computed)
    shown = subsample(computed.samples, min(len(computed.samples), params.grid_images))
    write_grid(project.figures / "samples.png", context.to_drawn(shown))
    data = image_data(context, computed.reconstructions.ssim, computed.features)
    return result.metrics, data, context.hashes


def _counts(store: Store, params: Evaluate) -> dict[str, float]:
    """Numbers of images behind the metrics of a generative model."""
    return {
        "run/num_train": store.counts["train"],
        "run/num_test": store.counts["test"],
        "run/num_generated": params.num_generated,
    }
