"""Rank each user's held-out item and say how well: HR@K, NDCG@K, MRR, with intervals and paired differences.

    python eval.py                       base, SFT and DMPO, from the adapters that train.py saved
    python eval.py runs/a runs/b runs/c  the same for several runs: rows of one name are averaged, user by user
    python eval.py --baselines           beside popularity, item neighbours, a Markov chain and SASRec
    python eval.py --user 42 --explain   what to recommend to one person, and which history items speak for it

A candidate's score is the log-probability of its title after the user's prompt, all tokens together: what training
raises and compares. A model's positive ranks below all that it ties with, or a constant model would be perfect.
"""

import argparse
import ctypes
import difflib
import json
import math
import os
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import data
import dmpo
import lora
import model as llama

NODES = {"cpu": 2048, "cuda": 16384}  # nodes in one pass: large matrix products, yet activations that fit memory
BEGINNING = 7  # a whole catalogue is first scored by this many tokens of each title


# From scores to numbers


def encode(model, tokenizer, dataset, examples, shuffle_seed=None):
    """Examples, their histories cut to `dataset.latest`, as [(prompt ids, [response ids, ..]), ..]; ValueError where
    one is too long for the model."""
    examples = [replace(example, history=example.history[-dataset.latest:]) for example in examples]
    result = [data.tokenize(tokenizer, example, dataset.heading, shuffle_seed) for example in examples]
    for example, (prompt, responses) in zip(examples, result):
        tokens, most = len(prompt) + max(map(len, responses)), model.config.max_position_embeddings
        if tokens > most:
            raise ValueError(f"user {example.user or 'asked for'}: prompt and title have {tokens} tokens, more than "
                             f"the {most} that the model takes (--latest N lists fewer items)")
    return result


@torch.no_grad()
def log_probabilities(model, shots, desc=""):
    """log π(response | prompt) of every response -> (examples, candidates) float64 tensor, in order; -inf where one has
    fewer candidates than another. A shot is a list of examples (prompt ids, [response ids, ..]) that share a tree."""
    device = model.head.device
    me, processes = world()
    starts = np.cumsum([0, *map(len, shots)])
    counts = torch.tensor([len(responses) for shot in shots for _, responses in shot], device=device)
    logps = torch.zeros(len(counts), max(counts), dtype=torch.float64, device=device)
    groups = dmpo.group(shots, NODES[device.type])[me::processes]  # this process's part
    for group in tqdm(groups, desc, leave=False, disable=me > 0 or None):
        found = dmpo.response_logps(model, dmpo.pack([shots[i] for i in group]).to(device))  # (N, R)
        where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        logps[where, :found.shape[1]] = found.double()
    if not all_reduce(logps).isfinite().all():
        raise ValueError(f"{desc or 'the model'}: its log-probabilities are not finite: the weights are broken")
    return logps.masked_fill(torch.arange(logps.shape[1], device=device) >= counts[:, None], -math.inf)


def score(model, examples, desc=""):
    """The same for examples with a tree each -> (users, candidates) array, the positives in column 0."""
    return log_probabilities(model, [[example] for example in examples], desc).cpu().numpy()


def catalogue_ranks(model, tokenizer, dataset, examples, desc=""):
    """Rank of each example's positive among all items that its user has not touched -> (users,), ties against it.

    No title is likelier than its own beginning, so only those are scored in full whose first BEGINNING tokens are at
    least as likely as the whole positive, with 0.5 to spare: in bfloat16 a score moves by some tenths with its batch.
    """
    whole = [data.tokenize_response(tokenizer, item) for item in dataset.items]
    nodes = NODES[model.head.device.type] // 2  # smaller batches are padded less
    beginnings = dmpo.pack_catalogue([response[:BEGINNING] for response in whole], nodes)
    index = {item: i for i, item in enumerate(dataset.items)}
    longest = max(zip(map(len, whole), dataset.items))[1]  # which must fit the model, too
    tokens = encode(model, tokenizer, dataset, [replace(example, negatives=[longest]) for example in examples])
    least = score(model, tokens, desc=desc)[:, 0] - 0.5
    me, processes = world()
    result = torch.zeros(len(examples), dtype=torch.long)
    mine = range(me, len(examples), processes)
    for u in tqdm(mine, desc, leave=False, disable=me > 0 or None):
        prompt = tokens[u][0]
        bounds = dmpo.catalogue_logps(model, prompt, beginnings)
        bounds[[index[item] for item in dataset.sequences[examples[u].user]]] = -np.inf
        rivals = [index[examples[u].positive], *np.flatnonzero(bounds >= least[u])]
        scores = dmpo.catalogue_logps(model, prompt, dmpo.pack_catalogue([whole[i] for i in rivals], nodes))
        result[u] = (scores >= scores[0]).sum()  # itself included
    return all_reduce(result.to(model.head.device)).cpu().numpy()


