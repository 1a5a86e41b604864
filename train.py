"""Fine-tune a language model on users' histories: supervised (SFT), then by preference (DMPO). Top to bottom.

    python train.py --stage dmpo     SFT first where no SFT adapter exists yet, then DMPO, then a table of all three

SFT teaches the model to continue a history with the item that came next; DMPO starts from there and raises that item
above k sampled others, held to the SFT model, its reference. The reference costs no second model: its
log-probabilities of the training trees are taken once, before the first step.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import dmpo
import eval as evaluation
import lora
import model as llama

DEFAULTS = {"sft": {"epochs": 3, "lr": 2e-4}, "dmpo": {"epochs": 3, "lr": 5e-4}}
VALIDATION_USERS = 50  # a trend to watch; settings are chosen with eval.py --split validation
TOKENS = 1024  # nodes in one forward and backward pass, which keeps every activation


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model to recommend: SFT, then DMPO.")
    add, positive = parser.add_argument, evaluation.positive
    add("--stage", choices=("sft", "dmpo"), default="dmpo", help="dmpo runs sft first if it has not been (default)")
    evaluation.add_data_options(parser)
    add("--model", default="smollm2-135m", help="Hugging Face folder, hub id, or the default, %(default)s")
    add("--out", help="folder for sft/ and dmpo/ (default: runs/<data>)")
    add("--shots", type=positive, default=100, help="training examples (default: %(default)s)")
    add("--epochs", type=positive, help="passes over them in this stage (default: sft %(sft)d, dmpo %(dmpo)d)" % {
        stage: values["epochs"] for stage, values in DEFAULTS.items()})
    add("--lr", type=above_zero, help="peak learning rate of this stage (default: sft %(sft)g, dmpo %(dmpo)g)" % {
        stage: values["lr"] for stage, values in DEFAULTS.items()})
    add("--batch-size", type=positive, default=8, help="examples a step (default: %(default)s)")
    add("--rank", type=positive, default=8, help="of the adapters; alpha is twice that (default: %(default)s)")
    add("--loss", choices=("dmpo", "dpo", "sdpo"), default="dmpo", help="preference loss (default: %(default)s)")
    add("--init", choices=("sft", "base"), default="sft", help="start and reference of dmpo (default: %(default)s)")
    add("--beta", type=above_zero, default=0.1, help="weight of the implicit reward (default: %(default)s)")
    add("--negatives", type=positive, help="sampled negatives an example, k (default: 4; dpo: 1)")
    add("--sample", choices=("uniform", "popular", "hard"), default="uniform", help="negatives drawn uniformly, as "
        "often as they occur, or, of a larger draw, those that the reference scores highest (default: %(default)s)")
    add("--prompt", choices=("history", "candidates"), default="history",
        help="candidates: the prompt lists the positive and the negatives, shuffled (default: %(default)s)")
    add("--seed", type=evaluation.seed, default=0, help="draws shots, negatives, adapters, order (default: 0)")
    add("--candidates", type=evaluation.candidates, metavar="N", help="of the closing table: see eval.py --help")
    add("--users", type=positive, default=200, help="rank for a random so many users at the end (default: %(default)s; "
        "eval.py takes all)")
    add("--checkpoint-activations", action="store_true", help="less memory, half as much time again")
    evaluation.add_machine_options(parser)
    args = parser.parse_args()
    args.out = args.out or str(evaluation.runs_folder(args.data))
    args.split = "test"  # of the closing table
    args.negatives = args.negatives or (1 if args.loss == "dpo" else 4)
    if args.prompt == "candidates" and args.candidates == "all":
        parser.error("--candidates all cannot be listed in a prompt")
    if args.loss == "dpo" and args.negatives != 1:
        parser.error("--loss dpo has one negative; with several it is dmpo or sdpo")
    return args


def above_zero(text):
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


SHARED = ("data", "model", "heading", "prompt", "shots", "seed", "rank")  # settings that both stages must have alike


def stage_settings(args, stage):
    """Everything that decides a stage's adapter, as it is kept in args.json."""
    own = args.stage == stage  # --epochs and --lr are for the stage that was asked for
    settings = {key: getattr(args, key) for key in (*SHARED, "batch_size")}
    for key, default in DEFAULTS[stage].items():
        settings[key] = getattr(args, key) if own and getattr(args, key) else default
    if stage == "dmpo":
        settings |= {key: getattr(args, key) for key in ("loss", "init", "beta", "sample")}
    if stage == "dmpo" or args.prompt == "candidates":
        settings["negatives"] = args.negatives
    return {"stage": stage, **settings}


def require_same(folder, settings):
    """ValueError unless the adapter in `folder` was trained with these settings."""
    saved = llama.read_json(folder / "args.json")
    for key in SHARED:
        if saved.get(key) != settings[key]:
            raise ValueError(f"{folder} was trained with {key} {saved.get(key)}, not {settings[key]}: "
                             f"choose another folder with --out, or delete it")


