"""What must stay true, in the order of the files. `python test_all.py` or pytest; no network, small random models.

Checks against transformers, peft and trl are skipped where those are not installed, those of the real model and data
where they are not in the cache (train.py puts them there).
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
import shutil
import signal
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
    config = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
                  max_position_embeddings=1024, tie_word_embeddings=True)
    model = llama.Llama(llama.Config(**{**config, **changes}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1)
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
    """In the manner of Llama 2: a space before the text becomes part of the first token, digits stand alone."""
    words = ["<unk>", "▁", "▁M", "ovies", "▁Alien", "▁Aliens", "1", "2", "3", ".", "\n", "▁Heat"]
    words += [c for c in map(chr, range(33, 127)) if c not in words]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i) / 10 - 1) for i, word in enumerate(words)], 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def write_folder(model, folder, **changes):
    """Write a tiny model as a Hugging Face folder with the byte tokenizer; `changes` go into config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in vars(model.config).items() if key != "rope_scaling"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config, **changes}))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
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


TOY = ("--model", "base", "--data", "toy.csv", "--dtype", "float32", "--device", "cpu", "--shots", 24,
       "--batch-size", 8)


def random_examples(rng, count, shared=False, vocab=300):
    """[(prompt, 3 responses)] of unequal lengths; with `shared` 6, some beginning alike, and one extending another."""
    def ids(low, high):
        return [rng.randrange(vocab) for _ in range(rng.randint(low, high))]
    result = []
    for _ in range(count):
        responses = [ids(1, 6) for _ in range(3)]
        if shared:
            responses += [responses[0] + ids(1, 3), responses[0][:1] + ids(1, 4), list(responses[1])]
        result.append((ids(1, 12), responses))
    return result


def trees(examples):
    """Packed, a tree for each example."""
    return dmpo.pack([[example] for example in examples])


def one_by_one(model, examples):
    """Every response's log-probability computed in a row of its own, the plain way -> list of lists of scalars."""
    result = []
    for prompt, responses in examples:
        row = []
        for response in responses:
            logps = model.logits(model(torch.tensor([prompt + response]))).log_softmax(-1)[0]
            row.append(sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(response)))
        result.append(row)
    return result


