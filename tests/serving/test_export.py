"""`medgen export`: other programs compute what the model computes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from medgen.config import Model, Preprocess
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.serving import export as exporting
from medgen.serving.export import export
from medgen.training.initial_weights import load_weights

INFO = bundle.BundleInfo(
    Model(), Preprocess(image_size=16, clahe_tiles=2), (1, 16, 16), ("a", "b", "c"), "d", "r", torch.__version__
)


KINDS = {"age": {"kind": "number", "low": 0, "high": 100}, "lungs": {"kind": "mask"}}
SPACE = ConditionSpace.from_rows(Preprocess(conditions=KINDS), [])


def save(folder, name, space=None):
    torch.manual_seed(0)
    params = Model(name=name, base_channels=4, latent_channels=4)
    model = build_model(params, (1, 16, 16), 3, 2, space).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # layers that start at zero count too
    fields = () if space is None else space.fields
    bundle.save(folder / "model", model, dataclasses.replace(INFO, model=params, conditions=fields))
    return model


@pytest.mark.parametrize(
    ("name", "space"), [("cvae", None), ("cvae", SPACE), ("unet", None), ("vqvae", None)]
)  # labels, unknown conditions, masks, codes
def test_onnx_runtime_computes_what_torch_computes(name, space, tmp_path):
    """For another number of images than the export's example, and the labels of a conditional model."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = save(tmp_path, name, space)
    paths = export(tmp_path, tmp_path / "out", format="onnx")
    written = ["model.json", "model.onnx"] if name == "unet" else ["decoder.onnx", "encoder.onnx", "model.json"]
    assert [path.name for path in paths] == written
    assert json.loads((tmp_path / "out" / "model.json").read_text())["image_shape"] == [1, 16, 16]
    labels = {"label": np.array([0, 2, 1])} if name == "cvae" else {}

    def run(part, **inputs):
        session = runtime.InferenceSession(tmp_path / "out" / f"{part}.onnx", providers=["CPUExecutionProvider"])
        return [torch.from_numpy(found) for found in session.run(None, inputs | labels)]

    image, label = torch.rand(3, 1, 16, 16), torch.tensor([0, 2, 1])
    with torch.no_grad():
        if name == "unet":
            expected = model.predict(image).prediction
            torch.testing.assert_close(run("model", image=image.numpy())[0], expected, rtol=1e-3, atol=1e-4)
            return
        latent = model.encode(image, label)
        found, *codes = run("encoder", image=image.numpy())
        torch.testing.assert_close(found, latent.mean, rtol=1e-3, atol=1e-4)
        assert [torch.equal(one, latent.codes) for one in codes] == [True] * (name == "vqvae")
        decoded = model.decode(latent.mean, label)
    torch.testing.assert_close(run("decoder", latent=latent.mean.numpy())[0], decoded, rtol=1e-3, atol=1e-4)


def test_a_folder_of_diffusers_gives_the_model_back(tmp_path):
    model, info = save(tmp_path, "autoencoder_kl"), bundle.load_info(tmp_path / "model")
    export(tmp_path, tmp_path / "out", format="diffusers")
    again = build_model(info.model, (1, 16, 16), 0)
    assert load_weights(again, "out", tmp_path / "out", strict=True) == []
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_family_is_no_architecture_of_diffusers(tmp_path):
    save(tmp_path, "vqvae")
    with pytest.raises(UserError, match=r"vqvae is no architecture of diffusers; expected autoencoder_kl"):
        export(tmp_path, tmp_path / "out", format="diffusers")
    assert not list((tmp_path / "out").glob("*"))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    save(tmp_path, "vae")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxscript; .*pip install medgen\[onnx\]"):
        export(tmp_path, tmp_path / "out", format="onnx")
