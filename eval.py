"""Rank each user's held-out item and say how well: HR@K, NDCG@K, MRR, intervals, differences.

    python eval.py                       base, SFT and DMPO, from the adapters that train.py saved
    python eval.py runs/a runs/b         the same for several runs, averaged over seeds
    python eval.py --baselines           beside popularity, item neighbours, Markov chain and SASRec
    python eval.py --user 42 --explain   what to recommend to one person, and why

A candidate's score is the log-probability of its title after the user's prompt, all tokens
together: what training raises and compares. A model's positive ranks below all that it ties with,
or a constant model would be perfect.
"""

import argparse
import difflib
import json
import math
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import dmpo
import lora
import model as llama
from model import InputError, at_least


# From ranks to a table


def measure(ranks, candidates):
    """Every metric, user by user: ranks (.., users) among `candidates`, a number -> {name: (..,
    users)}.

    With one negative, AUC is the share of pairs in order.
    """
    values = {}
    if candidates > 2:
        for k in (1, 5, 10):
            values[f"HR@{k}"] = (ranks <= k).astype(float)
        values["NDCG@5"] = dmpo.ndcg(ranks, 5)
    else:
        values["AUC"] = (ranks == 1).astype(float)
    return values | {"NDCG@10": dmpo.ndcg(ranks, 10), "MRR": 1 / ranks}


def interval(values):
    """95 % bootstrap interval of the mean of values (users,): users are drawn again with
    replacement, 2,000 times."""
    rng, users, averages = np.random.default_rng(0), len(values), []
    for _ in range(20):  # by the hundred: one by one is slow, all at once large
        drawn = rng.integers(users, size=(100, users))
        averages += values[drawn].mean(1).tolist()
    return np.percentile(averages, [2.5, 97.5]).tolist()


def means(values):
    """{metric: (users,)} -> the means, and their intervals under "ci95"."""
    told = {key: float(value.mean()) for key, value in values.items()}
    return told | {"ci95": {key: interval(value) for key, value in values.items()}}


def summarise(rows):
    """[(name, {metric: (users,)}, name of the row to compare with or None), ..] -> the JSON rows:
    means, intervals, and paired differences."""
    by_name = {name: values for name, values, _ in rows}
    result = []
    for name, values, to in rows:
        row = {"name": name, **means(values)}
        if to:
            paired = {key: value - by_name[to][key] for key, value in values.items()}
            row["difference"] = {"to": to, **means(paired)}
        result.append(row)
    return result


def print_table(report):
    """The report as text: each mean ± half the width of its interval, and below it the paired
    difference."""
    metrics = list(report["rows"][0]["ci95"])
    width = max(len(row["name"]) for row in report["rows"]) + 4

    def print_row(name, row, sign=""):
        cells = ""
        for key in metrics:
            low, high = row["ci95"][key]
            cells += f"{f'{row[key]:{sign}.3f} ±{(high - low) / 2:.3f}':>15}"
        print(f"{name:{width}}{cells}")

    print(f"\n{report['data']}: {report['split']} items of {report['users']} users, "
          f"candidates: {report['candidates']} (95 % intervals)")
    print(" " * width + "".join(f"{key:>15}" for key in metrics))
    for row in report["rows"]:
        print_row(row["name"], row)
        if "difference" in row:
            print_row(f"  - {row['difference']['to']}", row["difference"], "+")


# The whole catalogue


def catalogue_scores(model, prompt, responses, desc="", titles=128):
    """The scores of all responses (ids) after one prompt (ids) -> (responses,) array.

    Sorted, responses that begin alike are neighbours; so many `titles` share a tree.
    """
    order = sorted(range(len(responses)), key=lambda i: responses[i])
    parts = [order[start:start + titles] for start in range(0, len(order), titles)]
    trees = []
    for part in parts:
        trees.append(dmpo.build_tree([(prompt, [responses[i] for i in part])]))
    scores = np.empty(len(responses))
    for part, row in zip(parts, dmpo.tree_logps(model, trees, desc).cpu().numpy()):
        scores[part] = row[:len(part)]
    return scores


