"""What an evaluation leaves to read: a table in the terminal, and reports/index.html with the pictures in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medgen.io import write_atomic
from medgen.metrics.intervals import NORMAL_QUANTILE
from medgen.metrics.privacy import CERTAIN
from medgen.metrics.spectrum import NUM_BANDS
from medgen.reports.html import bullets, figure, page, table

PICTURES = {
    "samples.png": "New images, drawn through the prior",
    "reconstructions.png": "Test images over their reconstructions",
    "nearest_train.png": "The samples closest to a train image, over that image; below 1 of the limit counts as a "
    "copy. It shows train images: do not publish it, nor this page",
    "wrong_labels.png": "Test images over what the model makes of them with a wrong label",
    "progress.gif": "Samples from the first epoch to the last",
    "loss.png": "Loss by epoch, linear and logarithmic",
    "ssim.png": "SSIM of the validation split by epoch",
    "codebook.png": "Codes in use on the validation split by epoch",
}

DECODED = "samples_decoded.png"
REFINED_PICTURES = {  # of a model with a refiner
    "samples.png": "New images, drawn through the prior, decoded and refined",
    DECODED: "The same images, decoded and not refined",
    "reconstructions.png": "Test images over the decoder's reconstructions, over refined reconstructions",
    **{name: text for name, text in PICTURES.items() if name not in ("samples.png", "reconstructions.png")},
}
FIDELITY = (
    "Fidelity is how close an image is to one original (SSIM), realism how close a set of images is to real ones (all "
    "other columns). A refiner raises realism and lowers SSIM: it draws detail that fits the image and is not the "
    "original's, and SSIM counts such detail as error (the perception-distortion trade-off, Blau and Michaeli, 2018). "
    "Power is over that of real images in bands from coarse (1) to fine (5): 1 is best, below is blurred. Of the other "
    "columns 0 is best. Compare FD of "
    "reconstructions with reconstructions only, and of samples with samples and train images: sets of other sizes and "
    "images that are compared with their own originals give other values. MMD depends on neither."
)
BY_CLASS = (
    "Refined samples of a class against its test images, for classes with at least 20 of them. MMD is squared, with "
    "its 95 % interval."
)

NO_INCEPTION = (
    "Inception Score and FID were asked for (evaluate.extractors) and are absent: the machine did not have the "
    "weights of the Inception network. Run `medgen weights fetch inception`, and `medgen evaluate` again."
)

NEXT_STEPS = (  # HTML
    "<code>medgen ui</code> shows this run and the others, with curves and samples by epoch.",
    "<code>medgen compare</code> puts runs side by side.",
    "<code>reports/metrics.json</code> has every number, <code>reports/provenance.json</code> their origin.",
)
MORE_IMAGES = "<code>medgen generate --n 25 --out outputs/new</code> makes more images."

LOW_USAGE = 0.5  # of a codebook
BLURRED = 0.8  # share of real images' power in the finest band, below which a person sees blur
VIEWS = ("spectrum", "domain", "pixels")  # what classifiers look at
VISIBLE = 1.645 + 0.842  # standard errors that a one-sided test at 5 % finds 4 times out of 5
ADVICE_ON_COPIES = (
    "Look at the closest pairs below, and hand out neither samples nor model. Bring more images, train shorter, or "
    "take a smaller latent (model.latent_channels) or a simpler prior (prior.name)."
)
SMALL_SHARE = 0.5  # of the samples' excess MMD: reconstructions with no more of it have no large part in it
LEAST_LIMIT = 0.2  # of the copy limit, in held-out images' median distances; real chest films: 0.5


@dataclass(frozen=True)
class Row:
    """One line of the key numbers."""

    name: str
    value: str
    reference: str  # what the value is compared with
    reading: str


@dataclass(frozen=True)
class PageTable:
    """A table of its own on the page."""

    title: str
    text: str  # one paragraph that says how to read it
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def key_numbers(metrics: Mapping[str, float], pca: Mapping[int, float], num_latent: int) -> list[Row]:
    """The numbers a person looks at first, each with its reference.

    Args:
        metrics: the content of metrics.json.
        pca: SSIM by number of principal components.
        num_latent: how many numbers the latent has; of a model with a codebook, how many codes.
    """
    m = {name: f"{value:.4g}" for name, value in metrics.items()}
    ssim = _interval(metrics, "reconstruction/ssim")
    rows = [Row("SSIM of reconstructions", ssim, f"{num_latent:,} latent numbers", "1 is perfect")]
    for count, score in sorted(pca.items()):
        rows.append(Row("  of PCA reconstructions", f"{score:.4g}", f"{count:,} components", "linear reference"))
    rows += [
        Row("PSNR of reconstructions", f"{m['reconstruction/psnr']} dB", "", "higher is better"),
        Row("L1 of reconstructions", m["reconstruction/l1"], "", "mean over pixels in [0, 1], lower is better"),
        *_spectrum_numbers(metrics),
        *_realism_numbers(metrics),
    ]
    sizes = _sizes(metrics)
    names = {
        "mmd_domain": ("MMD of samples", f"squared, RBF kernel; lower is better; {sizes}"),
        "kid_domain": ("KID of samples", f"0 where samples and test images are alike; {sizes}"),
        "fd_domain": ("Fréchet distance of samples", f"lower is better, biased upward in small sets; {sizes}"),
    }
    for key, (name, reading) in names.items():
        reference = f"train {m[f'generation/{key}_floor']}"
        rows.append(Row(name, _interval(metrics, f"generation/{key}"), reference, reading))
    shares = {
        "precision": ("Precision", "share of samples among real images"),
        "recall": ("Recall", "share of real images among samples"),
        "density": ("Density", "as precision, outliers weigh less"),
        "coverage": ("Coverage", "share of real images with a sample near"),
    }
    for key, (name, reading) in shares.items():
        reference = f"train {m[f'generation/{key}_real']}"
        rows.append(Row(name, _interval(metrics, f"generation/{key}"), reference, reading))
    diversity = f"test {m['generation/ms_ssim_diversity_real']}"
    reading = "MS-SSIM of pairs; higher: too alike"
    rows.append(Row("Similarity of two samples", m["generation/ms_ssim_diversity"], diversity, reading))
    rows += _privacy_numbers(metrics)
    if "generation/fd_inception" in m:
        rows += _inception_numbers(metrics)
    if "generation/fd_local" in m:
        rows += _network_numbers(metrics, "local", "local network")
    if "latent/kl_nats" in m:
        rows.append(Row("KL of the posterior", f"{m['latent/kl_nats']} nats", "", "what an image tells the latent"))
    rows += _label_numbers(metrics)
    if "latent/codebook_usage" in m:
        usage, perplexity = f"{metrics['latent/codebook_usage']:.1%}", m["latent/codebook_perplexity"]
        rows.append(Row("Codebook usage", usage, "", "share of all codes that occur in the test split"))
        rows.append(Row("Codebook perplexity", perplexity, "", "as many codes, evenly used, would say as much"))
    if "latent/active_units" in m:
        active = f"{metrics['latent/active_units']:.0f}"
        rows.append(Row("Active latent numbers", active, "", "vary with the image (variance above 0.01)"))
    return rows


def _interval(metrics: Mapping[str, float], key: str) -> str:
    """A value with its 95 % interval."""
    low, high = metrics[f"{key}_ci_low"], metrics[f"{key}_ci_high"]
    return f"{metrics[key]:.3g} ({low:.3g} to {high:.3g})"


def _sizes(metrics: Mapping[str, float]) -> str:
    """Numbers of images that a comparison of sets rests on."""
    return f"n = {metrics['run/num_test']:,.0f} test images, m = {metrics['run/num_generated']:,.0f} samples"


def _spectrum_numbers(metrics: Mapping[str, float]) -> list[Row]:
    """Whether images hold as much detail as real ones, band by band."""
    rows = []
    for group, name in (("reconstruction", "reconstructions"), ("generation", "samples")):
        ratios = ", ".join(f"{metrics[f'{group}/spectrum_ratio_{band}']:.2f}" for band in range(1, NUM_BANDS + 1))
        reading = "coarse to fine, over real images' power: below 1 is blurred, above is noise"
        rows.append(Row(f"Power by band, {name}", ratios, "1 each", reading))
    floor = f"train {metrics['generation/spectrum_distance_floor']:.3g}"
    distance = f"{metrics['generation/spectrum_distance']:.3g}"
    rows.append(Row("Spectrum distance of samples", distance, floor, "RMS log ratio over frequencies; 0 is alike"))
    return rows


def _realism_numbers(metrics: Mapping[str, float]) -> list[Row]:
    """How well classifiers tell samples from real images."""
    if "generation/c2st_auc" not in metrics:
        return []
    rows = []
    reading = "AUC of a classifier, samples against test images: 0.5 is chance, 1 finds every sample"
    for suffix, name in (("", "Realism (C2ST)"), *((f"_{view}", f"  by {view}") for view in VIEWS)):
        key = f"generation/c2st_auc{suffix}"
        floor = f"train {metrics[f'{key}_floor']:.3g}"
        rows.append(Row(name, _interval(metrics, key), floor, reading if not suffix else ""))
    return rows


def _inception_numbers(metrics: Mapping[str, float]) -> list[Row]:
    """Inception Score, FID and KID, by which published systems are compared."""
    m = {name: f"{value:.4g}" for name, value in metrics.items()}
    return [
        *_network_numbers(metrics, "inception", "Inception"),
        Row(
            "Inception Score",
            m["generation/inception_score"],
            f"{m['generation/inception_score_real']} of the test images",
            "classes of photographs that samples spread over; says little of medical images",
        ),
    ]


def _network_numbers(metrics: Mapping[str, float], key: str, name: str) -> list[Row]:
    """Distances through a network trained on other images, with the numbers of images they depend on."""
    m = {name: f"{value:.4g}" for name, value in metrics.items()}
    sizes = f"{metrics['run/num_generated']:,.0f} samples against all {metrics['run/num_test']:,.0f} test images"
    fid, kid = (f"{m[f'generation/{distance}_{key}_floor']} train images" for distance in ("fd", "kid"))
    return [
        Row(f"FID ({name})", m[f"generation/fd_{key}"], fid, f"{sizes}; higher with fewer, lower is better"),
        Row(f"KID ({name})", m[f"generation/kid_{key}"], kid, "the same sets; not biased by their sizes"),
    ]


def _privacy_numbers(metrics: Mapping[str, float]) -> list[Row]:
    """How near samples come to train images."""
    m = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("privacy/")}
    chance = f"up to {m['copy_rate_plausible']:.1%} is chance"
    parts = f"{m['copy_rate_features']:.1%} by features, {m['copy_rate_pixels']:.1%} by pixels"
    reading = "share of samples nearer to a train image than 99 % of test images are"
    ratio = f"{m['nearest_train_ratio_pixels']:.4g} by pixels"
    return [
        Row("Copies of train images", f"{m['copy_rate']:.1%}", chance, f"{reading}: {parts}"),
        Row(
            "  nearest sample, of the limit",
            f"{m['nearest_over_limit']:.3g}",
            f"at least {CERTAIN:g}",
            "smallest distance to a train image; 1 is where copies are counted, less than a quarter is a copy for sure",
        ),
        Row("  distance to the nearest", f"{m['nearest_train_ratio']:.4g}", ratio, "over test images' own; copies: 0"),
    ]


def _label_numbers(metrics: Mapping[str, float]) -> list[Row]:
    """The classifier's accuracy on samples and on wrongly labelled images, each with that on real images."""
    rows = []
    names = {
        "label_accuracy": ("Label accuracy of samples", "the domain classifier finds the class asked for"),
        "label_accuracy_wrong": ("  with a wrong label", "test images decoded with a wrong label: that one is found"),
    }
    for key, (name, reading) in names.items():
        if f"generation/{key}" in metrics:
            value, real = _percentage(metrics, key), _percentage(metrics, "label_accuracy_real")
            rows.append(Row(name, value, f"{real} of real test images", f"mean over classes; {reading}"))
    return rows


