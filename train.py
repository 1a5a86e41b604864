"""Fine-tune a language model on users' histories: supervised (SFT), then by preference (DMPO). Read top to bottom.

    python train.py --stage dmpo     SFT first if no SFT adapter exists yet, DMPO, then a table of base, SFT and DMPO

SFT teaches the model to continue a history with the item that came next; DMPO starts from there and raises that item
above k sampled others, kept close to the SFT model, its reference. The reference needs no second model: its
log-probabilities of the training trees are taken once, before the first step.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as save_tensors
from tqdm import tqdm

import data
import dmpo
import eval as evaluation
import lora
import model as llama

LEARNING_RATES = {"sft": 1e-3, "dmpo": 5e-4}
VALIDATION_USERS = 50  # a trend to watch; settings are chosen with eval.py --split validation
CHECKPOINT_SECONDS = 60


def prepare(model, tokenizer, dataset, settings):
    """The stage's shots, each a list of examples, and the validation examples, as token ids."""
    seed, k, sample = settings["seed"], settings.get("negatives", 0), settings.get("sample", "given")
    shuffle_seed = seed if settings["prompt"] == "candidates" else None
    shots = data.shots(dataset, settings["shots"], k, seed, sample, settings["moments"])
    shots = [evaluation.encode(model, tokenizer, dataset, shot, shuffle_seed) for shot in shots]
    if sample == "hard":  # of many more, the k that the reference takes for the likeliest
        scores = evaluation.log_probabilities(model, shots, desc="hard negatives")[:, 1:]  # (N, 5k)
        hardest = iter(scores.argsort(descending=True)[:, :k].tolist())
        shots = [[(prompt, [responses[0], *(responses[1 + i] for i in next(hardest))]) for prompt, responses in shot]
                 for shot in shots]
    none = dataset.given and not dataset.given["validation"]
    validation = [] if none else data.heldout(dataset, "validation", users=VALIDATION_USERS)
    validation = evaluation.encode(model, tokenizer, dataset, validation, shuffle_seed)
    if settings["stage"] == "sft":  # which learns from the positive alone
        shots = [[(prompt, responses[:1]) for prompt, responses in shot] for shot in shots]
    return shots, validation


def sizes(shot):
    """(nodes of a shot's tree, those that predict something, tokens that a row for each response would have).

    >>> sizes([([7, 8], [[1, 2, 3], [1, 2, 4], [5]])])
    (4, 3, 10)
    """
    tokens, _, edges, _ = dmpo.tree(shot)
    rows = (len(prompt) + len(response) - 1 for prompt, responses in shot for response in responses)
    return len(tokens), len({node for node, _ in edges}), sum(rows)


def train(model, tokenizer, dataset, settings, folder):
    """One stage with the settings that args.json keeps: train the adapters, log every step, save them to `folder`."""
    main_process = evaluation.world()[0] == 0
    held = lock(folder) if main_process else None  # never read: closed, it would free the lock
    evaluation.barrier(model.head.device)  # until the folder is ours the other processes leave it alone
    shots, validation = prepare(model, tokenizer, dataset, settings)
    print("{} shots, {} examples; mean tree: {:.0f} nodes, {:.0f} of which predict a token; as one row per response: "
          "{:.0f} tokens".format(len(shots), sum(map(len, shots)), *np.mean([sizes(shot) for shot in shots], axis=0)))
    reference = [None] * len(shots)
    if settings["stage"] == "dmpo":  # before load_checkpoint: until then the model is its own reference
        reference = evaluation.log_probabilities(model, shots, desc="reference").float().split([*map(len, shots)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0, fused=True)
    size, epochs = settings["batch_size"], settings["epochs"]
    steps = math.ceil(len(shots) / size)  # of one epoch
    total = epochs * steps
    checkpoint = folder / "checkpoint"
    done = load_checkpoint(checkpoint, model, optimizer, settings)
    lines, saved = [], time.perf_counter()
    with open(folder / "log.jsonl" if main_process else os.devnull, "a" if done else "w") as log:
        bar = tqdm(range(done, total), folder.name, total, initial=done, disable=not main_process or None)
        for step in bar:
            epoch, start = step // steps + 1, step % steps * size
            order = random.Random(f"{settings['seed']} epoch {epoch}").sample(range(len(shots)), len(shots))
            picked = order[start:start + size]
            lr = learning_rate(step, total, settings["lr"])
            line = {"step": step, **update(model, optimizer, lr, shots, reference, picked, settings)}
            lines.append(line)
            if (step + 1) % steps == 0:  # an epoch ends
                losses = [one["loss"] for one in lines[-steps:]]
                told = f"{folder.name} epoch {epoch}/{epochs}: loss {np.mean(losses):.3f}"
                if len(losses) < steps:
                    told += f" (of its last {len(losses)} steps, since it went on)"
                if validation:
                    rank = evaluation.ranks(evaluation.score(model, validation, desc="validation"))
                    line["validation_ndcg@10"] = evaluation.measure(rank, 20)["NDCG@10"].mean()
                    told += f", validation NDCG@10 {line['validation_ndcg@10']:.3f} ({len(validation)} users)"
                bar.write(told)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix({key: f"{line[key]:.3g}" for key in ("loss", "reward_accuracy", "margin", "examples_per_s")
                             if key in line})
            if main_process and step + 1 < total and time.perf_counter() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, model, optimizer, settings, step + 1)
                saved = time.perf_counter()
    if main_process:
        lora.write_file(folder / "args.json", json.dumps(settings, indent=2).encode())
        lora.save(model, folder, settings["model"])  # from here on the stage is done
        checkpoint.unlink(missing_ok=True)
    evaluation.barrier(model.head.device)  # the others wait for the files
    report_speed(model, lines)


