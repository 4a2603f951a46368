"""Every family goes through the one training loop: it learns, leaves a bundle, and survives being cut off."""

import math

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import Beta, Loss, Model, Phase, Tracking, Train, Weights
from medgen.models import MODELS, bundle
from medgen.tracking import history
from medgen.training import train
from medgen.training.loader import Loader

PICTURES, MASKS = Loss(weights=Weights(l1=1.0, ssim=0.5)), Loss(weights=Weights(bce=1.0, dice=1.0))
FAMILIES = {
    "autoencoder": (Model(name="autoencoder", base_channels=4, latent_channels=2), Loss(weights=Weights(mse=1.0))),
    "vae": (Model(name="vae", base_channels=4, latent_channels=8), Loss(weights=Weights(bce=1.0))),
    "cvae": (Model(name="cvae", base_channels=4, latent_channels=8), Loss(weights=Weights(sigma=1.0))),
    "spatial_vae": (Model(base_channels=4, latent_channels=2), PICTURES),
    "vqvae": (Model(name="vqvae", base_channels=4, latent_channels=4, num_codes=16), PICTURES),
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


def test_every_family_is_trained_here():
    assert FAMILIES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_learns_and_leaves_its_bundle(tiny_project, name):
    scratch = run(tiny_project, name)
    first, last = history(scratch)
    assert last["val/loss"] < first["val/loss"]
    assert all(math.isfinite(value) for value in last.values())
    assert ("train/kl" in last) == (name in ("vae", "cvae", "spatial_vae"))
    assert ("train/commitment" in last) == ("val/codebook_usage" in last) == (name == "vqvae")
    assert ("val/dice" if name == "unet" else "val/ssim") in last
    model, info = bundle.load(tiny_project.model)
    assert info.model.name == name
    output = model.predict(torch.rand(2, 1, 32, 32), torch.tensor([0, 1]))
    assert output.reconstruction.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_codebook_cut_off_in_mid_epoch_ends_bit_identical(tiny_project, tiny_store, tmp_path, monkeypatch, codebook):
    """Codes, their moving averages and the draws for dead ones are all in the checkpoint or follow from the step."""
    from medgen.config import Project

    other = Project(tmp_path / "other")
    other.dataset.parent.mkdir(parents=True)
    other.dataset.symlink_to(tiny_store)
    run(other, "vqvae", codebook=codebook)

    batch, cut = Loader.batch, {3, 5}

    def cutting(self, position):
        if position in cut:
            cut.remove(position)
            raise KeyboardInterrupt
        return batch(self, position)

    monkeypatch.setattr(Loader, "batch", cutting)
    monkeypatch.setattr("medgen.training.state.Job.save_is_due", lambda self: True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_project, "vqvae", codebook=codebook)
    run(tiny_project, "vqvae", codebook=codebook)
    weights = load_file(tiny_project.model / "model.safetensors")
    assert weights.keys() >= {"quantizer.codebook", "quantizer.usage", "quantizer.sums"}
    ours, theirs = ((project.model / "model.safetensors").read_bytes() for project in (tiny_project, other))
    assert ours == theirs