def close(a, b, tolerance):
    """Two tensors, arrays, lists or numbers of one shape differ nowhere by more."""
    a, b = (x.detach().double() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"differ by {worst}"


def refused(function, *words):
    """The function must raise ValueError or OSError with a message of one line that contains the words."""
    try:
        function()
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, f"not one line: {message}"
        assert all(word in message for word in words), f"{words} not in: {message}"
    else:
        raise AssertionError(f"accepted: expected an error about {words}")


def command(main, *args):
    """Run a script's main with a command line in this process -> (exit status, its output, its errors)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["program", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            evaluation.run(main)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        err.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        sys.argv = before
    return status, out.getvalue(), err.getvalue()


# model.py


def test_logits_equal_transformers():
    transformers = need("transformers")
    base = dict(vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
                num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, rms_norm_eps=1e-5)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}
    for changes in (dict(), dict(num_key_value_heads=6), dict(num_key_value_heads=1), dict(tie_word_embeddings=True),
                    dict(head_dim=16), dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
                    dict(rope_parameters={**llama3, "rope_theta": 5e5}), dict(shards="20KB"),
                    dict(rope_parameters={**llama3, "rope_theta": 50.0})):  # with pairs between fast and slow
        torch.manual_seed(0)
        shards = changes.pop("shards", "5GB")
        config = transformers.LlamaConfig(**{**base, "tie_word_embeddings": False, **changes})
        theirs = transformers.LlamaForCausalLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder, max_shard_size=shards)
            assert (Path(folder) / "model.safetensors.index.json").exists() == (shards == "20KB")
            ours = llama.load(folder)
        ids = torch.randint(0, 120, (3, 70))
        for training in (False, True):  # attend's two ways
            with torch.set_grad_enabled(training):
                close(ours.logits(ours(ids)), theirs(ids).logits, 1e-4)


def test_old_config_layout_is_read():
    with tempfile.TemporaryDirectory() as folder:
        write_folder(tiny(), folder, rope_theta=777.0,
                     rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                                   "original_max_position_embeddings": 64})
        config = llama.read_config(folder)
    assert config.rope_theta == 777.0 and config.rope_scaling["factor"] == 8


def test_settings_that_a_config_leaves_out_and_tensors_stored_needlessly_are_those_of_transformers():
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(tiny(), folder)
        weights = load_file(path / "model.safetensors")
        extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                 "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as older checkpoints have
        save_file(weights | extra, path / "model.safetensors")
        llama.load(path)
        config = {key: value for key, value in json.loads((path / "config.json").read_text()).items() if key in (
            "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
        (path / "config.json").write_text(json.dumps(config))
        assert llama.read_config(path) == llama.Config(300, 32, 48, 2, 4, 4, 8, 1e-6, 10000.0, None, 2048, False)


def test_attention_written_out_for_training_equals_the_fused_kernel():
    torch.manual_seed(0)
    model, ids = tiny(), torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        fused = model(ids)
    close(model(ids), fused, 1e-4)


def test_keys_and_values_of_the_past_stand_in_for_its_tokens():
    torch.manual_seed(0)
    model, ids = tiny(), torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        past = [[] for _ in model.model.layers]
        model(ids[:, :12], past=past)
        close(model(ids[:, 12:], past=past), model(ids)[:, 12:], 1e-5)
        close(model(ids[:, 12:].repeat(2, 1), past=past)[1:], model(ids)[:, 12:], 1e-5)  # one past, two rows


def test_checkpointing_activations_changes_no_gradient():
    examples, gradients = random_examples(random.Random(5), 3), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nonzero(lora.attach(tiny(), 4, 8))
        model.checkpoint_activations = checkpointed
        with mock.patch.object(llama, "checkpoint", wraps=llama.checkpoint) as used:
            dmpo.dmpo_loss(dmpo.response_logps(model, trees(examples)), torch.zeros(3, 3), 0.1).backward()
        assert used.call_count == 2 * checkpointed  # layers
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    close(*gradients, 1e-6)


def test_real_model_continues_five_prompts_token_for_token_as_transformers():
    transformers, folder = need("transformers"), need_model()
    tokenizer, ours = data.load_tokenizer(folder), llama.load(folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for text in (chat, "The three primary colours are", "def fibonacci(n):\n", "Once upon a time 12345",
                 "Movies watched, in order:\n1. Alien (1979)\n2."):
        ids = torch.tensor([tokenizer.encode(text).ids])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
                                   pad_token_id=0)[0].tolist()
        row = ids[0].tolist()
        with torch.no_grad():
            while len(row) < len(expected):
                row.append(int(ours.logits(ours(torch.tensor([row]))[0, -1]).argmax()))
        assert row == expected, tokenizer.decode(row)
        if text == chat:
            assert "Paris" in tokenizer.decode(row)


def test_unsupported_or_damaged_models_are_refused_by_name():
    table = [
        (dict(model_type="mistral"), "model_type"), (dict(hidden_act="gelu"), "hidden_act"),
        (dict(rope_scaling={"type": "yarn", "factor": 2}), "yarn"), (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"), (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"), (dict(rope_scaling=[1]), "rope"),
        (dict(hidden_size="32"), "hidden_size"), (dict(num_hidden_layers=-1), "num_hidden_layers"),
        (dict(vocab_size=None), "vocab_size"), (dict(vocab_size=10 ** 30), "vocab_size"),
        (dict(rms_norm_eps=0), "rms_norm_eps"), (dict(head_dim=7), "odd"),
        (dict(num_key_value_heads=3), "evenly"), (dict(hidden_size=64), "disagree"),
        (dict(hidden_size=2 ** 39, vocab_size=2 ** 39), "disagree"), (dict(head_dim=2 ** 39), "disagree"),
        (dict(num_hidden_layers=3), "disagree"), (dict(num_hidden_layers=10 ** 10), "2 layers"),
        (dict(tie_word_embeddings=False), "lm_head.weight"),
        (dict(rope_scaling={"type": "llama3", "factor": 8}), "low_freq_factor"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for changes, word in table:
            write_folder(tiny(), folder, **changes)
            refused(lambda: llama.load(folder), word)
        write_folder(tiny(), folder)
        path = Path(folder)
        whole = (path / "model.safetensors").read_bytes()
        for content in (b"", whole[:100], whole[:-10], b"\xff" * 64):
            (path / "model.safetensors").write_bytes(content)
            refused(lambda: llama.load(folder), "model.safetensors")
        (path / "model.safetensors").unlink()
        refused(lambda: llama.load(folder), "model.safetensors")
        for content in ("", "[]", "{", "\xff", "[" * 100000):
            (path / "config.json").write_text(content, encoding="latin-1")
            refused(lambda: llama.load(folder), "config.json")
        (path / "config.json").unlink()
        refused(lambda: llama.load(folder), "config.json")
        (path / "tokenizer.json").write_text("{}")
        refused(lambda: data.load_tokenizer(folder), "tokenizer.json")
        Tokenizer(models.WordLevel({"1.": 0}, unk_token="<unk>")).save(f"{folder}/tokenizer.json")
        refused(lambda: data.tokenize_response(data.load_tokenizer(folder), "Heat"), "cannot encode", "Heat")
        (path / "tokenizer.json").unlink()
        refused(lambda: data.load_tokenizer(folder), "tokenizer.json")


# lora.py


def test_adapter_by_hand():
    torch.manual_seed(0)
    module = lora.LoRALinear(torch.nn.Linear(32, 16, bias=False), 2, 3)
    x = torch.randn(5, 32)
    module.lora_B.data.fill_(2.0)  # B A x is twice the sum of A x, for every output; alpha/r is 3/2
    close(module(x), x @ module.weight.T + 3 / 2 * 2 * (x @ module.lora_A.T).sum(-1, keepdim=True), 1e-5)


def test_fresh_adapter_changes_nothing_but_its_B_gets_a_gradient():
    torch.manual_seed(0)
    model, ids = tiny(), torch.randint(0, 300, (2, 9))
    before = model(ids).detach()
    lora.attach(model, 4, 8)
    after = model(ids)
    assert torch.equal(before, after)
    after.sum().backward()
    for module in lora.adapters(model).values():
        assert module.lora_B.grad.abs().max() > 0 and module.lora_A.grad.abs().max() == 0
        assert 0.8 < module.lora_A.abs().max() * module.lora_A.shape[1] ** 0.5 <= 1  # uniform within ±1/√in
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{key}" for name in lora.adapters(model) for key in ("lora_A", "lora_B")}


def test_lora_forward_and_gradients_equal_peft_and_files_are_exchanged():
    peft, transformers = need("peft"), need("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 11))
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_folder(tiny(), f"{folder}/base"), f"{folder}/adapter"
        ours = nonzero(lora.attach(llama.load(base), 4, 12))
        lora.save(ours, adapter, base)
        theirs = transformers.LlamaForCausalLM.from_pretrained(base)
        theirs = peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=True)
        logits, expected = ours.logits(ours(ids)), theirs(ids).logits
        close(logits, expected, 1e-4)
        logits.square().mean().backward()
        expected.square().mean().backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        for name, module in lora.adapters(ours).items():
            for key in ("lora_A", "lora_B"):
                expected = gradients[f"base_model.model.{name}.{key}.default.weight"]
                scale = expected.abs().max()
                close(getattr(module, key).grad / scale, expected / scale, 1e-4)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config)
        theirs.save_pretrained(f"{folder}/theirs")
        ours = lora.load(llama.load(base), f"{folder}/theirs")
        close(ours.logits(ours(ids)), theirs(ids).logits, 1e-4)


def test_save_load_and_merge_keep_the_outputs():
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        base = write_folder(tiny(), f"{folder}/base")
        model = nonzero(lora.attach(llama.load(base), 4, 8))
        expected = model(ids)
        lora.save(model, f"{folder}/adapter")
        other = lora.load(nonzero(lora.attach(llama.load(base), 2, 2), 9), f"{folder}/adapter")  # replaces another
        assert torch.equal(other(ids), expected)
        merged = lora.merge(other)
        assert not lora.adapters(merged)
        close(merged(ids), expected, 1e-4)
        status, out, err = command(lora.main, base, f"{folder}/adapter", f"{folder}/merged")
        assert status == 0, err
        close(llama.load(f"{folder}/merged")(ids), expected, 1e-4)
        assert data.load_tokenizer(f"{folder}/merged").get_vocab_size() == 256
        status, _, err = command(lora.main, base, f"{folder}/adapter", f"{folder}/merged")
        assert status and "holds another model" in err  # and keeps them


def test_adapters_that_are_damaged_or_not_plain_lora_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        lora.save(lora.attach(tiny(), 4, 8), path)
        config, weights = ((path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
        for changes, word in (
                (dict(use_dora=True), "use_dora"), (dict(use_rslora=True), "use_rslora"), (dict(bias="all"), "bias"),
                (dict(peft_type="IA3"), "IA3"), (dict(modules_to_save=["lm_head"]), "modules_to_save"),
                (dict(rank_pattern={"q_proj": 2}), "rank_pattern"), (dict(r="4"), "r must"), (dict(r=5), "fit"),
                (dict(r=0), "r must"), (dict(r=10 ** 12), "fit"), (dict(lora_alpha=float("nan")), "lora_alpha"),
                (dict(target_modules=["q_proj"]), "fit"), (dict(target_modules=["lm_head"]), "lm_head"),
                (dict(target_modules=[1]), "target_modules"),
                (dict(init_lora_weights="pissa"), "pissa"), (dict(alora_invocation_tokens=[1]), "alora")):
            (path / "adapter_config.json").write_text(json.dumps({**json.loads(config), **changes}))
            refused(lambda: lora.load(tiny(), path), word)
        (path / "adapter_config.json").write_bytes(config)
        refused(lambda: lora.load(tiny(num_hidden_layers=3), path), "fit")
        for content in (b"", weights[:50], weights[:-4]):
            (path / "adapter_model.safetensors").write_bytes(content)
            refused(lambda: lora.load(tiny(), path), "adapter")
        refused(lambda: lora.load(tiny(), path / "nowhere"), "nowhere")


# data.py


def test_prompt_is_a_numbered_list_of_the_ten_latest_or_as_many_as_told_that_ends_in_the_next_number():
    assert data.prompt(["Heat (1995)", "M"], "Films seen:") == "Films seen:\n1. 1995 Heat\n2. M\n3."
    example = data.Example("u", [f"F{i}" for i in range(13)], "F", ["G"])
    for dataset, latest in ((data.Dataset({}, []), 10), (data.Dataset({}, [], latest=12), 12)):
        (prompt, _), = evaluation.encode(tiny(), byte_tokenizer(), dataset, [example])
        lines = [f"{i + latest - 12}. F{i}" for i in range(13 - latest, 13)]
        assert byte_tokenizer().decode(prompt) == "\n".join(["Items chosen, in order:", *lines, f"{latest + 1}."])
    assert data.response("2001: A Space Odyssey (1968)") == " 1968 2001: A Space Odyssey\n"


def test_a_prompt_may_list_the_candidates_shuffled_alike_for_one_seed():
    example = data.Example("u", ["Heat (1995)"], "P", list("ABCDEFG"))
    prompts = []
    for seed in (0, 0, 1):
        prompt, responses = data.tokenize(byte_tokenizer(), example, "Movies:", seed)
        prompts.append(byte_tokenizer().decode(prompt))
        assert responses == data.tokenize(byte_tokenizer(), example, "Movies:")[1]  # the positive's still first
    lines = prompts[0].splitlines()
    assert prompts[0] == prompts[1] != prompts[2] and sorted(lines[1:9]) == [f"- {item}" for item in "ABCDEFGP"]
    assert lines[0] == "One of these comes next:" and lines[9:] == ["", "Movies:", "1. 1995 Heat", "2."]
    tokenizer = byte_tokenizer()
    texts = (tokenizer.decode(data.tokenize(tokenizer, example, "Movies:", seed)[0]) for seed in range(99))
    assert {text.splitlines().index("- P") for text in texts} == set(range(1, 9))  # the positive may stand anywhere


def test_prompt_and_response_tokens_together_are_those_of_the_whole_text():
    example = data.Example("u", ["Aliens", "Heat"], "Alien", ["Heat", "M (1931)"])
    for tokenizer in (byte_tokenizer(), sentencepiece_tokenizer()):
        prompt, responses = data.tokenize(tokenizer, example, "Movies:")
        for item, ids in zip([example.positive, *example.negatives], responses):
            whole = data.prompt(example.history, "Movies:") + data.response(item)
            assert prompt + ids == tokenizer.encode(whole).ids, item
    assert sentencepiece_tokenizer().encode(" Alien").ids != responses[0]  # alone it would have been another


def test_tokenizers_that_merge_or_go_past_the_prompts_end_are_refused_and_none_truncates():
    merging = Tokenizer(models.BPE({**byte_tokenizer().get_vocab(), ".Ġ": 256}, [(".", "Ġ")]))  # full stop and space
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    refused(lambda: data.tokenize_response(merging, "Heat"), "merges")
    with tempfile.TemporaryDirectory() as folder:
        short = byte_tokenizer()
        short.enable_truncation(5)
        short.enable_padding(length=20)
        short.save(f"{folder}/tokenizer.json")
        assert len(data.load_tokenizer(folder).encode("ten letters").ids) == 11
        short.post_processor = processors.TemplateProcessing("$A A", special_tokens=[("A", short.token_to_id("A"))])
        short.save(f"{folder}/tokenizer.json")
        refused(lambda: data.load_tokenizer(folder), "behind every text")


def test_last_item_is_the_test_the_one_before_validation_the_rest_training():
    dataset = toy_data()
    test, validation = (data.heldout(dataset, split, 5) for split in ("test", "validation"))
    shots = [shot for (shot,) in data.shots(dataset, 30, 5, seed=0)]
    for t, v in zip(test, validation):
        items = dataset.sequences[t.user]
        assert t.positive == items[-1] and t.history == items[:-1]
        assert v.positive == items[-2] and v.history == items[:-2]
    assert len({s.user for s in shots}) == 30 and all(s.positive == dataset.sequences[s.user][-3] for s in shots)
    for (s,) in data.shots(dataset, 150, 5, seed=0):
        items = dataset.sequences[s.user]
        assert s.positive in items[1:-2] and s.history == items[:items.index(s.positive)]
    refused(lambda: data.shots(dataset, 10000, 1, 0), "fewer than 10000")


def test_a_shot_of_several_moments_is_learnt_item_by_item():
    dataset = toy_data()
    last = data.shots(dataset, 30, 5, seed=0)
    for (example,), shot in zip(last, data.shots(dataset, 30, 5, seed=0, moments=4)):
        assert shot[-1] == example and len(shot) == 4  # the last is what it is without the others
        for before, after in zip(shot, shot[1:]):
            assert after.history == [*before.history, before.positive]
        touched = set(dataset.sequences[example.user])
        assert all(len(set(e.negatives) - touched) == 5 for e in shot)
        assert len({tuple(e.negatives) for e in shot}) == 4  # drawn anew for each
    learnt = [(e.user, e.positive) for shot in data.shots(dataset, 60, 0, 0, moments=4) for e in shot]
    assert len(set(learnt)) == len(learnt) == 30 * 6  # each training item but a user's first, once
    both = [tuple(shot[-1].negatives) for shot in data.shots(dataset, 60, 5, 0, moments=4)]
    assert len(set(both)) == 60  # a user's second shot has negatives of its own
    long = data.Dataset({"u": [f"f{i}" for i in range(40)]}, [f"f{i}" for i in range(50)])
    assert [(shot[0].history, shot[-1].positive, len(shot)) for shot in data.shots(long, 4, 2, 0, moments=99)] == [
        (["f27"], "f37", 10), (["f17"], "f27", 10), (["f7"], "f17", 10), (["f0"], "f7", 7)]  # none left out


def test_negatives_are_untouched_distinct_uniform_and_depend_on_seed_and_user_alone():
    dataset = toy_data()
    examples = data.heldout(dataset, "test", 19, seed=5)
    for e in examples:
        assert len(set(e.negatives)) == 19 and not set(e.negatives) & set(dataset.sequences[e.user])
    for e in data.heldout(dataset, "validation", 19, seed=5):
        assert not set(e.negatives) & set(dataset.sequences[e.user])  # nor the test item
    assert len({tuple(data.sample_negatives(dataset.items, set(), 9, 5, "test", user)) for user in "abc"}) == 3
    few = data.heldout(dataset, "test", 19, seed=5, users=7)
    assert len(few) == 7 and all(e in examples for e in few)
    assert data.heldout(dataset, "test", 19, seed=6) != examples
    assert data.shots(dataset, 10, 4, 1) == data.shots(dataset, 100, 4, 1)[:10]  # fewer shots are a part of more
    counts = {}
    for seed in range(3000):
        for item in data.sample_negatives(dataset.items, set(dataset.items[:20]), 2, seed, "p", "u"):
            counts[item] = counts.get(item, 0) + 1
    expected = 6000 / 20
    assert len(counts) == 20 and sum((c - expected) ** 2 / expected for c in counts.values()) < 43.8  # chi², p = .001
    refused(lambda: data.heldout(dataset, "test", 35), "too few")


def test_popular_negatives_come_as_often_as_they_occur():
    sequences = {f"u{i}": ["often", f"f{i % 5}", "seldom" if i == 0 else f"g{i % 7}", "x", "y"] for i in range(100)}
    sequences["me"] = ["a", "b", "c", "d", "e"]
    dataset = data.Dataset(sequences, sorted({item for items in sequences.values() for item in items}))
    drawn = [next(e.negatives[0] for (e,) in data.shots(dataset, 101, 1, seed, "popular") if e.user == "me")
             for seed in range(300)]
    assert 70 < drawn.count("often") < 130 and drawn.count("seldom") < 10  # 100 and 1 of 300 interactions


def test_titles_read_as_one_would_say_them():
    for raw, title in (("Matrix, The", "The Matrix"), ("Postino, Il", "Il Postino"), ("Enfer, L'", "L'Enfer"),
                       ("Sex, Lies, and Videotape", "Sex, Lies, and Videotape"), ("Bye Bye, Love", "Bye Bye, Love"),
                       ("Fille seule, La (A Single Girl)", "La Fille seule (A Single Girl)"),
                       ("Big Blue, The (Grand bleu, Le) (1988)", "The Big Blue (Le Grand bleu) (1988)"),
                       ("Bug's Life, A (1998)", "A Bug's Life (1998)"), (" a\r\nb\x00\u2028c ", "a b c")):
        assert data.articles_first(raw) == title, data.articles_first(raw)


def test_interactions_are_ordered_by_time_and_equal_times_as_in_the_file():
    items = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" \
            "1\tMatrix, The\t1999\tx\n2\tHeat\t1995\tx\n3\tHeat\t1995\tx\n10\tunknown\t\t\n"
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" \
            "7\t10\t3\t5\n7\t2\t3\t5\n7\t1\t3\t9\n7\t3\t3\t9\n8\t1\t3\t1\n"
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        b.write_text(items)
        a.write_text(inter)
        dataset = data.load_ml_100k(a, b)
        assert dataset.sequences == {"7": ["unknown", "Heat (1995)", "The Matrix (1999)"], "8": ["The Matrix (1999)"]}
        assert dataset.items == ["Heat (1995)", "The Matrix (1999)", "unknown"]
    refused(lambda: data.load("nothing"), "--data nothing", "ml-100k")


CSV_HEADER = "user,item,timestamp,title\n"


def read_text(text, name, load=None):
    """What data.load makes of a file of this name and text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return (load or data.load)(str(path))


def test_your_own_interactions_are_read_whatever_their_titles():
    text = ("\ufeffuser,rating,item,timestamp,title\r\n"               # a byte-order mark, one more column, CRLF
            'a,5,1,3,"Good, Bad ""and"" Ugly"\r\na,5,2,1,🎬 فيلم\r\n'   # quotes; an emoji and right-to-left text
            'a,5,3,2,"two\r\nlines\x07"\r\na,5,4,2,Same\r\n\r\n'      # a line break, a bell; equal times; an empty line
            'a,5,5,9,Same\r\nb,1,1,0,"Good, Bad ""and"" Ugly"\r\n')    # one title with two ids; a single interaction
    dataset = read_text(text, "own.csv")
    assert dataset.sequences == {"a": ["🎬 فيلم", "two lines", "Same", 'Good, Bad "and" Ugly'],
                                 "b": ['Good, Bad "and" Ugly']}
    assert len(dataset.items) == 4 and dataset.heading == "Items chosen, in order:"
    assert [e.user for e in data.heldout(dataset, "test", 0)] == ["a"]
    assert data.shots(dataset, 1, 0, 0)[0][0].positive == "two lines"
    assert read_text("user\titem\ttimestamp\ttitle\na\t1\t1e9\tHeat, the film\n", "o.tsv").items == ["Heat, the film"]


def test_your_own_malformed_interactions_are_refused_by_line():
    good = "a,1,1,Heat\n"
    for text, words in (
        ("", ("column", "user")), ("user,item,title\n", ("line 1", "timestamp")),
        (CSV_HEADER + "a,1,1\n", ("line 2", "3 columns")),
        (CSV_HEADER + good + "a,2,soon,Alien\n", ("line 3", "soon")),
        (CSV_HEADER + "a,2,inf,Alien\n", ("line 2", "not a number")), (CSV_HEADER + "a,2,1,\n", ("line 2", "title")),
        (CSV_HEADER + ",2,1,Alien\n", ("line 2", "user")),
        (CSV_HEADER + good + "b,1,1,Alien\n", ("line 3", "'1'", "Heat")),
        (CSV_HEADER + 'a,1,1,"open\n', ("line 2", "unexpected end")),
        (CSV_HEADER.encode() + b"a,1,1,Heat\n" * 999 + b"a,1,1,\xff\n", ("line 1001", "UTF-8")),
        (CSV_HEADER + f"a,1,1,{'x' * 200_000}\n", ("line 2", "field larger")),
    ):
        refused(lambda: read_text(text, "own.csv"), *words)


def test_a_million_interactions_take_a_few_hundred_megabytes():
    import subprocess
    program = f"""\
import resource, sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("big.csv", "w") as file:
    file.write({CSV_HEADER!r})
    for i in range(1_000_000):
        item = i * 7919 % 5003
        file.write(f"user {{i % 9973}},{{item}},{{i}},Some film number {{item}}\\n")
dataset = data.load("big.csv")
assert sum(map(len, dataset.sequences.values())) > 900_000 and len(dataset.items) == 5003
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and float(done.stdout) < 400, (done.stdout, done.stderr)  # MiB


def test_your_own_examples_bring_their_negatives_and_splits():
    line = '{"user": "%s", "history": ["A", "B"], "positive": "%s", "negatives": ["X", "Y"]%s}\n'
    dataset = read_text(line % ("u", "C", ', "split": "test"') + line % ("v", "D", "") + line % ("w", "W", "")
                        + '{"history": ["A"], "positive": "Z", "split": "validation"}\n', "own.jsonl")
    assert {name: [e.positive for e in part] for name, part in dataset.given.items()} == {
        "train": ["D", "W"], "validation": ["Z"], "test": ["C"]}
    assert data.heldout(dataset, "test", "given")[0].negatives == ["X", "Y"]
    drawn = data.heldout(dataset, "test", 3)[0].negatives
    assert set(drawn) <= {"X", "Y", "D", "W", "Z"} and len(drawn) == 3
    refused(lambda: data.heldout(dataset, "validation", "given"), "brings no candidates")
    some = replace(dataset, given=dataset.given | {"test": dataset.given["test"] + dataset.given["validation"]})
    assert [len(e.negatives) for e in data.heldout(some, "test")] == [2, 5]  # drawn only where none are given
    shot = next(shot for (shot,) in data.shots(dataset, 2, 3, seed=0) if shot.user == "v")
    assert shot.negatives == ["X", "Y", "W"]  # filled up by drawing from the training titles that v has not touched
    shot = next(shot for shot in data.shots(dataset, 2, 2, seed=0, moments=10) if shot[0].user == "v")
    assert [(e.history, e.positive) for e in shot] == [(["A"], "B"), (["A", "B"], "D")]
    assert shot[1].negatives == ["X", "Y"]  # given for the latest only: the others' are drawn
    assert {e.negatives[0] for seed in range(9) for e, *_ in data.shots(dataset, 2, 2, seed, moments=10)} == set("DWXY")
    rows = ('["A"], "positive": "B"', '["A", "B"], "positive": "C"', '["A", "C"], "positive": "D", "split": "test"')
    dataset = read_text("".join('{"user": "u", "history": %s}\n' % row for row in rows), "own.jsonl")
    assert data.interactions(dataset) == [["A", "B", "C"]]  # what a user's examples repeat counts once
    rows = ((["A"], "B", "validation"), (["A", "B", "C"], "D", "test"), (["E"], "F", "test"))
    rows = [dict(user="u", history=history, positive=positive, split=split) for history, positive, split in rows]
    dataset = read_text("".join(json.dumps(row) + "\n" for row in rows), "own.jsonl")
    assert data.interactions(dataset) == [["A", "C", "E"]]  # neither what validation asks for, nor what the test does
    dataset = read_text('{"history": ["A", "B", "A"], "positive": "C"}', "own.jsonl")
    assert dataset.given["test"][0].history == ["A", "B"]  # of a title that comes twice the first counts
    both = read_text(line % ("u", "C", ', "split": "train"') + line % ("u", "D", ', "split": "test"'), "own.jsonl")
    assert both.sequences == {"u": ["A", "B", "C", "D"]}  # what no negative of u may be, in any split
    dataset = read_text("".join(line % (f"u{i // 2}", f"P{i}", "") for i in range(60)), "own.jsonl")  # split by user
    parts = {name: {e.user for e in part} for name, part in dataset.given.items()}
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [24, 3, 3]
    assert len(set.union(*parts.values())) == 30
    drawn = [e.negatives for (e,) in data.shots(dataset, 24, 2, 0, "uniform")]
    assert any(negatives != ["X", "Y"] for negatives in drawn)  # not those that the data bring


def test_your_own_malformed_examples_are_refused_by_line():
    good = '{"history": ["A"], "positive": "B", "negatives": ["C"]}\n'
    for text, words in (
        ("{", ("line 1",)), (good + "[]", ("line 2", "must be")), ("[" * 100_000, ("line 1",)),
        ('{"history": [], "positive": "B"}', ("line 1", "must be")), ('{"history": ["A"]}', ("line 1", "must be")),
        ('{"history": ["A"], "positive": 3}', ("line 1", "must be")),
        (good + good.replace("C", "B"), ("line 2", "positive")), (good.replace("B", "A"), ("line 1", "in the history")),
        ('{"history": ["A"], "positive": "\\n", "negatives": []}', ("line 1", "must be")),
        (good.replace('"C"', '"C", "C"'), ("line 1", "twice")),
        (good.replace("}", ', "split": "dev"}'), ("line 1", "split")),
        (good.replace("}", ', "user": null}'), ("line 1", "user")), (b"\xff\xfe", ("line 1",)), ("", ("no test",)),
    ):
        refused(lambda: data.heldout(read_text(text, "own.jsonl"), "test", 0), *words)
    assert read_text('{"history": ["\\ud800"], "positive": "B"}', "own.jsonl").items == ["?", "B"]  # half a character


def test_movielens_1m_is_read_as_grouplens_zips_it():
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "ml-1m.zip"
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("ml-1m/movies.dat", "1::Santa Clause, The (1994)::Comedy\n"
                                                "2::Misérables, Les (1995)::Drama\n".encode("latin-1"))
            zipped.writestr("ml-1m/ratings.dat", "7::2::5::20\n7::1::5::10\n")
        assert data.load_ml_1m(archive).sequences == {"7": ["The Santa Clause (1994)", "Les Misérables (1995)"]}


def paper_row(history, pair, output):
    """A row as the DMPO authors' files have it."""
    titles = "".join(f" <Title:{title}> " for title in history)
    return {"instruction": f"Here is the user's history:{titles}. Rank the likelihood of the user watching the two "
                           f"movies  <Title:{pair[0]}>  and  <Title:{pair[1]}> .", "input": "", "output": output}


def test_the_authors_format_is_read_into_examples():
    rank = lambda a, b: f" <Title:{a}> ,  <Title:{b}> "
    train_rows = [paper_row(["A ", "B"], ["P", n], [rank("P", n), rank(n, "P")]) for n in ("N1", "N2 &amp; N3")]
    test_rows = [paper_row(["Clause, The (1994)", "D"], ["Q", "R"], rank("R", "Q")), paper_row(["E", "F"], ["G", "H"],
                                                                                              rank("G", "H"))]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("x_dpo_ranking_5.json", train_rows), ("x_eval_ranking.json", test_rows)):
            (Path(folder) / name).write_text(json.dumps(rows))
        with mock.patch.object(data, "fetch", lambda name: Path(folder) / name):
            dataset = data.load_paper("x")
    assert dataset.given["train"] == [data.Example("train 1", ["A", "B"], "P", ["N1", "N2 & N3"])]
    assert dataset.given["test"][0] == data.Example("test 1", ["The Clause (1994)", "D"], "R", ["Q"])
    assert data.interactions(dataset) == [["A", "B", "P"], ["The Clause (1994)"], ["E"]]  # nothing held out
    first = dataset.given["validation"][0]
    assert (first.history, first.positive) == (["The Clause (1994)"], "D") and first.negatives[0] in ("E", "F")


