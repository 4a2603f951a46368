"""Each model family in the training loop: it learns, saves a bundle and resumes after an interruption."""

import math

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import Beta, Loss, Model, Phase, Tracking, Train, Weights
from medgen.models import MODELS, bundle
from medgen.tracking import history
from medgen.training import train
from medgen.training.loader import Loader

IMAGES, MASKS = Loss(weights=Weights(l1=1.0, ssim=0.5)), Loss(weights=Weights(bce=1.0, dice=1.0))
FAMILIES = {
    "autoencoder": (Model(name="autoencoder", base_channels=4, latent_channels=2), Loss(weights=Weights(mse=1.0))),
    "autoencoder_kl": (Model(name="autoencoder_kl", base_channels=4, latent_channels=2), IMAGES),
    "vae": (Model(name="vae", base_channels=4, latent_channels=8), Loss(weights=Weights(bce=1.0))),
    "cvae": (Model(name="cvae", base_channels=4, latent_channels=8), Loss(weights=Weights(sigma=1.0))),
    "spatial_vae": (Model(base_channels=4, latent_channels=2), IMAGES),
    "vqvae": (Model(name="vqvae", base_channels=4, latent_channels=4, num_embeddings=16), IMAGES),
    "unet": (Model(name="unet", base_channels=4), MASKS),
}
TRAIN = Train(
    batch_size=8,
    ema_decay=0.5,
    sample_every=9,
    phases=(Phase(name="train", epochs=2, learning_rate=3e-3, beta=Beta(end=0.01)),),
)


def run(project, name, **update):
    model, loss = FAMILIES[name]
    return train.run(
        project,
        model=model.model_copy(update=update),
        loss=loss,
        train=TRAIN,
        tracking=Tracking(enabled=False),
    )


def test_every_family_is_in_the_table():
    assert FAMILIES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_learns_and_saves_its_bundle(tiny_project, name):
    scratch = run(tiny_project, name)
    first, last = history(scratch)
    assert last["val/loss"] < first["val/loss"]
    assert all(math.isfinite(value) for value in last.values())
    assert ("train/commitment" in last) == ("val/codebook_usage" in last) == (name == "vqvae")
    assert ("val/dice" if name == "unet" else "val/ssim") in last
    model, info = bundle.load(tiny_project.model)
    assert info.model.name == name
    output = model.predict(torch.rand(2, 1, 32, 32), torch.tensor([0, 1]))
    assert ("train/kl" in last) == (output.latent is not None and output.latent.logvar is not None)
    assert output.prediction.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_an_interrupted_codebook_model_resumes_bit_identically(
    tiny_project, tiny_store, tmp_path, monkeypatch, codebook
):
    """The checkpoint holds codes and moving averages; the draws for dead codes follow from the step."""
    from medgen.config import Project

    other = Project(tmp_path / "other")
    other.dataset.parent.mkdir(parents=True)
    other.dataset.symlink_to(tiny_store)
    run(other, "vqvae", codebook=codebook)

    batch, interruptions = Loader.batch, {3, 5}

    def interrupted_batch(self, position):
        if position in interruptions:
            interruptions.remove(position)
            raise KeyboardInterrupt
        return batch(self, position)

    monkeypatch.setattr(Loader, "batch", interrupted_batch)
    monkeypatch.setattr("medgen.training.state.TrainState.due", lambda self: (False, True))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_project, "vqvae", codebook=codebook)
    run(tiny_project, "vqvae", codebook=codebook)
    weights = load_file(tiny_project.model / "model.safetensors")
    assert weights.keys() >= {"quantizer.codebook", "quantizer.usage", "quantizer.sums"}
    resumed, uninterrupted = ((each.model / "model.safetensors").read_bytes() for each in (tiny_project, other))
    assert resumed == uninterrupted
