"""Conclusions from the metrics of an evaluation, in sentences, with the settings that help."""

import math
from collections.abc import Mapping, Sequence

from medgen.metrics import c2st
from medgen.metrics.intervals import DETECTABLE_ERRORS, NORMAL_QUANTILE, Interval
from medgen.metrics.privacy import CERTAIN_COPY, MIN_HELD_OUT_LIMIT
from medgen.metrics.spectrum import NUM_BANDS
from medgen.reports.evaluation import Verdict

MIN_CODEBOOK_USAGE = 0.5
BLUR_RATIO = 0.8  # of real images' power in the finest band; below, blur is visible
MAX_SIMILARITY_EXCESS = 0.05  # of the samples' mean MS-SSIM over that of test images
MAX_RECONSTRUCTION_SHARE = 0.5  # of the samples' excess MMD, up to which reconstructions are not the main cause
MIN_CLASS_DIFFERENCE = 0.1  # between the Dice of the worst class and the mean
COPY_ADVICE = (
    "Look at the closest pairs below, and publish neither samples nor model. Add images, train for fewer epochs, or "
    "use a smaller latent (model.latent_channels) or a simpler prior (prior.name)."
)
NO_INCEPTION = (
    "evaluate.extractors has inception, but there is no Inception Score and no FID, because the weights of the "
    "Inception network are missing. Run `medgen weights fetch inception`, then `medgen evaluate` again."
)


def image_verdict(metrics: Mapping[str, float]) -> Verdict:
    """The main conclusion about a generative model and the power behind it, from the content of metrics.json."""
    power = _power(metrics)
    if _has_copies(metrics):
        return Verdict("bad", "The model reproduces patients' images: publish neither samples nor model.", power)
    if "generation/c2st_auc" in metrics:
        auc, low, high, reference = (
            metrics[f"generation/c2st_auc{suffix}"] for suffix in ("", "_ci_low", "_ci_high", "_floor")
        )
        if low > max(0.5, reference):
            text = (
                f"Samples differ from real images: a classifier recognises them with an AUC of {auc:.2f} "
                f"({low:.2f} to {high:.2f}; chance is 0.5, and train images reach {reference:.2f})."
            )
            return Verdict("warning", text, power)
    if metrics["generation/mmd_domain_ci_low"] > metrics["generation/mmd_domain_floor"]:
        text = (
            "By the domain extractor's features, samples are farther from test images than train images are (squared "
            f"MMD {metrics['generation/mmd_domain']:.2g}, train images {metrics['generation/mmd_domain_floor']:.2g})."
        )
        return Verdict("warning", text, power)
    return Verdict("neutral", "This test found no difference between samples and real images.", power)


def mask_verdict(metrics: Mapping[str, float], dice: Interval) -> Verdict:
    """The main conclusion about a model that predicts masks; `dice` is the mean over images with its interval."""
    value, reference = metrics["segmentation/dice_foreground"], metrics["segmentation/dice_foreground_mean_mask"]
    detectable = DETECTABLE_ERRORS * (dice.high - dice.low) / 2 / NORMAL_QUANTILE
    power = (
        f"Mean Dice of {metrics['run/num_test']:,.0f} test images with a mask: {dice.value:.3f} ({dice.low:.3f} to "
        f"{dice.high:.3f}). In 4 of 5 cases the test finds a difference of {detectable:.2g} or more from a given "
        "value; smaller ones it may miss. The variation between trainings is not included."
    )
    if value <= reference:
        text = f"The model is no better than one mask for all images (Dice {value:.3f}, that mask {reference:.3f})."
        return Verdict("bad", text, power)
    text = f"Predicted masks have a Dice of {value:.3f}; one mask for all images has {reference:.3f}."
    return Verdict("neutral", text, power)


def image_findings(metrics: Mapping[str, float]) -> list[str]:
    """Findings on a generative model, from the content of metrics.json."""
    ssim, pca = metrics["reconstruction/ssim"], metrics["reconstruction/pca_ssim"]
    if ssim < pca:
        findings = [
            f"PCA of the train split reconstructs better (SSIM {pca:.3f}, the model {ssim:.3f}): train longer, raise "
            "the learning rate, or use a larger latent grid (model.latent_size)."
        ]
    else:
        findings = [f"Reconstructions are better than those of PCA (SSIM {ssim:.3f}, PCA {pca:.3f})."]
    findings += [_sharpness(metrics), _realism(metrics), _distance(metrics), *_gap(metrics)]
    excess = metrics["generation/ms_ssim_diversity"] - metrics["generation/ms_ssim_diversity_real"]
    if excess > MAX_SIMILARITY_EXCESS:
        findings.append(
            "Samples are more similar to each other than real images are: look for a collapse in the samples below."
        )
    findings += _privacy(metrics) + _membership(metrics)
    if metrics.get("latent/codebook_usage", 1.0) < MIN_CODEBOOK_USAGE:
        findings.append(
            f"Only {metrics['latent/codebook_usage']:.0%} of the codes are used: take fewer (model.num_embeddings), or "
            "train them another way (model.codebook)."
        )
    return findings + _labels(metrics) + _utility(metrics)