def test_the_authors_released_data_have_the_shape_that_the_readme_states():
    if not all((data.cache() / file).exists() for file in data.FILES if file.startswith("rec_")):
        raise unittest.SkipTest("the authors' files are not in the cache")
    for name in ("paper-ml-1m", "paper-amazon-movies", "paper-amazon-games"):
        dataset = data.load(name)
        assert [len(dataset.given[split]) for split in ("train", "validation", "test")] == [100, 1000, 1000]
        assert all(len(e.negatives) == 5 for e in dataset.given["train"])
        assert all(len(e.negatives) == 1 for e in dataset.given["test"])
        train, test = ({(*e.history, e.positive) for e in dataset.given[part]} for part in ("train", "test"))
        assert len(train & test) == (15 if name == "paper-amazon-games" else 0)
        counts = Counter(title for e in dataset.given["test"] for title in e.history)
        right = np.mean([np.sign(counts[e.positive] - counts[e.negatives[0]]) / 2 + 0.5 for e in dataset.given["test"]])
        assert abs(right - {"paper-ml-1m": 0.608, "paper-amazon-movies": 0.516}.get(name, 0.545)) < 0.001, (name, right)
        if name == "paper-ml-1m":  # the last two of a history follow each other in others' too, the positive does not
            steps = Counter(step for e in dataset.given["test"] for step in zip(e.history, e.history[1:]))
            inside = np.mean([steps[tuple(e.history[-2:])] > 1 for e in dataset.given["test"]])
            onward, aside = np.mean([[steps[e.history[-1], title] > 0 for title in (e.positive, *e.negatives)]
                                     for e in dataset.given["test"]], axis=0)
            assert abs(inside - 0.684) < 0.001 and (onward, aside) == (0.003, 0.004), (inside, onward, aside)
            for split, share in (("validation", 0.654), ("test", 0.613)):
                rank = evaluation.rank_by(evaluation.fit_item_knn, dataset, dataset.given[split],
                                          data.interactions(dataset))
                assert abs(np.mean(rank == 1) - share) < 0.001, (split, np.mean(rank == 1))
    assert dataset.heading == "Video games bought, in order:"


def test_ties_in_time_decide_what_is_last_in_ml_100k():
    if not all((data.cache() / name).exists() for name in ("ml-100k.inter", "ml-100k.item")):
        raise unittest.SkipTest("MovieLens-100K is not in the cache")
    rows = [line.split("\t") for line in (data.cache() / "ml-100k.inter").read_text().splitlines()[1:]]
    seconds = Counter((user, second) for user, _, _, second in rows)
    assert 0.75 < sum(count for count in seconds.values() if count > 1) / len(rows) < 0.77
    ndcg = {}
    for order in ("film", "file"):
        dataset = data.from_events((user, (float(time), int(film) if order == "film" else line), film)
                                   for line, (user, film, _, time) in enumerate(rows))
        rank = evaluation.rank_by(evaluation.fit_popularity, dataset, data.heldout(dataset, "test", 19),
                                  data.interactions(dataset))
        ndcg[order] = evaluation.measure(rank, 20)["NDCG@10"].mean()
    assert ndcg["film"] < 0.48 and ndcg["file"] > 0.51, ndcg


@contextlib.contextmanager
def cache_with(content):
    """A temporary cache, for which x.txt, of this content, is to come out of the wheel no-such==1.0; no network."""
    with tempfile.TemporaryDirectory() as folder:
        file = ("no-such==1.0", hashlib.sha256(content).hexdigest())
        with mock.patch.dict(os.environ, DMPO_CACHE=folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=folder), \
                mock.patch.dict(data.FILES, {"x.txt": file}):
            yield Path(folder)


def test_files_come_from_the_cache_or_a_wheel_put_there_or_an_address_or_not_at_all():
    with cache_with(b"hello") as folder:
        refused(lambda: data.fetch("x.txt"), "no-such==1.0", "x.txt", str(folder))
        wheel = folder / "no_such-1.0-py3-none-any.whl"
        wheel.write_bytes(b"PK no zip")
        refused(lambda: data.fetch("x.txt"), "no-such==1.0", "not a zip file")
        for content in (b"other", b"hello"):
            with zipfile.ZipFile(wheel, "w") as zipped:
                zipped.writestr("pkg/x.txt", content)
            if content == b"other":
                refused(lambda: data.fetch("x.txt"), "sha256")
        assert data.fetch("x.txt").read_bytes() == b"hello"
        wheel.unlink()
        assert data.fetch("x.txt").read_bytes() == b"hello"  # now from the cache
        with mock.patch.dict(data.FILES, {"y.txt": ((folder / "x.txt").as_uri(), data.FILES["x.txt"][1])}):
            assert data.fetch("y.txt").read_bytes() == b"hello"
            data.fetch("y.txt").unlink()
        data.fetch("x.txt").write_bytes(b"damaged")
        refused(lambda: data.fetch("x.txt"), "no-such==1.0")
        assert sorted(p.name for p in folder.iterdir()) == ["x.txt"]  # nothing half-done is left behind
    refused(lambda: data.find_model("no such model!"), "--model")


def test_hub_ids_are_found_in_the_hubs_own_cache_without_a_network():
    import subprocess
    with tempfile.TemporaryDirectory() as home:
        repo = Path(home) / "hub" / "models--some--model"
        write_folder(tiny(), repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        program = (f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import data, eval; "
                   "print(data.find_model('some/model')); eval.run(lambda: data.find_model('some/other'))")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,  # it reads HF_HOME once
                              env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 1 and done.stdout.strip().endswith("snapshots/abc"), done
        assert "error: --model some/other" in done.stderr and "Traceback" not in done.stderr, done


def test_gguf_is_converted_to_the_weights_settings_and_tokens_that_transformers_reads():
    transformers, _, folder = need("transformers"), need("gguf"), need_model()
    path = data.cache() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        raise unittest.SkipTest("the GGUF file is not in the cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    theirs, tokenizer = model.state_dict(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with tempfile.TemporaryDirectory() as work:
        data.convert_gguf(path, Path(work) / "model")  # anew: the cache's may be an earlier version's
        ours = llama.load(Path(work) / "model", dtype=torch.bfloat16).state_dict()
        assert set(theirs) - set(ours) <= {"lm_head.weight"}
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name].bfloat16()), name
        del model.config.quantization_config
        model.config.save_pretrained(work)  # the epsilon is float32 in the file
        expected = replace(llama.read_config(work), rms_norm_eps=1e-5)
        assert llama.read_config(Path(work) / "model") == llama.read_config(folder) == expected
        for text in ("Movies watched, in order:\n1. 1995 Heat\n2.", "Amélie 🎬: it's  映画館 <|im_end|>"):
            assert data.load_tokenizer(Path(work) / "model").encode(text).ids == tokenizer(text).input_ids
        tokens = data.load_tokenizer(Path(work) / "model").encode("1995 Heat").tokens
        assert tokens[:4] == ["1", "9", "9", "5"]  # every digit a token: titles of one decade share a beginning


# dmpo.py


def test_tree_by_hand():
    tokens, parents, edges, paths = dmpo.tree([([7, 8], [[1, 2, 3], [1, 2, 4], [5], [1]])])
    assert tokens == [7, 8, 1, 2]               # the prompt, then "1 2" once; a last token needs no node
    assert parents == [-1, 0, 1, 2]
    assert edges == [(1, 1), (2, 2), (3, 3), (3, 4), (1, 5)]  # (from node, predicted token)
    assert paths == [[[0, 1, 2], [0, 1, 3], [4], [0]]]
    with mock.patch.object(dmpo, "padded", lambda nodes: nodes):
        batch = dmpo.pack([[([7, 8], [[1, 2, 3], [5, 6]])]])  # 7, 8, then 1, 2 on one branch, 5 on another
    assert batch.ids.tolist() == [[7, 8, 1, 2, 5]] and batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.mask.int().tolist() == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0],
                                          [1, 1, 0, 0, 1]]]


