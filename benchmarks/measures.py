"""Values of each metric and results of each gate on faults of known kind, and how often the gates refuse a model.

python benchmarks/measures.py [--cache FOLDER] [--cases] [--power] [--chain]

Run it in a project's folder after `dvc repro`, with the data of `medgen data sample`. The project's own model is the
champion. Faults are applied to a second draw of its samples, so that "no change" shows the noise. The reference is
procedural images of unseen patients. Progress goes to stderr, Markdown tables to stdout.

Shapes: N images, M samples, C channels, H W height and width.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen import config
from medgen.data.images import StoredImages, to_stored
from medgen.data.store import Split, open_store
from medgen.datasets.sample import draw
from medgen.evaluation.context import FeatureSets, describe_images, load_context
from medgen.evaluation.data import EvaluationData
from medgen.evaluation.evaluate import image_data
from medgen.evaluation.generation import domain_distances, draw_samples, evaluate_samples
from medgen.evaluation.label_accuracy import evaluate_labels
from medgen.evaluation.privacy import evaluate_privacy, search_train
from medgen.evaluation.reconstruction import evaluate_reconstructions, reconstruct_rows
from medgen.ingest import preprocess
from medgen.metrics.comparison import ImageSet, compare
from medgen.metrics.degradations import DEGRADATIONS
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import group_rows, interval_metrics
from medgen.metrics.mmd import median_distance
from medgen.metrics.reconstruction import ssim as image_ssim
from medgen.models import GenerativeModel, bundle
from medgen.priors import ANALYTIC
from medgen.priors import Prior as AnyPrior
from medgen.registry.evaluations import compare_versions
from medgen.registry.gates import check_gates
from medgen.registry.promotion import select_references
from medgen.registry.versions import EVALUATED_ON, EVALUATED_WITH, Version
from medgen.training.distributed import World, pick_device
from medgen.training.latents import encode_dataset

NUM_UNSEEN, UNSEEN_SEED = 3300, 20240  # procedural images of unseen patients
NUM_REFERENCE = 1000  # of these, the reference of the first table
NUM_SAMPLES = 2000  # samples of an evaluated model
NUM_POOL = 3000  # samples of a case; each repetition chooses from them
NUM_COPIES = 15
PERMUTATIONS = 249  # with four tests 1.2 % reach Holm's first level, p < 0.0125, as with the gate's 999
STATISTICS = ("mmd", "spectrum", "c2st", "recall")
CHAIN = [1.0 + 0.1 * step for step in range(1, 16)]  # prior temperatures
COLUMNS = {
    "SSIM": "reconstruction/ssim",
    "power ratio, finest band": "generation/spectrum_ratio_5",
    "spectrum distance": "generation/spectrum_distance",
    "MMD": "generation/mmd_domain",
    "KID": "generation/kid_domain",
    "FD": "generation/fd_domain",
    "precision": "generation/precision",
    "recall": "generation/recall",
    "AUC, spectrum": "generation/c2st_auc_spectrum",
    "AUC, features": "generation/c2st_auc_domain",
    "AUC, pixels": "generation/c2st_auc_pixels",
    "label accuracy": "generation/label_accuracy",
    "copy rate": "privacy/copy_rate",
    "nearest / limit": "privacy/nearest_over_limit",
}

Change = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> changed ones


@dataclass(frozen=True)
class Altered:
    """A prior with its latents spread by a temperature around their mean, or without the last class."""

    prior: AnyPrior
    temperature: float = 1.0
    lost_class: bool = False

    @property
    def frequencies(self) -> Tensor:
        """Class frequencies of the prior."""
        return self.prior.frequencies

    @property
    def conditional(self) -> bool:
        """The prior draws latents by class."""
        return self.prior.conditional

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Latents (n, ...), changed."""
        if self.lost_class and labels is not None:
            labels = labels.clamp(max=len(self.frequencies) - 2)  # replaced by the class before it
        latents = self.prior.sample(n, labels, generator)
        mean = self.prior.axes.mean.view(1, *latents.shape[1:])
        return mean + self.temperature * (latents - mean)