def ranks(scores):
    """Rank of column 0 among its row, 1 the best, ties counting against it: (users, candidates) -> (users,)."""
    return (scores >= scores[:, :1]).sum(1)


def measure(rank, candidates):
    """Every metric, user by user: rank (.., users) among `candidates`, a number -> {name: (.., users)}.

    With one positive, NDCG@K is 1/log2(1 + rank), 0 beyond K; with one negative, AUC is the share of pairs in order.
    """
    ndcg = {k: np.where(rank <= k, 1 / np.log2(1 + rank), 0.0) for k in (5, 10)}
    values = {"AUC": (rank == 1).astype(float)}
    if candidates > 2:
        values = {f"HR@{k}": (rank <= k).astype(float) for k in (1, 5, 10)} | {"NDCG@5": ndcg[5]}
    return values | {"NDCG@10": ndcg[10], "MRR": 1 / rank}


def interval(values):
    """95 % bootstrap interval of the mean of values (users,): users are drawn again with replacement."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def summarise(rows):
    """[(name, {metric: (users,)}, name of the row to compare with or None), ..] -> the JSON rows: means, intervals, and
    paired differences."""
    def means(values):
        return {**{key: float(value.mean()) for key, value in values.items()},
                "ci95": {key: interval(value) for key, value in values.items()}}

    result, by_name = [], {name: values for name, values, _ in rows}
    for name, values, to in rows:
        result.append({"name": name, **means(values)})
        if to:
            paired = {key: value - by_name[to][key] for key, value in values.items()}
            result[-1]["difference"] = {"to": to, **means(paired)}
    return result


def print_table(report):
    """The report as text: each mean ± half the width of its interval, and below it the paired difference."""
    names = list(report["rows"][0]["ci95"])
    width = max(12, *(len(row["name"]) + 4 for row in report["rows"]))

    def line(name, row, sign=""):
        cells = (f"{row[key]:{sign}.3f} ±{(row['ci95'][key][1] - row['ci95'][key][0]) / 2:.3f}" for key in names)
        return f"{name:{width}}" + "".join(f"{cell:>15}" for cell in cells)

    print(f"\n{report['data']}: {report['split']} items of {report['users']} users, "
          f"candidates: {report['candidates']} (95 % intervals)")
    print(" " * width + "".join(f"{key:>15}" for key in names))
    for row in report["rows"]:
        print(line(row["name"], row))
        if "difference" in row:
            print(line(f"  - {row['difference']['to']}", row["difference"], "+"))


# Traditional recommenders, under the same protocol: fit(sequences, n_items) -> score(history) -> (n_items,). Here a
# sequence and a history hold numbers of items instead of titles.


def fit_popularity(sequences, n_items):
    """How often each item was chosen."""
    counts = np.bincount(np.concatenate(sequences), minlength=n_items).astype(float)
    return lambda history: counts


def fit_item_knn(sequences, n_items):
    """Items chosen by the same users: cosine similarities summed over the history (Deshpande and Karypis, 2004)."""
    chosen = np.zeros((len(sequences), n_items), np.float32)
    for row, sequence in zip(chosen, sequences):
        row[sequence] = 1
    norms = np.sqrt(np.maximum(chosen.sum(0), 1))
    similar = (chosen.T @ chosen) / norms / norms[:, None]  # (n_items, n_items)
    np.fill_diagonal(similar, 0)
    return lambda history: similar[history].sum(0)


def fit_markov(sequences, n_items):
    """How often each item came right after the history's last one; those that never did are ranked by popularity."""
    follows, counts = {}, fit_popularity(sequences, n_items)(None)
    for sequence in sequences:
        for before, after in zip(sequence, sequence[1:]):
            follows.setdefault(before, np.zeros(n_items))[after] += 1
    return lambda history: follows.get(history[-1], 0) + counts / (1 + counts.sum())