def test_tree_of_two_moments_by_hand():
    first, second = ([7, 8], [[1, 9], [2, 9]]), ([7, 8, 1, 9, 8], [[3, 9]])  # 7 8 is answered by 1 9, then 8 by 3 9
    tokens, parents, edges, paths = dmpo.tree([first, second])
    assert tokens == [7, 8, 1, 2, 9, 8, 3] and parents == [-1, 0, 1, 1, 2, 4, 5]  # one trunk, 7 8 1 9 8, two branches
    assert edges == [(1, 1), (2, 9), (1, 2), (3, 9), (5, 3), (6, 9)] and paths == [[[0, 1], [2, 3]], [[4, 5]]]
    assert train.sizes([first, second]) == (7, 5, 3 + 3 + 6)  # nodes, predicting nodes; tokens of three rows
    batch = dmpo.pack([[first, second]])
    assert batch.positions[0, :7].tolist() == [0, 1, 2, 2, 3, 4, 5]


def test_tree_logps_equal_scoring_every_response_alone():
    rng, model = random.Random(0), tiny()
    for count, shared in ((1, False), (1, True), (4, False), (5, True)):  # unequal sizes are padded
        examples = random_examples(rng, count, shared)
        with torch.no_grad():
            close(dmpo.response_logps(model, trees(examples)), one_by_one(model, examples), 1e-4)
            close(dmpo.response_logps(model, dmpo.pack([examples])), one_by_one(model, examples), 1e-4)  # one tree
    unequal = [([1, 2], [[3], [4, 5]]), ([6], [[7, 8]])]  # the second tree has one response fewer
    with torch.no_grad():
        logps = dmpo.response_logps(model, trees(unequal))
    close(logps[0], one_by_one(model, unequal[:1])[0], 1e-4)
    close(logps[1, 0], one_by_one(model, unequal[1:])[0][0], 1e-4)
    assert logps[1, 1] == 0


def test_moments_that_share_a_tree_equal_scoring_every_response_alone():
    rng, model, rows = random.Random(6), tiny(), []
    for _ in range(3):
        prompt, row = [rng.randrange(300) for _ in range(5)], []
        for _ in range(rng.randint(1, 4)):
            responses = random_examples(rng, 1)[0][1]
            row.append((prompt, responses))
            prompt = prompt + responses[0] + [7]  # the positive is taken up into the next prompt
        rows.append(row)
    with torch.no_grad():
        close(dmpo.response_logps(model, dmpo.pack(rows)), one_by_one(model, sum(rows, [])), 1e-4)
        with mock.patch.dict(evaluation.NODES, cpu=60):
            close(evaluation.log_probabilities(model, rows), one_by_one(model, sum(rows, [])), 1e-4)


def test_a_gpu_computes_what_the_cpu_does():
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no GPU")
    shots, found = [random_examples(random.Random(i), 3, shared=True) for i in range(5)], []
    settings = {"stage": "dmpo", "loss": "dmpo", "beta": 0.5, "sft_weight": 0.1}
    for device in "cpu", "cuda":
        torch.manual_seed(0)
        model = nonzero(lora.attach(tiny(), 4, 8)).to(device)
        logps = evaluation.log_probabilities(model, shots)
        train.backward(model, shots, torch.zeros_like(logps).float().split([3] * 5), settings)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        catalogue = dmpo.catalogue_logps(model, shots[0][0][0], dmpo.pack_catalogue(shots[0][0][1], 1024))
        found.append([logps.cpu(), gradient.cpu() / gradient.abs().max().cpu(), torch.from_numpy(catalogue)])
    for cpu, gpu in zip(*found):
        close(gpu, cpu, 1e-4)


def test_tree_gradients_equal_scoring_every_response_alone():
    examples, gradients = random_examples(random.Random(1), 3, shared=True), []
    prompt, responses = examples[0]
    examples[1] = prompt + responses[0] + [7], examples[1][1]  # a second moment: the first response is taken up
    for tied in (True, False):
        for score in (lambda m: dmpo.response_logps(m, dmpo.pack([examples[:2], examples[2:]])),
                      lambda m: torch.stack([torch.stack(row) for row in one_by_one(m, examples)])):
            torch.manual_seed(0)
            model = nonzero(lora.attach(tiny(tie_word_embeddings=tied), 4, 8))
            dmpo.dmpo_loss(score(model), torch.zeros(3, 6), 0.1).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        scale = gradients[-1].abs().max()
        close(gradients[-2] / scale, gradients[-1] / scale, 1e-4)


def test_tree_gradients_have_the_same_bits_every_time():
    torch.manual_seed(0)
    shot = [([1], [[node, token] for token in range(20) for node in range(2, 52)])]  # 50 nodes, 20 children each
    hidden = torch.randn(1, 64, 512, requires_grad=True)

    class Model:
        head = torch.randn(64, 512)

        def __call__(self, *_):
            return hidden

    batch, threads = dmpo.pack([shot]), torch.get_num_threads()
    torch.set_num_threads(8)  # with one, indexing has the same bits, too
    first, *others = (torch.autograd.grad(dmpo.response_logps(Model(), batch).sum(), hidden)[0] for _ in range(100))
    torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_real_model_tree_equals_scoring_every_title_alone():
    folder = need_model()
    model, tokenizer = llama.load(folder), data.load_tokenizer(folder)
    titles = ["The Matrix (1999)", "The Matrix (1999) II", "The Crow (1994)", "Fargo (1996)", "Amélie 🎬 (2001)"]
    examples = [data.tokenize(tokenizer, data.Example("u", titles[:n], titles[0], titles[1:]), "Movies:")
                for n in (1, 4)]
    with torch.no_grad():
        close(dmpo.response_logps(model, trees(examples)), one_by_one(model, examples), 5e-4)  # of about -30


def test_vocabulary_in_pieces_has_the_values_and_gradients_of_the_whole():
    torch.manual_seed(0)
    for size, tolerance in ((1, 1e-5), (50, 1e-3)):  # exp of the latter's logits, some hundreds, would overflow
        hidden, vocabulary = (torch.randn(5, 8) * size).requires_grad_(), torch.randn(9000, 8)
        pieces, whole = dmpo.LogSumExp.apply(hidden, vocabulary), (hidden @ vocabulary.T).logsumexp(-1)
        close(pieces, whole, tolerance)
        weights = torch.linspace(-1, 1, 5)
        close(*(torch.autograd.grad(y, hidden, weights)[0] for y in (pieces, whole)), tolerance)


def test_bfloat16_weights_give_nearly_the_same_scores_and_float32_gradients():
    examples, found = random_examples(random.Random(7), 3), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nonzero(lora.attach(tiny().to(torch.bfloat16).to(dtype), 4, 8))  # the same weights
        logps = dmpo.response_logps(model, trees(examples))
        dmpo.dmpo_loss(logps, torch.full((3, 3), -20.0), 0.1).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert logps.dtype == gradient.dtype == torch.float32
        found.append((logps.detach(), gradient / gradient.norm()))
    (scores, direction), (rounded_scores, rounded_direction) = found
    close(scores, rounded_scores, 0.5)  # of about -23
    assert direction @ rounded_direction > 0.98
    model, ids, places = tiny().bfloat16(), torch.arange(20)[None], torch.arange(20)[None]
    near, far = (model(ids, places + shift).float().flatten() for shift in (0, 900))
    assert torch.cosine_similarity(near, far, dim=0) > 0.999  # only distances count: angles are float32, however far


def test_two_responses_of_one_node_differ_by_their_own_logits_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(1, 16, 512).bfloat16()

    class Model:
        head = torch.randn(64, 512).bfloat16()

        def __call__(self, *_):
            return hidden

    (one, two), = dmpo.response_logps(Model(), dmpo.pack([[([1], [[2], [3]])]]))
    close(one - two, hidden[0, 0].float() @ (Model.head[2].float() - Model.head[3].float()), 1e-4)


def test_losses_by_hand():
    policy = torch.tensor([[-10.0, -12.0, -16.0], [-7.0, -8.0, -9.0]])
    reference = torch.tensor([[-11.0, -11.0, -12.0], [-7.0, -8.0, -9.0]])
    # r = 0.5 * (1, -1, -4) = (0.5, -0.5, -2) and, as nothing has moved, (0, 0, 0)
    close(dmpo.rewards(policy, reference, 0.5), [[0.5, -0.5, -2.0], [0, 0, 0]], 1e-6)
    # DMPO: margins 0.5 - mean(-0.5, -2) = 1.75, and 0; S-DPO: log(e^-1 + e^-2.5), and log(e^0 + e^0)
    close(dmpo.dmpo_loss(policy, reference, 0.5), (math.log(1 + math.exp(-1.75)) + math.log(2)) / 2, 1e-6)
    close(dmpo.sdpo_loss(policy, reference, 0.5), (math.log(1 + math.exp(-1) + math.exp(-2.5)) + math.log(3)) / 2, 1e-6)
    close(dmpo.sft_loss(torch.tensor([[-6.0, -9.0], [-2.0, -5.0]]), 3 + 1), 2.0, 1e-6)  # positives of 3 and 1 tokens
    assert dmpo.LOSSES["dmpo"] is dmpo.LOSSES["dpo"] is dmpo.dmpo_loss and dmpo.LOSSES["sdpo"] is dmpo.sdpo_loss
    for loss in (dmpo.dmpo_loss, dmpo.sdpo_loss):
        close(loss(policy[:1, :2], reference[:1, :2], 0.5), math.log(1 + math.exp(-1)), 1e-6)  # k = 1: DPO
        extreme = torch.tensor([[-1e4, 0.0, 0.0]], requires_grad=True)
        loss(extreme, torch.zeros(1, 3), 1.0).backward()
        assert torch.isfinite(extreme.grad).all()


