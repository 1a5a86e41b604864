"""Fine-tune a language model on users' histories: supervised (SFT), then by preference (DMPO). Top to bottom.

    python train.py --stage dmpo     SFT first where no SFT adapter exists yet, then DMPO, then a table of all three

SFT teaches the model to continue a history with the item that came next; DMPO starts from there and raises that item
above k sampled others, held to the SFT model, its reference. The reference costs no second model: its
log-probabilities of the training trees are taken once, before the first step.
"""

import argparse
import json
import math
import random
import resource
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dmpo
import eval as evaluation
import lora
import model as llama

DEFAULTS = {"sft": {"epochs": 3, "lr": 2e-4}, "dmpo": {"epochs": 3, "lr": 2e-4}}
VALIDATION_USERS = 100


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model to recommend: SFT, then DMPO.")
    add, positive = parser.add_argument, evaluation.positive
    add("--stage", choices=("sft", "dmpo"), default="dmpo", help="dmpo runs sft first if it has not been (default)")
    add("--data", default="ml-100k", help="data set (default: %(default)s)")
    add("--model", default="smollm2-135m", help="smollm2-135m, a Hugging Face folder or a hub id (default: %(default)s)")
    add("--out", help="folder for sft/ and dmpo/ (default: runs/<data>)")
    add("--shots", type=positive, default=100, help="training examples (default: %(default)s)")
    add("--epochs", type=positive, help="passes over them in this stage (default: sft %(sft)d, dmpo %(dmpo)d)" % {
        stage: values["epochs"] for stage, values in DEFAULTS.items()})
    add("--lr", type=above_zero, help="peak learning rate of this stage (default: sft %(sft)g, dmpo %(dmpo)g)" % {
        stage: values["lr"] for stage, values in DEFAULTS.items()})
    add("--batch-size", type=positive, default=8, help="examples a step (default: %(default)s)")
    add("--rank", type=positive, default=8, help="of the adapters; alpha is twice that (default: %(default)s)")
    add("--loss", choices=("dmpo", "dpo", "sdpo"), default="dmpo", help="of the preference stage (default: %(default)s)")
    add("--init", choices=("sft", "base"), default="sft", help="where it starts, and its reference (default: %(default)s)")
    add("--beta", type=above_zero, default=0.1, help="weight of the implicit reward (default: %(default)s)")
    add("--negatives", type=positive, help="sampled negatives an example, k (default: 4; dpo: 1)")
    add("--seed", type=int, default=0, help="draws shots, negatives, adapters, order (default: %(default)s)")
    add("--users", type=positive, help="evaluate on a random sample of so many users (default: all)")
    evaluation.add_machine_options(parser)
    args = parser.parse_args()
    args.out = args.out or str(Path("runs") / args.data)
    args.negatives = args.negatives or (1 if args.loss == "dpo" else 4)
    if args.loss == "dpo" and args.negatives != 1:
        parser.error("--loss dpo has one negative; with several it is dmpo or sdpo")
    return args


def above_zero(text):
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def stage_settings(args, stage):
    """Everything that decides a stage's adapter, as it is kept in args.json."""
    own = args.stage == stage  # --epochs and --lr are for the stage that was asked for
    settings = {key: getattr(args, key) for key in ("data", "model", "shots", "seed", "rank", "batch_size")}
    for key, default in DEFAULTS[stage].items():
        settings[key] = own and getattr(args, key) or default
    if stage == "dmpo":
        settings |= {key: getattr(args, key) for key in ("loss", "init", "beta", "negatives")}
    return {"stage": stage, **settings}


def require_same(folder, settings):
    """ValueError unless the adapter in `folder` was trained with these settings."""
    saved = llama.read_json(folder / "args.json")
    for key in ("data", "model", "shots", "seed", "rank"):
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
    """Gradients of one step's loss over its examples, in groups of bounded size -> what the log tells of the step."""
    stats = {"loss": 0.0, "nodes": 0}
    total = sum(len(responses[0]) for _, responses in examples)
    for group in dmpo.group(examples, evaluation.TOKENS):
        batch = dmpo.pack([examples[i] for i in group]).to(model.head.device)
        policy = dmpo.response_logps(model, batch)  # (B, 1+k)
        if settings["stage"] == "sft":
            loss = dmpo.sft_loss(policy, batch.lengths) * (batch.lengths[:, 0].sum() / total)
        else:
            function = dmpo.sdpo_loss if settings["loss"] == "sdpo" else dmpo.dmpo_loss
            share = len(group) / len(examples)
            loss = function(policy, reference[group], settings["beta"]) * share
            r = dmpo.rewards(policy.detach(), reference[group], settings["beta"])
            margin = r[:, 0] - r[:, 1:].mean(-1)
            stats["margin"] = stats.get("margin", 0) + margin.mean() * share
            stats["reward_accuracy"] = stats.get("reward_accuracy", 0) + (r[:, :1] > r[:, 1:]).float().mean() * share
        loss.backward()
        stats["loss"] += loss.detach()
        stats["nodes"] += int((batch.positions > 0).sum()) + len(group)
    return {key: float(value) for key, value in stats.items()}