def mask_findings(metrics: Mapping[str, float]) -> list[str]:
    """Findings on a model that predicts masks, from the content of metrics.json."""
    dice, reference = metrics["segmentation/dice_foreground"], metrics["segmentation/dice_foreground_mean_mask"]
    if dice <= reference:
        return [
            f"The most common train mask, used for every image, has a Dice of {reference:.3f}, the model only "
            f"{dice:.3f}: the model does not use the image yet. Train longer, raise the learning rate, or add a Dice "
            "term (loss.weights)."
        ]
    findings = [f"Dice {dice:.3f}, better than the most common train mask for every image ({reference:.3f})."]
    classes = {name: metrics[name] for name in metrics if name.startswith("segmentation/dice_") and name[-1].isdigit()}
    if classes and min(classes.values()) < dice - MIN_CLASS_DIFFERENCE:
        worst = min(classes, key=lambda name: classes[name])
        findings.append(
            f"Class {worst.rpartition('_')[2]} has a much lower Dice ({classes[worst]:.3f}): for rare or thin classes, "
            "add a Dice term to the cross-entropy (loss.weights)."
        )
    return findings


def unrecognised_finding(classes: Sequence[str]) -> str:
    """Finding on classes that the domain extractor does not recognise."""
    return (
        f"The domain extractor does not recognise {', '.join(classes)} on validation images (`medgen features` prints "
        "its accuracies): label accuracy leaves these classes out, and other metrics of its features may miss errors "
        "in them. Raise features.epochs, or add images of these classes."
    )


def _sharpness(metrics: Mapping[str, float]) -> str:
    has_refiner = f"refined/spectrum_ratio_{NUM_BANDS}" in metrics
    group, name = ("refined", "refined reconstructions") if has_refiner else ("reconstruction", "reconstructions")
    samples, reconstructed = (metrics[f"{prefix}/spectrum_ratio_{NUM_BANDS}"] for prefix in ("generation", group))
    values = f"samples have {samples:.0%} of real images' power in the finest band, {name} {reconstructed:.0%}"
    if samples < BLUR_RATIO:
        cause = "the prior draws latents that decode to blurred images"
        if reconstructed < BLUR_RATIO:
            cause = "the refiner adds too little detail" if has_refiner else "the decoder blurs"
        return f"Samples are blurred: {values}. Cause: {cause}."
    if samples > 1.0 / BLUR_RATIO:
        return f"Samples are noisy: {values}."
    return f"Sharpness: {values}."


def _realism(metrics: Mapping[str, float]) -> str:
    sizes = _sizes(metrics)
    if "generation/c2st_auc" not in metrics:
        return f"Too few images for a classifier test of realism ({sizes})."
    auc, low, reference = (metrics[f"generation/c2st_auc{suffix}"] for suffix in ("", "_ci_low", "_floor"))
    inputs = ", ".join(f"{metrics[f'generation/c2st_auc_{name}']:.2f} by {name}" for name in c2st.INPUTS)
    if low > max(0.5, reference):
        return (
            f"Classifiers recognise samples among real images (AUC {inputs}; chance 0.5, train images "
            f"{reference:.2f}). Compare the images below: if reconstructions look as wrong as samples, train longer; "
            f"if only samples do, {_simpler_latent(metrics)}."
        )
    return (
        f"Too few images to decide whether samples differ from real ones ({sizes}): AUC {auc:.2f} ({inputs}; train "
        f"images {reference:.2f}). An AUC below {_detectable_auc(metrics):.2f} would not be detected."
    )


def _distance(metrics: Mapping[str, float]) -> str:
    value, low, high, reference = (
        metrics[f"generation/mmd_domain{suffix}"] for suffix in ("", "_ci_low", "_ci_high", "_floor")
    )
    mmd = f"squared MMD {value:.3g}, {low:.3g} to {high:.3g}"
    if low > reference:
        return (
            f"By domain features, samples are farther from test images than train images are ({mmd}, train images "
            f"{reference:.3g})."
        )
    return (
        "Too few images to decide by domain features whether samples are farther from test images than train images "
        f"are ({_sizes(metrics)}): {mmd}; a value below {_detectable_mmd(metrics):.2g} would not be detected."
    )