def _percentage(metrics: Mapping[str, float], key: str) -> str:
    error = metrics[f"generation/{key}_ci_high"] - metrics[f"generation/{key}"]
    return f"{metrics[f'generation/{key}']:.1%} ± {100 * error:.1f}"


def findings(metrics: Mapping[str, float]) -> list[str]:
    """States what the numbers say, and what to try."""
    found = []
    ssim, reference = metrics["reconstruction/ssim"], metrics["reconstruction/pca_ssim"]
    if ssim < reference:
        found.append(
            f"Principal components of the train split rebuild better (SSIM {reference:.3f} against {ssim:.3f}): "
            "train longer, raise the learning rate, or spread the latent over a larger grid (model.latent_size)."
        )
    else:
        found.append(
            f"Reconstructions beat the train split's principal components (SSIM {ssim:.3f} over {reference:.3f})."
        )
    found += [_sharpness_finding(metrics), _realism_finding(metrics), _distance_finding(metrics)]
    found += _refiner_findings(metrics)
    if metrics["generation/ms_ssim_diversity"] > metrics["generation/ms_ssim_diversity_real"] + 0.05:
        found.append("Samples are more alike than real images are: look for a collapse in the grid below.")
    found += _privacy_findings(metrics)
    if metrics.get("latent/codebook_usage", 1.0) < LOW_USAGE:
        found.append(
            f"Only {metrics['latent/codebook_usage']:.0%} of the codes are used: take fewer (model.num_codes), or "
            "train them another way (model.codebook)."
        )
    return found + _label_findings(metrics)


