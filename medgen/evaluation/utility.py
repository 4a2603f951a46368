"""Stage `utility`: train classifiers on real images, on samples and on both, and test them on the test split.

medgen utility --set utility.enabled=true

The classifier is the class network of the domain extractor, with the batch size, learning rate and augmentation of
section `features`. All trainings have the same number of steps, and their batches have equally many images of each
class, so that neither more images nor other class proportions mean more training. A batch of "both" is half real
images, half samples.

Shapes: N test images, A sets of training images, R repetitions, K classes.
Source: Ravuri and Vinyals, Classification accuracy score for conditional generative models, 2019.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
from medgen.evaluation.label_accuracy import balanced_accuracy, class_mean
from medgen.io import parsing, read_description, read_tensors, save_artifact, to_json, write_folder
from medgen.metrics.features import DomainExtractor, ExtractorSizes
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import Groups, Interval, group_rows, interval_metrics, select_groups
from medgen.priors import is_conditional, iterate_samples
from medgen.priors.generator import Generator, content_hash, load_generator
from medgen.reports.evaluation import UTILITY_TEXT, PageTable
from medgen.reports.figures import write_intervals
from medgen.training.distributed import pick_device
from medgen.training.extractor import augment, sampling_weights

COMMAND = "medgen utility"
SCHEMA = 1
REAL, BOTH, SYNTHETIC = "real", "both", "synthetic"


@dataclass(frozen=True)
class TrainingSet:
    """The images that classifiers are trained on."""

    kind: str  # REAL, BOTH or SYNTHETIC
    percent: float  # of the train images of each class that are among the real ones; 0 for SYNTHETIC
    num_real: float  # mean over the repetitions
    num_synthetic: int

    @property
    def key(self) -> str:
        """End of a metric's name: real, both_10."""
        return self.kind if self.percent in (0, 100) else f"{self.kind}_{self.percent:g}"


@dataclass(frozen=True)
class UtilityResult:
    """Answers of classifiers trained on different images to the same labelled test images."""

    classes: tuple[int, ...]  # that the train and the test split have
    sets: tuple[TrainingSet, ...]
    rows: Tensor  # (N,) of the test split
    correct: Tensor  # (A, R, N) booleans: the class is found

    def __getitem__(self, key: str) -> Tensor:
        """Answers (R, N) of the classifiers trained on the set with this key."""
        return self.correct[[each.key for each in self.sets].index(key)]

    def intervals(self, labels: Tensor, groups: Groups) -> dict[str, Interval]:
        """Balanced accuracy of each set, and its gain over the same real images, with 95 % intervals.

        They cover other test patients and other seeds of the trainings, not other trainings of the generative model.

        Args:
            labels: (N,) of the test images.
            groups: N patients.
        """
        found = {}
        for each in self.sets:
            found[f"accuracy_{each.key}"] = _mean_accuracy(self[each.key], labels, self.classes, groups)
        for each in self.sets:
            if each.kind != REAL:
                baseline = self[each.key.replace(each.kind, REAL)]
                found[f"gain_{each.key}"] = _mean_gain(self[each.key], baseline, labels, self.classes, groups)
        return found


def run(project: Project, *, features: Features, utility: Utility) -> dict[str, float] | None:
    """Write artifacts/utility, from which `medgen evaluate` makes the `utility/` metrics.

    Returns:
        The metrics; None if `utility.enabled` is false.

    Raises:
        UserError: a part is missing or damaged, the model takes no labels, or there are fewer than two classes.
    """
    if not utility.enabled:
        write_folder(project.utility, {"utility.json": to_json({"enabled": False})})
        return None
    store, device = open_store(project.dataset), pick_device("auto")
    generator = load_generator(project.model, project.prior, project.refiner, device)
    samples, sample_labels = draw_training_samples(store, generator, features, utility)
    result = compare_training_sets(store, samples, sample_labels, features, utility, device)
    description = {
        "schema": SCHEMA,
        "enabled": True,
        "content": content_hash(project.model, project.prior, project.refiner),
        "dataset": store.fingerprint,
        "classes": result.classes,
        "sets": [asdict(each) for each in result.sets],
        "features": features.model_dump(mode="json"),
        "utility": utility.model_dump(mode="json"),
    }
    save_artifact(project.utility, "utility", {"rows": result.rows, "correct": result.correct}, description)
    metrics = utility_metrics(store, result)
    say(
        "utility: balanced accuracy on the test split, trained on real images "
        f"{metrics['utility/accuracy_real']:.3f}, on samples {metrics['utility/accuracy_synthetic']:.3f}, on both "
        f"{metrics['utility/accuracy_both']:.3f}"
    )
    return metrics