class Schedule:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""

    def __init__(self, peak, steps):
        self.peak, self.steps, self.warmup = peak, steps, max(1, steps // 10)

    def __call__(self, step):
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))) / 2


@torch.no_grad()
def reference_logps(model, examples):
    """The reference policy's sequence log-probabilities of all responses -> (N, 1+k) on the model's device."""
    result = torch.empty(len(examples), len(examples[0][1]), device=model.head.device)
    for group in dmpo.group(examples, evaluation.TOKENS):
        result[group] = dmpo.response_logps(model, dmpo.pack([examples[i] for i in group]).to(result.device))
    return result


def backward(model, examples, reference, settings):
    """Gradients of one step's loss over its examples, in groups of bounded size -> what the log tells of the step.

    Each process takes its part of the examples, weighted by its share of the whole, so that the sum over groups and
    processes is the gradient of one large batch.
    """
    me, processes = evaluation.world()
    mine = range(me, len(examples), processes)
    names = ["loss", "tokens", "operations"] + ["margin", "reward_accuracy"] * (settings["stage"] == "dmpo")
    stats = dict.fromkeys(names, 0.0)
    total = sum(len(responses[0]) for _, responses in examples)
    for group in dmpo.group([examples[i] for i in mine], TOKENS):
        group = [mine[i] for i in group]
        batch = dmpo.pack([examples[i] for i in group])
        stats["tokens"] += int((batch.positions > 0).sum()) + len(group)
        stats["operations"] += 2 * evaluation.operations(model, batch)  # W is frozen: backward costs one forward more
        batch = batch.to(model.head.device)
        policy = dmpo.response_logps(model, batch)  # (B, 1+k)
        if settings["stage"] == "sft":
            loss = dmpo.sft_loss(policy, batch.lengths) * (batch.lengths[:, 0].sum() / total)
        else:
            function = dmpo.sdpo_loss if settings["loss"] == "sdpo" else dmpo.dmpo_loss
            share = len(group) / len(examples)
            loss = function(policy, reference[group], settings["beta"]) * share
            r = dmpo.rewards(policy.detach(), reference[group], settings["beta"])
            margin = r[:, 0] - r[:, 1:].mean(-1)
            stats["margin"] += margin.mean() * share
            stats["reward_accuracy"] += (r[:, :1] > r[:, 1:]).float().mean() * share
        loss.backward()
        stats["loss"] += loss.detach()
    add_up_gradients([p for p in model.parameters() if p.requires_grad])
    values = torch.stack([torch.as_tensor(stats[name], device=model.head.device).double() for name in names])
    return dict(zip(names, evaluation.add_up(values)))


