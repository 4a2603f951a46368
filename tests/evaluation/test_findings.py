"""Findings: sentences that follow from the metrics, and advice that names the settings."""

import numpy as np
import pytest
import torch

from medgen.evaluation.findings import image_findings, image_verdict, mask_findings, mask_verdict
from medgen.evaluation.label_accuracy import balanced_accuracy
from medgen.metrics.intervals import Interval

GOOD = {
    "reconstruction/ssim": 0.9,
    "reconstruction/pca_ssim": 0.8,
    "reconstruction/spectrum_ratio_5": 0.95,
    "generation/spectrum_ratio_5": 0.9,
    **{f"generation/c2st_auc{name}": 0.53 for name in ("", "_spectrum", "_domain", "_pixels")},
    "generation/c2st_auc_ci_low": 0.45,
    "generation/c2st_auc_ci_high": 0.61,
    "generation/c2st_auc_floor": 0.52,
    "generation/mmd_domain": 0.002,
    "generation/mmd_domain_ci_low": -0.001,
    "generation/mmd_domain_ci_high": 0.005,
    "generation/mmd_domain_floor": 0.001,
    "generation/ms_ssim_diversity": 0.3,
    "generation/ms_ssim_diversity_real": 0.3,
    "privacy/copy_rate": 0.01,
    "privacy/copy_rate_plausible": 0.05,
    "privacy/nearest_over_limit": 0.9,
    "privacy/held_out_limit": 0.5,
    "run/num_test": 300.0,
    "run/num_generated": 2000.0,
}
EXPECTED = [  # of `GOOD`
    "better than those of PCA",
    "Sharpness: samples have 90% of real images' power in the finest band, reconstructions 95%",
    "Too few images to decide whether samples differ from real ones (n = 300 test images, m = 2,000 samples): AUC 0.53",
    "Too few images to decide by domain features",
    "No sign of copied train images",
]
LABELS = {
    "latent/codebook_usage": 0.9,
    "generation/label_accuracy": 0.96,
    "generation/label_accuracy_ci_high": 0.98,
    "generation/label_accuracy_wrong": 0.95,
    "generation/label_accuracy_wrong_ci_high": 0.97,
    "generation/label_accuracy_real": 0.98,
    "generation/label_accuracy_real_ci_low": 0.93,
}
GAP = {"generation/mmd_domain": 0.1, "generation/mmd_domain_ci_low": 0.09, "generation/mmd_domain_ci_high": 0.11}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, {}),
        ({"reconstruction/ssim": 0.5}, {0: "PCA of the train split reconstructs better"}),
        ({"generation/spectrum_ratio_5": 0.1, "reconstruction/spectrum_ratio_5": 0.1}, {1: "the decoder blurs"}),
        ({"generation/spectrum_ratio_5": 0.1}, {1: "the prior draws latents that decode to blurred images"}),
        ({"generation/spectrum_ratio_5": 1.5}, {1: "Samples are noisy"}),
        (
            {"generation/c2st_auc": 0.99, "generation/c2st_auc_pixels": 0.99, "generation/c2st_auc_ci_low": 0.97},
            {2: "recognise samples among real images (AUC 0.53 by spectrum, 0.53 by domain, 0.99 by pixels"},
        ),
        ({"generation/c2st_auc_ci_low": 0.47, "generation/c2st_auc_ci_high": 0.59}, {2: "An AUC below 0.60 would not"}),
        ({"generation/mmd_domain_ci_low": 0.0015}, {3: "samples are farther from test images than train images are"}),
        ({"generation/ms_ssim_diversity": 0.6}, {3.5: "collapse"}),
        ({"privacy/copy_rate": 0.2}, {4: "reproduces patients' images"}),
        ({"privacy/held_out_limit": 0.01}, {4: "is unreliable"}),
        ({"privacy/copy_rate": 0.02, "privacy/copy_rate_plausible": 0.015}, {4: "up to 1.5% is"}),
        ({"privacy/nearest_over_limit": 0.2}, {4: "At least one sample is a copy"}),
    ],
)
def test_findings_follow_from_the_metrics(change: dict[str, float], changed: dict[float, str]) -> None:
    findings = image_findings(GOOD | change)
    expected = [words for _, words in sorted((dict(enumerate(EXPECTED)) | changed).items())]
    assert len(findings) == len(expected)
    for words, text in zip(expected, findings, strict=True):
        assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        (GAP | {"refined/mmd_domain": 0.01}, "most of the gap is due to the prior"),
        (GAP | {"refined/mmd_domain": -0.001}, "most of the gap is due to the prior"),
        (GAP | {"refined/mmd_domain": 0.08}, "due to the decoder and the refiner"),
        ({"refined/mmd_domain": 0.01}, None),
    ],
    ids=["no refiner", "prior", "prior alone", "refiner", "no gap"],
)
def test_a_gap_is_attributed_to_the_prior_or_the_refiner(change: dict[str, float], words: str | None) -> None:
    findings = [text for text in image_findings(GOOD | change) if "Refined reconstructions" in text]
    assert len(findings) == (words is not None)
    assert all(str(words) in text for text in findings)