def train(model, tokenizer, dataset, settings, folder):
    """One stage: train the model's adapters on `--shots` examples and save them to `folder`."""
    stage, count = settings["stage"], settings.get("negatives", 0)
    shots = data.shots(dataset, settings["shots"], count, settings["seed"])
    examples = [data.tokenize(tokenizer, shot, dataset.heading) for shot in shots]
    validation = [data.tokenize(tokenizer, example, dataset.heading)
                  for example in data.heldout(dataset, "validation", 19, users=VALIDATION_USERS)]
    reference = reference_logps(model, examples) if stage == "dmpo" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    size = settings["batch_size"]
    per_epoch = math.ceil(len(examples) / size)
    schedule = Schedule(settings["lr"], settings["epochs"] * per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    step = 0
    with open(folder / "log.jsonl", "w", encoding="utf-8") as log:
        for epoch in range(settings["epochs"]):
            order = random.Random(f"{settings['seed']} {stage} epoch {epoch}").sample(range(len(examples)), len(examples))
            bar = tqdm(range(0, len(order), size), desc=f"{stage} epoch {epoch + 1}/{settings['epochs']}", disable=None)
            for start in bar:
                began = time.perf_counter()
                picked = order[start:start + size]
                for parameter_group in optimizer.param_groups:
                    parameter_group["lr"] = schedule(step)
                stats = backward(model, [examples[i] for i in picked],
                                 None if reference is None else reference[picked], settings)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seconds = time.perf_counter() - began
                stats = {"step": step, "loss": stats.pop("loss"), "lr": schedule(step), **stats,
                         "examples_per_s": len(picked) / seconds, "tokens_per_s": stats["nodes"] / seconds}
                log.write(json.dumps(stats) + "\n")
                bar.set_postfix({key: f"{stats[key]:.3g}" for key in ("loss", "reward_accuracy", "margin",
                                                                      "examples_per_s") if key in stats})
                step += 1
            rank = evaluation.ranks(evaluation.score(model, validation, title="validation"))
            ndcg = evaluation.measure(rank)["NDCG@10"].mean()
            log.write(json.dumps({"step": step, "epoch": epoch + 1, "validation_ndcg@10": ndcg}) + "\n")
            print(f"{stage} epoch {epoch + 1}/{settings['epochs']}: loss {stats['loss']:.3f}, "
                  f"validation NDCG@10 {ndcg:.3f} ({len(validation)} users)")
    lora.save(model, folder, settings["model"])
    evaluation.write_json(folder / "args.json", settings)


def main():
    """The command: model, data, SFT unless it is there, the preference stage, the table."""
    args = parse()
    device, dtype = evaluation.choose_device(args.device, args.dtype)
    dataset, path = data.load(args.data), data.find_model(args.model)
    model, tokenizer = llama.load(path, device, dtype), data.load_tokenizer(path)
    print(f"{args.model} on {device} in {str(dtype)[6:]}, {dataset.name}: {len(dataset.sequences)} users, "
          f"{len(dataset.items)} items")
    out, sft = Path(args.out), Path(args.out) / "sft"
    adapters = []
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
    evaluation.print_table(evaluation.evaluate(model, tokenizer, dataset, adapters, users=args.users))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"\nadapters in {', '.join(str(folder) for _, folder in adapters)}; peak memory {peak:.1f} GiB\n"
          f"next: python {'eval.py' if args.stage == 'dmpo' else 'train.py --stage dmpo'}"
          + (f" {args.out}" if args.stage == "dmpo" else f" --out {args.out}"))


if __name__ == "__main__":
    evaluation.run(main)
