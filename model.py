"""A LLaMA decoder in full, how its published weights are read, and the machine it runs on.

Notable:
- `forward` takes explicit positions and an explicit mask: all that a tree of tokens needs
  (dmpo.py).
- It returns hidden states: logits are needed only where a response token is predicted (dmpo.py).
- Parameter names are Hugging Face's, so `load_state_dict(strict=True)` translates nothing.
- Mistral and Qwen2 are LLaMAs, too, but for a window on attention and a bias on q, k and v.
- Shapes: B rows, T tokens, D model width, V vocabulary, H query heads, G key/value heads (each
  serves H/G query heads), d width of a head.
"""

import ctypes
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
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
    max_position_embeddings: int  # the longest text; of a sliding window, its width
    tie_word_embeddings: bool
    qkv_bias: bool = False  # Qwen2's


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
    """Rotations per position, in radians, of the d/2 pairs of a head's dimensions -> (d/2,)
    float32.

    arXiv 2104.09864; with `rope_scaling`, slow rotations are slowed as Llama 3.1 does for long
    texts.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_theta ** (pairs / config.head_dim)  # (d/2,)
    if config.rope_scaling:
        scale = config.rope_scaling
        turns = scale["original_max_position_embeddings"] * freqs / (2 * math.pi)
        low, high = scale["low_freq_factor"], scale["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast pair, left alone; 0: slow
        freqs = keep * freqs + (1 - keep) * freqs / scale["factor"]
    return freqs


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + d/2]) of each head by its position's angles: x (B, T, heads,
    d)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, bias):
    """softmax(q kᵀ / √d + bias) v -> (B, H, T, d).

    q (B, H, T, d); k, v (B, G, T, d); bias (B, 1, T, T), 0 where a token may attend, else -inf.
    """
    shared = q.shape[1] // k.shape[1]  # query heads to a key head
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)  # (B, H, T, d)
    if q.is_cuda or not torch.is_grad_enabled():  # on a CPU its backward is several times slower
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias  # (B, H, T, T)
    return torch.softmax(scores, dim=-1) @ v


class Attention(nn.Module):
    """Self-attention with grouped queries (arXiv 2305.13245) and rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, bias):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, d)
        k = rotate(k, cos, sin).transpose(1, 2)  # (B, G, T, d)

        # Scores (B, H, T, T) grow with the square of T: large ones are computed again for backward.
        if T > 512 and torch.is_grad_enabled():
            mixed = checkpoint(attend, q, k, v, bias, use_reentrant=False)  # (B, H, T, d)
        else:
            mixed = attend(q, k, v, bias)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


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
    """Attention, then the MLP, each added to what it read."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, bias):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids in, hidden states out; `logits` maps any of them to the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: keep a layer's input, compute the rest twice
        self.model = nn.ModuleDict({  # the nesting of Hugging Face's parameter names
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The vocabulary projection's weight (V, D): the embedding itself where the two are
        tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, ids, positions=None, mask=None):
        """Hidden states (B, T, D) after the last norm.

        ids (B, T) int; positions (B, T) int, default 0, 1, ..; mask (B, T, T) bool, True where a
        token (row) may attend to another (column), default causal.
        """
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril().expand(B, T, T)

        # The angles of the positions and the mask are the same for all layers.
        x = self.model.embed_tokens(ids)  # (B, T, D)
        angles = positions[..., None] * rope_frequencies(self.config, ids.device)  # (B, T, d/2)
        cos = angles.cos()[:, :, None].to(x.dtype)  # (B, T, 1, d/2)
        sin = angles.sin()[:, :, None].to(x.dtype)
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~mask, -math.inf)[:, None]  # (B, 1, T, T)

        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, bias, use_reentrant=False)
            else:
                x = layer(x, cos, sin, bias)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden (.., D) -> unnormalised log-probabilities of the next token (.., V)."""
        return F.linear(hidden, self.head)


