"""Fine-tune a language model on users' histories: supervised (SFT), then by preference (DMPO).

    python train.py --stage dmpo     SFT first if no SFT adapter exists yet, DMPO, then a table

SFT teaches the model to continue a history with the item that came next; DMPO starts from there and
raises that item above k sampled others, kept close to the SFT model, its reference. The reference
needs no second model: its log-probabilities of the training trees are taken once, before the first
step.
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

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as save_tensors
from tqdm import tqdm

import data
import dmpo
import eval as evaluation
import lora
import model as llama
from model import InputError, at_least

LEARNING_RATE = 1e-3
VALIDATION_USERS = 50  # a trend to watch; settings are chosen with eval.py --split validation
CHECKPOINT_SECONDS = 60


def parse():
    """The options, those filled in whose defaults follow from others."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model to recommend: SFT, then DMPO.", allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=("sft", "dmpo"), default="dmpo",
        help="dmpo runs sft first if it has not been (default)")
    data.add_options(parser, data="ml-100k", model="smollm2-135m", latest=data.LATEST)
    add("--out", help="folder for sft/ and dmpo/ (default: runs/<data>)")
    add("--init", metavar="sft|base|FOLDER",
        help="what this stage starts from, for dmpo its reference: the SFT of the same --out "
        "(dmpo's default), the base model (sft's default), or any adapter")

    # What is learnt from.
    add("--shots", type=at_least(1), default=100,
        help="stretches of histories (default: %(default)s)")
    add("--moments", type=at_least(1),
        help="learn this many of a shot's last items, each after those before it; 1: the last "
        "alone, as in the paper (default: as many as --latest, which is all)")
    add("--negatives", type=at_least(1),
        help="sampled negatives an example, k (default: 4; dpo: 1)")
    add("--sample", choices=("given", "uniform", "popular", "hard"), default="given",
        help="negatives. given: the data's own if any, then uniform ones (default); uniform: all "
        "titles alike; popular: as often as they occur; hard: of a larger draw those that the "
        "reference scores highest")
    add("--prompt", choices=("history", "candidates"), default="history",
        help="candidates: the prompt lists the positive and the negatives, shuffled "
        "(default: %(default)s)")

    # How.
    add("--loss", choices=tuple(dmpo.LOSSES), default="dmpo",
        help="preference loss (default: %(default)s)")
    add("--beta", type=at_least(1e-12, float), default=0.1,
        help="weight of the implicit reward; a larger one keeps closer to the reference "
        "(default: %(default)s)")
    add("--sft-weight", type=at_least(0, float), default=0.1, metavar="W",
        help="add W times SFT's loss to the preference loss (default: %(default)s)")
    add("--rank", type=at_least(1), default=8,
        help="of fresh adapters; alpha is twice that (default: %(default)s)")
    add("--epochs", type=at_least(1), default=1,
        help="passes over the shots in this stage (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=2, help="shots a step (default: %(default)s)")
    add("--lr", type=at_least(1e-12, float), default=LEARNING_RATE,
        help="peak learning rate of this stage (default: %(default)s)")
    add("--seed", type=at_least(0), default=0,
        help="draws shots, negatives, adapters, order (default: 0)")
    add("--checkpoint-activations", action="store_true",
        help="less memory, half as much time again")

    # The table at the end.
    add("--users", type=at_least(1), default=200, help="rank for a random sample of this many "
        "(default: %(default)s; eval.py takes all)")
    add("--candidates", type=at_least(2), help="rank among this many titles (default: among those "
        "that the data bring, else 20)")

    args = parser.parse_args()
    args.out = args.out or f"runs/{Path(args.data).stem}"
    args.init = args.init or ("base" if args.stage == "sft" else "sft")
    args.moments = args.moments or args.latest
    args.negatives = args.negatives or (1 if args.loss == "dpo" else 4)
    if args.stage == args.init == "sft":
        parser.error("--init sft is for --stage dmpo")
    if args.moments > args.latest:
        parser.error(f"--moments {args.moments}: more than the {args.latest} of --latest")
    if args.prompt == "candidates" and args.sample == "hard":
        parser.error("--sample hard needs --prompt history: it draws more than a prompt lists")
    if args.loss == "dpo" and args.negatives != 1:
        parser.error("--loss dpo has one negative; with several it is dmpo or sdpo")
    sft, from_folder = args.stage == "sft", args.init not in ("sft", "base")
    llama.refuse_idle(parser, [
        (sft, "with --stage sft", ["--loss", "--beta", "--sft-weight"]),
        (sft and args.prompt == "history", "with --stage sft", ["--negatives", "--sample"]),
        (from_folder, "with --init FOLDER, whose rank it is", ["--rank"]),
    ])
    return args


# The shots


def prepare(model, tokenizer, dataset, settings):
    """A stage's shots as token ids: lists of examples (prompt ids, [response ids, ..]), positives
    first."""
    seed, negatives = settings["seed"], settings.get("negatives", 0)
    sample = settings.get("sample", "given")
    drawn = data.shots(dataset, settings["shots"], negatives, seed, sample, settings["moments"])
    shots = []
    for shot in drawn:
        encoded = data.encode(tokenizer, shot, dataset, model.config, settings["prompt"], seed)
        shots.append(encoded)

    # Hard negatives: of many more, the k that the reference, which the model still is, finds
    # likeliest.
    if sample == "hard":
        trees = [dmpo.build_tree(shot) for shot in shots]
        scores = dmpo.tree_logps(model, trees, "hard negatives")[:, 1:]  # (N, HARD * k)
        hardest = scores.argsort(descending=True)[:, :negatives].tolist()
        row = 0
        for shot in shots:
            for i, (prompt, (positive, *others)) in enumerate(shot):
                shot[i] = prompt, [positive] + [others[n] for n in hardest[row]]
                row += 1

    # SFT learns from the positive alone.
    if settings["stage"] == "sft":
        for shot in shots:
            shot[:] = [(prompt, responses[:1]) for prompt, responses in shot]
    return shots


# The loop


def train(model, shots, validation, settings, folder):
    """One stage: train the model's adapters on shots, log every step, save them to `folder`.

    shots: as `prepare` gives them; validation: examples (prompt ids, [response ids, ..]) to rank
    after each epoch, or none; settings: what args.json keeps. Goes on from a checkpoint if there is
    one. Raises InputError where a loss is not finite.
    """
    device, (me, _) = model.head.device, llama.world()
    trees = [dmpo.build_tree(shot) for shot in shots]
    shot_examples = [len(shot) for shot in shots]
    shot_tokens = []  # of a shot's positives
    for shot in shots:
        shot_tokens.append(sum(len(responses[0]) for _, responses in shot))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)

    # Until a checkpoint is loaded, the adapters are what this stage starts from: the model is its
    # own reference.
    if settings["stage"] == "dmpo":
        reference = dmpo.tree_logps(model, trees, "reference").float()
        reference = reference.split(shot_examples)  # a shot's: (its examples, 1+k)

    # The losses of the steps before the run was cut off, if it was; those steps are not repeated.
    losses = load_checkpoint(folder / "checkpoint", model, optimizer)
    log = open_log(folder / "log.jsonl", len(losses))
    size, epochs, seed = settings["batch_size"], settings["epochs"], settings["seed"]
    steps_an_epoch = math.ceil(len(shots) / size)
    steps, step, saved_at = epochs * steps_an_epoch, 0, time.perf_counter()
    bar = tqdm(total=steps, initial=len(losses), desc=folder.name, disable=me > 0 or None)
    for epoch in range(1, epochs + 1):
        order = random.Random(f"{seed} epoch {epoch}").sample(range(len(shots)), len(shots))
        for start in range(0, len(shots), size):
            step += 1
            if step <= len(losses):
                continue
            began, picked = time.perf_counter(), order[start:start + size]
            step_examples = sum(shot_examples[i] for i in picked)
            step_tokens = sum(shot_tokens[i] for i in picked)

            # Gradients of the step's loss add up over its passes, and over processes.
            sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, margin, accuracy
            for part in passes(trees, picked, device):
                batch = dmpo.pack([trees[i] for i in part], device)
                policy = dmpo.response_logps(model, batch)  # (N, 1+k)
                if settings["stage"] == "sft":
                    loss = dmpo.sft_loss(policy, step_tokens)
                else:
                    ref, beta = torch.cat([reference[i] for i in part]), settings["beta"]
                    share = len(policy) / step_examples
                    loss = share * dmpo.LOSSES[settings["loss"]](policy, ref, beta)
                    # A little of SFT's loss beside it, as in the authors' code: see --sft-weight.
                    loss = loss + settings["sft_weight"] * dmpo.sft_loss(policy, step_tokens)
                    sums[1:] += share * margin_and_accuracy(policy.detach(), ref, beta)
                loss.backward()
                sums[0] += loss.detach()
            sum_gradients(trained)

            # One update, at this step's learning rate, along a gradient no longer than 1.
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            loss, margin, accuracy = llama.all_reduce(sums).tolist()
            lr = learning_rate(step - 1, steps, settings["lr"])
            if not math.isfinite(loss + norm):
                raise InputError(f"step {step}: loss {loss}, gradient {norm}, lr {lr:.2g}: nothing "
                                 "was updated, and what was saved is kept. Try a smaller --lr")
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # What log.jsonl and the progress bar tell of the step.
            losses.append(loss)
            line = {"step": step, "loss": loss, "lr": lr}
            line["examples_per_s"] = step_examples / (time.perf_counter() - began)
            if settings["stage"] == "dmpo":
                line |= {"margin": margin, "reward_accuracy": accuracy}
            bar.set_postfix({key: f"{line[key]:.3g}" for key in line if key not in ("step", "lr")})
            bar.update()
            if step % steps_an_epoch == 0:
                epoch_loss = sum(losses[-steps_an_epoch:]) / steps_an_epoch
                told = f"{folder.name} epoch {epoch}/{epochs}: loss {epoch_loss:.3f}"
                if validation:
                    ranks = dmpo.ranks(dmpo.score(model, validation, "validation"))
                    line["validation_ndcg@10"] = dmpo.ndcg(ranks, 10).mean()
                    told += f", validation NDCG@10 {line['validation_ndcg@10']:.3f}"
                bar.write(told)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if me == 0 and step < steps and time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
                save_checkpoint(folder / "checkpoint", model, optimizer, losses)
                saved_at = time.perf_counter()

    # From here on the stage is done; the other processes wait for its files.
    bar.close()
    if me == 0:
        lora.save(model, folder, settings["model"])
        (folder / "checkpoint").unlink(missing_ok=True)
    llama.barrier(device)


