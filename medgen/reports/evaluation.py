"""The reports of an evaluation: a table in the terminal, and reports/index.html with the figures inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from rich.table import Table

from medgen.console import show
from medgen.io import write_atomic
from medgen.metrics import c2st
from medgen.metrics.privacy import CERTAIN_COPY
from medgen.metrics.spectrum import NUM_BANDS
from medgen.reports.html import data_uri, render
from medgen.reports.model_card import ModelCard

TRAINING_FIGURES = "training"  # folder in reports/ of what stage train draws
UNREFINED_SAMPLES, CLOSEST_PAIRS, LABEL_SWAPS = "samples_decoded.png", "nearest_train.png", "wrong_labels.png"
CASES, LATENTS, CONDITIONS = "cases.png", "latents.png", "conditions.png"
UTILITY, UTILITY_MASKS = "utility.png", "utility_masks.png"
HIGHLIGHTS = (  # key metrics at the top of the page
    "SSIM of reconstructions",
    "MMD of samples",
    "Realism (C2ST)",
    "Label accuracy of samples",
    "Copies of train images",
    "Dice of masks",
    "IoU of masks",
)


class FigureFile(NamedTuple):
    """A figure of the page, left out if its file does not exist."""

    name: str  # of the file in reports/figures/
    caption: str
    kind: Literal["generated", "real", "plot"] = "generated"  # real: shows images of the dataset
    folder: str = "figures"


_CLOSEST = (
    "The samples closest to a train image, over that image; below 1 of the limit a sample counts as a copy. This shows "
    "train images: do not publish it, nor this page"
)
_CASES = (
    "Test images, their reconstructions and the difference: the worst, median and best by SSIM. Blue: the "
    "reconstruction is darker; red: it is brighter, in full colour from a quarter of the grey range"
)
_LATENTS = (
    "Latents of test images in the plane of their first two principal axes, by class, over latents that the prior "
    "draws (grey crosses). Where one kind of points lies without the other, the prior does not fit"
)
_UTILITY = (
    "Balanced accuracy on the test split of classifiers trained on real images, on as many with samples, and on "
    "samples alone, with 95 % intervals"
)
_UTILITY_MASKS = (
    "Dice on the test split of U-Nets trained on real images with their masks, on as many with samples and the masks "
    "that these were requested with, and on samples alone, with 95 % intervals"
)
_CONDITIONS = (
    "Test images over samples that were requested with the same conditions, with the masks and paired images among them"
)
_CURVES = [
    FigureFile("loss.png", "Loss by epoch, linear and logarithmic", "plot", TRAINING_FIGURES),
    FigureFile("kl.png", "KL of the posterior by epoch, linear and logarithmic", "plot", TRAINING_FIGURES),
    FigureFile("ssim.png", "SSIM on the validation split by epoch", "plot", TRAINING_FIGURES),
    FigureFile("dice.png", "Dice on the validation split by epoch", "plot", TRAINING_FIGURES),
    FigureFile("codebook.png", "Codes used on the validation split by epoch", "plot", TRAINING_FIGURES),
]


def image_figures(has_refiner: bool) -> dict[str, list[FigureFile]]:
    """Figures of a generative model by section."""
    samples = [FigureFile("samples.png", "Samples of the prior" + ", decoded and refined" * has_refiner)]
    rows = "Test images over their reconstructions"
    if has_refiner:
        samples.append(FigureFile(UNREFINED_SAMPLES, "The same samples, decoded and not refined"))
        rows = "Test images over the decoder's reconstructions, over refined reconstructions"
    samples.append(FigureFile(CONDITIONS, _CONDITIONS, "real"))
    return {
        "Samples": samples,
        "Reconstructions": [FigureFile(CASES, _CASES, "real"), FigureFile("reconstructions.png", rows, "real")],
        "Latents": [
            FigureFile(LATENTS, _LATENTS, "plot"),
            FigureFile(LABEL_SWAPS, "Test images over their decoding with a wrong label", "real"),
        ],
        "Similarity to train images": [FigureFile(CLOSEST_PAIRS, _CLOSEST, "real")],
        "Use of samples for training": [
            FigureFile(UTILITY, _UTILITY, "plot"),
            FigureFile(UTILITY_MASKS, _UTILITY_MASKS, "plot"),
        ],
        "Training curves": [
            *_CURVES,
            FigureFile("progress.gif", "Samples by epoch", "generated", TRAINING_FIGURES),
        ],
    }


def mask_figures() -> dict[str, list[FigureFile]]:
    """Figures of a model that predicts masks by section."""
    cases = "The worst, middle and best test images by Dice. Blue: correct; red: missed; yellow: false positive"
    return {
        "Masks": [
            FigureFile("samples.png", cases, "real"),
            FigureFile("reconstructions.png", "Test images, their masks, and the predicted masks", "real"),
        ],
        "Training curves": [
            *_CURVES,
            FigureFile("progress.gif", "Predicted masks of validation images by epoch", "real", TRAINING_FIGURES),
        ],
    }


FIDELITY = (
    "Fidelity is the similarity of an image to its original (SSIM). Realism is the similarity of a set of images to "
    "real images (all other columns). A refiner raises realism and lowers SSIM: it adds plausible detail that is not "
    "the original's, which SSIM counts as error (the perception-distortion trade-off, Blau and Michaeli, 2018). Power "
    "is relative to that of real images, in bands from coarse (1) to fine (5): 1 is best, less is blurred. In the "
    "other columns 0 is best. Compare FD of reconstructions only with that of reconstructions, and FD of samples only "
    "with that of samples and train images: it depends on the size of the sets and on whether images are compared "
    "with their own originals. MMD depends on neither."
)
BY_CLASS = (
    "Refined samples of each class compared with its test images, for classes with at least 20 test images. MMD is "
    "squared, with its 95 % interval."
)


FAIRNESS_TEXT = (
    "Means over the test images of each group, with 95 % intervals by patient. The difference is that from the images "
    "of all other groups of the same kind; its interval holds for all rows together (Bonferroni). Groups of fewer than "
    "20 images or 10 patients are left out. Groups may differ in their classes, too."
)
CONDITIONS_TEXT = (
    "Networks trained on the train split predict the conditions of samples and of held-out images, with 95 % "
    "intervals. Samples were requested with the conditions of held-out images. Real images give the best value to "
    "expect, the baseline is a prediction that does not depend on the image."
)
_UTILITY_TEXT = (
    "{} on the test split of {} that were trained on real images, on samples, or on both, with the same number of "
    "steps. The gain is the difference from the same real images alone. The intervals cover other test patients and "
    "other seeds of the {}. The generative model has seen all train images: a row with a part of them shows what "
    "samples add where those images are not available."
)
UTILITY_TEXT = _UTILITY_TEXT.format("Balanced accuracy", "classifiers", "classifiers")
UTILITY_MASKS_TEXT = (
    _UTILITY_TEXT.format("Mean Dice", "U-Nets", "U-Nets")
    + " Samples were requested with the masks of train images, and have these masks in the training."
)


class Row(NamedTuple):
    """One line of the key metrics."""

    name: str
    value: str
    reference: str  # value of a baseline or of real images
    explanation: str = ""


class PageTable(NamedTuple):
    """A further table on the page."""

    title: str
    text: str  # paragraph that explains it
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Verdict(NamedTuple):
    """The main conclusion about a model."""

    tone: Literal["neutral", "warning", "bad"]
    text: str
    power: str  # differences that the test behind it would have found


class Page(NamedTuple):
    """The content of index.html."""

    verdict: Verdict
    findings: Sequence[str]
    card: ModelCard
    phases: PageTable  # of the training
    settings: Mapping[str, str]  # of model, training and data, by name
    figures: Mapping[str, Sequence[FigureFile]]  # by section
    rows: Sequence[Row]
    tables: Sequence[PageTable] = ()


def image_rows(metrics: Mapping[str, float], pca: Mapping[int, float], num_latent: int) -> list[Row]:
    """Key metrics of a generative model, from the content of metrics.json.

    `pca` is the SSIM by number of principal components, `num_latent` the number of latent dimensions or code indices.
    """
    ssim = _interval(metrics, "reconstruction/ssim")
    return [
        Row("SSIM of reconstructions", ssim, f"{num_latent:,} latent dimensions", "1 is perfect"),
        *(
            Row("  of PCA reconstructions", f"{score:.4g}", f"{count:,} components", "linear baseline")
            for count, score in sorted(pca.items())
        ),
        Row("PSNR of reconstructions", f"{metrics['reconstruction/psnr']:.4g} dB", "", "higher is better"),
        Row("L1 of reconstructions", f"{metrics['reconstruction/l1']:.4g}", "", "mean over pixels in [0, 1]"),
        *_spectrum_rows(metrics),
        *_classifier_rows(metrics),
        *_distance_rows(metrics),
        *_privacy_rows(metrics),
        *_network_rows(metrics, "inception", "Inception"),
        *_network_rows(metrics, "local", "local network"),
        *_label_rows(metrics),
        *_anomaly_rows(metrics),
        *_latent_rows(metrics),
    ]


def mask_rows(metrics: Mapping[str, float]) -> list[Row]:
    """Key metrics of a model that predicts masks, from the content of metrics.json."""
    values = {name.partition("/")[2]: f"{value:.4f}" for name, value in metrics.items()}
    reference = f"{values['dice_foreground_mean_mask']} most common train mask"
    explanation = "mean over images and classes except the background, 1 is perfect"
    rows = [
        Row("Dice of masks", values["dice_foreground"], reference, explanation),
        Row("IoU of masks", values["iou_foreground"], "", "intersection over union; penalises errors more than Dice"),
    ]
    classes = sorted(int(name[5:]) for name in values if name[5:].isdigit() and name.startswith("dice_"))
    rows += [Row(f"  Dice, IoU of class {k}", f"{values[f'dice_{k}']}, {values[f'iou_{k}']}", "") for k in classes]
    train = f"{metrics['run/num_train']:.0f} train images"
    return [*rows, Row("Test images with a mask", f"{metrics['run/num_test']:.0f}", train)]


def _interval(metrics: Mapping[str, float], key: str) -> str:
    """A value with its 95 % interval."""
    low, high = metrics[f"{key}_ci_low"], metrics[f"{key}_ci_high"]
    return f"{metrics[key]:.3g} ({low:.3g} to {high:.3g})"


def _spectrum_rows(metrics: Mapping[str, float]) -> list[Row]:
    rows = []
    for group, name in (("reconstruction", "reconstructions"), ("generation", "samples")):
        ratios = ", ".join(f"{metrics[f'{group}/spectrum_ratio_{band}']:.2f}" for band in range(1, NUM_BANDS + 1))
        explanation = "coarse to fine, relative to real images: below 1 is blurred, above is noise"
        rows.append(Row(f"Power by band, {name}", ratios, "1 each", explanation))
    reference = f"train {metrics['generation/spectrum_distance_floor']:.3g}"
    distance = f"{metrics['generation/spectrum_distance']:.3g}"
    return [
        *rows,
        Row("Spectrum distance of samples", distance, reference, "RMS log ratio over frequencies; 0 is best"),
    ]


def _classifier_rows(metrics: Mapping[str, float]) -> list[Row]:
    if "generation/c2st_auc" not in metrics:
        return []
    rows = []
    explanation = "AUC of a classifier of samples and test images: 0.5 is chance, 1 finds every sample"
    for suffix, name in (("", "Realism (C2ST)"), *((f"_{name}", f"  by {name}") for name in c2st.INPUTS)):
        key = f"generation/c2st_auc{suffix}"
        reference = f"train {metrics[f'{key}_floor']:.3g}"
        rows.append(Row(name, _interval(metrics, key), reference, "" if suffix else explanation))
    return rows


def _distance_rows(metrics: Mapping[str, float]) -> list[Row]:
    """Distances by domain features, precision, recall, density, coverage and diversity."""
    sizes = f"n = {metrics['run/num_test']:,.0f} test images, m = {metrics['run/num_generated']:,.0f} samples"
    names = {
        "mmd_domain": ("MMD of samples", "floor", f"squared, RBF kernel; lower is better; {sizes}"),
        "kid_domain": ("KID of samples", "floor", f"0 if samples and test images are alike; {sizes}"),
        "fd_domain": ("Fréchet distance of samples", "floor", f"lower is better, biased upward in small sets; {sizes}"),
        "precision": ("Precision", "real", "share of samples among real images"),
        "recall": ("Recall", "real", "share of real images among samples"),
        "density": ("Density", "real", "as precision, with less weight on outliers"),
        "coverage": ("Coverage", "real", "share of real images with a sample near"),
    }
    rows = []
    for name, (title, suffix, explanation) in names.items():
        key = f"generation/{name}"
        rows.append(Row(title, _interval(metrics, key), f"train {metrics[f'{key}_{suffix}']:.4g}", explanation))
    similarity, real = (metrics[f"generation/ms_ssim_diversity{suffix}"] for suffix in ("", "_real"))
    explanation = "mean MS-SSIM of random pairs; above the reference, samples are too similar"
    return [*rows, Row("Similarity of two samples", f"{similarity:.4g}", f"test {real:.4g}", explanation)]


def _network_rows(metrics: Mapping[str, float], key: str, name: str) -> list[Row]:
    """FID and KID by features of a network trained on other images, and the Inception Score; empty without them."""
    if f"generation/fd_{key}" not in metrics:
        return []
    values = {name.partition("/")[2]: f"{value:.4g}" for name, value in metrics.items()}
    sizes = f"{metrics['run/num_generated']:,.0f} samples against all {metrics['run/num_test']:,.0f} test images"
    fid, kid = (f"{values[f'{distance}_{key}_floor']} train images" for distance in ("fd", "kid"))
    rows = [
        Row(f"FID ({name})", values[f"fd_{key}"], fid, f"{sizes}; lower is better, biased upward in small sets"),
        Row(f"KID ({name})", values[f"kid_{key}"], kid, "the same sets, without that bias"),
    ]
    if key == "inception":
        reference = f"{values['inception_score_real']} of the test images"
        explanation = "variety of photograph classes among samples; of little meaning for medical images"
        rows.append(Row("Inception Score", values["inception_score"], reference, explanation))
    return rows


def _privacy_rows(metrics: Mapping[str, float]) -> list[Row]:
    values = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("privacy/")}
    parts = f"{values['copy_rate_features']:.1%} by features, {values['copy_rate_pixels']:.1%} by pixels"
    return [
        Row(
            "Copies of train images",
            f"{values['copy_rate']:.1%}",
            f"up to {values['copy_rate_plausible']:.1%} is chance",
            f"share of samples nearer to a train image than 99 % of test images are: {parts}",
        ),
        Row(
            "  nearest sample, of the limit",
            f"{values['nearest_over_limit']:.3g}",
            f"at least {CERTAIN_COPY:g}",
            "smallest distance to a train image, relative to the limit for copies; a copy for certain below a quarter",
        ),
        Row(
            "  distance to the nearest",
            f"{values['nearest_train_ratio']:.4g}",
            f"{values['nearest_train_ratio_pixels']:.4g} by pixels",
            "median, relative to that of test images; 0 for copies",
        ),
        *_partial_copy_rows(values),
        *_membership_rows(metrics),
    ]


def _partial_copy_rows(values: Mapping[str, float]) -> list[Row]:
    if "partial_copy_rate" not in values:
        return []
    chance = f"up to {values['partial_copy_rate_plausible']:.1%} is chance"
    explanation = (
        "share of samples with a quarter of the image nearer to a train image than that of 99 % of test images; "
        f"nearest {values['nearest_part_over_limit']:.3g} of the limit"
    )
    return [Row("  partial copies", f"{values['partial_copy_rate']:.1%}", chance, explanation)]


def _membership_rows(metrics: Mapping[str, float]) -> list[Row]:
    if "privacy/membership_auc_loss" not in metrics:
        return []
    explanation = "AUC of a guess whether an image was a train image; 1 finds every one"
    return [
        Row(name, _interval(metrics, f"privacy/membership_auc_{key}"), "0.5 is chance", explanation)
        for key, name in {"loss": "Membership, by loss", "distance": "Membership, by distance"}.items()
    ]


def _label_rows(metrics: Mapping[str, float]) -> list[Row]:
    def percentage(key: str) -> str:
        error = metrics[f"generation/{key}_ci_high"] - metrics[f"generation/{key}"]
        return f"{metrics[f'generation/{key}']:.1%} ± {100 * error:.1f}"

    rows = []
    names = {
        "label_accuracy": ("Label accuracy of samples", "the domain classifier finds the requested class"),
        "label_accuracy_wrong": ("  with a wrong label", "test images decoded with a wrong label, which is then found"),
    }
    for key, (name, explanation) in names.items():
        if f"generation/{key}" in metrics:
            reference = f"{percentage('label_accuracy_real')} of real test images"
            rows.append(Row(name, percentage(key), reference, f"mean over classes; {explanation}"))
    return rows


def _anomaly_rows(metrics: Mapping[str, float]) -> list[Row]:
    names = {
        "l1": ("Anomalies, by L1", "mean absolute error of the reconstruction"),
        "ssim": ("Anomalies, by SSIM", "1 - SSIM of the reconstruction"),
        "nll": ("Anomalies, by density", "negative log density of the latent under the prior"),
    }
    return [
        Row(name, _interval(metrics, key), "0.5 is chance", f"AUC of normal and other test images: {explanation}")
        for name, explanation, key in ((*value, f"anomaly/auc_{score}") for score, value in names.items())
        if key in metrics
    ]


def _latent_rows(metrics: Mapping[str, float]) -> list[Row]:
    names = {
        "kl_nats": ("KL of the posterior", "{:.4g} nats", "information in the latent about an image"),
        "codebook_usage": ("Codebook usage", "{:.1%}", "share of the codes that occur in the test split"),
        "codebook_perplexity": ("Codebook perplexity", "{:.4g}", "equivalent number of evenly used codes"),
        "active_units": ("Active latent dimensions", "{:.0f}", "vary with the image (variance above 0.01)"),
    }
    return [
        Row(title, form.format(metrics[f"latent/{name}"]), "", explanation)
        for name, (title, form, explanation) in names.items()
        if f"latent/{name}" in metrics
    ]


def refiner_tables(metrics: Mapping[str, float], classes: Sequence[str]) -> list[PageTable]:
    """Tables of fidelity and realism before and after the refiner, and of realism by class; none without a refiner."""
    if "refined/ssim" not in metrics:
        return []

    def cell(key: str) -> str:
        return f"{metrics[key]:.3g}" if key in metrics else "–"

    bands = [f"spectrum_ratio_{band}" for band in range(1, NUM_BANDS + 1)]
    keys = ["ssim", *bands, "spectrum_distance", "fd_domain", "mmd_domain"]
    names = {
        "reconstruction": "decoder's reconstructions",
        "refined": "refined reconstructions",
        "decoded": "samples without the refiner",
        "generation": "refined samples",
    }
    rows = [(name, *(cell(f"{group}/{key}") for key in keys)) for group, name in names.items()]
    rows.append(("train images", *(cell(f"generation/{key}_floor") for key in keys)))
    head = [f"power, band {band}" for band in range(1, NUM_BANDS + 1)]
    columns = ("images", "SSIM", *head, "spectrum distance", "FD", "MMD")
    tables = [PageTable("Fidelity and realism", FIDELITY, columns, rows)]
    measured = [k for k in range(len(classes)) if f"generation/class_{k}/mmd_domain" in metrics]
    if measured:
        rows = [
            (
                classes[k],
                *(cell(f"generation/class_{k}/{key}") for key in (*bands, "spectrum_distance")),
                _interval(metrics, f"generation/class_{k}/mmd_domain"),
            )
            for k in measured
        ]
        columns = ("class", *head, "spectrum distance", "MMD")
        tables.append(PageTable("Realism of refined samples by class", BY_CLASS, columns, rows))
    return tables


def print_table(rows: Sequence[Row]) -> None:
    """Print the key metrics."""
    table = Table(title="Evaluation on the test split", title_justify="left")
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("reference", overflow="fold")
    for row in rows:
        table.add_row(row.name, row.value, row.reference)
    show(table)


def write_page(path: Path, page: Page) -> None:
    """Write index.html with its figures inside; those that do not exist are left out."""
    sections = {
        title: [shown for each in figures if (shown := _load(path.parent, each))]
        for title, figures in page.figures.items()
    }
    values = page._asdict() | {"figures": {title: figures for title, figures in sections.items() if figures}}
    title = f"medgen: {page.card.name}"
    write_atomic(path, render("evaluation.html", title=title, highlights=HIGHLIGHTS, **values))


def _load(reports: Path, figure: FigureFile) -> dict[str, Any] | None:
    """The values of template `figure` for a file; None if it does not exist."""
    file = reports / figure.folder / figure.name
    if not file.is_file():
        return None
    with Image.open(file) as image:
        width, height = image.size
    source = data_uri(file.read_bytes(), file.suffix.removeprefix("."))
    return {"source": source, "caption": figure.caption, "kind": figure.kind, "width": width, "height": height}