def test_dmpo_with_one_negative_and_its_sum_with_sft_equal_trl():
    trl, transformers, datasets = need("trl"), need("transformers"), need("datasets")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(tiny(), f"{folder}/policy")
        write_folder(tiny(rms_norm_eps=0.1), f"{folder}/reference")  # the same weights, other outputs
        policy, reference = (transformers.LlamaForCausalLM.from_pretrained(f"{folder}/{name}")
                             for name in ("policy", "reference"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), pad_token="!",
                                                         eos_token="~")
        rows = {"prompt": ["Films:\n1.", "Seen:"], "chosen": [" Heat\n", " Alien\n"], "rejected": [" Up\n", " Antz\n"]}
        args = trl.DPOConfig(output_dir=folder, per_device_train_batch_size=2, beta=0.3, report_to=[], use_cpu=True,
                             bf16=False, gradient_checkpointing=False, disable_dropout=True,
                             loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer = trl.DPOTrainer(policy, reference, args, train_dataset=datasets.Dataset.from_dict(rows),
                                     processing_class=tokenizer)
            inputs = next(iter(trainer.get_train_dataloader()))
            expected = trainer.compute_loss(trainer.model, inputs)
        sequences = []  # TRL stacks the chosen rows on the rejected ones
        columns = (inputs[key].tolist() for key in ("input_ids", "attention_mask", "completion_mask"))
        for ids, attended, answer in zip(*columns):
            sequences.append(([t for t, m, a in zip(ids, attended, answer) if m and not a],
                              [t for t, m, a in zip(ids, attended, answer) if m and a]))
        half = len(sequences) // 2
        batch = trees([(prompt, [chosen, rejected[1]])
                      for (prompt, chosen), rejected in zip(sequences[:half], sequences[half:])])
        policy, reference = (dmpo.response_logps(llama.load(f"{folder}/{name}"), batch)
                             for name in ("policy", "reference"))
        ours, tokens = dmpo.dmpo_loss(policy, reference, 0.3), sum(len(chosen) for _, chosen in sequences[:half])
    assert abs(ours - math.log(2)) > 0.01
    close(ours + 0.2 * dmpo.sft_loss(policy, tokens), expected.item(), 1e-4)


def test_catalogue_equals_scoring_every_title_alone():
    rng, model = random.Random(4), tiny()
    responses = [r for _, responses in random_examples(rng, 40, shared=True) for r in responses]
    prompts = [[rng.randrange(300) for _ in range(n)] for n in (2, 17)]
    with torch.no_grad():
        for titles, nodes in ((200, 4096), (3, 100)):  # in one piece, and cut into many
            catalogue = dmpo.pack_catalogue(responses, nodes, titles)
            assert (len(catalogue) == 1) == (titles == 200)
            assert sorted(i for _, parts in catalogue for part in parts for i in part) == list(range(len(responses)))
            for prompt in prompts:
                close(dmpo.catalogue_logps(model, prompt, catalogue),
                      one_by_one(model, [(prompt, responses)])[0], 1e-4)


def test_groups_hold_every_example_once_within_the_budget():
    rows = [[example] for example in random_examples(random.Random(2), 50)]
    groups = dmpo.group(rows, 90)
    assert sorted(i for g in groups for i in g) == list(range(50)) and len(groups) > 5 and max(map(len, groups)) > 1
    for g in groups:
        assert len(g) == 1 or dmpo.pack([rows[i] for i in g]).ids.numel() <= 90
    assert dmpo.pack(rows).nodes == sum(len(dmpo.tree(shot)[0]) for shot in rows)


# eval.py


def test_users_may_have_unlike_numbers_of_candidates():
    tokenizer, model = byte_tokenizer(), tiny()
    tokens = [data.tokenize(tokenizer, data.Example("u", ["A"], "B", list(names)), "Items:") for names in ("CDE", "F")]
    scores = evaluation.score(model, tokens)
    assert scores.shape == (2, 4) and np.isinf(scores).tolist() == [[False] * 4, [False, False, True, True]]
    close(scores[1, :2], evaluation.score(model, tokens[1:])[0], 1e-5)
    assert evaluation.ranks(scores)[1] <= 2


def test_scores_that_are_not_finite_and_prompts_that_are_too_long_are_refused():
    model = tiny(max_position_embeddings=50)
    refused(lambda: evaluation.encode(model, byte_tokenizer(), toy_data(), data.heldout(toy_data(), "test", 2)),
            "more than the 50")
    longest = replace(toy_data(), items=[*toy_data().items, "Z" * 1000])  # nobody's positive, but to be ranked
    refused(lambda: evaluation.catalogue_ranks(tiny(), byte_tokenizer(), longest, data.heldout(toy_data(), "test", 0)),
            "more than the 1024")
    model.model.norm.weight.data.fill_(math.nan)
    refused(lambda: evaluation.score(model, random_examples(random.Random(0), 2)), "not finite")
    refused(lambda: dmpo.catalogue_logps(model, [1, 2], dmpo.pack_catalogue([[3, 4], [5]], 1024)), "not finite")


def test_ranking_all_items_is_exact_whatever_beginning_is_scored_first():
    dataset, tokenizer, model = toy_data(), byte_tokenizer(), tiny()
    examples = data.heldout(dataset, "test", 31, users=4)  # 40 titles, 9 touched: 31 others, so the same as "all"
    expected = evaluation.ranks(evaluation.score(model, evaluation.encode(model, tokenizer, dataset, examples)))
    for beginning in (1, evaluation.BEGINNING, 100):
        with mock.patch.object(dmpo, "catalogue_logps", wraps=dmpo.catalogue_logps) as scored, \
                mock.patch.object(evaluation, "BEGINNING", beginning):
            assert evaluation.catalogue_ranks(model, tokenizer, dataset, examples).tolist() == expected.tolist()
        sizes = [sum(len(part) for _, parts in call.args[2] for part in parts) for call in scored.call_args_list]
        assert sizes[::2] == [40] * 4 and max(sizes[1::2]) <= 32  # user by user: all beginnings, then what may be ahead
    assert min(sizes[1::2]) < 32  # with whole titles for beginnings only the likelier ones remain
    model.model.norm.weight.data.zero_()  # every token alike, so titles of one length tie
    expected = evaluation.ranks(evaluation.score(model, evaluation.encode(model, tokenizer, dataset, examples)))
    assert evaluation.catalogue_ranks(model, tokenizer, dataset, examples).tolist() == expected.tolist()


def test_ranks_count_ties_against_the_positive():
    scores = np.array([[3.0, 1, 2], [2, 2, 1], [1, 1, 1], [0, 1, 2]])
    assert evaluation.ranks(scores).tolist() == [1, 2, 3, 3]


def test_metrics_by_hand():
    values = evaluation.measure(np.array([1, 3, 5, 10, 11]), 20)
    assert [values[f"HR@{k}"].mean() for k in (1, 5, 10)] == [0.2, 0.6, 0.8]
    close(values["NDCG@10"], [1, 0.5, 1 / math.log2(6), 1 / math.log2(11), 0], 1e-9)  # 1 / log2(1 + rank)
    close(values["NDCG@5"], [1, 0.5, 1 / math.log2(6), 0, 0], 1e-9)
    close(values["MRR"], [1, 1 / 3, 1 / 5, 1 / 10, 1 / 11], 1e-9)
    pairs = evaluation.measure(np.array([1, 1, 2, 1]), 2)  # one negative
    assert pairs["AUC"].mean() == 0.75 and "HR@5" not in pairs


def test_interval_of_many_users_is_the_textbooks():
    values = np.random.default_rng(0).random(1000)
    error = values.std() / math.sqrt(1000)
    close(evaluation.interval(values), [values.mean() - 1.96 * error, values.mean() + 1.96 * error], 0.25 * error)


def test_differences_are_paired():
    a, b = (evaluation.measure(np.array(rank * 25), 20) for rank in ([1, 2, 9, 20], [1, 1, 8, 19]))
    rows = evaluation.summarise([("base", a, None), ("dmpo", b, "base")])
    low, high = rows[1]["difference"]["ci95"]["MRR"]
    assert low > 0 and high - low < rows[0]["ci95"]["MRR"][1] - rows[0]["ci95"]["MRR"][0]
    close(rows[1]["difference"]["MRR"], rows[1]["MRR"] - rows[0]["MRR"], 1e-9)


def test_runs_of_one_name_are_averaged_user_by_user():
    dataset, model = toy_data(), tiny()
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            lora.save(nonzero(lora.attach(model, 2, 8), seed), f"{folder}/{seed}/sft")
            settings = {"stage": "sft", "seed": seed, "shots": 12, "moments": 3, "latest": 4}
            Path(f"{folder}/{seed}/sft/args.json").write_text(json.dumps(settings))
        adapters = evaluation.find_adapters([f"{folder}/0", f"{folder}/1"])
        with mock.patch.object(evaluation, "rank_baselines", return_value={}) as fitted:
            report = evaluation.evaluate(model, byte_tokenizer(), dataset, adapters, data.heldout(dataset, "test", 9),
                                         baselines=True)
    assert fitted.call_args.args[2] == [(12, 0, 3, 4), (12, 1, 3, 4)]  # fitted to the shots that the adapters saw
    base, both = (np.array(report["ranks"][name]) for name in ("base", "sft x2"))
    assert base.shape == (1, 30) and both.shape == (2, 30) and (both[0] != both[1]).any()
    row = report["rows"][1]
    close(row["MRR"], (1 / both).mean(), 1e-9)
    close(row["difference"]["MRR"], (1 / both).mean() - (1 / base).mean(), 1e-9)


def test_tables_show_half_the_interval():
    report = {"data": "d", "split": "test", "users": 2, "candidates": 20, "rows": [
        {"name": "base", "MRR": 0.2, "ci95": {"MRR": [0.1, 0.3]},
         "difference": {"to": "x", "MRR": 0.1, "ci95": {"MRR": [0.0, 0.1]}}}]}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.print_table(report)
    assert "0.200 ±0.100" in out.getvalue() and re.search(r"- x +\+0\.100 ±0\.050", out.getvalue()), out.getvalue()


def test_traditional_scores_by_hand():
    sequences = [[0, 1, 2], [0, 1], [3, 1]]
    assert evaluation.fit_popularity(sequences, 5)([2]).tolist() == [2, 3, 1, 1, 0]
    knn = evaluation.fit_item_knn(sequences, 5)
    close(knn([0]), [0, 2 / math.sqrt(6), 1 / math.sqrt(2), 0, 0], 1e-6)  # 0 and 1 share two users of 2 and 3
    close(knn([0, 2])[1], 2 / math.sqrt(6) + 1 / math.sqrt(3), 1e-6)
    markov = evaluation.fit_markov(sequences, 5)
    assert np.argsort(-markov([3, 0]), kind="stable").tolist() == [1, 0, 2, 3, 4]  # 0 -> 1 twice, then by popularity
    assert markov([4]).argmax() == 1  # nothing followed 4


def test_a_positive_gets_a_random_place_among_its_ties_in_a_traditional_method():
    dataset = data.Dataset({}, list("abcde"))
    examples = [data.Example("u", ["a"], "c", ["b", "d", "e"])] * 300
    rank = evaluation.rank_by(lambda *_: lambda history: np.array([0, 3, 3, 3, 5]), dataset, examples, [])
    assert set(rank) == {2, 3, 4} and min(np.bincount(rank)[2:]) > 70, np.bincount(rank)  # e is ahead, b and d tie
    dataset = data.Dataset({"u": ["e", "c"]}, list("abcde"))  # without negatives: all that u has not touched
    rank = evaluation.rank_by(lambda *_: lambda history: np.array([0, 3, 3, 3, 5]), dataset,
                              [data.Example("u", ["e"], "c", [])] * 300, [])
    assert set(rank) == {1, 2, 3}, np.bincount(rank)


def test_traditional_methods_learn_from_the_adapters_shots_or_from_everything_before_validation():
    dataset, seen = toy_data(), []

    def spy(sequences, items):
        seen.append([[dataset.items[i] for i in sequence] for sequence in sequences])
        return lambda history: np.zeros(items)
    with mock.patch.dict(evaluation.BASELINES, {"spy": spy}, clear=True):
        ranked = evaluation.rank_baselines(dataset, data.heldout(dataset, "test", 5), [(24, 0, 10, 10)])
        other = toy_data(4, 40, 25)
        evaluation.rank_baselines(other, data.heldout(other, "test", 5), [(9, 1, 3, 5)])  # shots, seed, moments, latest
    few, everybodys, windows, _ = seen
    assert windows == [[*shot[-1].history, shot[-1].positive]
                       for shot in data.shots(replace(other, latest=5), 9, 0, 1, moments=3)]
    assert list(ranked) == ["spy, 24 shots", "spy, all users"]
    assert everybodys == [items[:-2] for items in dataset.sequences.values()]
    assert few == [[*shot[-1].history, shot[-1].positive] for shot in data.shots(dataset, 24, 0, 0, moments=10)]
    assert all(sequence in everybodys for sequence in few)  # a toy user's only shot is all that may be learnt of him


def test_sasrec_learns_what_comes_next():
    dataset = toy_data()
    examples = data.heldout(dataset, "test", 19)
    training = [items[:-2] for items in dataset.sequences.values()]
    learnt = evaluation.rank_by(evaluation.fit_sasrec, dataset, examples, training)
    assert (learnt == 1).mean() > 0.8, learnt  # the toy users walk along a circle
    popular = evaluation.rank_by(evaluation.fit_popularity, dataset, examples, training)
    assert (popular == 1).mean() < 0.4
    numbers = evaluation.fit_sasrec([[(3 * u + i) % 40 for i in range(7)] for u in range(30)], 40)
    assert numbers(list(range(9))).argmax() == 9  # reads the latest six
    model, ids = evaluation.SASRec(40, 8).eval(), torch.arange(6)[None]
    with torch.no_grad():
        close(model(ids)[:, :3], model(ids[:, :3]), 1e-5)  # what comes later is not seen
    starts, forward = set(), evaluation.SASRec.forward
    with mock.patch.object(evaluation.SASRec, "forward", lambda self, ids: starts.update(ids[:, 0].tolist()) or forward(
            self, ids)):
        evaluation.fit_sasrec([list(range(120))] * 4, 120, epochs=10)
    assert len(starts) > 20 and max(starts) <= 69, "a long history is learnt by windows from all of its places"
    every = data.heldout(dataset, "test", 0)  # no negatives: among all
    assert (evaluation.rank_by(evaluation.fit_markov, dataset, every, training) == 1).mean() > 0.8


def test_adapters_of_one_name_are_told_apart_by_what_differs():
    with tempfile.TemporaryDirectory() as work:
        def saved(run, **adapters):
            for name, settings in adapters.items():
                folder = Path(work, run, name)
                folder.mkdir(parents=True)
                (folder / "adapter_config.json").write_text("{}")
                (folder / "adapter_model.safetensors").touch()
                (folder / "args.json").write_text(json.dumps(settings))
            return Path(work, run)

        def names(*runs):
            return [name for name, *_ in evaluation.find_adapters(runs)]

        dmpo_settings = {"seed": 0, "negatives": 4, "data": "x"}
        a = saved("a", dmpo=dmpo_settings, sft={"seed": 0, "data": "x"}, sdpo={"seed": 0}, dpo={"seed": 0})
        assert names(a) == ["sft", "dpo", "sdpo", "dmpo"]  # what the others start from, and DMPO last
        other_seed = saved("b", dmpo=dmpo_settings | {"seed": 1, "data": "y"})
        assert names(a / "dmpo", other_seed) == ["dmpo", "dmpo"]  # to be averaged
        fewer = saved("c", dmpo=dmpo_settings | {"negatives": 2})
        assert names(a / "dmpo", fewer) == ["dmpo, negatives 4", "dmpo, negatives 2"]
        again = saved("d", dmpo=dmpo_settings | {"init_sha256": "of another SFT"})
        assert names(a / "dmpo", again) == [f"dmpo, {a}/dmpo", f"dmpo, {again}/dmpo"]
        assert names(a / "dmpo", a) == ["dmpo", "sft", "dpo", "sdpo"]  # each once
        refused(lambda: evaluation.inherit(evaluation.find_adapters([a / "dmpo", other_seed]), "data", ""), "--data")
        refused(lambda: names(saved("e", base={"seed": 0})), "base")  # its numbers would be averaged with the model's


def test_adapters_without_args_json_are_evaluated_and_those_with_a_bad_one_refused():
    with toy_world():
        lora.save(nonzero(lora.attach(llama.load("base"), 2, 4)), "bare", "base")  # as peft would leave it
        status, out, err = command(evaluation.main, "bare", "--model", "base", "--data", "toy.csv", "--baselines")
        assert status == 0 and "bare" in out and "sasrec, all users" in out, err
        Path("bare/args.json").write_text('{"data": ["toy.csv"]}')
        status, out, err = command(evaluation.main, "bare")
        assert status == 1 and "data cannot be ['toy.csv']" in err, err
        Path("bare/args.json").write_text('{"latest": 0}')
        status, out, err = command(evaluation.main, "bare")
        assert status == 1 and "latest cannot be 0" in err, err


def test_explanations_are_the_change_in_log_odds_without_an_item():
    dataset, tokenizer, model = toy_data(), byte_tokenizer(), tiny()
    history, titles = dataset.items[:3], dataset.items[5:7]

    def alone(history, title):
        prompt, (response,) = data.tokenize(tokenizer, data.Example("", history, title, []), dataset.heading)
        return float(one_by_one(model, [(prompt, [response])])[0][0])

    scores, effects = evaluation.explain(model, tokenizer, dataset, history, titles)
    close(scores, [alone(history, title) for title in titles], 1e-4)
    without = [history[1:], [history[0], history[2]], history[:2]]  # so unlikely titles have odds like probabilities
    close(effects, [[alone(history, title) - alone(left, title) for left in without] for title in titles], 2e-4)
    # By hand: two titles of probability 1/2 and 1/5; without the first item 1/4 and 1/5, without the second 4/5, 1/2.
    # The first's odds are 1, then 1/3 and 4; the second's 1/4, then 1/4 and 1
    with mock.patch.object(evaluation, "score", lambda *_: np.log([[0.5, 0.2], [0.25, 0.2], [0.8, 0.5]])):
        _, effects = evaluation.explain(model, tokenizer, dataset, history[:2], titles)
    close(effects, [[math.log(3), -math.log(4)], [0, -math.log(4)]], 1e-9)


def test_the_deletion_test_takes_away_the_three_items_that_speak_most():
    dataset, encoded = toy_data(), []
    with mock.patch.multiple(
            evaluation, explain=lambda model, tokenizer, dataset, history, titles: (None, [np.arange(len(history))]),
            encode=lambda *args: encoded.append(args[3]) or args[3],  # the examples, which `score` counts
            score=lambda model, examples: np.array([[0, 1, 1, *[-1] * 17], *[[0] + [-1] * 19] * 5])[:len(examples)]):
        report = evaluation.check_explanations(None, None, dataset, [], mock.Mock(split="test", seed=0, users=2))
    chance, reasons = report["rows"]
    assert (chance["rank"], reasons["rank"], reasons["difference"]["rank"]) == (1, 3, 2) and len(encoded) == 4
    for (whole,), (best, *random_ones) in zip(encoded[::2], encoded[1::2]):
        assert best.positive == whole.negatives[0]  # which scores highest
        assert best.history == whole.history[:-3] and len(random_ones) == 5  # here the latest speak most
        assert all(len(e.history) == len(whole.history) - 3 and e.positive == best.positive for e in random_ones)


def test_people_get_lists_with_reasons():
    with toy_world():
        status, out, err = command(evaluation.main, "--model", "base", "--data", "toy.csv", "--user", "3", "--top", 4,
                                   "--explain", "--json", "person.json", "--dtype", "float32")
        assert status == 0, err
        report = json.loads(Path("person.json").read_text())
        dataset = data.load("toy.csv")
        assert report["history"] == dataset.sequences["3"][:-1]
        assert report["held_out"]["title"] == dataset.sequences["3"][-1]
        assert [row["rank"]["base"] for row in report["recommended"]] == [1, 2, 3, 4]
        assert not {row["title"] for row in report["recommended"]} & set(report["history"])
        assert all(row["title"] in out for row in report["recommended"]) and "<- what came next" in out
        assert set(report["recommended"][0]["effects"]) == set(report["history"]) and "\x1b" not in out
        typed, pair = f"{dataset.items[3].upper()};{dataset.items[0]}", dataset.items[8:10]
        status, out, err = command(evaluation.main, "--model", "base", "--data", "toy.csv", "--history", typed,
                                   "--compare", *pair, "--json", "pair.json", "--dtype", "float32")
        history = [dataset.items[3], dataset.items[0]]
        _, (a, b) = evaluation.explain(llama.load("base"), byte_tokenizer(), dataset, history, pair)
        close(list(json.loads(Path("pair.json").read_text())["base"]["effects"].values()), a - b, 1e-4)
        assert status == 0 and dataset.items[3] in out, (out, err)


def test_a_person_of_given_examples_has_the_history_of_one():
    line = '{"user": "a", "history": ["%s", "%s"], "positive": "%s"}\n'
    dataset = read_text(line % ("C", "D", "E") + line % ("A", "B", "C"), "own.jsonl")  # lines in any order
    assert evaluation.find_person(dataset, "a", None) == (["C", "D"], "E")


def test_people_and_titles_that_are_not_there_are_refused():
    with toy_world():
        items = data.load("toy.csv").items
        for args, words in ((("--user", "nobody"), ("no such user",)), (("--history", " ; "), ("no history",)),
                            (("--history", ";".join(items)), ("every title",)),
                            (("--history", items[3][:-2]), ("closest", items[3]))):
            status, _, err = command(evaluation.main, "--model", "base", "--data", "toy.csv", *args)
            assert status == 1 and all(word in err for word in words), err


def test_bars_to_the_right_speak_for_a_title():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.print_bars({"against": -0.5, "for": 1.0})
    for_it, against = "            |############", "      ######|            "
    assert out.getvalue() == f"     +1.00 {for_it}  for\n     -0.50 {against}  against\n", out.getvalue()


def test_bfloat16_is_chosen_where_it_multiplies_at_least_twice_as_fast():
    for half, dtype in ((1.9, torch.float32), (2.1, torch.bfloat16)):
        with mock.patch.object(evaluation, "matmul_rate", lambda _, kind: half if kind == torch.bfloat16 else 1.0):
            assert evaluation.choose_device("cpu", "auto")[1] == dtype


def test_operations_by_hand():
    model, batch = lora.attach(tiny(), 4, 8), dmpo.pack([[([1, 2, 3], [[4, 5]])], [([9], [[5, 6], [7]])]])
    weights = 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32)  # two layers: q, k, v, o, MLP, norms
    # four nodes and two (the second tree is padded), of which two each predict; 1 + 2 + 3 + 4 and 1 + 2 pairs attend,
    # in two layers, over 32 numbers for score and value
    assert evaluation.operations(model, batch) == 2 * 6 * weights + 4 * 13 * 2 * 32 + 2 * 4 * 300 * 32


