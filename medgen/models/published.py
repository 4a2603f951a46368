"""Published weights of autoencoders, converted to the state dict of `medgen.models.autoencoder_kl.AutoencoderKL`.

A folder of diffusers has config.json and safetensors; MedVAE publishes checkpoints of latent diffusion. Neither runs
code: checkpoints are read as tensors only.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medgen.errors import UserError
from medgen.io import parsing

CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # of a folder of diffusers
# keys of config.json that change what the weights mean, with the only value that is read
READ_ONLY = {"act_fn": "silu", "mid_block_add_attention": True}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def read_diffusers(folder: Path, groups: int) -> dict[str, Tensor]:
    """Tensors of an AutoencoderKL of diffusers, for a network whose norms have that many groups.

    Raises:
        UserError: a file is missing or damaged, or the architecture is another one.
    """
    path = folder / CONFIG
    with parsing(path, "save_pretrained"):
        config: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        found = {key: config.get(key, value) for key, value in READ_ONLY.items()}
        found |= {key: sorted(set(config.get(key, [kind]))) for key, kind in BLOCKS.items()}
        found |= {"_class_name": config.get("_class_name"), "norm_num_groups": config.get("norm_num_groups", 32)}
    expected = READ_ONLY | {key: [kind] for key, kind in BLOCKS.items()}
    expected |= {"_class_name": "AutoencoderKL", "norm_num_groups": groups}
    if wrong := [
        f"{key}: found {found[key]}, expected {value}" for key, value in expected.items() if found[key] != value
    ]:
        raise UserError(f"{path}: {'; '.join(wrong)}; only this architecture of diffusers is read")
    return read_file(folder / DIFFUSERS_WEIGHTS)


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a checkpoint that holds nothing but tensors and plain values.

    Raises:
        UserError: the file is missing or damaged, or a checkpoint holds other objects.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected the weights beside {CONFIG}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(
            f"{path}: not readable as tensors ({str(error).splitlines()[0]}); expected tensors and plain values"
        ) from None


def from_published(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under the names and in the shapes of an `AutoencoderKL` with the state dict `own`.

    Known are diffusers' names, those of its first versions, and those of latent diffusion, which MedVAE uses, with
    MedVAE's low-rank additions (LoRA). What the conversion leaves is the same function of grey images:
    the three input channels that a grey image would fill are summed, the three output channels averaged.
    """
    merged = _merge_lora({name: tensor.float() for name, tensor in tensors.items()})
    num_levels = len({name.split(".")[2] for name in merged if name.startswith("decoder.up.")})
    found = {}
    for name, tensor in merged.items():
        if name.startswith(("channel_ds.", "channel_proj.", "loss.")):
            continue  # MedVAE's projection for classifiers, and discriminators; no image passes them
        name = _diffusers_name(name, num_levels)
        if ".attentions." in name and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]  # a 1×1 convolution is a linear layer
        found[name] = tensor
    for conv in ("quant_conv", "post_quant_conv"):  # some models of diffusers have none
        if f"{conv}.weight" in own and f"{conv}.weight" not in found:
            size = len(own[f"{conv}.weight"])
            found |= {f"{conv}.weight": torch.eye(size)[:, :, None, None], f"{conv}.bias": torch.zeros(size)}
    if own["encoder.conv_in.weight"].shape[1] == 1 and "encoder.conv_in.weight" in found:
        found["encoder.conv_in.weight"] = found["encoder.conv_in.weight"].sum(dim=1, keepdim=True)
    if own["decoder.conv_out.weight"].shape[0] == 1:
        last = [name for name in ("decoder.conv_out.weight", "decoder.conv_out.bias") if name in found]
        found |= {name: found[name].mean(dim=0, keepdim=True) for name in last}
    return found


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LATENT_DIFFUSION = {
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
}


def _diffusers_name(name: str, num_levels: int) -> str:
    """diffusers' name of a tensor; `num_levels` are those of a decoder of latent diffusion, which counts backwards."""
    part, _, inner = name.partition(".")
    for old, new in _OLD_ATTENTION.items():
        inner = inner.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    for old, new in _LATENT_DIFFUSION.items():
        if inner.startswith(f"{old}."):
            inner = new + inner[len(old) :]
    if inner.startswith(("down.", "up.")):
        direction, level, kind, rest = inner.split(".", 3)
        number = int(level) if direction == "down" else num_levels - 1 - int(level)
        inner = f"{direction}_blocks.{number}."
        inner += f"resnets.{rest}" if kind == "block" else f"{kind}rs.0.{rest}"  # downsample -> downsamplers
        inner = inner.replace("nin_shortcut", "conv_shortcut")
    return f"{part}.{inner}"


def _merge_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in which low-rank additions of convolutions are added to the weights they belong to."""
    down = {name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")}
    merged = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        owner = layer.removesuffix(".conv")
        if layer.endswith((".lora_down", ".lora_up")):
            continue
        if owner in down and layer.endswith(".conv"):
            if key == "weight":
                up, low = tensors[f"{owner}.lora_up.weight"], tensors[f"{owner}.lora_down.weight"]
                tensor = tensor + torch.einsum("or,rikl->oikl", up[:, :, 0, 0], low)
            name = f"{owner}.{key}"
        merged[name] = tensor
    return merged