def update(model, optimizer, lr, shots, reference, picked, settings):
    """One update with the shots of these indices -> its line of the log; ValueError if the loss is not finite."""
    began, shots = time.perf_counter(), [shots[i] for i in picked]
    optimizer.param_groups[0]["lr"] = lr
    stats = backward(model, shots, [reference[i] for i in picked], settings)
    norm = float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0))
    if not math.isfinite(stats["loss"] + norm):
        raise ValueError(f"the loss is {stats['loss']}, its gradient's norm {norm} (lr {lr:.2g}, shots {picked}): "
                         "nothing was updated; what was saved before is kept. Try a smaller --lr")
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    done = {"examples": sum(map(len, shots)), "tokens": stats.pop("tokens"), "flops": stats.pop("operations")}
    return {**stats, "lr": lr, "seconds": seconds, **{f"{key}_per_s": value / seconds for key, value in done.items()}}


def backward(model, shots, reference, settings):
    """Gradients of one step's loss, in groups of bounded size -> what the log tells of the step.

    shots: lists of examples (prompt ids, [response ids, ..]); reference: for each a tensor (examples, 1+k), for SFT
    None. Each process takes its part of the shots; parts are weighted by their share of the whole, tokens for SFT and
    examples for DMPO, so that the sum over groups and processes is the gradient of one large batch.
    """
    device, (me, processes) = model.head.device, evaluation.world()
    names = ["loss", "tokens", "operations"] + ["margin", "reward_accuracy"] * (settings["stage"] == "dmpo")
    stats = dict.fromkeys(names, 0.0)
    examples = sum(map(len, shots))
    predicted = sum(len(responses[0]) for shot in shots for _, responses in shot)  # tokens that SFT learns
    shots, reference = shots[me::processes], reference[me::processes]  # this process's part
    for group in dmpo.group(shots, evaluation.NODES[device.type]):
        batch = dmpo.pack([shots[i] for i in group])
        stats["tokens"] += batch.nodes
        stats["operations"] += 2 * evaluation.operations(model, batch)  # W is frozen: backward costs one forward more
        batch = batch.to(device)
        policy = dmpo.response_logps(model, batch)  # (N, 1+k)
        if settings["stage"] == "sft":
            loss = dmpo.sft_loss(policy, predicted)
        else:
            ref, share = torch.cat([reference[i] for i in group]), len(policy) / examples
            loss = dmpo.LOSSES[settings["loss"]](policy, ref, settings["beta"]) * share
            loss = loss + settings["sft_weight"] * dmpo.sft_loss(policy, predicted)
            r = dmpo.rewards(policy.detach(), ref, settings["beta"])
            margin = r[:, 0] - r[:, 1:].mean(-1)
            stats["margin"] += margin.mean() * share
            stats["reward_accuracy"] += (r[:, :1] > r[:, 1:]).float().mean() * share  # negatives below their positive
        loss.backward()
        stats["loss"] += loss.detach()
    if processes > 1:  # all gradients in one message; there is none where this process had no shot
        trained = [p for p in model.parameters() if p.requires_grad]
        whole = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        for p, grad in zip(trained, evaluation.all_reduce(whole).split([p.numel() for p in trained])):
            p.grad = grad.view_as(p)
    values = torch.stack([torch.as_tensor(stats[name], device=device).double() for name in names])
    return dict(zip(names, evaluation.all_reduce(values).tolist()))  # a GPU is waited for here


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def report_speed(model, lines):
    """Print these steps' speed, beside that of plain matrix products, measured now, and the memory."""
    seconds = sum(line["seconds"] for line in lines)
    examples, tokens, rate = (sum(line[key] * line["seconds"] for line in lines) / seconds
                              for key in ("examples_per_s", "tokens_per_s", "flops_per_s"))
    peak = evaluation.matmul_rate(model.head.device, model.head.dtype)
    print(f"{examples:.2f} examples/s, {tokens:.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s = {rate / peak:.0%} "
          f"of plain {str(model.head.dtype)[6:]} matrix products ({peak / 1e9:.0f}); "
          f"peak memory {evaluation.peak_memory(model.head.device):.1f} GiB")


