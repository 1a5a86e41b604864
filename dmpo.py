r"""The method: its losses; log π of a response, as a loop, then of a whole tree; ranking by it.

    .. 2. ─ 19 ┬ 79 ─ Alien ─ \n ─ 3. ─ 19 ┬ 86 ─ Aliens   node i: ids[i], parents[i], and
               │                           └ 94 ─ Speed    positions[i], its depth; it attends
               └ 96 ─ Fargo                                to itself and its ancestors

Notable:
- The prompt is computed once for all responses to it, and so is whatever else begins alike:
  responses, and the prompts of one user at several moments. Above, "2." is answered by Alien or
  Fargo, and then "3." by Aliens or Speed.
- A response's last token is predicted, but predicts nothing: it gets a node only where a later
  prompt goes on from it.
- It is exact but for rounding: a node sees the tokens and positions that it would see in a row of
  its own.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as llama
from model import InputError

NODES = {"cpu": 1024, "cuda": 16384}  # nodes in one pass, to fit into memory


# The losses. policy, reference (N, 1+k): log π of N examples' 1+k responses under the model in
# training and under the one that it started from; column 0 is the positive's. A step that takes its
# examples in several passes scales each pass's loss by its share of them (see train.py).


def sft_loss(logps, count):
    """-Σ log π(positive) / count, for logps (N, 1+k), of which column 0 alone matters. `count`: the
    tokens of all positives of the step, so that the losses of its passes add up to the mean over
    tokens."""
    return -logps[:, 0].sum() / count


def rewards(policy, reference, beta):
    """DPO's implicit rewards, r_i = beta (log π(y_i|x) - log π_ref(y_i|x)) -> (N, 1+k); arXiv
    2305.18290, eq. 5."""
    return beta * (policy - reference)


def dmpo_loss(policy, reference, beta):
    """-log σ(r_0 - mean(r_1 .. r_k)), averaged over examples; arXiv 2405.16127. With k = 1 it is
    DPO."""
    r = rewards(policy, reference, beta)  # (N, 1+k)
    margin = r[:, 0] - r[:, 1:].mean(-1)  # (N,)
    return -F.logsigmoid(margin).mean()


def sdpo_loss(policy, reference, beta):
    """-log σ(r_0 - log Σ_i exp(r_i)), averaged over examples; arXiv 2406.09215. With k = 1 it is
    DPO."""
    r = rewards(policy, reference, beta)  # (N, 1+k)
    margin = r[:, 0] - r[:, 1:].logsumexp(-1)  # (N,)
    return -F.logsigmoid(margin).mean()


LOSSES = {"dmpo": dmpo_loss, "dpo": dmpo_loss, "sdpo": sdpo_loss}  # DPO is DMPO with one negative


# log π(response | prompt), by its definition, which the tests compare the tree with


def response_logp(model, prompt, response):
    """Σ log π(token | all tokens before it) over the tokens of a response; both are lists of
    ids."""
    ids = torch.tensor([prompt + response], device=model.head.device)  # (1, T)
    logps = model.logits(model(ids))[0].float().log_softmax(-1)  # (T, V), row t of token t + 1
    total = 0.0
    for i, token in enumerate(response):
        total = total + logps[len(prompt) - 1 + i, token]
    return total


# The same for all prompts and responses of a shot in one pass: the token tree


@dataclass
class Tree:
    """Examples with their equal beginnings merged, of T nodes and E edges (see `build_tree`)."""
    ids: np.ndarray      # (T,) the nodes' tokens
    parents: np.ndarray  # (T,) the node before each, -1 before the first
    sources: np.ndarray  # (E,) the node that an edge starts from, which predicts
    targets: np.ndarray  # (E,) the token that it predicts
    paths: list          # paths[example][response]: the numbers of a response's edges


def build_tree(examples):
    """Merge equal beginnings of examples (prompt ids, [response ids, ..]) -> Tree.

    A node stands for a token and all before it. An edge leads from a node to a response's token;
    the log-probabilities of a response's edges add up to its own. Prompt tokens are not predicted.
    Examples of one shot share most: each prompt goes on where the one before it was answered by its
    positive.

    >>> found = build_tree([([7, 8], [[1, 2, 3], [1, 2, 4], [5]])])  # nodes 0 and 1: the prompt
    >>> found.ids.tolist(), found.parents.tolist()
    ([7, 8, 1, 2], [-1, 0, 1, 2])
    >>> list(zip(found.sources.tolist(), found.targets.tolist()))
    [(1, 1), (2, 2), (3, 3), (3, 4), (1, 5)]
    >>> found.paths
    [[[0, 1, 2], [0, 1, 3], [4]]]
    """
    # Numbered as they come, so a node's parent stands before it.
    nodes = {}  # (parent, token): node
    edges = {}  # (node, token): number
    paths = []
    for prompt, responses in examples:

        # The trunk: the prompt's tokens, those that an earlier example put there included.
        end = -1
        for token in prompt:
            end = nodes.setdefault((end, token), len(nodes))

        # Its branches: the last token of each is predicted, but is no node.
        paths.append([])
        for response in responses:
            node, path = end, []
            for token in response[:-1]:
                path.append(edges.setdefault((node, token), len(edges)))
                node = nodes.setdefault((node, token), len(nodes))
            path.append(edges.setdefault((node, response[-1]), len(edges)))
            paths[-1].append(path)
    parents, ids = np.array(list(nodes), np.int32).T
    sources, targets = np.array(list(edges), np.int32).T
    return Tree(ids, parents, sources, targets, paths)


def padded(nodes):
    """`nodes` rounded up to a multiple of 16, so that shapes recur: a CPU's matrix library prepares
    every new shape, which takes time, and keeps what it prepared, which takes memory."""
    return math.ceil(nodes / 16) * 16


def group_trees(trees, budget):
    """Split the indices of trees into groups of like size that, padded, hold at most `budget`
    nodes; a larger tree gets a group of its own."""
    sizes = [padded(len(tree.ids)) for tree in trees]
    groups = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):  # each is the largest so far
        if not groups or (len(groups[-1]) + 1) * sizes[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


@dataclass
class Batch:
    """B trees, padded to T nodes each. Together they hold N examples, of at most R responses of at
    most L tokens, and E edges that start from P of the nodes."""
    ids: torch.Tensor         # (B, T) int64, the nodes' tokens
    positions: torch.Tensor   # (B, T) int64, their depths
    mask: torch.Tensor        # (B, T, T) bool, the node itself and its ancestors
    predicting: torch.Tensor  # (P,) int64, the nodes (b * T + t) that predict a token
    rows: torch.Tensor        # (E,) int64, which of those P an edge starts from
    targets: torch.Tensor     # (E,) int64, the token that it predicts
    paths: torch.Tensor       # (N, R, L) int64, each response's edges; E where there is none


def pack(trees, device="cpu"):
    """A Batch of trees, on a device."""
    B, T = len(trees), padded(max(len(tree.ids) for tree in trees))
    ids, positions = np.zeros((B, T), int), np.zeros((B, T), int)
    mask = np.eye(T, dtype=bool)[None].repeat(B, 0)  # padding attends to itself alone
    for b, tree in enumerate(trees):
        nodes = len(tree.ids)
        ids[b, :nodes] = tree.ids
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                mask[b, node] |= mask[b, parent]
        positions[b, :nodes] = mask[b, :nodes].sum(-1) - 1  # how many ancestors

    # Nodes and edges are numbered on from tree to tree.
    sources = np.concatenate([b * T + tree.sources for b, tree in enumerate(trees)])
    targets = np.concatenate([tree.targets for tree in trees]).astype(int)
    predicting, rows = np.unique(sources, return_inverse=True)
    responses, offset = [], 0
    for tree in trees:
        for paths in tree.paths:
            responses.append([np.add(path, offset) for path in paths])
        offset += len(tree.sources)

    # Every response's edges, padded with an edge behind the last, which response_logps makes worth
    # 0.
    R = max(map(len, responses))
    L = max(max(map(len, paths)) for paths in responses)
    paths = np.full((len(responses), R, L), len(targets))
    for n, found in enumerate(responses):
        for r, path in enumerate(found):
            paths[n, r, :len(path)] = path
    arrays = (ids, positions, mask, predicting, rows, targets, paths)
    return Batch(*[torch.from_numpy(array).to(device) for array in arrays])


def log_normalizer(hidden, head):
    """log Σ_v exp(h · w_v) for hidden (P, D) and the vocabulary's head (V, D) -> (P,) float32.

    In pieces of 128 rows that are computed again for their gradients, so that never more than 128 V
    logits are kept; the last is padded, as every new shape costs time and memory (see `padded`).
    """
    def piece(h):
        return (h @ head.T).float().logsumexp(-1)

    whole = F.pad(hidden, (0, 0, 0, -len(hidden) % 128))  # (P rounded up, D)
    pieces = [checkpoint(piece, h, use_reentrant=False) for h in whole.split(128)]
    return torch.cat(pieces)[:len(hidden)]


def response_logps(model, batch):
    """Each response's Σ log π(token | all tokens before it) -> (N, R) float32; 0 where an example
    has fewer than R responses. Only nodes that predict meet the vocabulary."""
    hidden = model(batch.ids, batch.positions, batch.mask)  # (B, T, D)
    hidden = hidden.flatten(0, 1)[batch.predicting]  # (P, D)

    # An edge's log-probability: its token's logit, in float32, less the normaliser of its node. (An
    # embedding is indexing whose backward adds up in a fixed order: the same run gives the same
    # bits.)
    before = F.embedding(batch.rows, hidden).float()  # (E, D)
    logits = (before * model.head[batch.targets]).sum(-1)  # (E,)
    logps = logits - log_normalizer(hidden, model.head)[batch.rows]  # (E,)

    # A response is the sum over its path; padded paths point behind the last edge, where a 0 is
    # appended.
    return F.pad(logps, (0, 1))[batch.paths].sum(-1)  # (N, R, L) -> (N, R)


# Ranking by log π


@torch.no_grad()
def tree_logps(model, trees, desc=""):
    """log π of every response of trees -> (examples, R) float64 tensor, in order; -inf where an
    example has fewer than R. InputError if one is not finite. Each process computes a part."""
    device, (me, processes) = model.head.device, llama.world()
    starts = np.cumsum([0] + [len(tree.paths) for tree in trees])
    counts = []
    for tree in trees:
        counts += [len(responses) for responses in tree.paths]
    logps = torch.zeros(len(counts), max(counts), dtype=torch.float64, device=device)
    groups = group_trees(trees, NODES[device.type])[me::processes]
    for picked in tqdm(groups, desc, leave=False, disable=me > 0 or None):
        found = response_logps(model, pack([trees[i] for i in picked], device))  # (N, R)
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in picked])
        logps[rows, :found.shape[1]] = found.double()
    if not llama.all_reduce(logps).isfinite().all():
        raise InputError(f"{desc or 'the model'}: log-probabilities are not finite: broken weights")
    missing = torch.arange(logps.shape[1]) >= torch.tensor(counts)[:, None]
    return logps.masked_fill(missing.to(device), -math.inf)


def score(model, encoded, desc=""):
    """The scores of examples (prompt ids, [response ids, ..]), a tree for each -> (users,
    candidates) array, the positives in column 0."""
    return tree_logps(model, [build_tree([example]) for example in encoded], desc).cpu().numpy()


def ranks(scores):
    """The positives' places, 1 the best, ties counting against them: scores (users, candidates) ->
    (users,)."""
    return (scores >= scores[:, :1]).sum(1)


def ndcg(ranks, k):
    """Normalised discounted cumulative gain of one positive, by its place: 1/log2(1 + place), 0
    beyond k."""
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)
