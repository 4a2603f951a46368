"""A CT-like series through import, training and generation, in Hounsfield units all the way.

python benchmarks/ct_series.py --out outputs/ct [--patients 48] [--epochs 30]

It draws thorax-like volumes in HU as int16 NIfTI files (air, lung, fat, soft tissue, bone, noise), and runs medgen's
commands on them with `preprocess.bits: 16` and a window of -1000 to 400 HU. Then it checks with nibabel that

- the store has the files' HU within half a grey value,
- generated NIfTI files have the HU of the model's samples within half a grey value, in the slices' directions,
- medgen reads the generated files back as the very same grey values,

and prints HU of real and generated slices side by side. `--out` gets real.png and samples/ with grid.png and the NIfTI
files. Five minutes on two cores.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
from ruamel.yaml import YAML

import medgen
from medgen.reports.figures import write_grid

SIDE, SLICES, NUM_GENERATED = 64, 6, 64
LOW, HIGH = -1000.0, 400.0
STEP = (HIGH - LOW) / 65535
QUANTILES = (1, 5, 25, 50, 75, 95, 99)
PARAMS = {
    "data": {"path": "data", "name": "ct"},
    "preprocess": {
        "image_size": SIDE,
        "bits": 16,
        "window": {"low": LOW, "high": HIGH, "unit": "HU"},
        "clahe_clip": 0,
        "volume": {"min_foreground": 0.0},
    },
    "features": {"epochs": 5},
    "model": {"name": "spatial_vae", "base_channels": 16, "latent_channels": 8, "latent_size": 8},
    "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
    "prior": {"name": "gmm"},
    "refiner": {},
    "evaluate": {"num_generated": 200},
    "tracking": {"enabled": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder of the project and its images")
    parser.add_argument("--patients", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    project = arguments.out.resolve()
    project.mkdir(parents=True)
    series = project / "series"
    series.mkdir()
    volumes = {}
    for number in range(arguments.patients):
        name = f"case_{number:03}.nii.gz"
        volumes[name] = draw(np.random.default_rng(number))
        save(series / name, volumes[name])
    phases = {
        "reconstruct": {"epochs": arguments.epochs, "learning_rate": 2e-3},
        "regularise": {"epochs": max(1, arguments.epochs // 3), "learning_rate": 5e-4, "beta": {"end": 1.0}},
    }
    with (project / "params.yaml").open("w") as file:
        YAML().dump({**PARAMS, "train": {"batch_size": 16, "phases": phases}}, file)
    run(project, "git", "init", "-q")
    run(project, sys.executable, "-m", "dvc", "init", "-q")
    run_medgen(project, "data", "import", "series", "--name", "ct")
    for stage in ("preprocess", "features", "train", "prior", "refiner", "evaluate"):
        run_medgen(project, stage)
    run_medgen(project, "generate", "--n", str(NUM_GENERATED), "--format", "nifti", "--out", "samples")

    real = check_store(project, volumes)
    generated = check_samples(project)
    rows = {"real": real, "generated": generated}
    print("HU quantile " + "".join(f"{quantile:>8}" for quantile in QUANTILES))
    for name, units in rows.items():
        print(f"{name:12}" + "".join(f"{value:8.0f}" for value in np.percentile(units, QUANTILES)))
    metrics = json.loads((project / "reports" / "metrics.json").read_text())
    for key in ("reconstruction/ssim", "reconstruction/psnr", "generation/mmd_domain", "generation/c2st_auc"):
        print(f"{key:28}{metrics.get(key, math.nan):.4f}")


def draw(generator: np.random.Generator) -> np.ndarray:
    """A volume (SLICES, SIDE, SIDE) of HU."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    width, height, tilt = generator.uniform(0.78, 0.92), generator.uniform(0.58, 0.7), generator.normal(0, 0.05)
    x, y = x + tilt * y, y - tilt * x
    lung = generator.uniform(0.30, 0.38)
    slices = []
    for position in np.linspace(-1, 1, SLICES):

        def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
            return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

        size = lung * (1 - 0.25 * position**2)
        units = np.full((SIDE, SIDE), -1000.0)
        units[ellipse(0, 0, width, height)] = -100  # fat
        units[ellipse(0, 0, width - 0.07, height - 0.07)] = 45  # muscle
        units[ellipse(-0.42, -0.02, size, 1.2 * size)] = -850
        units[ellipse(0.42, -0.02, size, 1.2 * size)] = -850
        units[ellipse(0.1, -0.05 + 0.1 * position, 0.24, 0.26)] = 55  # heart
        units[ellipse(0, height - 0.24, 0.1, 0.1)] = 350  # spine
        slices.append(units)
    return np.rint(np.stack(slices) + generator.normal(0, 15, (SLICES, SIDE, SIDE))).clip(-1024, 3071)


def save(path: Path, units: np.ndarray) -> None:
    """Slices (N, H, W), front at the top and the patient's right on the left, as a NIfTI volume."""
    volume = nibabel.Nifti1Image((units + 1024).astype(np.int16)[:, ::-1, ::-1].transpose(2, 1, 0), np.eye(4))
    volume.header.set_slope_inter(1, -1024)
    nibabel.save(volume, path)


def check_store(project: Path, volumes: dict[str, np.ndarray]) -> np.ndarray:
    """HU (N, H, W) of the test split, after a comparison of all splits with the drawn volumes."""
    dataset = medgen.open_dataset(project / "artifacts" / "dataset")
    scale = json.loads((dataset.folder / "dataset.json").read_text())["scale"]
    worst = 0.0
    for name in ("train", "val", "test"):
        split = dataset.split(name)
        units = scale["slope"] * split.images[:][:, 0].astype(float) + scale["intercept"]
        for image, row in zip(units, split.rows(), strict=True):
            original = volumes[Path(row["path"]).name][int(row["index"])]
            worst = max(worst, float(np.abs(image - original.clip(LOW, HIGH)).max()))
    print(f"store: {dataset.counts} slices, {scale}; largest difference from the files {worst:.4f} HU")
    assert worst <= STEP / 2 + 1e-6, worst
    write_grid(project / "real.png", torch.from_numpy((units[:100, None] - LOW) / (HIGH - LOW)))
    return units


def check_samples(project: Path) -> np.ndarray:
    """HU (N, H, W) of the generated files by nibabel, after a comparison with the Python API's samples."""
    units = np.stack([read(path) for path in sorted((project / "samples").glob("*.nii.gz"))])
    model = medgen.load(project / "artifacts", project=project, device="cpu")
    images = model.sample(NUM_GENERATED, seed=0)[:, 0]
    scale = model.scale
    assert scale is not None and images.dtype == np.uint16
    worst = float(np.abs(units - (scale.low + images / 65535 * (scale.high - scale.low))).max())
    print(f"samples: {len(units)} NIfTI files in {scale.unit}; largest difference from the model {worst:.4f} HU")
    assert worst <= STEP + 1e-3, worst
    again = np.stack([model.read(path)[0, 0] for path in sorted((project / "samples").glob("*.nii.gz"))])
    assert np.array_equal(again, images)
    return units


def read(path: Path) -> np.ndarray:
    """HU (H, W) of a NIfTI file with one axial slice, front at the top and the patient's right on the left."""
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    return np.asarray(volume[::-1, ::-1, 0].T)


def run_medgen(project: Path, *words: str) -> None:
    print("medgen", *words, flush=True)
    run(project, sys.executable, "-m", "medgen", "--quiet", *words)


def run(project: Path, *command: str) -> None:
    subprocess.run(command, cwd=project, check=True)


if __name__ == "__main__":
    main()
