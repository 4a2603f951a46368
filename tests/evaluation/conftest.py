"""Models of random weights, to evaluate."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch

from medgen.config import Features, Model, Preprocess, Prior, Project
from medgen.data.store import open_store
from medgen.models import GenerativeModel, build_model, bundle
from medgen.priors import ANALYTIC, save_prior
from medgen.priors.refiner import save_disabled
from medgen.training import extractor

MODEL = Model(base_channels=8, latent_size=8, latent_channels=2, attention_resolutions=())


@pytest.fixture(scope="session")
def trained() -> Callable[..., Project]:
    """Function that gives a project a model of random weights, a prior over its latents, and an extractor."""

    def train(
        project: Project,
        sizes: Model = MODEL,
        prior: str = "gmm",
        conditional: bool = True,
        unrecognised: Sequence[str] = (),
    ) -> Project:
        store = open_store(project.dataset)
        torch.manual_seed(0)
        model = build_model(sizes, store.image_shape, len(store.classes)).eval()
        assert isinstance(model, GenerativeModel)
        data = (store.image_shape, store.classes, store.fingerprint)
        info = bundle.BundleInfo(sizes, Preprocess(image_size=32), *data, "run0", torch.__version__)
        bundle.save(project.model, model, info)
        split = store.split("train")
        labels = torch.from_numpy(split.labels.copy())
        with torch.no_grad():
            means = model.encode(torch.from_numpy(split.images.copy()).float() / 255, labels).mean
        params, digest = Prior(conditional=conditional, components=(1,)), bundle.digest(project.model)
        save_prior(project.prior, ANALYTIC[prior].fit(means, labels, len(store.classes), params), digest)
        save_disabled(project.refiner, digest)
        extractor.run(project, features=Features(width=8, epochs=1))
        description = project.features / "extractor.json"  # after one epoch it recognises no class
        stated = {"unrecognised": {"classes": list(unrecognised)}}
        description.write_text(json.dumps(json.loads(description.read_text()) | stated))
        return project

    return train