def _sharpness_finding(metrics: Mapping[str, float]) -> str:
    """Whether the finest detail has the power that it has in real images."""
    refined = f"refined/spectrum_ratio_{NUM_BANDS}" in metrics
    group, name = ("refined", "refined reconstructions") if refined else ("reconstruction", "reconstructions")
    own, rebuilt = (metrics[f"{of}/spectrum_ratio_{NUM_BANDS}"] for of in ("generation", group))
    both = f"samples hold {own:.0%} of real images' power in the finest detail, {name} {rebuilt:.0%}"
    if own < BLURRED:
        cause = "the prior draws latents that decode to blurred images"
        if rebuilt < BLURRED:
            cause = "the refiner adds too little detail" if refined else "the decoder blurs"
        return f"Samples are blurred: {both}. As reconstructions show, {cause}."
    if own > 1.0 / BLURRED:
        return f"Samples are noisy: {both}."
    return f"Sharpness: {both}."


def _realism_finding(metrics: Mapping[str, float]) -> str:
    """Whether classifiers tell samples from real images, and by what."""
    if "generation/c2st_auc" not in metrics:
        return f"Too few images for a classifier test of realism ({_sizes(metrics)})."
    auc, low, floor = (metrics[f"generation/c2st_auc{end}"] for end in ("", "_ci_low", "_floor"))
    views = ", ".join(f"{metrics[f'generation/c2st_auc_{view}']:.2f} by {view}" for view in VIEWS)
    if low > max(0.5, floor):
        advice = (
            "Compare the images below: where reconstructions look as wrong as samples, train longer; where only "
            f"samples do, {_say_less(metrics)}."
        )
        return (
            f"Classifiers find samples among real images (AUC {views}; 0.5 is chance, train images {floor:.2f}). "
            f"{advice}"
        )
    error = (metrics["generation/c2st_auc_ci_high"] - low) / 2 / NORMAL_QUANTILE
    return (
        f"Too few images to tell whether samples differ from real ones ({_sizes(metrics)}): AUC {auc:.2f} ({views}; "
        f"train images {floor:.2f}). An AUC below {max(0.5, floor) + VISIBLE * error:.2f} would not be seen."
    )