def load_utility(project: Project, dataset: str) -> UtilityResult | None:
    """The answers that `run` has saved; None if the stage is disabled or has not run.

    `dataset` is the fingerprint of the store.

    Raises:
        UserError: the files are damaged, or belong to another model or dataset.
    """
    path = project.utility / "utility.json"
    if not path.exists():
        return None
    description = read_description(project.utility, "utility", COMMAND)
    with parsing(path, COMMAND):
        if not description["enabled"]:
            return None
        made_of = (description["schema"], description["content"], description["dataset"])
        expected = (SCHEMA, content_hash(project.model, project.prior, project.refiner), dataset)
        tensors = read_tensors(project.utility, "utility", COMMAND, description["sha256"])
        sets = TypeAdapter(tuple[TrainingSet, ...]).validate_python(description["sets"])
        result = UtilityResult(
            tuple(map(int, description["classes"])),
            sets,
            tensors["rows"],
            tensors["correct"],
        )
    if made_of != expected:
        raise UserError(f"{path}: made with another model, dataset or version of medgen; run `{COMMAND}` again")
    return result


def utility_metrics(store: Store, result: UtilityResult) -> dict[str, float]:
    """The `utility/` metrics."""
    return interval_metrics("utility", result.intervals(*_labels_and_patients(store, result)))