def catalogue_ranks(model, tokenizer, dataset, examples, desc=""):
    """Rank of each example's positive among all items that its user has not touched -> (users,),
    ties against it."""
    index = {item: i for i, item in enumerate(dataset.items)}
    responses = [data.response_ids(tokenizer, item) for item in dataset.items]
    longest = dataset.items[np.argmax([len(response) for response in responses])]
    asked = [replace(example, negatives=[longest]) for example in examples]  # must fit the model
    encoded = data.encode(tokenizer, asked, dataset, model.config)
    ranks = []
    bar = tqdm(examples, desc, leave=False, disable=llama.world()[0] > 0 or None)
    for example, (prompt, _) in zip(bar, encoded):
        scores = catalogue_scores(model, prompt, responses)
        positive = scores[index[example.positive]]
        scores[[index[item] for item in dataset.sequences[example.user]]] = -np.inf  # itself, too
        ranks.append(1 + (scores >= positive).sum())
    return np.array(ranks)


# Traditional recommenders, under the same protocol: fit(sequences, n_items) -> score(history) ->
# (n_items,). Here a sequence and a history hold numbers of items instead of titles.


def fit_popularity(sequences, n_items):
    """How often each item was chosen."""
    counts = np.bincount(np.concatenate(sequences), minlength=n_items).astype(float)
    return lambda history: counts


def fit_item_knn(sequences, n_items):
    """Items chosen by the same users: cosine similarities summed over the history (Deshpande,
    Karypis, 2004)."""
    similar = np.zeros((n_items, n_items), np.float32)
    for sequence in sequences:
        similar[np.ix_(sequence, sequence)] += 1  # users that two items share
    norms = np.sqrt(np.maximum(similar.diagonal(), 1))
    similar /= norms
    similar /= norms[:, None]
    np.fill_diagonal(similar, 0)
    return lambda history: similar[history].sum(0)


def fit_markov(sequences, n_items):
    """How often each item came right after the history's last one; those that never did, by
    popularity."""
    counts = fit_popularity(sequences, n_items)(None)
    follows = {}
    for sequence in sequences:
        for before, after in zip(sequence, sequence[1:]):
            follows.setdefault(before, Counter())[after] += 1

    def score(history):
        scores = counts / (1 + counts.sum())
        for after, count in follows.get(history[-1], {}).items():
            scores[after] += count
        return scores
    return score


class SASRec(nn.Module):
    """Self-attention over the latest item numbers (arXiv 1808.09781), trained with the whole
    softmax."""

    def __init__(self, n_items, length, width=64, layers=2, heads=2, dropout=0.3):
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(n_items + 1, width, padding_idx=n_items)
        self.places = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, heads, width * 4, dropout, "gelu", batch_first=True, norm_first=True)
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, layers, norm, enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids):
        """ids (B, T), padded on the right, T <= length -> what comes next, (B, T, width)."""
        x = self.dropout(self.embed(ids) + self.places.weight[:ids.shape[1]])
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.blocks(x, mask=causal, is_causal=True)

    def logits(self, hidden):
        """hidden (.., width) -> (.., n_items)."""
        return hidden @ self.embed.weight[:-1].T


