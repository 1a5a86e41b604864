"""Low-rank adapters (LoRA, arXiv 2106.09685): attach, save, load, merge.

A frozen linear map W gets a trainable correction of rank r:  y = W x + (alpha / r) B A x.
A (r, in) starts random and B (out, r) at zero, so that training starts from exactly the base model, yet B receives a
gradient from the first step (were both zero, neither would). Files are PEFT's.

    python lora.py BASE ADAPTER OUT    writes the merged model as a Hugging Face folder
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import nn

import model as llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """An nn.Linear without bias, frozen, and its adapter, in float32: bfloat16 would swallow small updates."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight, self.scale = linear.weight, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within ±1/√in, as nn.Linear and PEFT do

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), (self.scale * self.lora_B).to(x.dtype)
        return F.linear(x, self.weight) + F.linear(F.linear(x, A), B)  # (.., out)


def adapters(model):
    """The LoRALinear modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model, rank=8, alpha=16, targets=TARGETS):
    """Freeze the model, drop any adapter it has, and put a fresh one on every nn.Linear whose own name, without its
    parents', is in `targets`; returns the model. Raises ValueError if there is no such layer."""
    detach(model).requires_grad_(False)
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, nn.Linear) and name in targets]
    if not found:
        raise ValueError(f"the model has no linear layer called {' or '.join(targets)}")
    for parent, name, linear in found:
        setattr(parent, name, LoRALinear(linear, rank, alpha))
    model.lora_config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({name for _, name, _ in found})}
    return model


def state(model):
    """The adapters' tensors under PEFT's names, A (r, in) and B (out, r) float32: not copies, so that writing into them
    sets the adapters."""
    return {f"base_model.model.{name}.{key}.weight": getattr(module, key).detach()
            for name, module in adapters(model).items() for key in ("lora_A", "lora_B")}


def write_file(path, content):
    """Write to `path`.part, flush it to the disk, then rename: `path` appears whole or not at all, whatever happens."""
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
    """Write adapter_config.json, then adapter_model.safetensors; each of the two appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
              "lora_dropout": 0.0, "inference_mode": True, **model.lora_config}
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
    tensors = {key: value.cpu() for key, value in state(model).items()}
    write_file(folder / "adapter_model.safetensors", save_tensors(tensors, {"format": "pt"}))


def load(model, folder):
    """Give the model the adapter saved in `folder`, attaching or replacing; None takes it off. Returns the model.

    Raises ValueError where a file is missing or damaged, uses a PEFT feature not implemented here, or does not fit.
    """
    if folder is None:
        return detach(model)
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config, saved = llama.read_json(path), llama.read_tensors(weights)
    refuse_unsupported(path, config)
    if not saved or any(config["r"] not in value.shape for value in saved.values()):  # r could ask for terabytes
        raise ValueError(f"{weights}: its tensors do not fit r {config['r']} in {path.name}")
    attach(model, config["r"], config["lora_alpha"], config["target_modules"])
    own = state(model)
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in saved.items()}:
        raise ValueError(f"{weights}: its tensors do not fit this model (another base model, rank or set of layers?)")
    for key, value in own.items():
        value.copy_(saved[key])
    return model


def refuse_unsupported(path, config):
    """ValueError, naming the setting, unless the PEFT configuration describes a plain LoRA."""
    known = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}  # pissa alters the base
    for key in (*known, "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
                "layers_to_transform", "alora_invocation_tokens"):
        if config.get(key) and config[key] not in known.get(key, []):
            raise ValueError(f"{path}: {key} {config[key]!r} is not supported")
    r, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise ValueError(f"{path}: r must be a positive integer and lora_alpha a positive number, not {r!r}, {alpha!r}")
    if not isinstance(targets, list) or not targets or any(target not in TARGETS for target in targets):
        raise ValueError(f"{path}: target_modules {targets!r} must be a list out of {', '.join(TARGETS)}")


def detach(model):
    """Turn every LoRALinear back into the nn.Linear it wraps; returns the model."""
    for name, module in adapters(model).items():
        linear = nn.Linear(*module.weight.shape[::-1], bias=False, device="meta")
        linear.weight = module.weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


@torch.no_grad()
def merge(model):
    """Fold the adapters into the weights, W + (alpha/r) B A: the same outputs up to rounding, a plain model again."""
    for module in adapters(model).values():
        module.weight += module.scale * module.lora_B @ module.lora_A  # (out, in); in float32, then rounded to W's type
    return detach(model)


def main():
    """Merge an adapter into its base model and write the Hugging Face folder."""
    if len(sys.argv) != 4:
        sys.exit("usage: python lora.py BASE ADAPTER OUT")
    base, adapter, out = map(Path, sys.argv[1:])
    try:
        if list(out.glob("model*.safetensors")) or (out / "config.json").exists():
            raise ValueError(f"{out}: holds another model: choose an empty folder")
        merged = merge(load(llama.load(base), adapter))
        out.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (base / name).exists():
                shutil.copy(base / name, out / name)
        config = llama.read_json(base / "config.json") | {"dtype": "float32"}
        config.pop("torch_dtype", None)  # dtype's old name
        save_file(merged.state_dict(), out / "model.safetensors.part", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config, indent=2))
        os.replace(out / "model.safetensors.part", out / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:500]}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
