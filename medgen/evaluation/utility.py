"""Stage `utility`: train networks on real images, on samples and on both, and test them on the test split.

medgen utility --set utility.enabled=true

Where labels change the samples, the networks are classifiers: the class network of the domain extractor, with the
batch size, learning rate and augmentation of section `features`. Where masks do, they are the U-Nets that also measure
how samples agree with their masks. All trainings have the same number of steps, and the batches of classifiers have
equally many images of each class, so that neither more images nor other class proportions mean more training. A batch
of "both" is half real images, half samples.

Shapes: M samples, N test images, A sets of training images, R repetitions, K classes.
Source: Ravuri and Vinyals, Classification accuracy score for conditional generative models, 2019.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from medgen.config import Features, Project, Utility, seed_of
from medgen.console import counting_bar, say
from medgen.data.images import Images, StoredPlanes, middle_planes, split_images, to_floats, to_stored
from medgen.data.store import Store, open_store
from medgen.errors import UserError
from medgen.evaluation.context import MAX_HELD_OUT, labels_of
from medgen.evaluation.fitting import fit
from medgen.evaluation.segmenter import MaskedImages, StoredMasks, score_masks, train_segmenter
from medgen.evaluation.training_sets import (
    BOTH,
    CLASSIFICATION,
    REAL,
    SEGMENTATION,
    SYNTHETIC,
    TrainingSet,
    UtilityResult,
    UtilityTask,
    utility_metrics,
)
from medgen.io import parsing, read_description, read_tensors, save_artifact, to_json, write_folder
from medgen.metrics.features import DomainExtractor, ExtractorSizes
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import Groups, group_rows
from medgen.nn.conditions import StoredConditions
from medgen.priors import is_conditional, iterate_samples
from medgen.priors.generator import Generator, content_hash, load_generator
from medgen.training.distributed import pick_device
from medgen.training.extractor import augment, sampling_weights

COMMAND = "medgen utility"
SCHEMA = 1
# names in utility.json and utility.safetensors: sets of training images, rows of test images and their scores
KEYS = {CLASSIFICATION: ("sets", "rows", "correct"), SEGMENTATION: ("mask_sets", "mask_rows", "dice")}
Source = TypeVar("Source", bound=tuple[Images, object])  # images with their labels or masks


def run(project: Project, *, features: Features, utility: Utility) -> dict[str, float] | None:
    """Write artifacts/utility, from which `medgen evaluate` makes the `utility/` metrics.

    Returns:
        The metrics; None if `utility.enabled` is false.

    Raises:
        UserError: a part is missing or damaged, or samples can train neither classifiers nor U-Nets.
    """
    if not utility.enabled:
        write_folder(project.utility, {"utility.json": to_json({"enabled": False})})
        return None
    store, device = open_store(project.dataset), pick_device("auto")
    generator = load_generator(project.model, project.prior, project.refiner, device)
    missing = {
        CLASSIFICATION: missing_for_classifiers(store, generator, utility),
        SEGMENTATION: missing_for_segmenters(store, generator),
    }
    if all(missing.values()):
        raise UserError(
            f"utility.enabled: true, but samples can train no classifier, because {missing[CLASSIFICATION]}, and no "
            f"U-Net, because {missing[SEGMENTATION]}. Set utility.enabled to false"
        )
    for task, reason in missing.items():
        if reason:
            say(f"utility: no {task.network} is trained, because {reason}")
    results = []
    if not missing[CLASSIFICATION]:
        samples, labels = draw_labelled_samples(store, generator, features, utility)
        results.append(compare_classifiers(store, samples, labels, features, utility, device))
    if not missing[SEGMENTATION]:
        pairs = draw_masked_samples(store, generator, features, utility)
        results.append(compare_segmenters(store, pairs, features, utility, device))
    description: dict[str, object] = {
        "schema": SCHEMA,
        "enabled": True,
        "content": content_hash(project.model, project.prior, project.refiner),
        "dataset": store.fingerprint,
    }
    tensors: dict[str, Tensor] = {}
    for result in results:
        sets, rows, scores = KEYS[result.task]
        description |= {"classes": result.classes} if result.task is CLASSIFICATION else {}
        description[sets] = [asdict(each) for each in result.sets]
        tensors |= {rows: result.rows, scores: result.scores}
    description |= {"features": features.model_dump(mode="json"), "utility": utility.model_dump(mode="json")}
    save_artifact(project.utility, "utility", tensors, description)
    metrics = utility_metrics(store, results)
    for task in (result.task for result in results):
        real, synthetic, both = (metrics[f"utility/{task.measure.lower()}_{kind}"] for kind in (REAL, SYNTHETIC, BOTH))
        say(
            f"utility: {task.average} on the test split, trained on real images {real:.3f}, on samples "
            f"{synthetic:.3f}, on both {both:.3f}"
        )
    return metrics


def load_utility(project: Project, dataset: str) -> list[UtilityResult]:
    """The results that `run` has saved; none if the stage is disabled or has not run.

    `dataset` is the fingerprint of the store.

    Raises:
        UserError: the files are damaged, or belong to another model or dataset.
    """
    path = project.utility / "utility.json"
    if not path.exists():
        return []
    description = read_description(project.utility, "utility", COMMAND)
    with parsing(path, COMMAND):
        if not description["enabled"]:
            return []
        made_of = (description["schema"], description["content"], description["dataset"])
        expected = (SCHEMA, content_hash(project.model, project.prior, project.refiner), dataset)
        tensors = read_tensors(project.utility, "utility", COMMAND, description["sha256"])
        results = []
        for task, (sets, rows, scores) in KEYS.items():
            if sets in description:
                parsed = TypeAdapter(tuple[TrainingSet, ...]).validate_python(description[sets])
                classes = tuple(map(int, description["classes"])) if task is CLASSIFICATION else ()
                results.append(UtilityResult(task, parsed, tensors[rows], tensors[scores], classes))
    if made_of != expected:
        raise UserError(f"{path}: made with another model, dataset or version of medgen; run `{COMMAND}` again")
    return results


def missing_for_classifiers(store: Store, generator: Generator, utility: Utility) -> str | None:
    """The reason why samples cannot train a classifier; None if they can."""
    if not is_conditional(generator.prior, generator.model) or int((generator.prior.frequencies > 0).sum()) < 2:
        return (
            "labels do not change what the model generates (expected two classes in the data and "
            "prior.conditional: true)"
        )
    classes = shared_classes(store, sample_labels(generator, utility))
    if len(classes) < 2:
        return f"train and test split have {len(classes)} classes in common (expected at least two)"
    return None


def missing_for_segmenters(store: Store, generator: Generator) -> str | None:
    """The reason why samples cannot train a U-Net; None if they can."""
    space = generator.model.space or getattr(generator.prior, "space", None)
    if space is None or space.mask is None:
        return (
            "masks do not change what the model generates (expected masks in the data, one of preprocess.conditions "
            "of kind mask, and prior.conditional: true)"
        )
    if store.preprocess.has_volumes:
        return "the dataset has volumes (expected images)"
    counts = [len(store.split(name).masked_rows) for name in ("train", "test")]
    if not all(counts):
        return f"{counts[0]} train and {counts[1]} test images have a mask (expected at least one of each)"
    return None


def sample_labels(generator: Generator, utility: Utility) -> Tensor:
    """Labels (M,), sorted, of the samples that train classifiers: all classes of the train split evenly."""
    known = generator.prior.frequencies.nonzero()[:, 0]
    return known[torch.arange(utility.num_generated) % len(known)].sort().values


def shared_classes(store: Store, labels: Tensor) -> tuple[int, ...]:
    """Classes that the train split, the test split and samples with these labels (M,) have."""
    of_splits = (set(labels_of(store.split(name)).tolist()) for name in ("train", "test"))
    return tuple(sorted(set(labels.tolist()).intersection(*of_splits) - {-1}))


def draw_labelled_samples(
    store: Store, generator: Generator, features: Features, utility: Utility
) -> tuple[Tensor, Tensor]:
    """Samples (M, C, H, W) as stored, refined as `medgen generate` refines them, and their labels (M,)."""
    labels = sample_labels(generator, utility)
    return _draw_samples(store, generator, features, utility, 1, labels), labels


def draw_masked_samples(store: Store, generator: Generator, features: Features, utility: Utility) -> MaskedImages:
    """M samples as stored, refined as `medgen generate` refines them, with the masks that they were requested with.

    Each is requested with the conditions and the label of a train image that has a mask, all of which come evenly.
    """
    train = store.split("train")
    masked = torch.from_numpy(train.masked_rows)
    rows = masked[torch.arange(utility.num_generated) * len(masked) // utility.num_generated]
    labels = labels_of(train)[rows] if is_conditional(generator.prior, generator.model) else None
    conditions = StoredConditions(train, rows)
    samples = _draw_samples(store, generator, features, utility, 3, labels, conditions)
    return MaskedImages(samples, StoredMasks(train, rows))


def _draw_samples(
    store: Store,
    generator: Generator,
    features: Features,
    utility: Utility,
    part: int,
    labels: Tensor | None,
    conditions: StoredConditions | None = None,
) -> Tensor:
    """Samples (M, C, H, W) as stored, with labels (M,) and conditions of M images; each `part` has its own draws."""
    count, seed = utility.num_generated, seed_of(utility.seed, part)  # not the samples of `evaluate`
    drawn = iterate_samples(
        generator.prior,
        generator.model,
        count,
        labels,
        seed,
        features.batch_size,
        generator.refiner,
        conditions=conditions,
    )
    images = []
    with counting_bar() as progress:
        task = progress.add_task("samples", total=count)
        for batch, _ in drawn:
            images.append(to_stored(middle_planes(batch), store.preprocess.bits))
            progress.advance(task, len(batch))
    return torch.cat(images)


def compare_classifiers(
    store: Store, samples: Tensor, labels: Tensor, features: Features, utility: Utility, device: torch.device
) -> UtilityResult:
    """Train classifiers on each set of images, and test them on the labelled test images.

    Args:
        samples: (M, C, H, W) as stored.
        labels: (M,) of the samples.
    """
    train, test = store.split("train"), store.split("test")
    train_labels, test_labels = labels_of(train), labels_of(test)
    classes = shared_classes(store, labels)
    rows = torch.isin(test_labels, torch.tensor(classes)).nonzero()[:, 0]
    rows = subsample(rows, min(len(rows), MAX_HELD_OUT))

    def read(chosen: Tensor) -> tuple[Images, Tensor]:
        return StoredPlanes(train, chosen), train_labels[chosen]

    def test_images(sources: Sequence[tuple[Images, Tensor]], seed: int) -> Tensor:
        network = train_classifier(sources, store, features, utility.steps, seed, device)
        return predict(network, StoredPlanes(test, rows), features.batch_size) == test_labels[rows]

    labelled: tuple[Images, Tensor] = (samples, labels)
    sets, correct = _compare_training_sets(
        CLASSIFICATION, utility, train_labels, train.patients, read, labelled, test_images
    )
    return UtilityResult(CLASSIFICATION, sets, rows, correct, classes)


def compare_segmenters(
    store: Store, samples: MaskedImages, features: Features, utility: Utility, device: torch.device
) -> UtilityResult:
    """Train U-Nets on each set of images, and measure their Dice on the test images that have a mask."""
    train, test = store.split("train"), store.split("test")
    rows = torch.from_numpy(test.masked_rows)
    rows = subsample(rows, min(len(rows), MAX_HELD_OUT))
    held_out = MaskedImages.stored(test, rows)
    is_masked = torch.full((len(train),), -1).index_fill_(0, torch.from_numpy(train.masked_rows), 0)

    def test_images(sources: Sequence[MaskedImages], seed: int) -> Tensor:
        network = train_segmenter(sources, store, utility.steps, seed, device)
        return score_masks(network, held_out, features.batch_size)[:, 0].float()

    def read(chosen: Tensor) -> MaskedImages:
        return MaskedImages.stored(train, chosen)

    sets, dice = _compare_training_sets(SEGMENTATION, utility, is_masked, train.patients, read, samples, test_images)
    return UtilityResult(SEGMENTATION, sets, rows, dice)


def _compare_training_sets(
    task: UtilityTask,
    utility: Utility,
    labels: Tensor,
    patients: Groups,
    read: Callable[[Tensor], Source],
    samples: Source,
    test: Callable[[Sequence[Source], int], Tensor],
) -> tuple[tuple[TrainingSet, ...], Tensor]:
    """Train networks on each set of images: the sets, and scores (A, R, N) of the test images.

    Repetition r has the same seed and the same real images in all sets that have as many, so that its draws cancel in
    differences.

    Args:
        labels: class of each train image; -1 for those that are never chosen.
        patients: of the train images.
        read: returns the train images of some rows.
        samples: the samples with their labels or masks.
        test: trains a network on images with a seed, and returns scores (N,) of the test images.
    """
    fractions = (*sorted(utility.fractions), 1.0)
    found: dict[tuple[str, float], list[Tensor]] = {}
    num_real: dict[float, list[int]] = {}
    with counting_bar() as progress:
        bar = progress.add_task(f"{task.network}s", total=utility.repetitions * (1 + 2 * len(fractions)))
        for repetition in range(utility.repetitions):
            seed = seed_of(utility.seed, 2, repetition)
            sets: dict[tuple[str, float], list[Source]] = {(SYNTHETIC, 0.0): [samples]}
            for fraction in fractions:
                chosen = choose_rows(labels, patients, fraction, seed)
                num_real.setdefault(fraction, []).append(len(chosen))
                real = read(chosen)
                sets |= {(REAL, fraction): [real], (BOTH, fraction): [real, samples]}
            for key, sources in sets.items():
                found.setdefault(key, []).append(test(sources, seed))
                progress.advance(bar)
    kinds = []
    for kind, fraction in found:
        mean = sum(num_real[fraction]) / utility.repetitions if fraction else 0.0
        num_synthetic = 0 if kind == REAL else len(samples[0])
        kinds.append(TrainingSet(kind, round(100 * fraction, 4), mean, num_synthetic))
    return tuple(kinds), torch.stack([torch.stack(each) for each in found.values()])


def choose_rows(labels: Tensor, patients: Groups, fraction: float, seed: int) -> Tensor:
    """Rows of all labelled images of random patients, until each class has this share of its images (N,).

    The same seed gives nested sets: more of the images for a larger fraction.
    """
    generator = torch.Generator().manual_seed(seed)
    members = group_rows(len(labels), patients)
    order = [members[number] for number in torch.randperm(len(members), generator=generator).tolist()]
    counts, chosen = torch.zeros(int(labels.max()) + 1, dtype=torch.int64), []
    wanted = (fraction * torch.bincount(labels[labels >= 0], minlength=len(counts))).ceil()
    for rows in order:
        own = rows[labels[rows] >= 0]
        if bool((counts < wanted)[labels[own]].any()):
            chosen.append(own)
            counts += torch.bincount(labels[own], minlength=len(counts))
    return torch.cat(chosen).sort().values


def train_classifier(
    sources: Sequence[tuple[Images, Tensor]],
    store: Store,
    features: Features,
    steps: int,
    seed: int,
    device: torch.device,
) -> DomainExtractor:
    """A classifier trained on equal numbers of stored images (N, C, H, W) with labels (N,) from each source."""
    sizes = ExtractorSizes(store.plane_shape[0], min(store.plane_shape[1:]), features.width, len(store.classes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DomainExtractor(sizes).to(device)
    weights = [*network.content.parameters(), *network.class_head.parameters()]
    chances = [sampling_weights(labels) for _, labels in sources]
    sizes_of_parts = [len(part) for part in torch.arange(features.batch_size).tensor_split(len(sources))]

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, step))
        images, targets = [], []
        for (pixels, labels), chance, size in zip(sources, chances, sizes_of_parts, strict=True):
            if size:
                rows = torch.multinomial(chance, size, replacement=True, generator=generator)
                images.append(to_floats(pixels[rows]))
                targets.append(labels[rows])
        batch = augment(torch.cat(images), generator).to(device)
        return F.cross_entropy(network.logits(batch), torch.cat(targets).to(device))

    fit(weights, loss_of, steps, features.learning_rate)
    return network.eval()


@torch.no_grad()
def predict(network: DomainExtractor, images: Images, batch_size: int) -> Tensor:
    """Class (N,) that the network finds in each image (N, C, H, W) as stored."""
    device = network.mean.device
    parts = split_images(images, batch_size)
    return torch.cat([network.logits(to_floats(part.to(device))).argmax(dim=1).cpu() for part in parts])