def fit_sasrec(sequences, n_items, epochs=120, seed=0):
    """SASRec trained for `epochs` passes, of at most 4,000 steps in all: a step draws up to 128
    sequences anew, and of each a random window of up to 51 items. It never reads more of a history
    than it was trained on."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    longest = max([len(sequence) for sequence in sequences], default=2)
    model = SASRec(n_items, min(50, longest - 1))
    steps = min(epochs * math.ceil(len(sequences) / 128), 4000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 2))
    bar = tqdm(range(steps), "sasrec", leave=False, disable=llama.world()[0] > 0 or None)
    for _ in bar:
        drawn = rng.sample(sequences, min(128, len(sequences)))
        ids = torch.full((len(drawn), model.length + 1), n_items)
        for row, sequence in zip(ids, drawn):
            start = rng.randint(0, max(0, len(sequence) - len(row)))
            window = sequence[start:start + len(row)]
            row[:len(window)] = torch.tensor(window)

        # At every place but padding, the next item out of all.
        targets = ids[:, 1:]
        known = targets != n_items
        logits = model.logits(model(ids[:, :-1])[known])
        nn.functional.cross_entropy(logits, targets[known]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def score(history):
        hidden = model(torch.tensor([history[-model.length:]]))
        return model.logits(hidden[0, -1]).numpy()
    return score


BASELINES = {"popularity": fit_popularity, "item knn": fit_item_knn, "markov": fit_markov,
             "sasrec": fit_sasrec}


def rank_by(fit, dataset, examples, sequences):
    """Rank of each example's positive by a traditional method fitted to sequences of titles ->
    (users,).

    Examples without negatives are ranked among all that their users have not touched. Counts tie
    often, most of all those from few shots, so a positive gets a random place among its ties:
    always the last would be below chance.
    """
    index = {item: i for i, item in enumerate(dataset.items)}

    def numbers(titles):
        return [index[title] for title in titles]

    # Among a user's own candidates: those ahead, and a draw among those that tie.
    score_items = fit([numbers(sequence) for sequence in sequences], len(index))
    ranks, rng = [], np.random.default_rng(0)
    for example in examples:
        scores = score_items(numbers(example.history))
        others = numbers(example.negatives)
        if not others:
            others = np.delete(np.arange(len(index)), numbers(dataset.sequences[example.user]))
        ahead = scores[others] - scores[index[example.positive]]  # > 0 better, 0 a tie
        ranks.append(1 + (ahead > 0).sum() + rng.integers((ahead == 0).sum() + 1))
    return np.array(ranks)


def rank_baselines(dataset, examples, shown):
    """Every traditional method, fitted to the shots that adapters were shown, [(count, seed,
    moments, latest), ..] (one averaged row per count), and to all that users did before validation
    -> {name: [ranks (users,), ..]}."""
    ranked, everything = {}, data.interactions(dataset)
    if not everything:
        raise InputError(f"{dataset.name}: --baselines have nothing to learn from")
    for name, fit in BASELINES.items():
        for count, seed, moments, latest in shown:
            shots = data.shots(replace(dataset, latest=latest), count, 0, seed, moments=moments)
            few = [[*shot[-1].history, shot[-1].positive] for shot in shots]
            runs = ranked.setdefault(f"{name}, {count} shots", [])
            runs.append(rank_by(fit, dataset, examples, few))
        ranked[f"{name}, all users"] = [rank_by(fit, dataset, examples, everything)]
    return ranked


# The base model and its adapters, in one table


def find_adapters(paths):
    """[(name, folder, what args.json says)]; a path is an adapter, or a run that holds several, of
    which SFT comes first and DMPO last. A name is the folder's path."""
    found = []
    for path in map(Path, paths):
        folders = [file.parent for file in path.glob("*/adapter_model.safetensors")]
        folders.sort(key=lambda folder: (folder.name != "sft", folder.name == "dmpo", folder.name))
        if (path / "adapter_model.safetensors").exists():
            folders = [path]
        if not folders and any(path.glob("**/adapter_model.bin")):
            raise InputError(f"{path}: adapter_model.bin may run code and is never read: save the "
                             "adapter as safetensors")
        if not folders:
            raise InputError(f"{path}: no adapter there (python train.py --stage dmpo trains one)")
        for folder in folders:
            if not any(folder.samefile(other) for _, other, _ in found):
                found.append((str(folder), folder, read_settings(folder)))
    return found


def read_settings(folder):
    """What an adapter's args.json says; PEFT's adapters have none: only the model's name, and no
    seed."""
    base = llama.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    saved = {"model": base or "smollm2-135m"}
    if (folder / "args.json").exists():
        saved |= llama.read_json(folder / "args.json")
    numbers = {"seed", "shots", "moments", "latest"}
    texts = {"data", "model", "prompt", "heading", "dtype"}
    for key, value in saved.items():
        fits = True
        if key in texts or "identity" in key:
            fits = type(value) is str
        elif key in numbers:
            fits = type(value) is int and value >= (0 if key == "seed" else 1)
        if not fits:
            raise InputError(f"{folder / 'args.json'}: {key} cannot be {value!r}")
    if "seed" in saved and not numbers <= saved.keys():
        raise InputError(f"{folder / 'args.json'}: lacks {min(numbers - saved.keys())}")
    return saved


def inherit(adapters, key, default):
    """The setting that all adapters were trained with; InputError where they differ."""
    values = {}  # {what it is: what it is called}, as one thing may have several names
    for _, _, saved in adapters:
        value = saved.get(key, default)
        values[saved.get(f"{key}_identity", value)] = value
    if len(values) > 1:
        raise InputError(f"the adapters were trained with {key} "
                         f"{' and '.join(map(repr, values.values()))}: choose with --{key}")
    return next(iter(values.values()), default)


def without_seed(saved):
    """What adapters must agree in to be averaged: all settings but the seed, what follows from it,
    and names under which the same thing may be found."""
    apart = ("seed", "init_identity", "data", "model", "init")
    return {key: value for key, value in saved.items() if key not in apart}