class Reference:
    """The project's model, its data, and images of unseen patients."""

    def __init__(self, project: config.Project, cache: Path) -> None:
        self.project, self.params = project, config.load(project.root / "params.yaml")
        store = open_store(project.dataset)
        device = pick_device("auto")
        model, info = bundle.load_for(store, project.model, device)
        if not isinstance(model, GenerativeModel):
            raise SystemExit(f"{project.model}: finds masks; expected a model that draws images")
        self.context = load_context(project, store, model, info, self.params.evaluate, World(0, 1, device))
        self.unseen = unseen_split(cache, self.params)
        self.train, self.test = (StoredImages(split)[:] for split in (store.split("train"), self.context.held_out))
        self.train_view, self.test_view = self.view(self.train), self.view(self.test)
        self.unseen_images, self.patients = StoredImages(self.unseen)[:], list(self.unseen.patients or [])
        self.unseen_view = self.view(self.unseen_images)
        self.bandwidth = median_distance(self.train_view.features)

    def view(self, images: Tensor) -> ImageSet:
        """Images (N, C, H, W) uint8 as the measures see them."""
        return describe_images(self.context, images)

    def draw(
        self, seed: int, count: int, prior: AnyPrior | None = None, model: GenerativeModel | None = None
    ) -> Tensor:
        """Samples (count, C, H, W) uint8 of the project's model, or of another prior or other weights."""
        params = self.context.params.model_copy(update={"seed": seed, "num_generated": count})
        context = replace(self.context, params=params, prior=prior or self.context.prior)
        return draw_samples(replace(context, model=model or context.model)).images


def unseen_split(cache: Path, params: config.Params) -> Split:
    """Nine tenths of NUM_UNSEEN procedural images, preprocessed as the project's and cached in a folder."""
    project = config.Project(cache)
    if not (cache / "data").exists():
        draw(cache / "data", NUM_UNSEEN, seed=UNSEEN_SEED)
    sizes = params.preprocess.model_copy(update={"val_fraction": 0.05, "test_fraction": 0.9})
    with redirect_stdout(sys.stderr):
        preprocess.run(project, data=params.data.model_copy(update={"path": "data"}), preprocess=sizes)
    return open_store(project.dataset).split("test")