# train.py


def test_schedule_warms_up_then_falls_along_half_a_cosine():
    values = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    close(values[:10], [0.2 * step for step in range(1, 11)], 1e-9)     # a tenth of the steps up to the peak
    close([values[10], values[55], values[99]], [2.0, 1.0, 0.0], 1e-3)  # 55 is half-way
    assert train.learning_rate(0, 1, 2.0) == 2.0                        # even a single step is taken


def test_a_steps_gradient_is_that_of_one_batch_however_many_groups_and_processes_share_it():
    a, b, c, *rest = ([example] for example in random_examples(random.Random(3), 6))
    shots = [a + b, c, *rest]  # five, of unequal numbers of examples
    examples, reference = sum(shots, []), torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) - 20
    tokens = sum(len(responses[0]) for _, responses in examples)

    def fresh():
        torch.manual_seed(0)
        return nonzero(lora.attach(tiny(), 4, 8))

    def gradient(model):
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    for settings in ({"stage": "sft"}, {"stage": "dmpo", "loss": "dmpo", "beta": 0.5, "sft_weight": 0},
                     {"stage": "dmpo", "loss": "sdpo", "beta": 0.5, "sft_weight": 0.3}):
        whole = fresh()
        logps = torch.stack([torch.stack(row) for row in one_by_one(whole, examples)])
        r = 0.5 * (logps.detach() - reference)
        expected = {"margin": (r[:, 0] - r[:, 1:].mean(1)).mean(),
                    "reward_accuracy": (r[:, :1] > r[:, 1:]).float().mean()}
        loss = sft = -logps[:, 0].sum() / tokens
        if settings["stage"] == "dmpo":
            loss = dmpo.LOSSES[settings["loss"]](logps, reference, 0.5) + settings["sft_weight"] * sft
        loss.backward()
        expected["loss"] = loss.detach()
        for budget, processes in ((10000, 1), (1, 1), (10000, 2), (60, 7)):  # of seven, two have no shot
            told, found = Counter(), 0
            for me in range(processes):
                part = fresh()
                with (mock.patch.dict(evaluation.NODES, cpu=budget),
                      mock.patch.object(evaluation, "world", lambda: (me, processes))):
                    stats = train.backward(part, shots, reference.split([2, 1, 1, 1, 1]), settings)
                told.update(stats)  # adds them up
                found = found + gradient(part)
            scale = gradient(whole).abs().max()
            close(found / scale, gradient(whole) / scale, 1e-4)
            for key in set(expected) & set(told):
                close(told[key], float(expected[key]), 1e-4)


def test_a_step_moves_the_adapters_by_the_learning_rate_along_the_clipped_gradient():
    torch.manual_seed(0)
    model = nonzero(lora.attach(tiny(), 4, 8))
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = lambda: torch.cat([p.detach().flatten() for p in trained])
    before, shots = flat(), [[example] for example in random_examples(random.Random(8), 3)]
    with mock.patch.object(dmpo, "sft_loss", lambda logps, tokens: -1000 * logps[:, 0].sum()):  # a long gradient
        line = train.update(model, torch.optim.SGD(trained, lr=9.0), 0.01, shots, [None] * 3, [2, 0],
                            {"stage": "sft"})
    close((flat() - before).norm(), 0.01, 1e-4)
    assert line["lr"] == 0.01 and all(p.grad is None for p in trained)
    close(line["examples_per_s"] * line["seconds"], 2.0, 1e-6)