def share_rows(dataset, adapters):
    """({a row's key: its [(name, folder, settings), ..]}, {an adapter's sha256: its row's key},
    {(shots, seed, moments, latest) that adapters of this data set were shown}).

    Adapters that differ in the seed alone share a row; InputError where not even that differs.
    """
    rows, starts, shown = {"base": [("base", None, {})]}, {}, set()
    for name, folder, saved in adapters:
        key = json.dumps(without_seed(saved)) if "seed" in saved else name
        for other, _, settings in rows.setdefault(key, []):
            if settings["seed"] == saved["seed"]:
                raise InputError(f"{other} and {name} have the same settings and seed: name one")
        rows[key].append((name, folder, saved))
        starts[data.file_sha256(folder / "adapter_model.safetensors")] = key
        if "seed" in saved and saved.get("data_identity") == data.identity(dataset.name):
            shown.add((saved["shots"], saved["seed"], saved["moments"], saved["latest"]))
    return rows, starts, shown


def evaluate(model, tokenizer, dataset, adapters, examples, split="test", seed=0,
             prompt="history", baselines=False):
    """Rank the examples' positives with the base model and each of [(name, folder, settings), ..]
    -> a report that JSON can hold. Examples without negatives are ranked among all that their users
    have not touched. InputError where two adapters have the same settings and seed.
    """
    rows, starts, shown = share_rows(dataset, adapters)

    # Everybody's ranks, {name of a row: [(users,), ..]}, and the row that each is compared with:
    # that of the adapter which its training started from, or base if that is not in the table.
    encoded = data.encode(tokenizer, examples, dataset, model.config, prompt, seed)
    whole = not examples[0].negatives
    labels = {key: label(row[0][0], len(row)) for key, row in rows.items()}
    ranked, compared = {}, {}
    for key, row in rows.items():
        for name, folder, _ in row:
            lora.load(model, folder)
            if whole:
                ranks = catalogue_ranks(model, tokenizer, dataset, examples, name)
            else:
                ranks = dmpo.ranks(dmpo.score(model, encoded, name))
            ranked.setdefault(labels[key], []).append(ranks)
        _, folder, saved = row[-1]
        if folder:
            compared[labels[key]] = labels[starts.get(saved.get("init_identity"), "base")]
    if baselines:
        last = list(labels.values())[-1]
        for name, runs in rank_baselines(dataset, examples, sorted(shown)).items():
            ranked[label(name, len(runs))] = runs
            compared[label(name, len(runs))] = last

    counts = {len(responses) for _, responses in encoded}
    count = len(dataset.items) if whole else max(counts)
    told = f"{min(counts)} to {count}" if len(counts) > 1 else "all" if whole else count
    measured = []
    for name, runs in ranked.items():
        values = measure(np.array(runs), count)  # {metric: (runs, users)}
        averages = {metric: value.mean(0) for metric, value in values.items()}
        measured.append((name, averages, compared.get(name)))
    return {"data": dataset.name, "split": split, "candidates": told, "users": len(examples),
            "seed": seed, "rows": summarise(measured),
            "ranks": {name: np.array(runs).tolist() for name, runs in ranked.items()}}


def label(name, runs):
    """What a row is called: by its first adapter's path, with the number of seeds if averaged."""
    return name if runs == 1 else f"{name} x{runs}"


# One person's recommendations, and why


def find_title(dataset, title):
    """The title as the data write it, whatever its capitals; InputError with the closest ones
    otherwise."""
    known = {item.casefold(): item for item in dataset.items}
    if title in dataset.items:
        return title
    if title.casefold() not in known:
        close = difflib.get_close_matches(title.casefold(), known, 4, 0.4)
        raise InputError(f"--history: {dataset.name} has no {title!r}; the closest: "
                         f"{'; '.join(known[name] for name in close) or 'none'}")
    return known[title.casefold()]


def find_person(dataset, user, typed):
    """(history, what came next or None) of a user of the data, or of the titles typed in."""
    positive = None
    if typed is not None:
        history = [find_title(dataset, data.one_line(title)) for title in typed]
    elif user not in dataset.sequences:
        raise InputError(f"--user {user}: no such user in {dataset.name} (they are called "
                         f"{', '.join(list(dataset.sequences)[:3])}, ..)")
    else:
        *history, positive = dataset.sequences[user]
        for split in ("train", "validation", "test"):  # the data's own examples: the last counts
            for example in dataset.examples.get(split, []):
                if example.user == user:
                    history, positive = example.history, example.positive
    if not history or len(set(history)) == len(dataset.items):
        raise InputError(f"the history {'holds every title' if history else 'is empty'}")
    return list(dict.fromkeys(history)), positive