def _distance_finding(metrics: Mapping[str, float]) -> str:
    """Whether samples are farther from test images than train images are."""
    value, low, high, floor = (metrics[f"generation/mmd_domain{end}"] for end in ("", "_ci_low", "_ci_high", "_floor"))
    if low > floor:
        return (
            f"By the domain extractor samples are farther from test images than train images are (squared MMD "
            f"{value:.3g}, {low:.3g} to {high:.3g}, against {floor:.3g})."
        )
    visible = floor + VISIBLE * (high - low) / 2 / NORMAL_QUANTILE
    return (
        f"Too few images to tell by the domain extractor whether samples are farther from test images than train "
        f"images are ({_sizes(metrics)}): squared MMD {value:.3g}, {low:.3g} to {high:.3g}; below {visible:.2g} a "
        "difference would not be seen."
    )


def _refiner_findings(metrics: Mapping[str, float]) -> list[str]:
    """Which part the gap between refined samples and real images is due to, where there are a refiner and a gap."""
    if "refined/mmd_domain" not in metrics:
        return []
    low, floor = metrics["generation/mmd_domain_ci_low"], metrics["generation/mmd_domain_floor"]
    if low <= floor:
        return []
    samples, rebuilt = metrics["generation/mmd_domain"] - floor, metrics["refined/mmd_domain"]
    both = f"squared MMD {rebuilt:.3g}; refined samples {samples:.3g} more than train images"
    if rebuilt <= SMALL_SHARE * samples:
        return [
            f"Refined reconstructions are close to real images ({both}): most of the gap is due to the prior. Train "
            "another prior (prior.name: flow) or train it longer, or raise refiner.sampling_noise."
        ]
    return [
        f"Refined reconstructions differ from real images, too ({both}): much of the gap is due to the decoder and the "
        "refiner. Train the refiner longer (refiner.epochs) or make it larger (refiner.channels)."
    ]