# Reading a Hugging Face folder


class InputError(Exception):
    """What came from outside (a file, an option) cannot be used: `run` shows it as one line."""


def read_config(folder):
    """The Config in a folder's config.json; InputError names any setting not implemented here."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the new and the old place
    if not isinstance(rope, dict):
        raise InputError(f"{path}: the rope settings are not a JSON object")
    refuse_unsupported(path, raw, rope)

    # Sizes that a config may leave out follow from others, or are transformers' defaults.
    sizes = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6,
             "rope_theta": 10000.0, "max_position_embeddings": 2048}
    sizes |= {key: value for key, value in {**raw, **rope}.items() if value is not None}

    def number(key, kind=int):
        value = sizes.get(key)
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not fits or not 0 < value < 2 ** 40:
            raise InputError(f"{path}: {key} is {value!r}, not a positive {kind.__name__}")
        return kind(value)

    heads, width, longest = map(number, (
        "num_attention_heads", "hidden_size", "max_position_embeddings"))
    sizes.setdefault("head_dim", width // heads)
    scaling = None
    if "llama3" in (rope.get("rope_type"), rope.get("type")):
        scaling = {key: number(key, float) for key in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

    # A window that attention slides over the text: no prompt may be longer than it (data.encode).
    if raw["model_type"] == "mistral" or raw.get("use_sliding_window"):
        sizes["sliding_window"] = raw.get("sliding_window", 4096) or longest
        longest = min(longest, number("sliding_window"))
    config = Config(
        vocab_size=number("vocab_size"),
        hidden_size=width,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads"),
        head_dim=number("head_dim"),
        rms_norm_eps=number("rms_norm_eps", float),
        rope_theta=number("rope_theta", float),
        rope_scaling=scaling,
        max_position_embeddings=longest,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=raw["model_type"] == "qwen2",
    )
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(f"{path}: {heads} query heads do not share {config.num_key_value_heads} "
                         f"key/value heads evenly, or the head width {config.head_dim} is odd")
    return config


def refuse_unsupported(path, raw, rope):
    """InputError, naming the setting, unless a config describes a decoder as it stands above."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for setting, value, known in (
        ("model_type", raw.get("model_type"), ["llama", "mistral", "qwen2"]),
        ("hidden_act", raw.get("hidden_act", "silu"), ["silu"]),
        ("rope type", rope_type, ["default", "llama3"]),
        ("attention_bias", raw.get("attention_bias", False), [False]),
        ("mlp_bias", raw.get("mlp_bias", False), [False]),
        ("partial_rotary_factor", (raw | rope).get("partial_rotary_factor", 1), [1]),
        ("quantization_config", raw.get("quantization_config"), [None]),
        ("tie_word_embeddings", raw.get("tie_word_embeddings", False), [True, False]),
    ):
        if value not in known:
            allowed = " or ".join(map(repr, known))
            raise InputError(f"{path}: {setting} {value!r} is not supported, only {allowed}")