def recommend(model, tokenizer, dataset, adapters, history, positive, top):
    """The `top` titles that the last model ranks first among those not in the history -> a report.

    adapters: [(name, folder or None, ..), ..], whose ranks for these titles are told, too.
    """
    # Every model's scores of every title that is left.
    titles = [item for item in dataset.items if item not in set(history)]
    asked = [data.Example("", history, titles[0], titles[1:])]
    (prompt, responses), = data.encode(tokenizer, asked, dataset, model.config)
    scores, last = {}, adapters[-1][0]
    for name, folder, *_ in adapters:
        lora.load(model, folder)
        scores[name] = catalogue_scores(model, prompt, responses, name)

    def row(i):
        ranks = {}  # of equal scores, each has the better rank
        for name, values in scores.items():
            ranks[name] = int((values > values[i]).sum()) + 1
        return {"title": titles[i], "score": float(scores[last][i]), "rank": ranks,
                "held_out": titles[i] == positive}

    best = np.argsort(-scores[last], kind="stable")[:top]
    return {"data": dataset.name, "history": history, "latest": dataset.latest, "model": last,
            "titles": len(titles), "recommended": [row(i) for i in best],
            "held_out": row(titles.index(positive)) if positive else None}


def explain(model, tokenizer, dataset, history, titles):
    """The titles' scores (titles,) after a history, and what each of its items does for each,
    (titles, H).

    Computed, not estimated: the title's log-odds after the history, less those without that item.
    """
    histories = [history] + [history[:i] + history[i + 1:] for i in range(len(history))]
    asked = [data.Example("", items, titles[0], titles[1:]) for items in histories]
    encoded = data.encode(tokenizer, asked, dataset, model.config)
    scores = dmpo.score(model, encoded)  # (1 + H, titles)
    below = np.minimum(scores, -1e-6)  # rounding may lift a sure title's above 0
    odds = scores - np.log1p(-np.exp(below))
    return scores[0], (odds[0] - odds[1:]).T


def add_reasons(model, tokenizer, dataset, report):
    """Put into a report of `recommend` what each history item does for each title, `effects`."""
    listed = report["history"][-dataset.latest:]
    titles = [row["title"] for row in report["recommended"]]
    _, effects = explain(model, tokenizer, dataset, listed, titles)
    for row, effect in zip(report["recommended"], effects):
        row["effects"] = dict(zip(listed, effect.tolist()))


def print_bars(effects):
    """{history item: what it does for a title} as bars: to the right they speak for it, to the left
    against."""
    largest = max(1, *[abs(effect) for effect in effects.values()])
    for item, effect in sorted(effects.items(), key=lambda pair: -pair[1]):
        bar = "#" * round(12 * abs(effect) / largest)
        left, right = ("", bar) if effect >= 0 else (bar, "")
        print(f"    {effect:+6.2f} {left:>12}|{right:12}  {item}")


def print_person(report):
    """A report of `recommend` as text, with the three strongest reasons for a title and the one
    against."""
    name, rows = report["model"], list(report["recommended"])
    others = [other for other in rows[0]["rank"] if other != name]
    if report["held_out"] and not any(row["held_out"] for row in rows):
        rows.append(report["held_out"])
    # The prompt's titles; then a line a title, with its strongest reasons if they were asked for.
    print("The history, oldest first:")
    for title in report["history"][-report["latest"]:]:
        print(f"  {title}")
    print(f"\nOf {report['titles']} other titles {name} ranks first:\n")
    print("  rank   score" + "".join(f"  {other}" for other in others) + "  title")
    for i, row in enumerate(rows):
        if i == len(report["recommended"]):
            print("   ...")
        ranks = "".join(f"  {row['rank'][other]:{len(other)}}" for other in others)
        mark = "  <- what came next" if row["held_out"] else ""
        print(f"{row['rank'][name]:6}{row['score']:8.2f}{ranks}  {row['title']}{mark}")
        if "effects" in row:
            strongest = sorted(row["effects"], key=lambda item: -row["effects"][item])
            shown = strongest[:3] + strongest[3:][-1:]
            print_bars({item: row["effects"][item] for item in shown})


# The command


def candidates(text):
    """argparse type: a number of titles to rank, the held-out one included; or "all", or
    "given"."""
    return text if text in ("all", "given") else at_least(2)(text)