def _detectable_auc(metrics: Mapping[str, float]) -> float:
    """The AUC that the classifier test finds in 4 of 5 cases.

    Its standard error is at least that of a classifier without skill: near an AUC of 1 the interval vanishes.

    Source: Mason and Graham, Areas beneath the relative operating characteristics curves, 2002 (the null distribution).
    """
    low, high, reference = (metrics[f"generation/c2st_auc{suffix}"] for suffix in ("_ci_low", "_ci_high", "_floor"))
    n, m = metrics["run/num_test"], metrics["run/num_generated"]
    error = max((high - low) / 2 / NORMAL_QUANTILE, math.sqrt((n + m + 1) / (12 * n * m)))
    return max(0.5, reference) + DETECTABLE_ERRORS * error


def _detectable_mmd(metrics: Mapping[str, float]) -> float:
    """The squared MMD that the test finds in 4 of 5 cases."""
    low, high, reference = (metrics[f"generation/mmd_domain{suffix}"] for suffix in ("_ci_low", "_ci_high", "_floor"))
    return reference + DETECTABLE_ERRORS * (high - low) / 2 / NORMAL_QUANTILE


def _power(metrics: Mapping[str, float]) -> str:
    """A sentence about the differences from real images that the tests would have found."""
    found = [f"a squared MMD of {_detectable_mmd(metrics):.2g}"]
    if "generation/c2st_auc" in metrics:
        found.insert(0, f"an AUC of {_detectable_auc(metrics):.2f}")
    return (
        f"With {_sizes(metrics)}, the tests find {' or '.join(found)} and more in 4 of 5 cases; smaller differences "
        "they may miss. The variation between trainings is not included."
    )


def _gap(metrics: Mapping[str, float]) -> list[str]:
    """The part that causes most of the gap between refined samples and real images, if there is a gap."""
    if "refined/mmd_domain" not in metrics:
        return []
    low, reference = metrics["generation/mmd_domain_ci_low"], metrics["generation/mmd_domain_floor"]
    if low <= reference:
        return []
    excess, reconstructed = metrics["generation/mmd_domain"] - reference, metrics["refined/mmd_domain"]
    values = f"squared MMD {reconstructed:.3g}; that of refined samples exceeds train images by {excess:.3g}"
    if reconstructed <= MAX_RECONSTRUCTION_SHARE * excess:
        return [
            f"Refined reconstructions are close to real images ({values}): most of the gap is due to the prior. Train "
            "another prior (prior.name: flow) or train it longer, or raise refiner.sampling_noise."
        ]
    return [
        f"Refined reconstructions differ from real images, too ({values}): much of the gap is due to the decoder and "
        "the refiner. Train the refiner longer (refiner.epochs) or make it larger (refiner.channels)."
    ]


def _has_copies(metrics: Mapping[str, float]) -> bool:
    rate, chance = metrics["privacy/copy_rate"], metrics["privacy/copy_rate_plausible"]
    return rate > chance or metrics["privacy/nearest_over_limit"] < CERTAIN_COPY


def _privacy(metrics: Mapping[str, float]) -> list[str]:
    rate, chance = metrics["privacy/copy_rate"], metrics["privacy/copy_rate_plausible"]
    nearest = metrics["privacy/nearest_over_limit"]
    findings = []
    if metrics["privacy/held_out_limit"] < MIN_HELD_OUT_LIMIT:
        findings.append(
            "The search for copied train images is unreliable: some test images are nearly identical to train images. "
            "Fix the duplicates and leaks that `medgen data audit` lists, and run all stages again."
        )
    if rate > chance:
        findings.append(
            f"{rate:.1%} of the samples are nearer to a train image than test images are (up to {chance:.1%} is "
            f"chance): the model reproduces patients' images. {COPY_ADVICE}"
        )
    if nearest < CERTAIN_COPY:
        findings.append(
            f"At least one sample is a copy of a train image: its distance is {nearest:.3g} of the limit, and real "
            f"images of other patients are not below {CERTAIN_COPY:g}. {COPY_ADVICE}"
        )
    findings = findings or [f"No sign of copied train images (copy rate {rate:.1%}, up to {chance:.1%} is chance)."]
    partial, chance = (metrics.get(f"privacy/partial_copy_rate{suffix}", 0.0) for suffix in ("", "_plausible"))
    if partial > chance:
        findings.append(
            f"{partial:.1%} of the samples have a part that is nearer to a train image than parts of test images are "
            f"(up to {chance:.1%} is chance): the model reproduces parts of patients' images. {COPY_ADVICE}"
        )
    return findings