# A run that was cut off goes on from its checkpoint: adapters, the optimiser's state, the number of steps done. No
# random state is needed, since every draw is seeded by what it is for.


def save_checkpoint(path, model, optimizer, settings, steps):
    """Write everything that the rest of a stage depends on, behind its sha256; the file appears whole or not at all."""
    tensors = lora.state(model)
    for i, averages in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in averages.items()}
    tensors = {key: value.cpu() for key, value in tensors.items()}
    about = {"settings": settings, "steps": steps, "logged": (path.parent / "log.jsonl").stat().st_size}
    content = json.dumps(about).encode() + b"\n" + save_tensors(tensors)
    lora.write_file(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path, model, optimizer, settings):
    """Set adapters, optimiser and log as they were -> steps done, 0 without a file; ValueError if it does not fit."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path}: a damaged checkpoint; delete it to start anew")
    about, _, tensors = content[32:].partition(b"\n")
    about, tensors = json.loads(about), parse_tensors(tensors)
    require_same(path.parent, about["settings"], settings, settings)  # so that the tensors fit, too
    for key, value in lora.state(model).items():
        value.copy_(tensors.pop(key))
    state = optimizer.state_dict()
    for key, value in tensors.items():
        _, i, name = key.split(".")
        state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
    with open(path.parent / "log.jsonl", "ab") as log:
        log.truncate(min(about["logged"], log.tell()))  # the steps after the checkpoint are taken once more
    print(f"going on after step {about['steps']}, from {path}")
    return about["steps"]


def require_same(folder, saved, settings, keys):
    """ValueError, naming the setting, unless what is in `folder` was trained with the same ones."""
    for key in keys:
        if saved.get(key) != settings[key]:
            raise ValueError(f"{folder} was trained with {key} {saved.get(key)!r}, not {settings[key]!r}: "
                             "choose another folder with --out, or delete it")


def lock(folder):
    """Refuse a second run in the same folder for as long as the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is at work here: wait for it, or choose another --out") from None
    return file


# The command line