def utility_tables(store: Store, result: UtilityResult) -> list[PageTable]:
    """Tables of the accuracy by training set, and by class with all train images."""
    labels, groups = _labels_and_patients(store, result)
    found = result.intervals(labels, groups)
    rows: list[tuple[str, ...]] = []
    for each in result.sets:
        gain = found.get(f"gain_{each.key}")
        cells = (f"{each.num_real:,.0f}", f"{each.num_synthetic:,}", _show(found[f"accuracy_{each.key}"]))
        rows.append(
            (each.kind, *cells, "–" if gain is None else f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
        )
    head = ("trained on", "real images", "samples", "balanced accuracy", "gain")
    by_class: list[tuple[str, ...]] = []
    for label in result.classes:
        accuracies = (_show(_mean_accuracy(result[key], labels, (label,), groups)) for key in (REAL, BOTH, SYNTHETIC))
        by_class.append((store.classes[label], f"{int((labels == label).sum()):,}", *accuracies))
    head_by_class = ("class", "test images", "accuracy, real images", "both", "samples")
    text = "Accuracy of the classifiers trained on all train images, with samples, and on samples alone."
    return [
        PageTable("Use of samples for training", UTILITY_TEXT, head, rows),
        PageTable("Use of samples for training by class", text, head_by_class, by_class),
    ]


def write_figure(path: Path, store: Store, result: UtilityResult) -> None:
    """Plot the balanced accuracy of each training set over the number of its real images."""
    found = result.intervals(*_labels_and_patients(store, result))
    names = {REAL: "real images", BOTH: "real images and samples", SYNTHETIC: "samples alone"}
    numbers = [each.num_real for each in result.sets if each.kind == REAL]
    series = {}
    for kind, name in names.items():
        sets = [each for each in result.sets if each.kind == kind]
        points = {each.num_real: found[f"accuracy_{each.key}"] for each in sets}
        series[name] = dict.fromkeys(numbers, points[0]) if kind == SYNTHETIC else points  # a level line
    write_intervals(path, series, ("real train images", "balanced accuracy on the test split"))


def _labels_and_patients(store: Store, result: UtilityResult) -> tuple[Tensor, Groups]:
    """Labels (N,) and patients of the test images."""
    test = store.split("test")
    return labels_of(test)[result.rows], select_groups(test.patients, result.rows)


def _show(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def draw_training_samples(
    store: Store, generator: Generator, features: Features, utility: Utility
) -> tuple[Tensor, Tensor]:
    """Samples (M, C, H, W) as stored, as `medgen generate` makes them, refined, and their labels: all classes evenly.

    Raises:
        UserError: generation does not depend on the label.
    """
    known = generator.prior.frequencies.nonzero()[:, 0]
    if not is_conditional(generator.prior, generator.model) or len(known) < 2:
        raise UserError(
            "utility.enabled: true, but labels do not change what the model generates, so samples cannot train a "
            "classifier; expected two classes in the data and prior.conditional: true. Set utility.enabled to false"
        )
    labels = known[torch.arange(utility.num_generated) % len(known)].sort().values
    seed = seed_of(utility.seed, 1)  # other samples than those of `evaluate`
    drawn = iterate_samples(
        generator.prior, generator.model, len(labels), labels, seed, features.batch_size, generator.refiner
    )
    images = []
    with counting_bar() as progress:
        task = progress.add_task("samples", total=len(labels))
        for batch, _ in drawn:
            images.append(to_stored(middle_planes(batch), store.preprocess.bits))
            progress.advance(task, len(batch))
    return torch.cat(images), labels


def compare_training_sets(
    store: Store, samples: Tensor, sample_labels: Tensor, features: Features, utility: Utility, device: torch.device
) -> UtilityResult:
    """Train classifiers on each set of images and test them on the labelled test images.

    Repetition r has the same seed and the same real images in all sets that have as many, so that its draws cancel in
    differences.

    Raises:
        UserError: the train and test splits have fewer than two classes in common.
    """
    train, test = store.split("train"), store.split("test")
    train_labels, test_labels = labels_of(train), labels_of(test)
    classes = sorted(set(train_labels.tolist()) & set(test_labels.tolist()) & set(sample_labels.tolist()) - {-1})
    if len(classes) < 2:
        raise UserError(
            f"{store.folder}: train and test split have {len(classes)} classes in common; expected at least two. Set "
            "utility.enabled to false"
        )
    rows = torch.isin(test_labels, torch.tensor(classes)).nonzero()[:, 0]
    rows = subsample(rows, min(len(rows), MAX_HELD_OUT))
    fractions = (*sorted(utility.fractions), 1.0)
    num_trainings = utility.repetitions * (1 + 2 * len(fractions))
    found: dict[tuple[str, float], list[Tensor]] = {}
    num_real: dict[float, list[int]] = {}
    with counting_bar() as progress:
        task = progress.add_task("classifiers", total=num_trainings)
        for repetition in range(utility.repetitions):
            seed = seed_of(utility.seed, 2, repetition)
            synthetic = (samples, sample_labels)
            sets: dict[tuple[str, float], list[tuple[Images, Tensor]]] = {(SYNTHETIC, 0.0): [synthetic]}
            for fraction in fractions:
                chosen = choose_rows(train_labels, train.patients, fraction, seed)
                num_real.setdefault(fraction, []).append(len(chosen))
                real = (StoredPlanes(train, chosen), train_labels[chosen])
                sets |= {(REAL, fraction): [real], (BOTH, fraction): [real, synthetic]}
            for key, sources in sets.items():
                network = train_classifier(sources, store, features, utility.steps, seed, device)
                answers = predict(network, StoredPlanes(test, rows), features.batch_size)
                found.setdefault(key, []).append(answers == test_labels[rows])
                progress.advance(task)
    kinds = []
    for kind, fraction in found:
        mean = sum(num_real[fraction]) / utility.repetitions if fraction else 0.0
        kinds.append(TrainingSet(kind, round(100 * fraction, 4), mean, 0 if kind == REAL else len(samples)))
    answers = torch.stack([torch.stack(each) for each in found.values()])
    return UtilityResult(tuple(classes), tuple(kinds), rows, answers)


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


def _mean_accuracy(correct: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups) -> Interval:
    """Balanced accuracy, mean over trainings, from answers (R, N)."""
    of_images = balanced_accuracy(correct.double().mean(dim=0), labels, classes, groups)
    by_training = torch.tensor([class_mean(one.double(), labels, classes, groups)[0] for one in correct])
    return _with_trainings(of_images, by_training)


def _mean_gain(correct: Tensor, baseline: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups) -> Interval:
    """Difference of two balanced accuracies, mean over trainings with the same seeds, from answers (R, N)."""
    differences = correct.double() - baseline.double()
    value, variance = class_mean(differences.mean(dim=0), labels, classes, groups)
    by_training = torch.tensor([class_mean(one, labels, classes, groups)[0] for one in differences])
    return _with_trainings(Interval.from_error(value, variance**0.5), by_training)


def _with_trainings(of_images: Interval, by_training: Tensor) -> Interval:
    """Widen an interval over test images by the variance of the mean over trainings (R,)."""
    half = (of_images.high - of_images.low) / 2
    error = Interval.from_error(0.0, float((by_training.double().var() / len(by_training)).sqrt())).high
    half = math.hypot(half, error)
    return Interval(of_images.value, of_images.value - half, of_images.value + half)
