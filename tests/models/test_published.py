"""Published autoencoders: the same function as in diffusers, from each layout in which weights are published.

The files are small ones of the same layouts; the published ones have up to 335 MB.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medgen.config import Loss, Model, Phase, Preprocess, Tracking, Train
from medgen.datasets import weights
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.models.published import from_published, read_diffusers, read_file
from medgen.serving.export import export
from medgen.training import train
from medgen.training.initial_weights import load_weights

SIZES = Model(name="autoencoder_kl", base_channels=4, max_channels=8, latent_size=8, latent_channels=2)
CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
}
# of diffusers 0.42.1 with the weights of `filled`: first mean, log-variance and decoded values of `wave(2, 3, 32, 32)`
MEAN = [-0.14749, -0.13606, -0.12934, -0.1297, -0.14422, -0.13469]
LOGVAR = [-0.05607, -0.06845, -0.07694, -0.07541, -0.05985, -0.06936]
DECODED = [-0.22563, -0.20253, -0.18185, -0.17394, -0.18346, -0.19575]


def wave(*shape, phase=0.0):
    count = int(torch.Size(shape).numel())
    return (torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase)).float().reshape(shape)


def filled(state):
    """Tensors of the same names and shapes with values that every machine computes alike."""
    return {name: 0.3 * wave(*state[name].shape, phase=i) for i, name in enumerate(sorted(state))}


def build(channels=3):
    return build_model(SIZES, (channels, 32, 32), 0).eval()


@pytest.fixture(scope="module")
def tensors():
    return filled(build().state_dict())


@pytest.fixture
def model(tensors):
    network = build()
    network.load_state_dict(tensors)
    return network


IMAGE = (wave(2, 3, 32, 32) + 1) / 2


def latent_diffusion_names(tensors):
    """The names and shapes of latent diffusion, written down from its source."""
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{2 - int(match[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{2 - int(match[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("conv_norm_out", "norm_out").replace("group_norm", "norm").replace("to_out.0", "proj_out")
        new = re.sub(r"to_([qkv])", r"\1", new)
        is_attention = "attn_1" in new and tensor.dim() == 2
        renamed[new] = tensor[:, :, None, None] if is_attention else tensor
    return renamed


def test_values_are_those_of_diffusers(model):
    with torch.no_grad():
        latent = model.encode(IMAGE)
        decoded = model.decoder(model.post_quant_conv(latent.mean))
    torch.testing.assert_close(latent.mean.flatten()[:6], torch.tensor(MEAN), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(latent.logvar.flatten()[:6], torch.tensor(LOGVAR), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(decoded.flatten()[:6], torch.tensor(DECODED), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_diffusers_reads_an_export_computes_the_same_and_converts_names_alike(model, tensors, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    preprocess = Preprocess(image_size=32, channels=3, clahe_tiles=2)
    bundle.save(tmp_path / "model", model, bundle.BundleInfo(SIZES, preprocess, (3, 32, 32), (), "d", "r", "2"))
    export(tmp_path, tmp_path / "out", format="diffusers")
    other = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    assert all(other.config[key] == value for key, value in CONFIG.items() if key != "_class_name")
    with torch.no_grad():
        posterior = other.encode(2 * IMAGE - 1).latent_dist
        latent = model.encode(IMAGE)
        torch.testing.assert_close(latent.mean, posterior.mean)
        torch.testing.assert_close(latent.logvar, posterior.logvar)
        decoded = ((other.decode(posterior.mean).sample + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(model.decode(latent.mean), decoded)
    converted = convert_ldm_vae_checkpoint(latent_diffusion_names(tensors), CONFIG)
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("layout", ["diffusers", "old diffusers", "latent diffusion", "LoRA"])
def test_every_layout_gives_the_same_weights(tensors, tmp_path, layout):
    path = tmp_path / "weights.safetensors"
    given = dict(tensors)
    if layout == "old diffusers":  # as sd-vae-ft-mse is published
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        given = {re.sub(r"to_([qkv]|out\.0)", lambda match: old[match[0]], name): x for name, x in tensors.items()}
    if layout in ("latent diffusion", "LoRA"):
        path = tmp_path / "weights.ckpt"
        given = latent_diffusion_names(tensors) | {"channel_proj.weight": torch.ones(2, 2, 1, 1)}
    if layout == "LoRA":  # as MedVAE publishes some: base weights and an addition of rank 2 to each convolution
        for name in [key for key in given if re.search(r"(conv\d|nin_shortcut|\.[qkv])\.weight", key)]:
            layer, weight = name.removesuffix(".weight"), given.pop(name)
            up, down = wave(len(weight), 2, 1, 1), wave(2, *weight.shape[1:], phase=1)
            given |= {f"{layer}.conv.bias": given.pop(f"{layer}.bias"), f"{layer}.lora_up.weight": up}
            given |= {f"{layer}.lora_down.weight": down}
            given[f"{layer}.conv.weight"] = weight - torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": given, "epoch": 3}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, path)
    found = from_published(read_file(path), build().state_dict())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_a_model_of_grey_images_is_the_same_function_as_one_of_three_equal_channels(model, tensors):
    grey = build(channels=1)
    grey.load_state_dict(from_published(tensors, grey.state_dict()))
    image = IMAGE[:, :1]
    with torch.no_grad():
        latent = model.encode(image.expand(-1, 3, -1, -1)).mean
        torch.testing.assert_close(grey.encode(image).mean, latent)
        colours = model.decoder(model.post_quant_conv(latent))
        torch.testing.assert_close(grey.decoder(grey.post_quant_conv(latent)), colours.mean(dim=1, keepdim=True))


def test_an_autoencoder_without_quant_convolutions_gets_the_identity(tensors):
    given = {name: tensor for name, tensor in tensors.items() if "quant_conv" not in name}
    found = from_published(given, build().state_dict())
    assert torch.equal(found["quant_conv.weight"][:, :, 0, 0], torch.eye(4))
    assert torch.equal(found["post_quant_conv.bias"], torch.zeros(2))


def write_diffusers(folder: Path, tensors, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_folder_of_diffusers_is_a_start(tensors, tmp_path):
    folder = write_diffusers(tmp_path / "vae", tensors)
    assert load_weights(model := build(), "vae", folder, strict=True) == []
    assert torch.equal(model.state_dict()["encoder.conv_in.weight"], tensors["encoder.conv_in.weight"])
    with pytest.raises(UserError, match=r"set model\.name: autoencoder_kl"):
        load_weights(build_model(Model(base_channels=4), (1, 32, 32), 0), "vae", folder, strict=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 2}, "norm_num_groups: found 2, expected 4"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name: found AutoencoderTiny"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
    ],
)
def test_another_architecture_is_refused(tensors, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_diffusers(write_diffusers(tmp_path / "vae", tensors, **changes), 4)


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hook": print}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt: not readable as tensors"):
        read_file(tmp_path / "evil.ckpt")


def test_a_training_starts_from_fetched_weights(tensors, tiny_project, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    torch.save({"state_dict": latent_diffusion_names(tensors)}, tmp_path / "cache" / "small.ckpt")
    digest = weights.hash_file(tmp_path / "cache" / "small.ckpt")
    size = (tmp_path / "cache" / "small.ckpt").stat().st_size
    entry = weights.WeightsFile("https://example.org/small.ckpt", digest, size, "tests", model={"latent_channels": 2})
    monkeypatch.setitem(weights.WEIGHTS, "small", entry)
    one = Phase(name="one", epochs=1, learning_rate=1e-3)

    def run(source, phase=one):
        section = Train(batch_size=8, subset=8, phases=(phase,), init_from=source, freeze="encoder")
        return train.run(tiny_project, model=SIZES, loss=Loss(), train=section, tracking=Tracking(enabled=False))

    run("weights:/small")
    model, info = bundle.load(tiny_project.model)
    assert info.init_from == f"weights:/small#sha256={digest}"
    assert torch.equal(model.state_dict()["quant_conv.weight"], tensors["quant_conv.weight"])
    run("weights:/small", one.model_copy(update={"epochs": 0, "learning_rate": 2e-3}))
    model, _ = bundle.load(tiny_project.model)
    grey = from_published(tensors, model.state_dict())
    assert all(torch.equal(tensor, grey[name]) for name, tensor in model.state_dict().items()), "as they are"
    with pytest.raises(UserError, match="did you mean 'small'"):
        run("weights:/smal")
    with pytest.raises(UserError, match="expected a folder"):
        run("cache/small.ckpt")
