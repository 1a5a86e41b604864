"""A LLaMA decoder in full, and how its published weights are read.

Notable:
- `forward` takes explicit positions and an explicit mask, which is all that a tree of tokens needs (see dmpo.py).
- It returns hidden states: logits are needed only where a response token is predicted (see dmpo.py).
- Parameter names are Hugging Face's, so `load_state_dict(strict=True)` is the whole loader.
- Shapes: B rows, T new tokens, S tokens attended to (past and new), D model width, V vocabulary,
  H query heads, G key/value heads (each serves H/G query heads), d width of a head.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The sizes of a LLaMA, under the names of Hugging Face's config.json."""
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # d
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama 3.1's four numbers, or None
    max_position_embeddings: int
    tie_word_embeddings: bool


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight (arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (B, T, 1)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return x * scale.to(x.dtype) * self.weight


def rope_frequencies(config, device):
    """Rotations per position, in radians, of the d/2 pairs of a head's dimensions -> (d/2,) float32.

    arXiv 2104.09864; with `rope_scaling`, slow rotations are slowed further as Llama 3.1 does for long contexts.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_theta ** (pairs / config.head_dim)  # (d/2,)
    if config.rope_scaling:
        scale = config.rope_scaling
        turns = scale["original_max_position_embeddings"] * freqs / (2 * math.pi)  # whole turns over the old context
        low, high = scale["low_freq_factor"], scale["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: a slow one
        freqs = keep * freqs + (1 - keep) * freqs / scale["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + d/2]) of each head by the angles of its position: x (B, T, heads, d)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, bias):
    """softmax(q kᵀ / √d + bias) v: q (B, H, T, d), k, v (B, G, S, d), bias (B, 1, T, S) of 0 and -inf -> (B, H, T, d).

    For training on a CPU it is written out: the fused kernel's backward is several times slower there.
    """
    (B, H, T, d), G = q.shape, k.shape[1]
    if q.is_cuda:  # CUDA's fused kernel takes a mask only with as many key heads as query heads
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=not q.is_cuda)
    q = (q * d ** -0.5).reshape(B, G, H // G * T, d)  # the query heads of one key head, one below the other
    weights = torch.softmax((q @ k.transpose(-1, -2)).view(B, H, T, -1).add_(bias), dim=-1)  # (B, H, T, S)
    return (weights.view(B, G, H // G * T, -1) @ v).view(B, H, T, d)


class Attention(nn.Module):
    """Self-attention with grouped queries (arXiv 2305.13245) and rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, bias, past):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, d)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                    # (B, G, T, d)
        if past:  # this layer's keys and values of the tokens before
            k, v = (torch.cat((old.expand(B, -1, -1, -1), new), dim=2)  # (B, G, S, d)
                    for old, new in zip(past, (k, v)))
        elif past is not None:  # an empty list, to be filled
            past.extend((k, v))
        return self.o_proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): a gated feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, bias, past):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids in, hidden states out; `logits` maps any of them to the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: keep only each layer's input, compute the rest again for backward
        self.model = nn.ModuleDict({  # the nesting of Hugging Face's parameter names
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The vocabulary projection's weight (V, D): the embedding itself where the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(self, ids, positions=None, mask=None, past=None):
        """Hidden states (B, T, D) after the last norm.

        ids (B, T) int; positions (B, T) int, default 0, 1, .. after the past; mask (B, T, S) bool, True where a token
        may attend, default causal; past: None, or a list for each layer. Empty lists are filled with the layer's keys
        and values; filled ones are attended to before the new tokens (one past row serves all rows) and left unchanged.
        """
        B, T = ids.shape
        past = past or [None] * len(self.model.layers)
        S = T + (past[0][0].shape[2] if past[0] else 0)
        if positions is None:
            positions = torch.arange(S - T, S, device=ids.device).expand(B, T)
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(S - T).expand(B, T, S)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        angles = positions[..., None] * rope_frequencies(self.config, ids.device)  # (B, T, d/2)
        cos, sin = (f(angles)[:, :, None].to(x.dtype) for f in (torch.cos, torch.sin))  # (B, T, 1, d/2)
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, -math.inf)[:, None]
        for layer, layer_past in zip(self.model.layers, past):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, bias, layer_past, use_reentrant=False)
            else:
                x = layer(x, cos, sin, bias, layer_past)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden (.., D) -> unnormalised log-probabilities of the next token (.., V)."""
        return F.linear(hidden, self.head)


def read_config(folder):
    """The Config in a Hugging Face folder's config.json; ValueError names any setting not implemented here."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the new and the old place
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: the rope settings are not a JSON object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for setting, value, known in (
        ("model_type", raw.get("model_type"), ["llama"]),
        ("hidden_act", raw.get("hidden_act", "silu"), ["silu"]),
        ("rope type", rope_type, ["default", "llama3"]),
        ("attention_bias", raw.get("attention_bias", False), [False]),
        ("mlp_bias", raw.get("mlp_bias", False), [False]),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)), [1]),
        ("quantization_config", raw.get("quantization_config"), [None]),
    ):
        if value not in known:
            raise ValueError(f"{path}: {setting} {value!r} is not supported, only {' or '.join(map(repr, known))}")

    def number(key, default=None, source=raw, kind=int):
        value = source.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2 ** 40:
            raise ValueError(f"{path}: {key} is {value!r}, not a positive {'number' if kind is float else 'integer'}")
        return kind(value)

    heads, width = number("num_attention_heads"), number("hidden_size")
    config = Config(
        vocab_size=number("vocab_size"), hidden_size=width, intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads), head_dim=number("head_dim", width // heads),
        rms_norm_eps=number("rms_norm_eps", 1e-6, kind=float),
        rope_theta=number("rope_theta", raw.get("rope_theta", 10000.0), rope, float),
        rope_scaling={key: number(key, source=rope, kind=float) for key in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        )} if rope_type == "llama3" else None,
        max_position_embeddings=number("max_position_embeddings", 2048),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(f"{path}: {heads} query heads do not share {config.num_key_value_heads} key/value heads "
                         f"evenly, or the head width {config.head_dim} is odd")
    return config


def read_json(path):
    """The JSON object in a file; ValueError, in one line, where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_tensors(path):
    """All tensors of one safetensors file by name; ValueError, in one line, where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def load(path, device="cpu", dtype=torch.float32):
    """A Llama with the weights of the Hugging Face folder `path` (config.json, one or several safetensors files).

    The weights are frozen: adapters are what is trained here. Raises ValueError for an unsupported setting, a damaged
    file, or a tensor missing, left over or misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = {}
    for file in sorted(folder.glob("model-*-of-*.safetensors")) or [folder / "model.safetensors"]:
        weights.update((key, tensor.to(device, dtype)) for key, tensor in read_tensors(file).items()
                       if not key.endswith("rotary_emb.inv_freq"))  # which rope_frequencies computes
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some checkpoints store the embedding twice
    layers = len({key.split(".")[2] for key in weights if key.startswith("model.layers.")})
    if layers != config.num_hidden_layers:  # first, as a damaged config may ask for millions
        raise ValueError(f"{folder}: weights and config.json disagree: {layers} layers, {config.num_hidden_layers}")
    try:
        with torch.device("meta"):
            model = Llama(config)
        model.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:  # many lines, the first of which says only that there are some
        details = " ".join(str(error).split("\n", 1)[-1].split())[:400]
        raise ValueError(f"{folder}: weights and config.json disagree: {details}") from None
    return model.requires_grad_(False).eval()