def parse():
    """Its options, and what those not given follow from."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model to recommend: SFT, then DMPO.")
    add, positive, above_zero = parser.add_argument, evaluation.bounded(int, 1), evaluation.bounded(float, 1e-12)
    add("--stage", choices=("sft", "dmpo"), default="dmpo", help="dmpo runs sft first if it has not been (default)")
    evaluation.add_shared_options(parser, "ml-100k")
    add("--model", default="smollm2-135m", type=os.path.normpath,
        help="Hugging Face folder, hub id, or the default, %(default)s")
    add("--out", help="folder for sft/ and dmpo/ (default: runs/<data>)")
    add("--shots", type=positive, default=100, help="stretches of histories to learn from (default: %(default)s)")
    add("--moments", type=positive, help="learn this many of a shot's last items, each after those before it; 1: the "
        "last alone, as in the paper (default: as many as --latest, which is all)")
    add("--epochs", type=positive, default=1, help="passes over them in this stage (default: %(default)s)")
    add("--lr", type=above_zero, help="peak learning rate of this stage (default: sft %(sft)g, dmpo %(dmpo)g)"
        % LEARNING_RATES)
    add("--batch-size", type=positive, default=2, help="shots a step (default: %(default)s)")
    add("--rank", type=evaluation.bounded(int, 1, 65536), default=8, help="of fresh adapters; alpha is twice that "
        "(default: %(default)s)")
    add("--loss", choices=tuple(dmpo.LOSSES), default="dmpo", help="preference loss (default: %(default)s)")
    add("--init", metavar="sft|base|FOLDER", help="what this stage starts from, for dmpo its reference: the SFT of the "
        "same --out (dmpo's default), the base model (sft's default), or any adapter's folder")
    add("--beta", type=above_zero, default=0.1, help="weight of the implicit reward (default: %(default)s)")
    add("--sft-weight", type=evaluation.bounded(float, 0), default=0.0, metavar="W",
        help="add W times SFT's loss to the preference loss (default: %(default)g; the paper's authors ran with 1)")
    add("--negatives", type=positive, help="sampled negatives an example, k (default: 4; dpo: 1)")
    add("--sample", choices=("given", "uniform", "popular", "hard"), default="given", help="negatives. given: the "
        "data's own if any, then uniform ones (default); uniform: all titles alike; popular: as often as they occur; "
        "hard: of a larger draw those that the reference scores highest")
    add("--prompt", choices=("history", "candidates"), default="history",
        help="candidates: the prompt lists the positive and the negatives, shuffled (default: %(default)s)")
    add("--seed", type=evaluation.bounded(int, 0, 2 ** 63), default=0,
        help="draws shots, negatives, adapters, order (default: 0)")
    add("--users", type=positive, default=200, help="at the end, rank for a random sample of this many users (default: "
        "%(default)s; eval.py takes all)")
    add("--checkpoint-activations", action="store_true", help="less memory, half as much time again")
    args = parser.parse_args()
    args.out = args.out or f"runs/{Path(args.data).stem}"
    args.init = args.init or ("base" if args.stage == "sft" else "sft")
    args.moments = args.moments or args.latest
    args.negatives = args.negatives or (1 if args.loss == "dpo" else 4)
    if args.stage == args.init == "sft":
        parser.error("--init sft is for --stage dmpo")
    if args.prompt == "candidates" and args.sample == "hard":
        parser.error("--sample hard needs --prompt history: it chooses among more negatives than a prompt lists")
    if args.loss == "dpo" and args.negatives != 1:
        parser.error("--loss dpo has one negative; with several it is dmpo or sdpo")
    return args


# What both stages have in common
SHARED = ("data", "data_sha256", "model", "heading", "latest", "prompt", "shots", "moments", "seed", "rank")


def stage_settings(args, stage):
    """A stage's settings as args.json keeps them; `main` adds init, init_sha256 (and that adapter's rank) and dtype."""
    own = args.stage == stage  # --epochs and --lr are for the stage that was asked for
    settings = {key: getattr(args, key) for key in (*SHARED, "batch_size")}
    settings["epochs"] = args.epochs if own else 1
    settings["lr"] = args.lr if own and args.lr else LEARNING_RATES[stage]
    if stage == "dmpo":
        settings |= {"loss": args.loss, "beta": args.beta, "sft_weight": args.sft_weight}
    if stage == "dmpo" or args.prompt == "candidates":
        settings |= {"negatives": args.negatives, "sample": args.sample}
    return {"stage": stage, **settings}


def main():
    """The command: model, data, SFT unless it is there, the preference stage, the table."""
    args = parse()
    dataset, model, tokenizer = evaluation.open_all(args)
    device, dtype = model.head.device, str(model.head.dtype)[6:]
    args.heading = dataset.heading
    args.data_sha256 = None if args.data in data.DATASETS else data.file_sha256(args.data)  # edited since?
    model.checkpoint_activations = args.checkpoint_activations
    print(f"{args.model} on {device} in {dtype}, {dataset.name}: {len(dataset.sequences)} users, "
          f"{len(dataset.items)} items")
    if args.stage == "dmpo":
        data.shots(dataset, args.shots, args.negatives, args.seed, args.sample, args.moments)  # fails now, if it must
    examples = data.heldout(dataset, "test", users=args.users)  # as eval.py's, whatever this run's seed
    adapters = []
    for stage in ["sft", "dmpo"] if args.init == "sft" else [args.stage]:
        init = args.init if stage == args.stage else "base"
        folder = Path(args.out) / ("sft" if stage == "sft" else args.loss)
        settings = {**stage_settings(args, stage), "init": Path(init).name, "dtype": dtype}
        if init == "base":
            torch.manual_seed(args.seed)
            lora.attach(model, args.rank, 2 * args.rank)
        else:
            start = Path(args.out) / "sft" if init == "sft" else Path(init)
            settings["rank"] = lora.load(model, start).lora_config["r"]
            settings["init_sha256"] = data.file_sha256(start / "adapter_model.safetensors")
        if (folder / "adapter_model.safetensors").exists():
            keys = settings if stage == args.stage else SHARED  # --lr and the like are for the stage asked for
            require_same(folder, llama.read_json(folder / "args.json"), settings, keys)
            print(f"{folder} holds this adapter already: going on with it (delete the folder to train it again)")
        else:
            print(f"{stage} -> {folder}")
            train(model, tokenizer, dataset, settings, folder)
        adapters.append((folder.name, folder, settings))
    evaluation.print_table(evaluation.evaluate(model, tokenizer, dataset, adapters, examples, prompt=args.prompt))
    print(f"\nadapters in {', '.join(str(folder) for _, folder, _ in adapters)}\n"
          + (f"next: python eval.py {shlex.quote(args.out)}, the same table for all users" if args.stage == "dmpo"
             else f"next: the same command with --stage dmpo --init sft --rank {settings['rank']} "
                  "(and --lr and --epochs of that stage, if any)"))


if __name__ == "__main__":
    evaluation.run(main)