def add_up_gradients(parameters):
    """Sum the gradients over all processes, in one message."""
    if evaluation.world()[1] > 1:
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        for p, grad in zip(parameters, evaluation.add_up(flat).split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def prepare(model, tokenizer, dataset, settings):
    """The stage's training examples and the validation examples, as token ids."""
    seed, k, sample = settings["seed"], settings.get("negatives", 0), settings.get("sample", "uniform")
    choices_seed = seed if settings["prompt"] == "candidates" else None
    shots = data.shots(dataset, settings["shots"], k * 5 if sample == "hard" else k, seed, popular=sample == "popular")
    if sample == "hard":  # of five times as many, the k that the reference takes for the likeliest
        scores = evaluation.score(model, evaluation.tokenize(model, tokenizer, dataset, shots))[:, 1:]  # (N, 5k)
        shots = [replace(shot, negatives=[shot.negatives[i] for i in row])
                 for shot, row in zip(shots, np.argsort(-scores)[:, :k])]
    own = dataset.given and all(example.negatives for example in dataset.given["validation"])
    validation = data.heldout(dataset, "validation", "given" if own else 19, users=VALIDATION_USERS)
    examples, validation = (evaluation.tokenize(model, tokenizer, dataset, part, choices_seed)
                            for part in (shots, validation))
    if settings["stage"] == "sft":  # which learns from the positive alone
        examples = [(prompt, responses[:1]) for prompt, responses in examples]
    return examples, validation


def train(model, tokenizer, dataset, settings, folder):
    """One stage: train the model's adapters on its examples, log every step, save them to `folder`."""
    examples, validation = prepare(model, tokenizer, dataset, settings)
    reference = reference_logps(model, examples) if settings["stage"] == "dmpo" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    size, epochs = settings["batch_size"], settings["epochs"]
    schedule = Schedule(settings["lr"], epochs * math.ceil(len(examples) / size))
    main_process = evaluation.world()[0] == 0
    folder.mkdir(parents=True, exist_ok=True)
    lines = []  # of the log, one a step
    with open(folder / "log.jsonl" if main_process else os.devnull, "w", encoding="utf-8") as log:
        for epoch in range(1, epochs + 1):
            order = random.Random(f"{settings['seed']} epoch {epoch}").sample(range(len(examples)), len(examples))
            bar = tqdm(range(0, len(order), size), desc=f"{settings['stage']} epoch {epoch}/{epochs}",
                       disable=None if main_process else True)
            for start in bar:
                began, picked, lr = time.perf_counter(), order[start:start + size], schedule(len(lines))
                optimizer.param_groups[0]["lr"] = lr
                stats = backward(model, [examples[i] for i in picked],
                                 None if reference is None else reference[picked], settings)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                stats = {key: float(value) for key, value in stats.items()}  # a GPU is waited for here
                lines.append(log_line(len(lines), lr, stats, len(picked), time.perf_counter() - began))
                lines[-1]["peak_flops_per_s"] = evaluation.matmul_rate(model.head.device, model.head.dtype, 0.01)
                log.write(json.dumps(lines[-1]) + "\n")
                bar.set_postfix({key: f"{lines[-1][key]:.3g}" for key in ("loss", "reward_accuracy", "margin",
                                                                          "examples_per_s") if key in lines[-1]})
            rank = evaluation.ranks(evaluation.score(model, validation, title="validation"))
            ndcg = evaluation.measure(rank, 20)["NDCG@10"].mean()
            log.write(json.dumps({"step": len(lines), "epoch": epoch, "validation_ndcg@10": ndcg}) + "\n")
            loss = np.mean([line["loss"] for line in lines[-len(bar):]])
            print(f"{settings['stage']} epoch {epoch}/{epochs}: loss {loss:.3f}, "
                  f"validation NDCG@10 {ndcg:.3f} ({len(validation)} users)")
    if main_process:
        lora.save(model, folder, settings["model"])
        evaluation.write_json(folder / "args.json", {**settings, "dtype": str(model.head.dtype)[6:]})
    evaluation.add_up(torch.zeros(1, device=model.head.device))  # the others wait for the files
    report_speed(model, lines, len(examples) * epochs)


def log_line(step, lr, stats, examples, seconds):
    """What log.jsonl says of one step."""
    rates = {"examples_per_s": examples, "tokens_per_s": stats.pop("tokens"), "flops_per_s": stats.pop("operations")}
    return {"step": step, "loss": stats.pop("loss"), "lr": lr, **stats, "seconds": seconds,
            **{key: value / seconds for key, value in rates.items()}}


def report_speed(model, lines, examples):
    """Print the stage's speed, beside that of plain matrix products (measured after each step), and its memory."""
    seconds = sum(line["seconds"] for line in lines)
    tokens, rate = (sum(line[key] * line["seconds"] for line in lines) / seconds
                    for key in ("tokens_per_s", "flops_per_s"))
    peak = torch.tensor(np.median([line["peak_flops_per_s"] for line in lines]), device=model.head.device)
    peak = float(evaluation.add_up(peak))  # of all processes together, as is the rate
    print(f"{examples / seconds:.2f} examples/s, {tokens:.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s = {rate / peak:.0%} "
          f"of plain {str(model.head.dtype)[6:]} matrix products ({peak / 1e9:.0f}); "
          f"peak memory {evaluation.peak_memory(model.head.device):.1f} GiB")


def main():
    """The command: model, data, SFT unless it is there, the preference stage, the table."""
    args = parse()
    device, dtype = evaluation.choose_device(args.device, args.dtype)
    dataset, model, tokenizer = evaluation.open_all(args, args.model, device, dtype)
    args.heading = dataset.heading
    model.checkpoint_activations = args.checkpoint_activations
    print(f"{args.model} on {device} in {str(dtype)[6:]}, {dataset.name}: {len(dataset.sequences)} users, "
          f"{len(dataset.items)} items")
    out, sft = Path(args.out), Path(args.out) / "sft"
    adapters = []
    if args.stage == "dmpo":
        data.shots(dataset, args.shots, args.negatives, args.seed)  # fails now, not after SFT, if it must
    torch.manual_seed(args.seed)
    if args.stage == "sft" or args.init == "sft":
        settings = stage_settings(args, "sft")
        if args.stage == "dmpo" and (sft / "adapter_model.safetensors").exists():
            require_same(sft, settings)
            print(f"starting from the SFT adapter in {sft}")
            lora.load(model, sft)
        else:
            if args.stage == "dmpo":
                print(f"no SFT adapter in {sft} yet: SFT comes first")
            train(lora.attach(model, args.rank, 2 * args.rank), tokenizer, dataset, settings, sft)
        adapters.append(("sft", sft))
    else:
        lora.attach(model, args.rank, 2 * args.rank)
    if args.stage == "dmpo":
        train(model, tokenizer, dataset, stage_settings(args, "dmpo"), out / args.loss)
        adapters.append((args.loss, out / args.loss))
    evaluation.print_table(evaluation.evaluate(model, tokenizer, dataset, adapters, args))
    print(f"\nadapters in {', '.join(str(folder) for _, folder in adapters)}\n"
          + (f"next: python eval.py {args.out}, the same table for all {len(dataset.sequences)} users"
             if args.stage == "dmpo" else f"next: python train.py --stage dmpo --out {args.out}"))


if __name__ == "__main__":
    evaluation.run(main)