@pytest.mark.parametrize(
    ("refined", "words"),
    [(0.95, "the prior draws latents that decode to blurred images"), (0.5, "the refiner adds too little detail")],
)
def test_blur_of_refined_samples_is_compared_with_refined_reconstructions(refined: float, words: str) -> None:
    blurred = {"generation/spectrum_ratio_5": 0.4, "reconstruction/spectrum_ratio_5": 0.1}
    text = image_findings(GOOD | blurred | {"refined/spectrum_ratio_5": refined})[1]
    assert f"refined reconstructions {refined:.0%}" in text and words in text


@pytest.mark.parametrize(
    ("low", "high", "start"),
    [
        (0.001, 0.02, "Samples help to train"),
        (-0.02, -0.001, "Samples harm the training of"),
        (-0.01, 0.01, "No effect of samples on the training of"),
    ],
)
def test_the_use_of_samples_is_a_finding(low: float, high: float, start: str) -> None:
    gain = (low + high) / 2
    for name, key, network, values in (
        (
            "accuracy",
            "gain",
            "a classifier",
            f"90.0% on all train images, 91.0% with samples ({100 * gain:+.1f} points",
        ),
        ("dice", "gain_dice", "a U-Net", f"0.900 on all train images, 0.910 with samples ({gain:+.3f}, {low:+.3f} to"),
    ):
        metrics = {
            f"utility/{name}_{kind}": value for kind, value in (("real", 0.9), ("both", 0.91), ("synthetic", 0.8))
        }
        ends = {"": gain, "_ci_low": low, "_ci_high": high}
        metrics |= {f"utility/{key}_both{end}": value for end, value in ends.items()}
        found = [text for text in image_findings(GOOD | metrics) if network in text]
        assert len(found) == 1 and found[0].startswith(f"{start} {network}") and values in found[0]
        assert ("Do not add them" in found[0]) == (high < 0)


def test_too_few_patients_for_a_classifier_test_are_a_finding() -> None:
    few = {key: value for key, value in GOOD.items() if "c2st" not in key}
    assert any("Too few images for a classifier test" in text for text in image_findings(few))


@pytest.mark.parametrize(
    ("change", "tone", "words"),
    [
        ({}, "neutral", "found no difference"),
        ({"generation/c2st_auc": 0.9, "generation/c2st_auc_ci_low": 0.85}, "warning", "differ from real images"),
        ({"generation/mmd_domain_ci_low": 0.0015}, "warning", "farther from test images"),
        ({"privacy/copy_rate": 0.2, "generation/c2st_auc_ci_low": 0.85}, "bad", "reproduces patients' images"),
    ],
)
def test_the_verdict_comes_with_the_power_of_its_test(change: dict[str, float], tone: str, words: str) -> None:
    verdict = image_verdict(GOOD | change)
    assert verdict.tone == tone and words in verdict.text and "indistinguishable" not in verdict.text
    assert "n = 300 test images" in verdict.power and "AUC of 0." in verdict.power and "4 of 5 cases" in verdict.power


def test_the_power_of_a_classifier_that_finds_all_samples_is_not_perfect() -> None:
    sure = dict.fromkeys([f"generation/c2st_auc{end}" for end in ("", "_ci_low", "_ci_high")], 1.0)
    assert "AUC of 0.56" in image_verdict(GOOD | sure).power  # 0.52 and 2.5 standard errors without skill


def test_the_verdict_on_masks_has_the_interval_of_the_mean_dice() -> None:
    metrics = {"segmentation/dice_foreground_mean_mask": 0.6, "run/num_test": 40.0}
    verdict = mask_verdict(metrics | {"segmentation/dice_foreground": 0.9}, Interval(0.9, 0.88, 0.92))
    assert "0.900" in verdict.text and "0.880 to 0.920" in verdict.power and "0.025 or more" in verdict.power
    assert mask_verdict(metrics | {"segmentation/dice_foreground": 0.5}, Interval(0.5, 0.4, 0.6)).tone == "bad"