def test_main_job_trains_sft_then_dmpo_and_eval_prints_the_same_table():
    with toy_world():
        status, out, err = command(train.main, "--stage", "dmpo", *TOY, "--epochs", 8, "--lr", 0.005, "--seed", 1,
                                   "--users", 20)
        assert status == 0, err
        assert "sft -> runs/toy/sft" in out and "next: python eval.py" in out
        for stage, steps, lr in (("sft", 3, train.LEARNING_RATES["sft"]), ("dmpo", 24, 0.005)):  # --lr: of its stage
            lines = [json.loads(line) for line in Path(f"runs/toy/{stage}/log.jsonl").read_text().splitlines()]
            assert len(lines) == steps and all(np.isfinite(line["loss"]) for line in lines)
            assert {"step", "loss", "lr", "examples_per_s", "tokens_per_s"} <= set(lines[0])
            assert [line["lr"] for line in lines] == [train.learning_rate(step, steps, lr) for step in range(steps)]
        config = json.loads(Path("runs/toy/dmpo/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (8, 16)  # alpha is twice the rank
        assert {"reward_accuracy", "margin"} <= set(lines[0])
        assert abs(lines[0]["loss"] - math.log(2)) < 1e-3 and abs(lines[0]["margin"]) < 1e-3  # starts at its reference
        assert np.mean([line["margin"] for line in lines[-3:]]) > 0.01
        first = out[out.index("toy.csv: test items"):out.index("adapters in")].strip()
        status, again, err = command(evaluation.main, "--data", "toy.csv", "--dtype", "float32", "--device", "cpu",
                                     "--users", 20, "--json", "table.json")
        assert status == 0 and first in again, err
        report = json.loads(Path("table.json").read_text())
        assert [row["name"] for row in report["rows"]] == ["base", "sft", "dmpo"]
        assert set(report) >= {"data", "candidates", "users", "seed", "rows"} and report["users"] == 20
        assert set(report["rows"][0]) == {"name", "ci95", "HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"}
        status, _, err = command(evaluation.main, "--data", "toy.csv", "--user", "3", "--explain", "--dtype", "float32",
                                 "--json", "person.json")
        person = json.loads(Path("person.json").read_text())
        assert status == 0 and person["model"] == "dmpo", err  # it recommends, the others' ranks are shown
        assert [row["rank"]["dmpo"] for row in person["recommended"]] == [*range(1, 11)]
        assert set(person["held_out"]["rank"]) == {"base", "sft", "dmpo"}
        os.symlink("toy.csv", "link.csv")
        status, out, err = command(evaluation.main, "runs/toy", "--data", "link.csv", "--dtype", "float32")
        assert status == 0 and "dmpo (toy.csv)" not in out, err  # the same file: the adapters are its own
        assert command(lora.main, "base", "runs/toy/dmpo", "merged")[0] == 0
        status, out, err = command(evaluation.main, "--data", "toy.csv", "--model", "merged", "--dtype", "float32")
        assert status == 0 and "dmpo" not in out and "base model only" in err, err  # not put on top of itself
        model, dataset, history = llama.load("base"), data.load("toy.csv"), person["history"]
        titles = [item for item in dataset.items if item not in history]
        for name, folder in (("base", None), ("sft", "runs/toy/sft"), ("dmpo", "runs/toy/dmpo")):
            scores, effects = evaluation.explain(lora.load(model, folder), byte_tokenizer(), dataset, history, titles)
            for row in person["recommended"]:
                assert row["rank"][name] == (scores >= scores[titles.index(row["title"])]).sum()
        close([list(row["effects"].values()) for row in person["recommended"]],
              effects[[titles.index(row["title"]) for row in person["recommended"]]], 1e-3)


def test_the_defaults_are_those_that_the_readme_states():
    with mock.patch.object(sys, "argv", ["train.py"]):
        args = vars(train.parse())
    assert train.LEARNING_RATES == {"sft": 1e-3, "dmpo": 5e-4} and args.items() >= dict(
        stage="dmpo", loss="dmpo", init="sft", data="ml-100k", shots=100, moments=10, latest=10, batch_size=2, epochs=1,
        rank=8, beta=0.1, sft_weight=0, negatives=4, sample="given", prompt="history", users=200, seed=0).items()


def test_an_epoch_takes_every_shot_once_in_an_order_of_its_own_without_weight_decay():
    with toy_world(), mock.patch.object(train, "update", wraps=train.update) as updates:
        status, _, err = command(train.main, *TOY, "--stage", "sft", "--epochs", 2, "--users", 5)
    assert status == 0, err
    picked = [call.args[5] for call in updates.call_args_list]  # three steps an epoch
    first, second = sum(picked[:3], []), sum(picked[3:], [])
    assert sorted(first) == sorted(second) == list(range(24)) and first != second and sorted(first) != first
    assert updates.call_args.args[1].param_groups[0]["weight_decay"] == 0


def test_eval_ranks_the_split_the_candidates_and_the_users_asked_for():
    with toy_world():
        status, _, err = command(evaluation.main, "--model", "base", "--data", "toy.csv", "--dtype", "float32",
                                 "--split", "validation", "--seed", 3, "--candidates", 6, "--users", 5,
                                 "--json", "table.json")
        assert status == 0, err
        dataset, model, report = data.load("toy.csv"), llama.load("base"), json.loads(Path("table.json").read_text())
        examples = evaluation.encode(model, byte_tokenizer(), dataset, data.heldout(dataset, "validation", 5, 3, 5))
        assert report["ranks"]["base"] == [evaluation.ranks(evaluation.score(model, examples)).tolist()]


def test_dmpo_starts_where_sft_ended():
    with toy_world():
        status, _, err = command(train.main, *TOY, "--lr", 1e-9, "--epochs", 1)
        sft, after = (load_file(f"runs/toy/{stage}/adapter_model.safetensors") for stage in ("sft", "dmpo"))
        assert status == 0 and all((sft[key] - after[key]).abs().max() < 1e-6 for key in sft), err
        assert max(sft[key].abs().max() for key in sft if "lora_B" in key) > 1e-4  # a fresh adapter's would be 0
        shutil.move("runs/toy/sft", "start")  # another SFT in its place is another reference
        assert command(train.main, *TOY, "--stage", "sft", "--lr", 0.01, "--epochs", 1)[0] == 0
        status, _, err = command(train.main, *TOY, "--lr", 1e-9, "--epochs", 1)
        assert status == 1 and "init_sha256" in err, err
        adapters = evaluation.find_adapters(["start", "runs/toy"])
        rows = evaluation.evaluate(llama.load("base"), byte_tokenizer(), toy_data(), adapters,
                                   data.heldout(toy_data(), "test", 9, users=3))["rows"]
        assert {row["name"].split(" (")[0]: row["difference"]["to"].split(" (")[0] for row in rows[1:]} == {
            "start": "base", "sft": "base", "dmpo": "start"}  # each is compared with what it started from


def test_same_seed_gives_the_same_adapter_and_another_seed_another():
    with toy_world():
        for out, seed in (("a", 1), ("b", 1), ("c", 2)):
            status, _, err = command(train.main, "--stage", "dmpo", *TOY, "--epochs", 1, "--seed", seed, "--out", out)
            assert status == 0, err
        a, b, c = (load_file(f"{out}/dmpo/adapter_model.safetensors") for out in "abc")
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)


@contextlib.contextmanager
def interrupted_run(*args, steps=4):
    """A toy run, in its folder, that was cut off after some steps, by default of SFT, and left its checkpoint."""
    with toy_world(), mock.patch.object(train, "CHECKPOINT_SECONDS", 0):
        original, calls = train.update, itertools.count(1)

        def failing(*arguments):
            if next(calls) > steps:
                raise OSError("No space left on device")
            return original(*arguments)
        with mock.patch.object(train, "update", failing):
            status, _, err = command(train.main, *TOY, "--epochs", 3, "--stage", "sft", *args)
        assert status == 1 and "No space left" in err, err
        yield Path("runs/toy/sft")


def assert_same_files(a, b, stages=("sft", "dmpo")):
    """Both runs' adapters are the same to the bit, their settings and steps too, and nothing half-done is left."""
    for stage in stages:
        for name in ("adapter_model.safetensors", "adapter_config.json", "args.json"):
            assert (Path(a) / stage / name).read_bytes() == (Path(b) / stage / name).read_bytes(), (stage, name)
        one, two = ([(line["step"], line.get("loss")) for line in map(json.loads, open(f"{run}/{stage}/log.jsonl"))]
                    for run in (a, b))
        assert one == two, (one, two)
        assert {p.name for p in (Path(a) / stage).iterdir()} == {p.name for p in (Path(b) / stage).iterdir()}


def test_an_interrupted_run_goes_on_where_it_was_and_ends_in_the_same_files_bit_for_bit():
    with interrupted_run("--stage", "dmpo", steps=7):  # the three of SFT and four of DMPO's nine: in the second epoch
        with open("runs/toy/dmpo/log.jsonl", "a") as log:
            log.write('{"step": 4, "lo')  # written after the checkpoint
        args = (*TOY, "--epochs", 3)
        status, out, err = command(train.main, *args)
        assert status == 0 and "going on after step 4, from runs/toy/dmpo" in out, (out, err)
        assert command(train.main, *args, "--out", "whole")[0] == 0
        assert_same_files("runs/toy", "whole")


def benchmark_kill_25_times():
    """Kill a toy DMPO (SIGKILL) at 25 random moments and start it again: its files are those of an undisturbed run."""
    import subprocess
    program = (f"import sys; sys.path.insert(0, {str(Path(train.__file__).parent)!r}); import eval, train; "
               "train.CHECKPOINT_SECONDS = 0; eval.run(train.main)")
    command_line = [sys.executable, "-c", program, *map(str, TOY), "--epochs", "2", "--users", "5", "--out", "killed"]
    rng, kills, resumed = random.Random(0), 0, 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def steps():
        return sum(len(log.read_bytes().splitlines()) for log in Path("killed").glob("*/log.jsonl"))
    with toy_world():
        subprocess.run([*command_line[:-1], "whole"], env=environment, capture_output=True, check=True)
        while kills < 25:
            most = steps() + rng.randint(1, 5)  # of three for SFT and six for DMPO
            run = subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            while run.poll() is None and steps() < most:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
            run.kill()
            resumed += b"going on after" in run.communicate()[0]
            if run.returncode == 0:
                assert_same_files("killed", "whole")
                shutil.rmtree("killed")  # and begin anew
            else:
                assert run.returncode == -signal.SIGKILL
                kills += 1
        assert resumed > 5, resumed
        subprocess.run(command_line, env=environment, capture_output=True, check=True)
        assert_same_files("killed", "whole")


def test_checkpoints_that_do_not_fit_are_refused_by_name():
    with interrupted_run() as folder:
        status, _, err = command(train.main, *TOY, "--epochs", 3, "--stage", "sft", "--lr", 0.01)
        assert status == 1 and f"lr {train.LEARNING_RATES['sft']}, not 0.01" in err, err
        whole = (folder / "checkpoint").read_bytes()
        assert not list(folder.glob("*.part"))
        for at in (3, len(whole) // 2, len(whole) - 5):  # the header, an adapter or moment, the last of them
            damaged = bytearray(whole)
            damaged[at] ^= 0x40
            (folder / "checkpoint").write_bytes(damaged)
            status, _, err = command(train.main, *TOY, "--epochs", 3, "--stage", "sft")
            assert status == 1 and "checkpoint" in err and "Traceback" not in err, err
        (folder / "checkpoint").write_bytes(whole)
        status, _, err = command(train.main, *TOY, "--epochs", 3, "--stage", "sft")
        assert status == 0 and not (folder / "checkpoint").exists(), err


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written():
    with toy_world(), mock.patch.object(train, "CHECKPOINT_SECONDS", 0):
        args = (*TOY, "--stage", "sft", "--epochs", 2)
        assert command(train.main, *args, "--out", "whole")[0] == 0
        size = Path("whole/sft/adapter_model.safetensors").stat().st_size
        for room in (size * 2, size // 2):  # for the adapter, but not for the checkpoint, which is larger; for neither
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            try:
                status, _, err = command(train.main, *args, "--out", "full")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert status == 1 and "File too large" in err.splitlines()[-1] and "Traceback" not in err, err
            assert {p.name for p in Path("full/sft").iterdir()} == {"lock", "log.jsonl"}
        assert command(train.main, *args, "--out", "full")[0] == 0
        assert_same_files("full", "whole", ["sft"])


def test_an_edited_data_file_is_not_mixed_with_what_was_trained_before():
    with interrupted_run():
        Path("toy.csv").write_text(Path("toy.csv").read_text() + "\nnew,99,1,Film Z")
        status, _, err = command(train.main, *TOY, "--epochs", 3, "--stage", "sft")
        assert status == 1 and "data_sha256" in err, err


def test_two_runs_in_one_folder_are_refused():
    with toy_world():
        held = train.lock(Path("runs/toy/sft"))
        status, _, err = command(train.main, *TOY, "--epochs", 1, "--stage", "sft")
        assert status == 1 and "another run is at work" in err, err
        held.close()
        with mock.patch.object(train, "update", wraps=train.update) as update:  # a run holds it while it trains
            update.side_effect = lambda *_: refused(lambda: train.lock(Path("runs/toy/sft"))) or mock.DEFAULT
            assert command(train.main, *TOY, "--epochs", 1, "--stage", "sft")[0] == 0 and update.called


def test_a_loss_that_is_not_finite_stops_the_run():
    with toy_world():
        with mock.patch.object(dmpo, "sft_loss", lambda logps, tokens: logps[:, 0].sum() * math.nan):
            status, _, err = command(train.main, *TOY, "--epochs", 1, "--stage", "sft")
        assert status == 1 and "the loss is nan" in err and "shots [" in err, err
        assert not Path("runs/toy/sft/adapter_model.safetensors").exists()


def test_a_finished_stage_is_not_trained_twice_nor_overwritten():
    with toy_world():
        weights, contents = Path("runs/toy/sft/adapter_model.safetensors"), []
        for again in range(2):
            status, out, err = command(train.main, *TOY, "--epochs", 1, "--stage", "sft")
            assert status == 0 and ("holds this adapter already" in out) == bool(again), err
            contents.append(weights.read_bytes())
        status, _, err = command(train.main, *TOY, "--epochs", 2, "--stage", "sft")
        assert status == 1 and "epochs 1, not 2" in err, err
        assert contents == [weights.read_bytes()] * 2


def test_two_processes_make_the_adapter_and_the_table_of_one():
    import subprocess
    training = (*TOY, "--epochs", 1, "--shots", 21, "--batch-size", 5, "--out")  # the last step has a shot for one only
    ranking = ("one", "--data", "toy.csv", "--dtype", "float32", "--device", "cpu", "--candidates", "all")

    def table(out):
        return [line for line in out.partition("users/s")[0].splitlines()[:-1]
                if not line.startswith("[Gloo]")]  # which some versions of torch print
    with toy_world() as folder:
        def two_processes(*args):
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                                   *map(str, args)], capture_output=True, text=True, cwd=folder, timeout=100,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout
        status, _, err = command(train.main, *training, "one")
        assert status == 0, err
        two_processes(train.__file__, *training, "two")
        one, two = (load_file(f"{run}/dmpo/adapter_model.safetensors") for run in ("one", "two"))
        for key in one:
            close(one[key], two[key], 1e-5)
        status, out, err = command(evaluation.main, *ranking)
        assert status == 0 and table(out) == table(two_processes(evaluation.__file__, *ranking)), (out, err)
        assert any("NDCG@10" in line for line in table(out)), out


def test_every_loss_and_start_trains_and_lands_in_its_folder():
    with toy_world():
        for extra in (("--loss", "sdpo", "--checkpoint-activations"), ("--loss", "dpo", "--beta", 0.3),
                      ("--init", "base", "--out", "frombase"),
                      ("--init", "runs/toy/sft", "--out", "again", "--loss", "sdpo"),
                      ("--init", "runs/toy/sft", "--out", "more", "--stage", "sft", "--lr", 1e-9)):
            with mock.patch.object(llama, "checkpoint", wraps=llama.checkpoint) as recomputed:
                status, out, err = command(train.main, *TOY, "--epochs", 1, *extra)
            assert status == 0 and recomputed.called == ("--checkpoint-activations" in extra), err
        saved = json.loads(Path("runs/toy/dpo/args.json").read_text())
        assert (saved["beta"], saved["negatives"]) == (0.3, 1)
        again, first = (Path(run, "sdpo/adapter_model.safetensors").read_bytes() for run in ("again", "runs/toy"))
        assert again == first, "from SFT's folder or right after SFT: the same adapter"
        more, first = (load_file(f"{run}/sft/adapter_model.safetensors") for run in ("more", "runs/toy"))
        for key in first:
            close(more[key], first[key], 1e-6)  # SFT, too, starts from the adapter that it is told
        status, out, err = command(train.main, *TOY, "--init", "nowhere", "--out", "never")
        assert status and "nowhere/adapter_config.json: cannot be read" in str(err), err
        assert sorted(p.name for p in Path("runs/toy").iterdir()) == ["dpo", "sdpo", "sft"]
        assert [p.name for p in Path("frombase").iterdir()] == ["dmpo"]
        status, out, err = command(evaluation.main, "runs/toy", "frombase", "--baselines", "--json", "table.json")
        rows = json.loads(Path("table.json").read_text())["rows"]
        to = {row["name"]: row.get("difference", {}).get("to") for row in rows}
        assert status == 0 and [*to.items()][:5] == [
            ("base", None), ("sft", "base"), ("dpo", "sft"), ("sdpo", "sft"), ("dmpo", "base")], (to, err)
        assert to["sasrec, 24 shots"] == to["sasrec, all users"] == "dmpo", to


def test_hard_negatives_are_those_that_the_reference_scores_highest():
    dataset, tokenizer, model = toy_data(), byte_tokenizer(), tiny()
    settings = {"stage": "dmpo", "seed": 1, "shots": 6, "negatives": 2, "prompt": "history", "sample": "hard",
                "moments": 2}
    hard, validation = train.prepare(model, tokenizer, dataset, settings)
    assert validation == evaluation.encode(model, tokenizer, dataset, data.heldout(dataset, "validation"))
    drawn = [data.tokenize(tokenizer, e, dataset.heading) for e in sum(data.shots(dataset, 6, 10, 1, moments=2), [])]
    assert [len(shot) for shot in hard] == [2] * 6
    for (_, chosen), (_, responses), scores in zip(sum(hard, []), drawn, evaluation.score(model, drawn)):
        best = sorted(range(1, 11), key=lambda i: -scores[i])[:2]
        assert chosen == [responses[0], *(responses[i] for i in best)]


def test_prompts_that_list_candidates_and_adapters_from_other_data_are_evaluated_as_trained():
    with toy_world():
        example = '{"history": ["A", "B", "C%d"], "positive": "D%d", "negatives": ["E"]}\n'
        Path("pairs.jsonl").write_text("".join(example % (i, i) for i in range(40)))
        with mock.patch.object(data, "tokenize", wraps=data.tokenize) as used:
            status, out, err = command(train.main, *TOY, "--shots", 8, "--epochs", 1, "--prompt", "candidates",
                                       "--sample", "popular", "--noun", "films", "--verb", "seen", "--latest", 4)
            assert status == 0, err
            trained = len(used.call_args_list)
            assert command(evaluation.main, "runs/toy")[0] == 0 and len(used.call_args_list) > trained
        assert {call.args[2:] for call in used.call_args_list} == {("Films seen, in order:", 0)}  # heading, seed
        for calls in (used.call_args_list[:trained], used.call_args_list[trained:]):
            assert max(len(call.args[1].history) for call in calls) == 4
        saved = json.loads(Path("runs/toy/dmpo/args.json").read_text())
        assert (saved["prompt"], saved["heading"]) == ("candidates", "Films seen, in order:")
        status, out, err = command(evaluation.main, "runs/toy", "--data", "pairs.jsonl")
        assert status == 0 and "dmpo (toy.csv)" in out and "AUC" in out, err
        text = Path("pairs.jsonl").read_text().replace("}", ', "split": "test"}', 10)  # the others are for training
        Path("parts.jsonl").write_text(text)
        status, out, err = command(train.main, *TOY, "--data", "parts.jsonl")
        assert status == 0 and "test items of 10 users" in out, err
        status, _, err = command(evaluation.main, "runs/toy", "--data", "toy.csv", "--candidates", "all")
        assert status == 1 and "listed in a prompt" in err
        status, _, err = command(train.main, *TOY, "--shots", 8, "--epochs", 1, "--latest", 4)
        assert status == 1 and "heading 'Films seen" in err, err


def test_bad_input_gets_one_line_and_a_status():
    with toy_world():
        Path("file").write_text("x")
        write_folder(tiny(vocab_size=200), "small")
        table = [
            (train.main, ["--epochs", "0"], "--epochs"), (train.main, ["--lr", "nan"], "--lr"),
            (train.main, ["--lr", "-1"], "--lr"), (train.main, ["--beta", "inf"], "--beta"),
            (train.main, ["--rank", "1.5"], "--rank"), (train.main, ["--stage", "ppo"], "--stage"),
            (train.main, ["--loss", "dpo", "--negatives", "3"], "one negative"), (train.main, ["--typo"], "--typo"),
            (train.main, ["--stage", "sft", "--init", "sft"], "--init"),
            (train.main, [*TOY, "--model", "nowhere"], "--model nowhere"),
            (train.main, [*TOY, "--device", "tpu9"], "--device"),
            (train.main, [*TOY, "--model", "file"], "--model file"),
            (train.main, [*TOY, "--shots", "100000"], "shots"),
            (train.main, [*TOY, "--negatives", "100"], "too few"), (train.main, [*TOY, "--out", "file"], "file"),
            (evaluation.main, ["--candidates", "1"], "--candidates"), (evaluation.main, ["--users", "-3"], "--users"),
            (evaluation.main, ["--model", "small", "--data", "toy.csv"], "a token 255, the model only 200"),
            (evaluation.main, ["--json", "nowhere/x.json"], "--json"),
            (evaluation.main, ["nowhere"], "nowhere"), (evaluation.main, ["base"], "no adapter"),
            (evaluation.main, ["--model", "base", "--data", "toy.csv", "--candidates", "500"], "too few"),
            (evaluation.main, ["--model", "base", "--data", "toy.csv", "--candidates", "given"], "no candidates"),
            (evaluation.main, ["--data", "toy.csv", "--candidates", "all", "--prompt", "candidates"], "listed"),
            (train.main, [*TOY, "--data", "gone.csv"], "--data gone.csv: there is no such file"),
            (train.main, [*TOY, "--data", "toy"], "--data toy"),
            (lora.main, ["base", "nowhere", "out"], "nowhere"), (lora.main, ["base"], "usage"),
            (lambda: torch.empty(1 << 50), [], "out of memory"),
        ]
        for main, args, word in table:
            status, out, err = command(main, *args)
            assert status != 0 and word in err.splitlines()[-1], (args, status, out, err)
            assert "Traceback" not in err and not Path("out").exists() and not Path("runs").exists()
        command(train.main, *TOY, "--stage", "sft", "--epochs", 1)
        status, _, err = command(train.main, *TOY, "--epochs", 1, "--shots", 10)
        assert status == 1 and "shots 24, not 10" in err, err


def test_examples_in_docstrings_hold():
    import doctest
    for module in (data, dmpo, train):
        assert doctest.testmod(module) == (0, 1), module.__name__  # failed, tried


# Untrusted files


ACCIDENTS = (b"", b"\0", b"\xff" * 8, b"\x7f" * 8, b"-1", b"0", b"1e999", b"9" * 20, b"NaN", b"null", b"[]", b"{}",
             b'"', b"{", b"../", b"\n", b"\r", b",", b"\t", b"\xed\xa0\x80", b"[" * 3000, b"true", b"1.5", b'"x":',
             b"::")


def mutated(content, rng):
    """The bytes after up to four accidents: bits flipped, pieces lost, repeated, overwritten, inserted, no end."""
    for _ in range(rng.randint(1, 4)):
        kind, at, size = rng.randrange(6), rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        before, piece, after = content[:at], content[at:at + size], content[at + size:]
        if kind == 0:
            content = before + bytes(byte ^ 1 << rng.randrange(8) for byte in piece) + after
        elif kind == 1:
            content = before + (after if rng.random() < 0.9 else b"")
        elif kind == 2:
            content = before + piece * rng.choice((2, 3, 100)) + after
        elif kind == 3:
            content = before + rng.randbytes(len(piece)) + after
        else:
            content = before + rng.choice(ACCIDENTS) + (piece if kind == 4 else b"") + after
    return content


def readers(folder):
    """Valid files of every kind that the program reads, in `folder` -> {path: what reads it}."""
    model, examples = tiny(), [data.Example(str(i), ["A", "B"], "C", ["D"]) for i in range(3)]
    base, adapter, run = write_folder(model, folder / "base"), folder / "adapter", folder / "run"
    lora.save(lora.attach(model, 2, 4), adapter, "base")
    settings = {"stage": "sft", "data": "toy.csv", "model": "base", "heading": "H:", "prompt": "history", "shots": 3,
                "seed": 0, "rank": 2, "latest": 4}
    (adapter / "args.json").write_text(json.dumps(settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run.mkdir()
    train.backward(model, [[([1, 2], [[3, 4]])]], [None], {"stage": "sft"})
    optimizer.step()
    (run / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    train.save_checkpoint(run / "checkpoint", model, optimizer, settings, 1)
    (folder / "own.csv").write_text(CSV_HEADER + "".join(f"u{i % 3},{i},{i},Film {i}\n" for i in range(12)))
    (folder / "own.jsonl").write_text("".join(json.dumps(vars(example)) + "\n" for example in examples))
    wheel = folder / "no_such-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("pkg/x.txt", b"hello" * 99)

    def fetch():
        (folder / "x.txt").unlink(missing_ok=True)
        data.fetch("x.txt")

    def adapters():
        found = evaluation.find_adapters([adapter])
        return [evaluation.inherit(found, key, "") for key in ("data", "prompt", "model", "heading", "latest")]

    def tokenizer():
        return data.tokenize(data.load_tokenizer(base), examples[0], "H:")

    return {base / "config.json": lambda: llama.load(base), base / "model.safetensors": lambda: llama.load(base),
            base / "tokenizer.json": tokenizer,
            adapter / "adapter_config.json": lambda: (adapters(), lora.load(tiny(), adapter)),
            adapter / "adapter_model.safetensors": lambda: lora.load(tiny(), adapter), adapter / "args.json": adapters,
            run / "checkpoint": lambda: train.load_checkpoint(run / "checkpoint", model, optimizer, settings),
            folder / "own.csv": lambda: data.load(f"{folder}/own.csv"),
            folder / "own.jsonl": lambda: data.load(f"{folder}/own.jsonl"),
            wheel: fetch}


class Hang(BaseException):
    """No Exception, so that nothing takes it for a bad file."""


def fuzz(times):
    """Let every reader meet so many damaged files: it accepts them, or refuses them in one line, within 5 seconds."""
    def hang(*_):
        raise Hang
    before = signal.signal(signal.SIGALRM, hang)
    with cache_with(b"hello" * 99) as folder:
        for path, read in readers(folder).items():
            whole, refusals, rng = path.read_bytes(), 0, random.Random(path.name)
            for _ in range(times):
                path.write_bytes(content := mutated(whole, rng))
                signal.setitimer(signal.ITIMER_REAL, 5)
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        evaluation.run(read)
                except SystemExit as stop:
                    refusals += 1
                    assert re.fullmatch("error: .{10,600}", stop.code), (path.name, stop.code)
                except BaseException as error:
                    raise AssertionError(f"{path.name}: {type(error).__name__} {error}: {content[:2000]!r}") from error
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            path.write_bytes(whole)
            read()
            if times > 1000:
                print(f"{path.name}: {times} damaged files, {refusals} refused")
    signal.signal(signal.SIGALRM, before)


def test_damaged_files_of_every_kind_are_refused_in_one_line_or_read():
    fuzz(100)


def benchmark_fuzz_10000_files_of_every_kind():
    """The same for longer: python test_all.py benchmark_fuzz."""
    fuzz(10000)


# Comparisons of speed, run only when named: python test_all.py benchmark_trl


def benchmark_catalogue():
    """Seconds a user for the rank among all titles: in two passes, by every title's score, and with a row for each."""
    evaluation.keep_freed_memory()
    folder = need_model()
    dataset, tokenizer = data.load("ml-100k"), data.load_tokenizer(folder)
    model = llama.load(folder, dtype=torch.bfloat16)
    titles = [data.tokenize_response(tokenizer, item) for item in dataset.items]
    examples, catalogue = data.heldout(dataset, "validation", 0, users=6), dmpo.pack_catalogue(titles, 1024)

    def tokens(example):
        return evaluation.encode(model, tokenizer, dataset, [example])[0][0]

    def row_by_row(example):
        return evaluation.log_probabilities(model, [[(tokens(example), [title])] for title in titles])

    for name, rank, users in (
        ("two passes", lambda some: evaluation.catalogue_ranks(model, tokenizer, dataset, some), 6),
        ("all to the end", lambda some: [dmpo.catalogue_logps(model, tokens(example), catalogue)
                                         for example in some], 6),
        ("every title, a row each", lambda some: [row_by_row(example) for example in some], 1),
    ):
        began = time.perf_counter()
        rank(examples[:users])
        print(f"{name:24} {(time.perf_counter() - began) / users:6.2f} s a user, {len(titles)} titles")


def benchmark_trl():
    """DMPO examples a second here, and in trl.DPOTrainer with peft, which gets the k = 4 pairs of each example.

    Twice in each type: with the last moment of each shot, and with ten, which share a tree here and are rows in TRL.
    Both take the reference's log-probabilities in each step; both rates are medians of the steps after the first. A
    step has two shots, or on a GPU sixteen, and as many examples in TRL.
    """
    trl, peft, transformers, datasets, folder = *map(need, ("trl", "peft", "transformers", "datasets")), need_model()
    dataset, tokenizer = data.load("ml-100k"), data.load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=data.load_tokenizer(folder),
                                                  pad_token="<|im_end|>", eos_token="<|im_end|>")
    gpu = torch.cuda.is_available()
    size = 16 if gpu else 2
    for dtype, moments in itertools.product((torch.bfloat16, torch.float32), (1, 10)):
        shots = data.shots(dataset, 12 * size, 4, 0, moments=moments)
        encoded = [[data.tokenize(tokenizer, e, dataset.heading) for e in shot] for shot in shots]
        model = lora.attach(llama.load(folder, "cuda" if gpu else "cpu", dtype))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        rates = []
        for start in (0, *range(0, len(shots), size)):
            began, step = time.perf_counter(), encoded[start:start + size]
            reference = evaluation.log_probabilities(model, step).float().split([*map(len, step)])
            settings = {"stage": "dmpo", "loss": "dmpo", "beta": 0.1, "sft_weight": 0}
            stats = train.backward(model, step, reference, settings)
            optimizer.step()
            optimizer.zero_grad()
            float(stats["loss"])  # a GPU is waited for
            rates.append(size * moments / (time.perf_counter() - began))
        ours, some = np.median(rates[1:]), random.Random(0).sample(sum(shots, []), 4 * size)
        rows = [{"prompt": data.prompt(e.history, dataset.heading), "chosen": data.response(e.positive),
                 "rejected": data.response(n)} for e in some for n in e.negatives]
        ends = []  # of TRL's steps, of four pairs an example
        clock = type("Clock", (transformers.TrainerCallback,),
                     {"on_step_end": lambda *_, **__: ends.append(time.perf_counter())})
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            args = trl.DPOConfig(output_dir=work, per_device_train_batch_size=4 * size, max_steps=4, report_to=[],
                                 beta=0.1, bf16=dtype == torch.bfloat16, use_cpu=not gpu, gradient_checkpointing=False,
                                 save_strategy="no", disable_tqdm=True, logging_strategy="no")
            trainer = trl.DPOTrainer(
                transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype), None, args, processing_class=theirs,
                train_dataset=datasets.Dataset.from_list(rows), callbacks=[clock()],
                peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(lora.TARGETS)))
            trainer.train()
        theirs_rate = size / np.median(np.diff(ends))
        print(f"{str(dtype)[6:]}, {moments} moments: {ours:.2f} examples/s; TRL {theirs_rate:.3f}; "
              f"ratio {ours / theirs_rate:.1f}", flush=True)


# The runner


def main():
    """Run every test function of this file whose name contains one of the arguments (all, without arguments)."""
    tests = [(name, test) for name, test in globals().items() if inspect.isfunction(test)
             and name.startswith(("test_", "benchmark_") if sys.argv[1:] else "test_")]
    chosen = [(name, test) for name, test in tests if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
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
        property_shown = name.removeprefix("test_").replace("_", " ")
        print(f"{outcome:7} {time.perf_counter() - began:5.1f} s  {property_shown}{note}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["failed"] > 0 or not chosen


if __name__ == "__main__":
    sys.exit(main())