def _membership(metrics: Mapping[str, float]) -> list[str]:
    if "privacy/membership_auc_loss" not in metrics:
        return []
    names = {"loss": "by the reconstruction error", "distance": "by the distance to samples"}
    parts = []
    for key, name in names.items():
        auc, low, high = (metrics[f"privacy/membership_auc_{key}{suffix}"] for suffix in ("", "_ci_low", "_ci_high"))
        parts.append(f"{auc:.2f} ({low:.2f} to {high:.2f}) {name}")
    values = ", ".join(parts)
    if all(metrics[f"privacy/membership_auc_{key}_ci_low"] <= 0.5 for key in names):
        return [f"No sign that the model reveals which images it was trained on: AUC of attacks {values}; chance 0.5."]
    return [
        "Who has a patient's image can guess better than by chance whether the model was trained on it: AUC of attacks "
        f"{values}; chance 0.5. This assumes that train, val and test images come from one population. Stop the "
        "training earlier (train.keep: best), add images, or use a smaller model."
    ]


def _labels(metrics: Mapping[str, float]) -> list[str]:
    findings = []
    samples, wrong, real = (f"generation/label_accuracy{suffix}" for suffix in ("", "_wrong", "_real"))
    if _significantly_below(metrics, samples, real):
        findings.append(
            "The domain classifier finds the requested class less often in samples than the true class in real images "
            f"({metrics[samples]:.0%} and {metrics[real]:.0%}): the classes are blurred."
        )
    if _significantly_below(metrics, wrong, real):
        findings.append(
            f"Test images decoded with a wrong label show that label in only {metrics[wrong]:.0%} of cases: the latent "
            f"still holds the class. To change this, {_simpler_latent(metrics)} (model.latent_channels)."
        )
    return findings


def _utility(metrics: Mapping[str, float]) -> list[str]:
    findings = []
    if "utility/gain_both" in metrics:
        real, both, synthetic = (f"{metrics[f'utility/accuracy_{kind}']:.1%}" for kind in ("real", "both", "synthetic"))
        gain, low, high = (100 * metrics[f"utility/gain_both{end}"] for end in ("", "_ci_low", "_ci_high"))
        values = (
            f"balanced accuracy of a classifier {real} on all train images, {both} with samples ({gain:+.1f} points, "
            f"{low:+.1f} to {high:+.1f}), {synthetic} on samples alone"
        )
        findings.append(_effect("a classifier", values, low, high))
    if "utility/gain_dice_both" in metrics:
        real, both, synthetic = (f"{metrics[f'utility/dice_{kind}']:.3f}" for kind in ("real", "both", "synthetic"))
        gain, low, high = (metrics[f"utility/gain_dice_both{end}"] for end in ("", "_ci_low", "_ci_high"))
        values = (
            f"Dice of a U-Net {real} on all train images, {both} with samples ({gain:+.3f}, {low:+.3f} to "
            f"{high:+.3f}), {synthetic} on samples alone"
        )
        findings.append(_effect("a U-Net", values, low, high))
    return findings


def _effect(network: str, values: str, low: float, high: float) -> str:
    """A sentence about the effect of samples on a training, whose gain has the interval from `low` to `high`."""
    if low > 0:
        return f"Samples help to train {network}: {values}."
    if high < 0:
        return f"Samples harm the training of {network}: {values}. Do not add them to train images."
    return f"No effect of samples on the training of {network} was found: {values}."


def _significantly_below(metrics: Mapping[str, float], name: str, reference: str) -> bool:
    """True if the 95 % interval of the difference of two independent metrics lies below 0."""
    if name not in metrics:
        return False
    upper, lower = metrics[f"{name}_ci_high"] - metrics[name], metrics[reference] - metrics[f"{reference}_ci_low"]
    return metrics[reference] - metrics[name] > math.hypot(upper, lower)


def _simpler_latent(metrics: Mapping[str, float]) -> str:
    """Advice that makes latents easier to sample; the KL weight only for a model that has one."""
    weight = "raise the KL weight (beta.end in train.phases), " if "latent/kl_nats" in metrics else ""
    return f"{weight}use a smaller latent, or another prior (prior.name: flow)"


def _sizes(metrics: Mapping[str, float]) -> str:
    return f"n = {metrics['run/num_test']:,.0f} test images, m = {metrics['run/num_generated']:,.0f} samples"