def passes(trees, picked, device):
    """This process's part of the picked shots, in lists whose trees fit into memory together."""
    me, processes = llama.world()
    mine = picked[me::processes]
    parts = []
    for group in dmpo.group_trees([trees[i] for i in mine], dmpo.NODES[device.type]):
        parts.append([mine[i] for i in group])
    return parts


def margin_and_accuracy(policy, reference, beta):
    """Means over examples, (2,), whatever the loss: of r_0 - mean(r_1 .. r_k), and of the share of
    negatives below their positive."""
    r = dmpo.rewards(policy, reference, beta)  # (N, 1+k)
    margin = (r[:, 0] - r[:, 1:].mean(-1)).mean()
    accuracy = (r[:, :1] > r[:, 1:]).float().mean()
    return torch.stack([margin, accuracy])


def sum_gradients(trained):
    """Add up the parameters' gradients over all processes, in one message."""
    if llama.world()[1] == 1:
        return
    for p in trained:
        if p.grad is None:  # this process had no shot
            p.grad = torch.zeros_like(p)
    whole = llama.all_reduce(torch.cat([p.grad.flatten() for p in trained]))
    for p, grad in zip(trained, whole.split([p.numel() for p in trained])):
        p.grad = grad.view_as(p)


def learning_rate(step, steps, peak):
    """Of step 0, 1, ..: linear warm-up over the first tenth, then half a cosine down to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def open_log(path, done):
    """log.jsonl for the steps to come, without the lines of steps that are taken once more."""
    if llama.world()[0] > 0:
        return open(os.devnull, "w")
    log = open(path, "a")
    lines = path.read_bytes().splitlines(keepends=True)
    log.truncate(sum(len(line) for line in lines[:done]))
    return log


# A run that was cut off goes on from its checkpoint: adapters, the optimiser's state, the losses so
# far. No random state is needed, as every draw is seeded by what it is for.


def save_checkpoint(path, model, optimizer, losses):
    """Write all that the rest of a stage depends on, behind its sha256; the file appears whole or
    not at all."""
    tensors = {**lora.state(model), "losses": torch.tensor(losses, dtype=torch.float64)}
    for i, averages in optimizer.state_dict()["state"].items():
        for key, value in averages.items():
            tensors[f"optimizer.{i}.{key}"] = value
    content = save_tensors({key: value.cpu() for key, value in tensors.items()})
    lora.write_file(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path, model, optimizer):
    """Set adapters and optimiser as they were -> the losses of the steps done, none without a
    file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise InputError(f"{path}: a damaged checkpoint; delete it to start anew")
    tensors = parse_tensors(content[32:])
    losses = tensors.pop("losses").tolist()
    for key, value in lora.state(model).items():
        value.copy_(tensors.pop(key))
    state = optimizer.state_dict()
    for key, value in tensors.items():
        _, i, name = key.split(".")
        state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
    print(f"going on after step {len(losses)}, from {path}")
    return losses