def _say_less(metrics: Mapping[str, float]) -> str:
    """What makes a latent easier to draw, of a model with a KL term or without."""
    weight = "raise the KL weight (beta.end in train.phases), " if "latent/kl_nats" in metrics else ""
    return f"{weight}take a smaller latent, or another prior (prior.name: flow)"


def _privacy_findings(metrics: Mapping[str, float]) -> list[str]:
    rate, limit = metrics["privacy/copy_rate"], metrics["privacy/held_out_limit"]
    chance, nearest = metrics["privacy/copy_rate_plausible"], metrics["privacy/nearest_over_limit"]
    found = []
    if limit < LEAST_LIMIT:
        found.append(
            "The search for copied train images is unreliable: some test images are nearly in the train split "
            "themselves. Fix the duplicates and leaks that `medgen data audit` lists, and start again."
        )
    if rate > chance:
        found.append(
            f"{rate:.1%} of the samples are nearer to a train image than test images are (up to {chance:.1%} is "
            f"chance): the model gives back patients' images. {ADVICE_ON_COPIES}"
        )
    if nearest < CERTAIN:
        found.append(
            f"At least one sample is a copy of a train image: its distance is {nearest:.3g} of the limit, and no real "
            f"image of another patient comes nearer than {CERTAIN:g}. {ADVICE_ON_COPIES}"
        )
    return found or [f"No sign of copied train images (copy rate {rate:.1%}, up to {chance:.1%} is chance)."]


def _label_findings(metrics: Mapping[str, float]) -> list[str]:
    found = []
    samples, wrong, real = (f"generation/label_accuracy{of}" for of in ("", "_wrong", "_real"))
    if _clearly_below(metrics, samples, real):
        found.append(
            "Samples show the class they were asked for less often than real images show theirs "
            f"({metrics[samples]:.0%} and {metrics[real]:.0%} by the domain classifier): the classes are blurred."
        )
    if _clearly_below(metrics, wrong, real):
        found.append(
            f"Decoded with a wrong label, test images show it in {metrics[wrong]:.0%} only: the latent still holds the "
            f"class. To change that, {_say_less(metrics)} (model.latent_channels)."
        )
    return found


def _clearly_below(metrics: Mapping[str, float], name: str, reference: str) -> bool:
    """True if the 95 % interval of the difference of two independent metrics lies below 0."""
    if name not in metrics:
        return False
    upper, lower = metrics[f"{name}_ci_high"] - metrics[name], metrics[reference] - metrics[f"{reference}_ci_low"]
    return metrics[reference] - metrics[name] > math.hypot(upper, lower)


def unrecognised_finding(classes: Sequence[str]) -> str:
    """A sentence on classes that the domain extractor does not recognise."""
    return (
        f"The domain extractor does not recognise {', '.join(classes)} on validation images (`medgen features` prints "
        "its accuracies): label accuracy leaves these classes out, and the other measures through it may overlook "
        "them. Raise features.epochs, or bring more images of these classes."
    )