@pytest.mark.parametrize("has_kl", [True, False])
def test_advice_names_the_kl_weight_only_for_models_that_have_one(has_kl: bool) -> None:
    metrics = GOOD | {
        "generation/c2st_auc_ci_low": 0.9,
        "generation/label_accuracy_real": 0.9,
        "generation/label_accuracy_real_ci_low": 0.85,
        "generation/label_accuracy_wrong": 0.1,
        "generation/label_accuracy_wrong_ci_high": 0.15,
        "latent/codebook_usage": 0.1,
    }
    text = " ".join(image_findings(metrics | ({"latent/kl_nats": 9.0} if has_kl else {})))
    assert text.count("use a smaller latent") == 2 and text.count("raise the KL weight") == 2 * has_kl
    assert "or train them another way (model.codebook)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"generation/label_accuracy": 0.8, "generation/label_accuracy_ci_high": 0.84}, ["less often"]),
        ({"generation/label_accuracy": 0.8, "generation/label_accuracy_ci_high": 0.99}, []),
        ({"generation/label_accuracy_wrong": 0.3, "generation/label_accuracy_wrong_ci_high": 0.35}, ["still holds"]),
        ({"latent/codebook_usage": 0.2}, ["20%"]),
    ],
    ids=["good", "blurred", "too few images", "labels ignored", "unused codes"],
)
def test_findings_report_unused_labels_and_codes(change: dict[str, float], words: list[str]) -> None:
    good = image_findings(GOOD | LABELS)
    findings = [text for text in image_findings(GOOD | LABELS | change) if text not in good]
    assert len(findings) == len(words)
    assert all(word in text for word, text in zip(words, findings, strict=True))


def perfect_model(seed: int, num_test: int = 95, num_samples: int = 500) -> dict[str, float]:
    """Label metrics of a model whose samples are like real images: three classes with accuracies 0.3, 0.97 and 0.99.

    The class proportions of test images and samples differ. Answers for a patient's three images are correlated.
    """
    random = np.random.default_rng(seed)
    accuracy = np.array([0.3, 0.97, 0.99])
    patients = np.arange(num_test) // 3
    labels = random.choice(3, num_test, p=[0.38, 0.36, 0.26])[patients]
    independent = random.random(num_test) < 0.3  # images whose answer is not that of their patient
    draws = np.where(independent, random.random(num_test), random.random(num_test)[patients])
    requested = np.arange(num_samples) % 3
    sets = {
        "_real": (draws < accuracy[labels], labels, patients.tolist()),
        "": (random.random(num_samples) < accuracy[requested], requested, None),
    }
    metrics = {}
    for suffix, (correct, classes, groups) in sets.items():
        interval = balanced_accuracy(torch.from_numpy(correct), torch.from_numpy(classes), [0, 1, 2], groups)
        for end, value in zip(("", "_ci_low", "_ci_high"), interval, strict=True):
            metrics[f"generation/label_accuracy{suffix}{end}"] = value
    return metrics


def test_blurred_classes_are_rarely_reported_for_a_perfect_model() -> None:
    metrics = [GOOD | LABELS | perfect_model(seed) for seed in range(300)]
    assert np.mean(["classes are blurred" in " ".join(image_findings(each)) for each in metrics]) < 0.05


def test_blurred_classes_are_reported_for_a_model_that_confuses_classes() -> None:
    worse = {f"generation/label_accuracy{end}": 0.4 for end in ("", "_ci_low")}
    worse["generation/label_accuracy_ci_high"] = 0.44
    metrics = [GOOD | LABELS | perfect_model(seed) | worse for seed in range(100)]
    assert np.mean(["classes are blurred" in " ".join(image_findings(each)) for each in metrics]) > 0.9


def test_mask_findings_follow_from_the_metrics() -> None:
    good = {"segmentation/dice_foreground": 0.9, "segmentation/dice_foreground_mean_mask": 0.7}
    assert "better than" in mask_findings(good)[0] and len(mask_findings(good)) == 1
    assert "does not use" in mask_findings(good | {"segmentation/dice_foreground": 0.6})[0]
    assert "Class 2" in mask_findings(good | {"segmentation/dice_1": 0.95, "segmentation/dice_2": 0.5})[1]