def lock(folder):
    """Refuse a second run in the same folder for as long as the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is at work here (--out names another)") from None
    return file


# The command

# What SFT and DMPO of one run must have in common.
SHARED = ("data_identity", "model_identity", "heading", "latest", "prompt", "shots", "moments",
          "seed", "rank", "negatives", "sample")
NAMES = ("data", "model", "init")  # never compared: what they stand for is ("data_identity", ..)


def stage_settings(args, stage):
    """All that decides what a stage trains, as args.json keeps it, but for where it starts."""
    keys = [*NAMES, *SHARED, "dtype", "batch_size"]
    if stage == "dmpo":
        keys += ["loss", "beta", "sft_weight"]
    elif args.prompt == "history":  # SFT meets no negatives
        keys = [key for key in keys if key not in ("negatives", "sample")]
    settings = {"stage": stage, "epochs": 1, "lr": LEARNING_RATE}
    settings |= {key: getattr(args, key) for key in keys}
    if stage != args.stage:
        settings["init"] = "base"
    else:  # which these options are for
        settings |= {"epochs": args.epochs, "lr": args.lr}
    return settings


def start_from(model, settings, out):
    """Give the model the adapters that a stage starts from, and say in its settings which."""
    if settings["init"] == "base":
        torch.manual_seed(settings["seed"])
        lora.attach(model, settings["rank"], 2 * settings["rank"])
        settings["init_identity"] = "base"
    else:
        start = out / "sft" if settings["init"] == "sft" else Path(settings["init"])
        settings["rank"] = lora.load(model, start).lora_config["r"]
        settings["init_identity"] = data.file_sha256(start / "adapter_model.safetensors")
        settings["init_settings"] = evaluation.without_seed(evaluation.read_settings(start))


def require_same(folder, settings, keys):
    """InputError, naming the setting, unless what is in `folder` was trained with the same ones."""
    saved = llama.read_json(folder / "args.json")
    for key in keys:
        if key in settings and key not in NAMES and saved.get(key) != settings[key]:
            raise InputError(f"{folder} was trained with {key} {saved.get(key)!r}, not "
                             f"{settings[key]!r}: choose another folder with --out, or delete it")


def run_stage(model, tokenizer, dataset, validation, settings, folder, asked):
    """Train one stage in its folder, unless that holds the adapter already: of the same settings,
    all of them if it is the stage `asked` for, else those that both stages share."""
    held = lock(folder) if llama.world()[0] == 0 else None  # until this function ends
    llama.barrier(model.head.device)
    start_from(model, settings, folder.parent)  # adds to the settings, so first
    if (folder / "adapter_model.safetensors").exists():
        require_same(folder, settings, settings if asked else SHARED)
        print(f"{folder} holds this adapter already (delete the folder to train it again)")
        return
    if (folder / "checkpoint").exists():
        require_same(folder, settings, settings)
    print(f"{settings['stage']} -> {folder}")
    if held:
        lora.write_file(folder / "args.json", json.dumps(settings, indent=2).encode())
    train(model, prepare(model, tokenizer, dataset, settings), validation, settings, folder)


def main():
    """The command: model, data, SFT unless it is there, the preference stage, the table."""
    args = parse()
    folders = {"sft": Path(args.out) / "sft", "dmpo": Path(args.out) / args.loss}
    stages = ["sft", "dmpo"] if args.init == "sft" else [args.stage]
    for stage in stages:  # a run goes on in the type that it began in
        if args.dtype == "auto" and (folders[stage] / "args.json").exists():
            args.dtype = llama.read_json(folders[stage] / "args.json").get("dtype", "auto")
    dataset, model, tokenizer = data.open_all(args)
    model.checkpoint_activations = args.checkpoint_activations
    args.dtype, args.heading = str(model.head.dtype)[6:], dataset.heading
    args.data_identity, args.model_identity = data.identity(args.data), llama.identity(model)
    print(f"{args.model} on {model.head.device} in {args.dtype}, {dataset.name}: "
          f"{len(dataset.sequences)} users, {len(dataset.items)} items")

    # What can fail fails now, and not behind SFT.
    if args.stage == "dmpo":
        data.shots(dataset, args.shots, args.negatives, args.seed, args.sample, args.moments)
    test = data.heldout(dataset, "test", args.candidates, users=args.users)
    validation = []
    if dataset.examples.get("validation") != []:  # []: the data's own examples lack it
        examples = data.heldout(dataset, "validation", args.candidates, users=VALIDATION_USERS)
        validation = data.encode(tokenizer, examples, dataset, model.config, args.prompt)

    adapters = []
    for stage in stages:
        folder, settings = folders[stage], stage_settings(args, stage)
        asked = stage == args.stage
        run_stage(model, tokenizer, dataset, validation, settings, folder, asked)
        adapters.append((str(folder), folder, settings))
    report = evaluation.evaluate(model, tokenizer, dataset, adapters, test, prompt=args.prompt)
    evaluation.print_table(report)
    if args.stage == "dmpo":
        more = f" --candidates {args.candidates}" if args.candidates else ""
        print(f"\nnext: python eval.py {shlex.quote(args.out)}{more}, the same table for all users")
    else:
        print("\nnext: the same command with --stage dmpo --init sft --rank "
              f"{settings['rank']} (and --lr and --epochs of that stage, if any)")


if __name__ == "__main__":
    llama.run(main)