def parse():
    """Its options; what was not given, and follows from the adapters, is left to `main`."""
    parser = argparse.ArgumentParser(
        description="Rank held-out items with a model and its adapters.", allow_abbrev=False)
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER",
        help="adapter folders, or runs that hold sft/ and dmpo/ (default: runs/<data>)")
    data.add_options(parser, data=None, model=None, latest=None)
    add("--prompt", choices=("history", "candidates"),
        help="list the candidates in the prompt or not (default: as the adapters were trained)")
    add("--users", type=at_least(1), help="rank for a random sample of this many (default: all)")
    add("--candidates", type=candidates, metavar="N", help="rank the held-out item among N, itself "
        "included; all: among every item that the user has not touched; given: those that the "
        "data bring (default: given if any, else 20)")
    add("--split", choices=("test", "validation"), default="test",
        help="validation is for choosing settings, test for reporting (default: %(default)s)")
    add("--seed", type=at_least(0), default=0,
        help="draws the candidates and the users (default: 0)")
    add("--baselines", action="store_true", help="also popularity, item neighbours, a Markov chain "
        "and SASRec, each trained on the adapters' shots and on everybody's data")
    person = parser.add_mutually_exclusive_group()
    person.add_argument("--user", help="instead, list what the last model ranks first for one user")
    person.add_argument("--history", nargs="+", metavar="TITLE",
                        help="or for somebody who chose these titles, in order")
    add("--top", type=at_least(1), default=10, help="titles to list (default: %(default)s)")
    add("--explain", action="store_true",
        help="and what each history item does for each title, and how the other models rank it")
    add("--json", metavar="FILE", help="also write the answer as JSON, with every user's ranks")

    # What cannot be, and what would do nothing, is refused.
    args = parser.parse_args()
    args.person = args.user is not None or args.history is not None
    llama.refuse_idle(parser, [
        (args.person, "for one person's list",
         ["--baselines", "--split", "--users", "--candidates", "--seed"]),
        (not args.person, "without --user or --history", ["--top", "--explain"]),
    ])
    if args.json:  # better now than after the work
        path = Path(args.json).absolute()
        if path.suffix != ".json" or path.is_dir() or not os.access(path.parent, os.W_OK):
            parser.error(f"--json {args.json}: no name that ends in .json in a folder to write to")
    return args


def main():
    """The command: find adapters, data and model; then a table, or a person's list."""
    args = parse()
    usual = Path("runs") / Path(args.data or "ml-100k").stem  # where train.py puts them
    found = [usual] if any(usual.glob("*/adapter_model.safetensors")) else []
    adapters = find_adapters(args.adapters or found)

    # What was not given is as the adapters were trained.
    args.data = args.data or inherit(adapters, "data", "ml-100k")
    args.model = args.model or inherit(adapters, "model", "smollm2-135m")
    args.prompt = args.prompt or inherit(adapters, "prompt", "history")
    args.latest = args.latest or inherit(adapters, "latest", data.LATEST)
    if args.dtype == "auto":
        args.dtype = inherit(adapters, "dtype", "auto")
    if args.prompt == "candidates" and (args.candidates == "all" or args.person):
        raise InputError("no prompt can list a whole catalogue: this needs --prompt history")
    dataset, model, tokenizer = data.open_all(args)
    if not args.heading:
        here = data.identity(args.data)
        same = [adapter for adapter in adapters if adapter[2].get("data_identity") == here]
        dataset = replace(dataset, heading=inherit(same, "heading", dataset.heading))

    # Adapters found without being named must be of this model (another may hold them, merged).
    if not args.adapters:
        mine = llama.identity(model)
        adapters = [adapter for adapter in adapters if adapter[2].get("model_identity") == mine]
    if not adapters:
        print(f"no adapter of {args.model} in {usual} (python train.py --data {args.data} makes "
              "them): base model only", file=sys.stderr)

    if args.person:
        history, positive = find_person(dataset, args.user, args.history)
        models = [("base", None), *adapters]
        models = models if args.explain else models[-1:]
        report = recommend(model, tokenizer, dataset, models, history, positive, args.top)
        if args.explain:
            add_reasons(model, tokenizer, dataset, report)
    else:
        examples = data.heldout(dataset, args.split, args.candidates, args.seed, args.users)
        report = evaluate(model, tokenizer, dataset, adapters, examples, args.split, args.seed,
                          args.prompt, args.baselines)
    if args.json and llama.world()[0] == 0:
        lora.write_file(args.json, json.dumps(report, indent=2).encode())
    if args.person:
        print_person(report)
    else:
        print_table(report)


if __name__ == "__main__":
    llama.run(main)