class SASRec(nn.Module):
    """Self-attention over the latest item numbers (arXiv 1808.09781), trained with the whole softmax."""

    def __init__(self, n_items, length, width=64, layers=2, heads=2, dropout=0.3):
        super().__init__()
        self.length, self.embed = length, nn.Embedding(n_items + 1, width, padding_idx=n_items)
        self.places = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, heads, width * 4, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids):
        """ids (B, T), padded on the right, T <= length -> logits (B, T, n_items) of what comes next."""
        x = self.dropout(self.embed(ids) + self.places.weight[:ids.shape[1]])  # (B, T, width)
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.blocks(x, mask=causal, is_causal=True) @ self.embed.weight[:-1].T


def fit_sasrec(sequences, n_items, epochs=120, seed=0):
    """SASRec trained for `epochs` passes: a step draws up to 128 sequences anew, and of each a random window of up
    to 51 items.

    It never reads more of a history than it was trained on: further places would have no meaning yet.
    """
    torch.manual_seed(seed)
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    longest = max(map(len, sequences), default=2)
    rng, model = random.Random(seed), SASRec(n_items, min(50, longest - 1))
    steps = epochs * -(-len(sequences) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 2))
    for step in tqdm(range(steps), desc="sasrec", disable=None, leave=False):
        ids = torch.full((min(128, len(sequences)), model.length + 1), n_items)
        for row, sequence in zip(ids, rng.sample(sequences, len(ids))):
            start = rng.randint(0, max(0, len(sequence) - len(row)))
            window = sequence[start:start + len(row)]
            row[:len(window)] = torch.tensor(window)
        logits = model(ids[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=n_items)  # which is padding
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def scores(history):
        return model(torch.tensor([history[-model.length:]]))[0, -1].numpy()
    return scores


BASELINES = {"popularity": fit_popularity, "item knn": fit_item_knn, "markov": fit_markov, "sasrec": fit_sasrec}


def rank_by(fit, dataset, examples, sequences):
    """Rank of each example's positive by a traditional method fitted to sequences of titles -> (users,).

    Examples without negatives are ranked among all that their users have not touched. Counts tie often, most of all
    those from few shots, so a positive gets a random place among its ties: always the last would be below chance.
    """
    index = {item: i for i, item in enumerate(dataset.items)}
    result, rng = [], np.random.default_rng(0)
    score_items = fit([[index[item] for item in sequence] for sequence in sequences], len(index))
    for example in examples:
        scores = score_items([index[item] for item in example.history])
        others = [index[item] for item in example.negatives] or np.delete(
            np.arange(len(index)), [index[item] for item in dataset.sequences[example.user]])
        ahead = scores[others] - scores[index[example.positive]]  # > 0 better, 0 a tie
        result.append(1 + (ahead > 0).sum() + rng.integers((ahead == 0).sum() + 1))
    return np.array(result)


def rank_baselines(dataset, examples, seen):
    """Every traditional method, fitted to the very shots that adapters saw, given as [(count, seed, moments, latest)]
    (one averaged row per count), and to all that users did before validation -> {name: [ranks (users,)]}."""
    ranked, everything = {}, data.interactions(dataset)
    if not everything:
        raise ValueError(f"{dataset.name}: --baselines have nothing to learn from, as every item is held out")
    for name, fit in BASELINES.items():
        for count, seed, moments, latest in seen:
            last = [shot[-1] for shot in data.shots(replace(dataset, latest=latest), count, 0, seed, moments=moments)]
            few = [[*example.history, example.positive] for example in last]
            ranked.setdefault(f"{name}, {count} shots", []).append(rank_by(fit, dataset, examples, few))
        ranked[f"{name}, all users"] = [rank_by(fit, dataset, examples, everything)]
    return ranked


# The base model and its adapters, in one table


def find_adapters(paths):
    """[(name, folder, args.json)]; a path is an adapter, or a run that holds several, of which SFT comes first and DMPO
    last. Adapters of one name become one averaged row, so settings that differ, other than seed and data, are added to
    the name; where even seed and data agree, so is the folder (two DMPOs that started from different SFTs)."""
    found = []
    for path in map(Path, paths):
        folders = [path] if (path / "adapter_model.safetensors").exists() else sorted(
            (weights.parent for weights in path.glob("*/adapter_model.safetensors")),
            key=lambda p: (p.name != "sft", p.name == "dmpo", p.name))
        if not folders:
            raise ValueError(f"{path}: no adapter there (train one: python train.py --stage dmpo)")
        for folder in folders:
            base = llama.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            saved = llama.read_json(folder / "args.json") if (folder / "args.json").exists() else {}
            saved = {"model": base or "smollm2-135m"} | saved
            for key, kind in {"data": str, "model": str, "prompt": str, "heading": str, "init_sha256": str,
                              "shots": int, "seed": int, "moments": int, "latest": int}.items():
                if key in saved and (not isinstance(saved[key], kind)
                                     or key in ("shots", "moments", "latest") and saved[key] < 1):
                    raise ValueError(f"{folder / 'args.json'}: {key} cannot be {saved[key]!r}")
            name = folder.absolute().name  # also of "."
            if name == "base":
                raise ValueError(f"{folder}: base is the name of the model's own row: call this folder something else")
            if not any(folder.samefile(place) for _, place, _ in found):  # a run and an adapter in it may be named
                found.append((name, folder, saved))

    def full(name, folder, saved):
        others = [other for other_name, place, other in found if other_name == name and place != folder]
        unlike = [key for key in saved if key not in ("seed", "init_sha256", "data", "data_sha256", "heading", "dtype")
                  and any(other.get(key) != saved[key] for other in others)]
        twin = any(all(other.get(key) == saved.get(key) for key in [*unlike, "seed", "data"]) for other in others)
        return ", ".join([name, *(f"{key} {saved[key]}" for key in unlike), *[str(folder)] * twin])

    return [(full(*adapter), *adapter[1:]) for adapter in found]


def inherit(adapters, key, default, options=None):
    """The setting that all of the adapters were trained with; ValueError, naming the options, where they differ."""
    values = {saved.get(key, default) for _, _, saved in adapters} or {default}
    if len(values) > 1:
        raise ValueError(f"the adapters were trained with {key} {' and '.join(map(repr, values))}: choose with "
                         f"{options or '--' + key}")
    return values.pop()


def evaluate(model, tokenizer, dataset, adapters, examples, split="test", seed=0, prompt="history", baselines=False):
    """Rank the examples' positives with the base model and each of [(name, folder, args.json)] -> a JSON-able report.

    Examples without negatives are ranked among all that their users have not touched.
    """
    encoded = encode(model, tokenizer, dataset, examples, seed if prompt == "candidates" else None)
    whole = not examples[0].negatives
    count = len(dataset.items) if whole else max(len(responses) for _, responses in encoded)
    ranked, compared = {}, {"base": None}  # {name: [ranks (users,) of each adapter]}, {name: row it is compared with}
    starts, seen = {}, set()               # {sha256: name} of adapters; their (shots, seed, moments, latest)
    for name, folder, saved in [("base", None, {}), *adapters]:
        lora.load(model, folder)
        if saved.get("data", dataset.name) != dataset.name:
            name = f"{name} ({saved['data']})"
        elif saved.keys() >= {"shots", "seed"}:
            seen.add((saved["shots"], saved["seed"], saved.get("moments", 1), saved.get("latest", data.HISTORY)))
        compared.setdefault(name, starts.get(saved.get("init_sha256"), "base"))  # what its training started from
        if folder:
            starts[data.file_sha256(folder / "adapter_model.safetensors")] = name
        rank = (catalogue_ranks(model, tokenizer, dataset, examples, name) if whole
                else ranks(score(model, encoded, desc=name)))
        ranked.setdefault(name, []).append(rank)
    if baselines:
        traditional = rank_baselines(dataset, examples, sorted(seen))
        compared |= dict.fromkeys(traditional, list(ranked)[-1])
        ranked |= traditional
    label = {name: name if len(runs) == 1 else f"{name} x{len(runs)}" for name, runs in ranked.items()}
    rows = [(label[name], {key: values.mean(0) for key, values in measure(np.array(runs), count).items()},  # over runs
             label.get(compared[name])) for name, runs in ranked.items()]
    return {"data": dataset.name, "split": split, "candidates": "all" if whole else count, "users": len(examples),
            "seed": seed, "rows": summarise(rows),
            "ranks": {label[name]: np.array(runs).tolist() for name, runs in ranked.items()}}


# One person's recommendations, and why


def find_title(dataset, title, option):
    """The title as the data write it, whatever its capitals; ValueError with the closest ones where there is none."""
    known = {item.casefold(): item for item in dataset.items}
    if title in dataset.items:
        return title
    if title.casefold() not in known:
        close = difflib.get_close_matches(title.casefold(), known, 4, 0.4)
        raise ValueError(f"{option}: {dataset.name} has no {title!r}; the closest: "
                         f"{'; '.join(known[name] for name in close) or 'none'}")
    return known[title.casefold()]


def find_person(dataset, user, text):
    """(history, what came next or None) of a user of the data, or of titles typed in with ";" between them."""
    name, positive = "--history" if text is not None else f"--user {user}", None
    if text is not None:
        history = [find_title(dataset, title.strip(), name) for title in text.split(";") if title.strip()]
    elif user not in dataset.sequences:
        raise ValueError(f"{name}: no such user in {dataset.name} (they are called "
                         f"{', '.join(list(dataset.sequences)[:3])}, ..)")
    elif dataset.given:  # examples, in any order: the user's latest
        example = next(e for split in ("test", "validation", "train") for e in dataset.given[split] if e.user == user)
        history, positive = example.history, example.positive
    else:
        *history, positive = dataset.sequences[user]
    if not history or len(set(history)) == len(dataset.items):
        raise ValueError(f"{name}: {'the history holds every title' if history else 'there is no history'}")
    return list(dict.fromkeys(history)), positive


def recommend(model, tokenizer, dataset, adapters, history, positive, top):
    """The `top` titles that the last model ranks first among those not in the history -> a report (JSON-able).

    adapters: [(name, folder or None, ..)]; each title's rank under every one of them is given.
    """
    seen, scores = set(history), {}
    last = adapters[-1][0]
    titles = [item for item in dataset.items if item not in seen]
    (prompt, responses), = encode(model, tokenizer, dataset, [data.Example("", history, titles[0], titles[1:])])
    catalogue = dmpo.pack_catalogue(responses, NODES[model.head.device.type] // 2)
    for name, folder, *_ in adapters:
        lora.load(model, folder)
        scores[name] = dmpo.catalogue_logps(model, prompt, catalogue)

    def row(i):
        return {"title": titles[i], "score": float(scores[last][i]), "held_out": titles[i] == positive,
                "rank": {name: int((values > values[i]).sum()) + 1  # equal scores, equal ranks
                         for name, values in scores.items()}}

    return {"data": dataset.name, "history": history, "latest": dataset.latest, "model": last, "titles": len(titles),
            "recommended": [row(i) for i in np.argsort(-scores[last], kind="stable")[:top]],
            "held_out": row(titles.index(positive)) if positive else None}


def explain(model, tokenizer, dataset, history, titles):
    """The titles' scores (titles,) after a history, and what each of its items does for each title (titles, H).

    Computed, not estimated: the title's log-odds after the history, less those after the history without that item.
    """
    without = [history[:i] + history[i + 1:] for i in range(len(history))]
    examples = [data.Example("", items, titles[0], titles[1:]) for items in [history, *without]]
    scores = score(model, encode(model, tokenizer, dataset, examples))  # (1 + H, titles)
    odds = scores - np.log1p(-np.exp(np.minimum(scores, -1e-6)))  # rounding may lift a sure title's above 0
    return scores[0], (odds[0] - odds[1:]).T


def print_bars(effects):
    """{history item: what it does for a title} as bars: to the right they speak for the title, to the left against."""
    largest = max(1e-9, *map(abs, effects.values()))
    for item, effect in sorted(effects.items(), key=lambda pair: -pair[1]):
        bar = "#" * round(12 * abs(effect) / largest)
        left, right = ("", bar) if effect >= 0 else (bar, "")
        print(f"    {effect:+6.2f} {left:>12}|{right:12}  {item}")


def print_person(report):
    """A report of `recommend`, with the reasons if they were added, as text."""
    name, rows = report["model"], list(report["recommended"])
    columns = {other: max(6, len(other)) for other in rows[0]["rank"] if other != name}
    if report["held_out"] and not any(row["held_out"] for row in rows):
        rows.append(report["held_out"])
    print("\n".join(["The history, oldest first:", *(f"  {title}" for title in report["history"][-report["latest"]:])]))
    print(f"\nOf {report['titles']} other titles {name} ranks first" + (
        f" ({', '.join(columns)}: their ranks for the same title):\n" if columns else ":\n"))
    print("  rank   score" + "".join(f" {other:>{width}}" for other, width in columns.items()) + "  title")
    for i, row in enumerate(rows):
        if i == len(report["recommended"]):
            print("   ...")
        others = "".join(f" {row['rank'][other]:{width}}" for other, width in columns.items())
        mark = "  <- what came next" if row["held_out"] else ""
        print(f"{row['rank'][name]:6}{row['score']:8.2f}{others}  {row['title']}{mark}")
        if "effects" in row:
            best = sorted(row["effects"], key=row["effects"].get, reverse=True)
            print_bars({item: row["effects"][item] for item in [*best[:3], best[-1]]})


def answer(model, tokenizer, dataset, adapters, args):
    """--user and --history: print the recommendations of the last adapter, or a comparison; returns what was said."""
    history, positive = find_person(dataset, args.user, args.history)
    if len({name for name, *_ in adapters}) < len(adapters):
        raise ValueError("several adapters have one name: name the run that is to recommend")
    named, latest = [("base", None, {}), *adapters], history[-dataset.latest:]
    if args.compare:
        return compare(model, tokenizer, dataset, named, latest, args.compare)
    report = recommend(model, tokenizer, dataset, named, history, positive, args.top)
    if args.explain:
        rows = report["recommended"]
        _, effects = explain(model, tokenizer, dataset, latest, [row["title"] for row in rows])
        for row, effect in zip(rows, effects):
            row["effects"] = dict(zip(latest, effect.tolist()))
    print_person(report)
    return report


def compare(model, tokenizer, dataset, adapters, history, pair):
    """Print and return, model by model, what each history item does for title A rather than B, and their scores."""
    pair, report = [find_title(dataset, title, "--compare") for title in pair], {}
    for name, folder, *_ in adapters:
        lora.load(model, folder)
        scores, (a, b) = explain(model, tokenizer, dataset, history, pair)
        report[name] = {"scores": dict(zip(pair, scores.tolist())), "effects": dict(zip(history, (a - b).tolist()))}
        print(f"{name}: {pair[0]} {scores[0]:.2f}, {pair[1]} {scores[1]:.2f}; what speaks for the first rather than "
              "the second:")
        print_bars(report[name]["effects"])
    return report


def check_explanations(model, tokenizer, dataset, adapters, args):
    """--explain without a person: a deletion test of whether explanations mean something -> a report for `print_table`.

    For each of --users (default: 200), of the title that the last adapter ranks first among 20: its rank without the 3
    history items that speak for it most, and its mean rank without 3 random ones (5 draws).
    """
    if adapters:
        lora.load(model, adapters[-1][1])
    examples = [example for example in data.heldout(dataset, args.split, 19, args.seed, args.users or 200)
                if len(example.history[-dataset.latest:]) > 3]
    if not examples:
        raise ValueError(f"{dataset.name}: no prompt lists more than 3 items")
    rng, found = np.random.default_rng(args.seed), []
    for example in tqdm(examples, "deletion test", disable=None, leave=False):
        history, titles = example.history[-dataset.latest:], [example.positive, *example.negatives]
        first = int(score(model, encode(model, tokenizer, dataset, [example]))[0].argmax())
        titles.insert(0, titles.pop(first))  # ranks() takes the first column's
        _, (effect,) = explain(model, tokenizer, dataset, history, titles[:1])
        gone = [np.argsort(-effect)[:3], *(rng.permutation(len(history))[:3] for _ in range(5))]
        left = [data.Example("", [item for i, item in enumerate(history) if i not in out], titles[0], titles[1:])
                for out in gone]
        rank = ranks(score(model, encode(model, tokenizer, dataset, left)))
        found.append((rank[0], rank[1:].mean()))
    reasons, chance = np.array(found).T
    rows = [("first title without 3 random items", {"rank": chance}, None),
            ("first title without its 3 reasons", {"rank": reasons}, "first title without 3 random items")]
    return {"data": dataset.name, "split": args.split, "candidates": 20, "users": len(found), "rows": summarise(rows)}


# The machine, or several: under torchrun every process does a part of the shots or users


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
    all_reduce(torch.zeros(1, device=device)).item()  # read, as on GPUs a reduction alone does not hold up the process


def choose_device(name, dtype):
    """--device and --dtype to torch's; "auto" takes a GPU if there is one, bfloat16 if that is twice as fast.

    If torchrun started this process, it joins the others here; only the first of them goes on printing to stdout.
    """
    processes, gpu = int(os.environ.get("WORLD_SIZE", 1)), name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError("--device cuda: torch finds no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"more processes than GPUs ({torch.cuda.device_count()}): lower --nproc_per_node")
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    if dtype != "auto":
        return device, getattr(torch, dtype)
    single, half = (matmul_rate(device, kind) for kind in (torch.float32, torch.bfloat16))
    return device, torch.bfloat16 if half > 2 * single else torch.float32


def matmul_rate(device, dtype):
    """Floating-point operations a second of plain matrix products (1536, 576) x (576, 1536): the best seen, of all
    processes together."""
    x, w = torch.randn(1536, 576, device=device).to(dtype), torch.randn(1536, 576, device=device).to(dtype)
    repeats = 200 if device.type == "cuda" else 5
    torch.nn.functional.linear(x, w).sum().item()  # the first product also loads the library
    best, end = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, repeats * 2 * x.numel() * len(w) / (time.perf_counter() - start))
    return float(all_reduce(torch.tensor(best, device=device)))


def operations(model, batch):
    """Floating-point operations that one forward pass over a Batch needs, padding not counted.

    Two (multiply, add) per weight and node; 4 d per attending pair in each head of each layer (2 d each for its score
    and its share of the values); two per weight of the vocabulary projection and predicting node.
    """
    c = model.config
    nodes, pairs = batch.nodes, int(batch.positions.sum()) + batch.nodes  # a node attends to itself and those above
    weights = sum(p.numel() for p in model.model.layers.parameters() if not p.requires_grad)
    return (2 * nodes * weights + 4 * pairs * c.num_hidden_layers * c.num_attention_heads * c.head_dim
            + 2 * len(batch.predicting) * c.vocab_size * c.hidden_size)


def peak_memory(device):
    """GiB: of the GPU's memory where one is used, else the process's resident maximum."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def keep_freed_memory():
    """Ask glibc to keep large freed blocks: by default each tensor's pages go back to the system and are cleared anew
    for the next one, which costs a fifth of the time on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; older versions take no more than 32 MiB
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def run(main):
    """Call a script's main; bad input and Ctrl-C end it with one line and a status that is not 0."""
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:500]}")
    except RuntimeError as error:
        if "to allocate" not in str(error):  # which both allocators, CPU's and GPU's, say; else a mistake of ours
            raise
        sys.exit(f"error: out of memory; train.py has --checkpoint-activations ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        print("interrupted; train.py goes on with the same command", file=sys.stderr)
        sys.exit(130)


# The command line


def bounded(kind, low, high=math.inf):
    """argparse type: an int or a float, at least `low` and below `high`."""
    def read(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}" + f" and below {high}" * (high < math.inf))
        return kind(text)
    read.__name__ = kind.__name__  # argparse's "invalid int value" takes it from here
    return read


def candidates(text):
    """argparse type: how many others to rank the held-out item among, N - 1; 0 for "all"; or "given"."""
    return {"all": 0, "given": "given"}[text] if text in ("all", "given") else bounded(int, 2)(text) - 1


def add_shared_options(parser, dataset):
    """What open_all needs, --data to --dtype, the same for train.py; `dataset` is the default."""
    parser.add_argument("--data", default=dataset, type=os.path.normpath,
                        help=f"{', '.join(data.DATASETS)}, or a .csv, .tsv or .jsonl file "
                             f"(default: {dataset or 'that of the adapters'})")
    parser.add_argument("--noun", help="what the prompt calls the items, as in \"films watched\"")
    parser.add_argument("--verb", help="what it says that users did to them")
    parser.add_argument("--latest", type=bounded(int, 1), default=dataset and data.HISTORY,
                        help="how many of a history's latest items a prompt lists (default: "
                             f"{data.HISTORY if dataset else 'as the adapters were trained'})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the frozen weights (default: bfloat16 where it multiplies twice as fast)")


def parse():
    """Its options; what was not given, and follows from the adapters, is left to `main`."""
    parser = argparse.ArgumentParser(description="Rank held-out items with the base model and with adapters.")
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER",
                        help="adapter folders, or runs that hold sft/ and dmpo/ (default: runs/<data>)")
    add_shared_options(parser, None)
    parser.add_argument("--model", type=os.path.normpath,
                        help="folder or hub id (default: the one that the adapters were trained on)")
    parser.add_argument("--prompt", choices=("history", "candidates"),
                        help="list the candidates in the prompt or not (default: as the adapters were trained)")
    parser.add_argument("--users", type=bounded(int, 1),
                        help="evaluate a random sample of this many users (default: all; --explain alone: 200)")
    parser.add_argument("--candidates", type=candidates, dest="others", metavar="N",
                        help="rank the held-out item among N, itself included; all: among every item that the user "
                             "has not touched; given: those that the data bring (default: given if any, else 20, or "
                             "as many as there are)")
    parser.add_argument("--split", choices=("test", "validation"), default="test",
                        help="validation is for choosing settings, test for reporting (default: %(default)s)")
    parser.add_argument("--seed", type=bounded(int, 0, 2 ** 63), default=0,
                        help="draws the candidates and the users (default: 0)")
    parser.add_argument("--baselines", action="store_true", help="also popularity, item neighbours, a Markov chain and "
                        "SASRec, each trained on the adapters' shots and on everybody's data")
    person = parser.add_mutually_exclusive_group()
    person.add_argument("--user", help="recommend to this user instead: the titles that the last model ranks first")
    person.add_argument("--history", metavar="\"TITLE; TITLE\"", help="or to somebody who chose these titles, in order")
    parser.add_argument("--top", type=bounded(int, 1), default=10, help="titles to list (default: %(default)s)")
    parser.add_argument("--explain", action="store_true", help="and say what each history item does for each title; "
                        "without --user and --history: test such explanations by deletion, on --users")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="which history items speak for title A over B")
    parser.add_argument("--json", metavar="FILE", help="also write the answer as JSON, with every user's ranks")
    args = parser.parse_args()
    args.person = args.user is not None or args.history is not None
    if args.json:  # better now than after the work
        path = Path(args.json).absolute()
        if path.suffix != ".json" or path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            parser.error(f"--json {args.json}: neither a file nor a new name, ending in .json, in a folder to write to")
    if args.compare and not args.person:
        parser.error("--compare needs --user or --history")
    if args.others is not None and (args.person or args.explain):
        parser.error("--candidates is for tables: lists rank every title, and --explain tests the first of 20")
    return args