def read_json(path):
    """The JSON object in a file; InputError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_tensors(path):
    """(tensors by name, the file's metadata) of a safetensors file; InputError where it is no such
    file."""
    if not Path(path).exists():
        pickled = any(Path(path).parent.glob("*.bin"))
        raise InputError(f"{path}: no such file" + pickled * " (a .bin may run code: not read)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def weight_files(folder):
    """The files that hold a folder's weights, chosen as transformers does: model.safetensors, or
    where there is none exactly those that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map does not name a file for each tensor")
    return [folder / name for name in sorted(set(names.values()))]


def load(path, device="cpu", dtype=torch.float32):
    """A Llama with the weights of the Hugging Face folder `path` (config.json, safetensors files).

    The weights are frozen: adapters are what is trained here. Raises InputError for an unsupported
    setting, a damaged file, or a tensor missing, left over, stored twice or misshapen.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = {}
    for file in weight_files(folder):
        for name, tensor in read_tensors(file)[0].items():
            if name in weights or not tensor.is_floating_point():
                raise InputError(f"{file}: {name} stands in another file, too, or holds no floats")
            if not name.endswith("rotary_emb.inv_freq"):  # which rope_frequencies computes
                weights[name] = tensor.to(device, dtype)

    # Some checkpoints with tied embeddings store them twice.
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get("model.embed_tokens.weight", head)):
            raise InputError(f"{folder}: lm_head.weight is not the embedding, as config.json says "
                             "(tie_word_embeddings): which of the two is right?")

    layers = len({key.split(".")[2] for key in weights if key.startswith("model.layers.")})
    if layers != config.num_hidden_layers:  # first, as a damaged config may ask for millions
        raise InputError(f"{folder}: weights and config.json disagree: {layers} layers, "
                         f"{config.num_hidden_layers}")
    try:
        with torch.device("meta"):
            model = Llama(config)
        model.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:  # of many lines, the first of which says little
        details = " ".join(str(error).split("\n", 1)[-1].split())[:400]
        raise InputError(f"{folder}: weights and config.json disagree: {details}") from None
    return model.requires_grad_(False).eval()


def identity(model):
    """A sha256 of some 256 numbers of each frozen weight: tells models apart without reading them
    whole."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            step = max(1, weight.numel() // 256)
            numbers = weight.detach().flatten()[::step].bfloat16().float()  # alike in all types
            digest.update(numbers.cpu().numpy().tobytes())
    return digest.hexdigest()


# The machine, or several: under torchrun every process takes a part of the shots or users


def world():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier(device):
    """Wait until all processes have come to this point."""
    all_reduce(torch.zeros(1, device=device)).item()  # read, as a GPU's reduction does not wait


def choose_device(name, dtype):
    """--device and --dtype -> (torch.device, torch.dtype): "auto" takes a GPU if there is one, and
    bfloat16 where the processor has units for it.

    A process that torchrun started joins the others here; only the first goes on printing to
    stdout.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here")
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # one for each process
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")

    if dtype != "auto":
        if dtype not in ("float32", "bfloat16"):  # it may come from an adapter's args.json
            raise InputError(f"dtype {dtype!r} is neither float32 nor bfloat16")
        return device, getattr(torch, dtype)

    # What units there are, and not what is faster in a trial: other work would sway that.
    units = torch.cpu.get_capabilities()
    fast = units.get("amx_bf16") or units.get("avx512_bf16")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Ask glibc to keep large freed blocks: by default each tensor's pages go back to the system
    and are cleared anew for the next one, which costs a fifth of the time on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; older ones take 32 MiB
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def run(main):
    """Call a script's main. Bad input and Ctrl-C end it with one line and a status that is not 0; a
    mistake in the code shows its traceback."""
    # Faster memory; and a terminal that lacks a character, such as "±", ends no run.
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError, MemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:500]}")
    except RuntimeError as error:
        if "to allocate" not in str(error):  # which both allocators, CPU's and GPU's, say
            raise
        sys.exit(f"error: out of memory; train.py has --checkpoint-activations ({error})"[:500])
    except KeyboardInterrupt:
        print("interrupted (train.py goes on with the same command)", file=sys.stderr)
        sys.exit(130)


def refuse_idle(parser, idle):
    """End with one line if an option was typed that does nothing: idle, [(condition, its words,
    options)]."""
    typed = {word.split("=")[0] for word in sys.argv[1:]}
    for condition, words, options in idle:
        for option in options:
            if condition and option in typed:
                parser.error(f"{option} does nothing {words}")


def at_least(low, kind=int):
    """argparse type: an int or a float, at least `low`."""
    def read(text):
        if not low <= kind(text) < 2 ** 63:
            raise ValueError
        return kind(text)
    read.__name__ = f"{kind.__name__} (at least {low})"  # as in "invalid int (at least 1) value"
    return read
