"""AUC of the membership attacks and partial copies, on the project's model and on an overfitted one of the same family.

python benchmarks/membership.py [--samples 500] [--members 100] [--steps 600]

Run it in a project's folder after `dvc repro`. The overfitted model is trained on a few train images, which are its
members, without regularisation. Its samples are its reconstructions of members, as a prior would draw them that has
learnt them by heart. About five minutes on one core at 64 px.
"""

import argparse
from pathlib import Path

import torch

from medgen.config import Project, load
from medgen.data.images import StoredImages, to_floats
from medgen.data.store import open_store
from medgen.evaluation.context import EvaluationContext, labels_of, load_context
from medgen.evaluation.generation import draw_samples
from medgen.evaluation.privacy import attack_splits, evaluate_membership
from medgen.metrics import privacy
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import select_groups
from medgen.models import GenerativeModel, build_model, bundle
from medgen.training.distributed import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    project, world = Project.find(Path.cwd()), World(0, 1, torch.device("cpu"))
    params = load(Path("params.yaml")).evaluate.model_copy(update={"num_generated": options.samples})
    store = open_store(project.dataset)
    model, info = bundle.load_generative(project.model)
    context = load_context(project, store, model, info, params, world)
    samples = draw_samples(context).images
    print("| model | attack by loss | attack by distance | partial copies |\n|---|---|---|---|", flush=True)
    attacked = attack_splits(context, samples)
    show("the project's", context, attacked, samples, StoredImages(store.split("train")))

    train = store.split("train")
    rows = subsample(torch.arange(len(train)), options.members)
    overfitted = overfit(context, rows, options.steps)
    images, labels = StoredImages(train, rows), labels_of(train)[rows]
    with torch.no_grad():
        decoded = context.to_stored(overfitted.decode(overfitted.encode(to_floats(images[:]), labels).mean, labels))
    context = load_context(project, store, overfitted, info, params, world)
    attacked = attack_splits(context, decoded)
    error, power, distance, groups = attacked["train"]
    keys = select_groups(groups, rows)
    attacked["train"] = type(attacked["train"])(error[rows], power[rows], distance[rows], keys)
    show("overfitted", context, attacked, decoded, images)


def overfit(context: EvaluationContext, rows: torch.Tensor, steps: int) -> GenerativeModel:
    """A new model of the same family after many steps on few train images."""
    store, train = context.store, context.store.split("train")
    torch.manual_seed(0)
    model = build_model(context.info.model, store.image_shape, len(store.classes))
    assert isinstance(model, GenerativeModel)
    images, labels = to_floats(StoredImages(train, rows)[:]), labels_of(train)[rows]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(rows), (16,))
        latent = model.encode(images[batch], labels[batch]).mean
        loss = (model.decode(latent, labels[batch]) - images[batch]).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def show(name: str, context: EvaluationContext, attacked: dict, samples: torch.Tensor, train: StoredImages) -> None:
    """Print a row of the table."""
    metrics = evaluate_membership(attacked)
    cells = [
        "{:.3f} ({:.3f} to {:.3f})".format(
            *(metrics[f"privacy/membership_auc_{key}{end}"] for end in ("", "_ci_low", "_ci_high"))
        )
        for key in ("loss", "distance")
    ]
    found = [privacy.nearest_by_parts(images, train) for images in (samples, context.compared)]
    parts = privacy.part_metrics(privacy.find_copies(*found, context.groups))
    rate, chance, nearest = parts.values()
    print(f"| {name} | {' | '.join(cells)} | {rate:.1%} of {chance:.1%}; nearest {nearest:.2f} |", flush=True)


if __name__ == "__main__":
    main()