def open_all(args):
    """The data set, the model and its tokenizer; of several processes the first fetches, and the others wait for it."""
    device, dtype = choose_device(args.device, args.dtype)
    me, _ = world()
    if me:
        barrier(device)
    dataset, folder = data.load(args.data, args.noun, args.verb, args.latest), data.find_model(args.model)
    if not me:
        barrier(device)
    model, tokenizer = llama.load(folder, device, dtype), data.load_tokenizer(folder)
    if (last := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has a token {last}, the model only {model.config.vocab_size}")
    return dataset, model, tokenizer


def main():
    """The command: find model, data and adapters; then a table, a person's list, or the test of explanations."""
    args = parse()
    usual = Path("runs") / Path(args.data or "ml-100k").stem  # where train.py puts them
    adapters = find_adapters(args.adapters or ([usual] if any(usual.glob("*/adapter_model.safetensors")) else []))
    if args.model and not args.adapters:  # another model's are not meant: this one may hold them already, merged
        adapters = [adapter for adapter in adapters if adapter[2]["model"] == args.model]
    args.data = args.data or inherit(adapters, "data", "ml-100k")
    if not adapters:
        print(f"no adapter {f'for {args.model} ' if args.model else ''}in {usual} yet (python train.py --data "
              f"{args.data} makes them): base model only", file=sys.stderr)
    if Path(args.data).is_file():  # which may have been called by another name in training
        sha256 = data.file_sha256(args.data)
        for _, _, saved in adapters:
            if saved.get("data_sha256") == sha256:
                saved["data"] = args.data
    args.prompt = args.prompt or inherit(adapters, "prompt", "history")
    if args.prompt == "candidates" and (args.others == 0 or args.person or args.explain):
        raise ValueError("a whole catalogue cannot be listed in a prompt: this needs --prompt history")
    args.model = args.model or inherit(adapters, "model", "smollm2-135m")
    args.latest = args.latest or inherit(adapters, "latest", data.HISTORY)
    dataset, model, tokenizer = open_all(args)
    if not args.noun and not args.verb:  # then the heading that the adapters of these data were trained with
        own = [adapter for adapter in adapters if adapter[2].get("data") == args.data]
        dataset = replace(dataset, heading=inherit(own, "heading", dataset.heading, "--noun and --verb"))
    if args.person:
        report = answer(model, tokenizer, dataset, adapters, args)
    elif args.explain:
        report = check_explanations(model, tokenizer, dataset, adapters, args)
        print_table(report)
    else:
        began = time.perf_counter()
        examples = data.heldout(dataset, args.split, args.others, args.seed, args.users)
        report = evaluate(model, tokenizer, dataset, adapters, examples, args.split, args.seed, args.prompt,
                          args.baselines)
        seconds = time.perf_counter() - began
        print_table(report)
        speed = "" if args.baselines else f"{report['users'] * (1 + len(adapters)) / seconds:.1f} users/s "
        device, dtype = model.head.device, str(model.head.dtype)[6:]
        print(f"\n{speed}in {dtype} on {device}; peak memory {peak_memory(device):.1f} GiB")
    if args.json and world()[0] == 0:
        lora.write_file(args.json, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    run(main)