def refiner_tables(metrics: Mapping[str, float], classes: Sequence[str]) -> list[PageTable]:
    """Fidelity and realism before and after the refiner, and realism by class; none without a refiner."""
    if "refined/ssim" not in metrics:
        return []
    bands = [f"spectrum_ratio_{band}" for band in range(1, NUM_BANDS + 1)]
    keys = ["ssim", *bands, "spectrum_distance", "fd_domain", "mmd_domain"]
    names = {
        "reconstruction": "decoder's reconstructions",
        "refined": "refined reconstructions",
        "decoded": "samples without the refiner",
        "generation": "refined samples",
    }
    rows = [(name, *(_cell(metrics, f"{group}/{key}") for key in keys)) for group, name in names.items()]
    rows.append(("train images", *(_cell(metrics, f"generation/{key}_floor") for key in keys)))
    head = [f"power, band {band}" for band in range(1, NUM_BANDS + 1)]
    columns = ("images", "SSIM", *head, "spectrum distance", "FD", "MMD")
    tables = [PageTable("Fidelity and realism", FIDELITY, columns, rows)]
    found = [k for k in range(len(classes)) if f"generation/class_{k}/mmd_domain" in metrics]
    if found:
        keys = [*bands, "spectrum_distance"]
        rows = [
            (
                classes[k],
                *(_cell(metrics, f"generation/class_{k}/{key}") for key in keys),
                _interval(metrics, f"generation/class_{k}/mmd_domain"),
            )
            for k in found
        ]
        columns = ("class", *head, "spectrum distance", "MMD")
        tables.append(PageTable("Realism of refined samples by class", BY_CLASS, columns, rows))
    return tables


def _cell(metrics: Mapping[str, float], key: str) -> str:
    """A value, or a dash where there is none."""
    return f"{metrics[key]:.3g}" if key in metrics else "–"


def print_table(rows: Sequence[Row]) -> None:
    """The key numbers, for the terminal."""
    shown = Table(title="Evaluation on the test split", title_justify="left")
    shown.add_column("measure", no_wrap=True)
    shown.add_column("value", justify="right", no_wrap=True)
    shown.add_column("reference", overflow="fold")
    for row in rows:
        shown.add_row(row.name, row.value, row.reference)
    Console(highlight=False).print(shown)


def write_page(
    path: Path,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    findings: Sequence[str],
    pictures: Mapping[str, str] = PICTURES,
    next_steps: Sequence[str] = (*NEXT_STEPS, MORE_IMAGES),
    tables: Sequence[PageTable] = (),
) -> None:
    """Writes one HTML page that needs no other file.

    Args:
        path: the page; pictures are taken from figures/ beside it, those that are there.
        facts: what was trained, name -> text.
        rows: the key numbers.
        findings: sentences.
        pictures: file name -> caption.
        next_steps: what to look at next, as HTML.
        tables: shown after the key numbers.
    """
    shown = "".join(
        figure((path.parent / "figures" / name).read_bytes(), Path(name).suffix.removeprefix("."), caption)
        for name, caption in pictures.items()
        if (path.parent / "figures" / name).is_file()
    )
    head = ("measure", "value", "reference", "how to read it")
    numbers = table(head, [(row.name, row.value, row.reference, row.reading) for row in rows], numeric={1})
    more = "".join(
        f"<h2>{escape(each.title)}</h2>\n<p>{escape(each.text)}</p>\n"
        f"{table(each.head, each.rows, numeric=range(1, len(each.head)))}\n"
        for each in tables
    )
    body = f"""<h1>How good is the model?</h1>
{bullets(findings)}
<h2>Key numbers, on the test split</h2>
{numbers}
{more}<h2>Pictures</h2>{shown}
<h2>What was trained</h2>{table((), facts.items())}
<h2>What to look at next</h2>
<ul>{"".join(f"<li>{step}</li>" for step in next_steps)}</ul>"""
    write_atomic(path, page("medgen: evaluation", body))
