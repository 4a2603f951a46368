"""Hashes of medgen's outputs, to compare two commits and find changes of results.

python benchmarks/unchanged.py --out before.json [--real FOLDER ...]
git switch CHANGED && python benchmarks/unchanged.py --out after.json [--real FOLDER ...] --compare before.json

It hashes the store of procedural images and of each real folder (the files, byte by byte), and for each recipe of
images the model's weights after two epochs on procedural images of its own size or less (each tensor's bytes without
its name). It uses only the command line and params.yaml, which do not depend on the code's structure. Ten minutes on
two cores.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
NUM_IMAGES, MAX_SIZE = 64, 64
STORE_ONLY = {"data": {"splits": "own"}, "preprocess": {"image_size": 64, "max_rejected": 1.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of hashes by name")
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="folders of real images")
    parser.add_argument("--compare", type=Path, help="an earlier --out; differences are listed and give exit code 1")
    arguments = parser.parse_args()
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sample = new_project(Path(scratch), None, STORE_ONLY)
        medgen(sample, "data", "sample", "--n", str(NUM_IMAGES))
        for folder in (sample / "data", *arguments.real):
            project = new_project(Path(scratch), folder, STORE_ONLY)
            medgen(project, "preprocess")
            name = "drawn" if folder.name == "data" else folder.name
            print(name, flush=True)
            hashes[f"store {name}"] = hash_folder(project / "artifacts" / "dataset")
        for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
            params = YAML().load(recipe)
            if isinstance(params["preprocess"]["image_size"], list):  # volumes; the procedural images are flat
                continue
            project = new_project(Path(scratch), sample / "data", shortened(params))
            medgen(project, "preprocess")
            medgen(project, "train")
            hashes[f"weights {recipe.stem}"] = hash_tensors(project / "artifacts" / "model" / "model.safetensors")
            print(recipe.stem, flush=True)
    arguments.out.write_text(json.dumps(hashes, indent=2) + "\n")
    if arguments.compare is not None:
        before = json.loads(arguments.compare.read_text())
        differing = sorted(name for name in {*before, *hashes} if before.get(name) != hashes.get(name))
        print(f"{len(hashes) - len(differing)} the same; differ: {', '.join(differing) or 'none'}")
        sys.exit(bool(differing))


def medgen(folder: Path, *words: str) -> None:
    """Run a command of this checkout in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "medgen", *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"medgen {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def new_project(scratch: Path, data: Path | None, params: dict) -> Path:
    """Create a folder with params.yaml, tracking off, and a link to the data if there are any."""
    project = Path(tempfile.mkdtemp(dir=scratch))
    if data is not None:
        (project / "data").symlink_to(data.resolve(), target_is_directory=True)
    sections = {"data": {"path": "data", "name": "unchanged"}, "tracking": {"enabled": False}}
    with (project / "params.yaml").open("w") as file:
        YAML().dump(
            {**params, "data": {**params.get("data", {}), **sections["data"]}, "tracking": sections["tracking"]}, file
        )
    return project


def shortened(params: dict) -> dict:
    """A recipe with two epochs and small images; all other parameters unchanged."""
    size = params["preprocess"]["image_size"]
    while size > MAX_SIZE and size % 2 == 0:
        size //= 2
        if params["model"].get("latent_size"):
            params["model"]["latent_size"] = max(1, params["model"]["latent_size"] // 2)
    params["preprocess"] |= {"image_size": size, "max_rejected": 1.0}
    phases = params["train"]["phases"]
    for phase in phases.values() if isinstance(phases, dict) else phases:
        phase["epochs"] = 2 if len(phases) == 1 else 1
        if "schedule" in phase:
            phase["schedule"]["period"] = phase["epochs"]
        if "beta" in phase:
            phase["beta"]["epochs"] = 1
    params["loss"]["weights"].pop("perceptual", None)  # its weights are a download
    return params


def hash_folder(folder: Path) -> str:
    """SHA-256 of all names and contents."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()


def hash_tensors(path: Path) -> str:
    """SHA-256 of the sorted hashes of all tensors."""
    tensors = safetensors.torch.load_file(path).values()
    each = sorted(hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(each).encode()).hexdigest()


if __name__ == "__main__":
    main()