def changes() -> dict[str, Change]:
    """Image faults of the first table, by name."""

    def degraded(kind: str, amount: float) -> Change:
        def change(images: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return DEGRADATIONS[kind].apply(images, torch.full((len(images),), amount), generator).clamp(0.0, 1.0)

        return change

    faults = {f"blur {sigma:g} px": degraded("blur", sigma) for sigma in (0.3, 0.5, 1.0)}
    faults |= {f"noise {amount:g}": degraded("noise", amount) for amount in (0.02, 0.05)}
    return {**faults, "contrast × 0.9": lambda images: 0.5 + 0.9 * (images - 0.5), "smoothed ribs": smooth_lungs}


def smooth_lungs(images: Tensor) -> Tensor:
    """Apply a 5 x 5 median in the dark parts of the image's middle: the lungs with their ribs and vessels."""
    rows, columns = images.shape[-2:]
    smoothed = images.clone()
    inside = (..., slice(rows // 6, -(rows // 4)), slice(columns // 6, -(columns // 6)))
    median = torch.from_numpy(np.stack([[cv2.medianBlur(one.numpy(), 5) for one in image] for image in images]))
    dark = images < images.flatten(1).median(dim=1).values[:, None, None, None]
    smoothed[inside] = torch.where(dark, median, images)[inside]
    return smoothed


def copies() -> dict[str, Change]:
    """Kinds of copies of a train image, by name."""
    return {
        "exact": lambda images: images,
        "shifted 3 px": lambda images: images.roll((3, 3), (2, 3)),
        "mirrored": lambda images: images.flip(3),
        "tone changed, γ 0.7": lambda images: images**0.7,
    }


def on_pixels(change: Change, images: Tensor) -> Tensor:
    return to_stored(change(images.float() / 255.0), 8)


def altered_models(reference: Reference) -> dict[str, Callable[[int, int], Tensor]]:
    """Functions of seed and count that return samples (count, C, H, W) with another prior or other weights, by name."""
    context = reference.context
    priors: dict[str, AnyPrior] = {
        f"prior temperature {temperature:g}": Altered(context.prior, temperature) for temperature in (0.8, 1.1, 1.25)
    }
    store, parameters = context.store, reference.params.prior
    world, digest = World(0, 1, pick_device("auto")), bundle.digest(reference.project.model)
    run = reference.project.runs / bundle.load_info(reference.project.model).run
    latents, _ = encode_dataset(store, context.model, digest, run, world)
    priors["one Gaussian for the mixture"] = ANALYTIC["gaussian"].fit(
        latents.means, latents.labels, len(store.classes), parameters, latents.variance
    )
    priors[f"no {store.classes[-1]}"] = Altered(context.prior, lost_class=True)
    shaken = shaken_decoder(context.model)
    drawn = {
        name: lambda seed, count, prior=prior: reference.draw(seed, count, prior) for name, prior in priors.items()
    }
    return drawn | {"decoder weights ± 5 %": lambda seed, count: reference.draw(seed, count, model=shaken)}


def shaken_decoder(model: GenerativeModel) -> GenerativeModel:
    """A copy whose decoder's weights are multiplied by 1 + 0.05 z, z standard normal."""
    shaken, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weights in shaken.named_parameters():
            if "decod" in name:
                weights.mul_(1.0 + 0.05 * torch.randn(weights.shape, generator=generator).to(weights.device))
    return shaken


class Promotions:
    """Evaluations on the project's own test images as `medgen evaluate` makes them, and `medgen promote`'s gates."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.reconstructions = reference, evaluate_reconstructions(reference.context)
        self.kept: dict[int, EvaluationData] = {}

    def version(self, samples: Tensor, metrics: dict[str, float], ssim: Tensor | None = None) -> Version:
        """A version with its evaluation, in memory."""
        context, number = self.reference.context, len(self.kept) + 1
        reference = self.reference
        features = FeatureSets(reference.view(samples), reference.train_view, reference.test_view, reference.bandwidth)
        similarity = self.reconstructions.ssim if ssim is None else ssim
        metrics = metrics | {
            "reconstruction/ssim": float(similarity.mean()),
            "run/num_generated": len(samples),
            **evaluate_privacy(context, search_train(context, features, samples))[0],
        }
        params = context.params.model_copy(update={"num_generated": len(samples)})
        self.kept[number] = image_data(replace(context, params=params), similarity, features)
        tags = {EVALUATED_ON: context.store.fingerprint, EVALUATED_WITH: context.extractor_sha256, "git.dirty": "false"}
        tags |= {"dataset.fingerprint": context.store.fingerprint}
        tags |= dict.fromkeys(("git.commit", "data.md5", "params.fingerprint"), "known")
        return Version("benchmark", number, "", tags | {key: repr(value) for key, value in metrics.items()})

    def refusals(self, candidate: Version, champions: list[Version]) -> list[str]:
        """Names of the gates that the candidate fails against these champions."""
        compared = [
            (version, compare_versions(self.kept[candidate.number], self.kept[version.number]))
            for version in select_references(candidate, champions)
        ]
        gates = check_gates(candidate, champions[-1], self.reference.params.registry.gates, compared)
        return list(dict.fromkeys(gate.name for gate in gates if not gate.passed))


def print_cases(reference: Reference) -> None:
    """Print metrics by case against NUM_REFERENCE unseen images; copies and gates use the project's test images."""
    context, promotions = reference.context, Promotions(reference)
    order = shuffled_patients(reference, torch.Generator().manual_seed(0))
    rows, others = order[:NUM_REFERENCE], order[NUM_REFERENCE:][:NUM_SAMPLES]
    held_out, images = take(reference.unseen_view, rows), reference.unseen_images[rows]
    patients = [reference.patients[row] for row in rows.tolist()]
    against = replace(context, held_out=ReferenceSplit(patients, images.numpy()))
    first, second = (reference.draw(seed, NUM_SAMPLES) for seed in (0, 1))
    batches = torch.split(torch.arange(len(reference.test)), context.params.batch_size)
    rebuilt = torch.cat([context.to_stored(reconstruct_rows(context, batch)[2]) for batch in batches])
    originals = reference.test.float() / 255.0

    def measured(samples: Tensor, ssim: Tensor | None = None) -> tuple[dict[str, float], Version]:
        features = FeatureSets(reference.view(samples), reference.train_view, held_out, reference.bandwidth)
        metrics = evaluate_samples(against, samples, features)
        if len(samples) == NUM_SAMPLES:
            params = context.params.model_copy(update={"num_generated": NUM_SAMPLES})
            metrics |= evaluate_labels(replace(context, params=params), samples, None)
        version = promotions.version(samples, metrics, ssim)
        return metrics | version.metrics, version

    champion = measured(first)
    print(f"| case | {' | '.join(COLUMNS)} | refused by |\n{'|---' * (len(COLUMNS) + 2)}|")

    def row(name: str, samples: Tensor, ssim: Tensor | None = None, without: tuple[str, ...] = ()) -> None:
        metrics, version = measured(samples, ssim)
        refused = ", ".join(promotions.refusals(version, [champion[1]])) or "–"
        cells = ["–" if key not in metrics or key in without else f"{metrics[key]:.3g}" for key in COLUMNS.values()]
        print(f"| {name} | {' | '.join(cells)} | {refused} |", flush=True)

    row("real images", reference.unseen_images[others], without=(COLUMNS["SSIM"], COLUMNS["label accuracy"]))
    row("no change", second)
    row("no change, another draw", reference.draw(2, NUM_SAMPLES))
    for name, change in changes().items():
        row(name, on_pixels(change, second), similarity(originals, on_pixels(change, rebuilt)))
    for name, drawn in altered_models(reference).items():
        shaken = similarity_of(reference, shaken_decoder(context.model)) if name.startswith("decoder") else None
        row(name, drawn(1, NUM_SAMPLES), shaken)
    rows_copied = subsample(torch.arange(len(reference.train)), NUM_COPIES)
    replaced = subsample(torch.arange(NUM_SAMPLES), NUM_COPIES)
    for name, change in copies().items():
        with_copies = second.clone()
        with_copies[replaced] = on_pixels(change, reference.train[rows_copied])
        row(f"{NUM_COPIES} copies, {name}", with_copies)
    halves, half = second.clone(), second.shape[3] // 2
    halves[replaced, ..., :half] = reference.train[rows_copied][..., :half]
    row(f"{NUM_COPIES} copies, left half only", halves)


@dataclass(frozen=True)
class ReferenceSplit:
    """The part of a split that the metrics of samples need."""

    patients: list[str]
    images: NDArray[np.uint8]
    name: str = "test"

    def __len__(self) -> int:
        return len(self.images)


def similarity(originals: Tensor, images: Tensor) -> Tensor:
    """SSIM (N,) of images (N, C, H, W) uint8 with the originals in [0, 1]."""
    return image_ssim(originals, images.float() / 255.0).double()


def similarity_of(reference: Reference, model: GenerativeModel) -> Tensor:
    return evaluate_reconstructions(replace(reference.context, model=model)).ssim


def print_power(reference: Reference, sizes: list[int], num_null: int, num_repetitions: int) -> None:
    """Print the share of repetitions in which each gate refuses, over test patients and samples."""
    seeds = (11, 12)
    first, second = (reference.draw(seed, NUM_POOL) for seed in seeds)
    pools = {"no change": second}
    pools |= {name: on_pixels(change, second) for name, change in changes().items() if name.startswith("blur")}
    pools |= {name: drawn(13, NUM_POOL) for name, drawn in altered_models(reference).items()}
    champion, views = reference.view(first), {name: reference.view(images) for name, images in pools.items()}
    columns = ("refused by any gate", *(f"by {name}" for name in STATISTICS))
    print(f"| test images (n) | case | repetitions | {' | '.join(columns)} |\n{'|---' * (len(columns) + 3)}|")
    for num_images in sizes:
        for name, view in views.items():
            is_null, refused, started = name == "no change", [], time.perf_counter()
            for repetition in range(num_null if is_null else num_repetitions):
                generator = torch.Generator().manual_seed(repetition)
                images = shuffled_patients(reference, generator)[:num_images]
                held_out, groups = take(reference.unseen_view, images), [reference.patients[i] for i in images.tolist()]
                rows = torch.randperm(NUM_POOL, generator=generator)[:NUM_SAMPLES]
                candidate, other = take(view, rows), take(champion, rows)
                if is_null:  # two draws of one model: exchange them at random
                    candidate, other = exchanged(candidate, other, generator)
                found = compare(
                    candidate, other, held_out, reference.bandwidth, groups, PERMUTATIONS, num_null + repetition
                )
                refused.append([one.p < reference.params.registry.gates.alpha for one in found])
            shares = np.array(refused).mean(0)
            cells = [f"{share:.3f}" for share in (np.array(refused).any(1).mean(), *shares)]
            print(f"| {num_images} | {name} | {len(refused)} | {' | '.join(cells)} |", flush=True)
            print(f"{num_images} {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def shuffled_patients(reference: Reference, generator: torch.Generator) -> Tensor:
    """Rows (N,) of the unseen images: patients in random order, the images of one patient together."""
    members = group_rows(len(reference.patients), reference.patients)
    return torch.cat([members[number] for number in torch.randperm(len(members), generator=generator).tolist()])


def take(images: ImageSet, rows: Tensor) -> ImageSet:
    return ImageSet(images.features[rows], images.power[rows])


def exchanged(first: ImageSet, second: ImageSet, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Both sets, with randomly chosen pairs swapped."""
    swap = torch.rand(len(first.features), 1, generator=generator) < 0.5
    pairs = [(first.features, second.features), (first.power, second.power)]
    swapped = [(torch.where(swap, b, a), torch.where(swap, a, b)) for a, b in pairs]
    features, power = swapped
    return ImageSet(features[0], power[0]), ImageSet(features[1], power[1])


def print_chain(reference: Reference) -> None:
    """Promote versions with rising prior temperatures in turn until one is refused."""
    promotions, prior = Promotions(reference), reference.context.prior
    champions: list[Version] = []
    for step, temperature in enumerate((1.0, *CHAIN)):
        samples = reference.draw(20 + step, NUM_SAMPLES, Altered(prior, temperature))
        groups = reference.context.held_out.patients
        found = domain_distances(reference.view(samples), reference.test_view, reference.bandwidth, groups)
        version = promotions.version(samples, interval_metrics("generation", found))
        if champions and (refused := promotions.refusals(version, champions)):
            print(
                f"\nChain: temperature {temperature:g}, step {step} of {len(CHAIN)}, refused by {', '.join(refused)}."
            )
            return
        champions.append(version)
    print(f"\nChain: all {len(CHAIN)} steps promoted.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/unseen"), help="folder of the unseen images")
    parser.add_argument("--null", type=int, default=200, help="--power: repetitions without a change")
    parser.add_argument("--repetitions", type=int, default=40, help="--power: repetitions of each other case")
    parser.add_argument("--images", type=int, nargs="+", default=[95, 342], help="--power: numbers of test images")
    for table in ("cases", "power", "chain"):
        parser.add_argument(f"--{table}", action="store_true", help="print this table; default: all three")
    arguments = parser.parse_args()
    everything = not (arguments.cases or arguments.power or arguments.chain)
    reference = Reference(config.Project(Path.cwd()), arguments.cache)
    if everything or arguments.chain:
        print_chain(reference)
    if everything or arguments.cases:
        print_cases(reference)
    if everything or arguments.power:
        print_power(reference, arguments.images, arguments.null, arguments.repetitions)


if __name__ == "__main__":
    main()
