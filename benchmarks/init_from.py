"""Compare a start from a registered model with a start from random weights: epochs to the same SSIM of the val split.

python benchmarks/init_from.py [--images FOLDER] [--epochs 16] [--source-epochs 16]

A model of the drawn sample is trained and registered. Then the same network is trained on the images of FOLDER (by
default other drawn patients) twice, with each start. The target is the SSIM after the last epoch of the random start.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from medgen import registry
from medgen.config import Params, Project, Tracking, load
from medgen.datasets.sample import draw
from medgen.ingest import preprocess
from medgen.tracking import history
from medgen.training import prior, refiner, train

PARAMS = Path(__file__).resolve().parent.parent / "params.yaml"


def fit(project: Project, params: Params, **values: object) -> list[float]:
    """SSIM of the val split after each epoch of a training with other values of section train."""
    section = params.train.model_copy(update=values)
    fetch = registry.fetcher(project, tracking=params.tracking)
    scratch = train.run(
        project, model=params.model, loss=params.loss, train=section, tracking=params.tracking, fetch=fetch
    )
    return [record["val/ssim"] for record in history(scratch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of the images to train on")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--source-epochs", type=int, default=16, help="epochs of the registered model")
    arguments = parser.parse_args()
    one = ["train.phases={one: {epochs: %d, learning_rate: 1e-3}}", "refiner.enabled=false"]
    with tempfile.TemporaryDirectory() as folder:
        store = Tracking(uri=f"sqlite:///{folder}/mlflow.db", system_metrics=False)
        params = load(PARAMS, [one[0] % arguments.source_epochs, one[1]]).model_copy(update={"tracking": store})
        source, target = Project(Path(folder, "source")), Project(Path(folder, "target"))
        draw(source.root / "data", num_images=480, size=128, seed=0)
        if arguments.images:
            shutil.copytree(arguments.images, target.root / "data")
        else:
            draw(target.root / "data", num_images=240, size=128, seed=1)
        for project in (source, target):
            preprocess.run(project, data=params.data, preprocess=params.preprocess)
        fit(source, params)
        prior.run(source, prior=params.prior, tracking=store)
        refiner.run(source, refiner=params.refiner, tracking=store)
        version = registry.register(source, params=params)
        phases = load(PARAMS, [one[0] % arguments.epochs]).train.phases
        random = fit(target, params, phases=phases)
        tuned = fit(target, params, phases=phases, init_from=version.uri)
    print("\n| epoch | random weights | registered model |\n|---|---|---|")
    for epoch, (first, second) in enumerate(zip(random, tuned, strict=True), 1):
        print(f"| {epoch} | {first:.4f} | {second:.4f} |")
    goal = random[-1]
    needed = next((epoch for epoch, ssim in enumerate(tuned, 1) if ssim >= goal), None)
    print(f"\nSSIM {goal:.4f}: {len(random)} epochs from random weights, {needed} from the registered model")


if __name__ == "__main__":
    main()
