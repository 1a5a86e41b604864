"""Low-rank adapters (LoRA, arXiv 2106.09685): attach, save, load, merge.

A frozen linear map W gets a trainable correction of rank r:  y = W x + (alpha / r) B A x.
A (r, in) starts random and B (out, r) at zero, so that training starts from exactly the base model,
yet B receives a gradient from the first step (were both zero, neither would). Files are PEFT's.

    python lora.py BASE ADAPTER OUT    writes the merged model as a Hugging Face folder
"""

import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import nn

import model as llama
from model import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its adapter, in float32, as bfloat16 would swallow small updates."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        out_features, in_features = linear.weight.shape
        device = linear.weight.device
        self.linear = linear
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # within ±1/√in, as PEFT's

    def forward(self, x):
        A = self.lora_A.to(x.dtype)
        B = (self.scale * self.lora_B).to(x.dtype)
        return self.linear(x) + F.linear(F.linear(x, A), B)  # (.., out)


def adapters(model):
    """The LoRALinear modules of a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}


def attach(model, rank=8, alpha=16, targets=TARGETS):
    """Freeze the model, drop any adapter it has, and put a fresh one on every nn.Linear whose own
    name, without its parents', is in `targets`; returns the model. InputError if there is no such
    layer."""
    remove(model).requires_grad_(False)
    found = set()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name in targets:
                setattr(parent, name, LoRALinear(child, rank, alpha))
                found.add(name)
    if not found:
        raise InputError(f"the model has no linear layer called {' or '.join(targets)}")
    model.lora_config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(found)}
    return model


def remove(model):
    """Put every LoRALinear's nn.Linear back into its place; returns the model."""
    for name, module in adapters(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.linear)
    return model


@torch.no_grad()
def merge(model):
    """Fold the adapters into the weights, W + (alpha/r) B A: the same outputs up to rounding."""
    for module in adapters(model).values():
        change = module.scale * module.lora_B @ module.lora_A  # (out, in)
        module.linear.weight += change  # added in float32, then rounded to W's type
    return remove(model)


# Files


def state(model):
    """The adapters' tensors under PEFT's names, A (r, in) and B (out, r) float32: not copies, so
    that writing into them sets the adapters."""
    tensors = {}
    for name, module in adapters(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B.detach()
    return tensors


def write_file(path, content):
    """Write bytes to `path`.part, flush them to the disk, then rename: `path` appears whole or not
    at all."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(model, folder, base=""):
    """Write adapter_config.json, then adapter_model.safetensors, which says what model it is
    for."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "bias": "none", "lora_dropout": 0.0, "inference_mode": True, **model.lora_config,
    }
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
    tensors = {key: value.cpu() for key, value in state(model).items()}
    about = {"base": llama.identity(model)}  # one entry: several would stand in random order
    write_file(folder / "adapter_model.safetensors", save_tensors(tensors, about))


def load(model, folder):
    """Give the model the adapter saved in `folder`, attaching or replacing; None takes it off.
    Returns the model.

    Raises InputError where a file is missing or damaged, uses a PEFT feature not implemented here,
    does not fit, or was saved by `save` for a model of other weights.
    """
    if folder is None:
        return remove(model)
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config = llama.read_json(path)
    saved, about = llama.read_tensors(weights)
    refuse_unsupported(path, config)
    identity = llama.identity(model)
    if about.get("base", identity) != identity:
        raise InputError(f"{weights}: was trained on a model of other weights than this one")

    # Before anything is attached: r could ask for terabytes.
    if not saved or any(config["r"] not in value.shape for value in saved.values()):
        raise InputError(f"{weights}: its tensors do not fit r {config['r']} in {path.name}")
    attach(model, config["r"], config["lora_alpha"], config["target_modules"])
    tensors = state(model)
    shapes = {key: value.shape for key, value in tensors.items()}
    if shapes != {key: value.shape for key, value in saved.items()}:
        raise InputError(f"{weights}: its tensors do not fit this model (another base model, rank "
                         "or set of layers?)")
    for key, value in tensors.items():
        value.copy_(saved[key])
    return model


def refuse_unsupported(path, config):
    """InputError, naming the setting, unless the PEFT configuration describes a plain LoRA."""
    known = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}
    for key in (*known, "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
                "modules_to_save", "layers_to_transform", "alora_invocation_tokens"):
        if config.get(key) and config[key] not in known.get(key, []):
            raise InputError(f"{path}: {key} {config[key]!r} is not supported")
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise InputError(f"{path}: r must be a positive integer and lora_alpha a positive number, "
                         f"not {r!r}, {alpha!r}")
    if not isinstance(targets, list) or not targets or any(name not in TARGETS for name in targets):
        raise InputError(f"{path}: target_modules {targets!r} must be a list out of "
                         f"{', '.join(TARGETS)}")


WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack",
           "*.onnx")  # which a merge replaces


def main():
    """Merge an adapter into its base model and write the Hugging Face folder, in float32."""
    if len(sys.argv) != 4:
        sys.exit("usage: python lora.py BASE ADAPTER OUT (folders; OUT is made)")
    base, adapter, out = map(Path, sys.argv[1:])
    if out.exists() and any(out.iterdir()) or base.resolve() in out.resolve().parents:
        raise InputError(f"{out}: is not empty, or lies in {base}: choose a new folder")
    merged = merge(load(llama.load(base), adapter))

    # All that is no weight is copied; the folder gets its name when it is complete.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        whole = Path(work) / "whole"
        shutil.copytree(base, whole, ignore=shutil.ignore_patterns(*WEIGHTS))
        config = llama.read_json(base / "config.json") | {"dtype": "float32"}
        config.pop("torch_dtype", None)  # dtype's old name
        (whole / "config.json").write_text(json.dumps(config, indent=2))
        try:
            save_file(merged.state_dict(), whole / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{out}: cannot be written ({error})") from None
        os.replace(whole, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    llama.run(main)
