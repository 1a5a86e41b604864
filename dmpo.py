r"""One user's shot is one token tree; the tree gives log-probabilities; they give the SFT, DPO, DMPO, S-DPO losses.

    .. 2. ─ 19 ┬ 79 ─ Alien ─ \n ─ 3. ─ 19 ┬ 86 ─ Aliens   node i: token[i], parent[i], position[i] = depth
               │                           └ 94 ─ Speed    i may attend to j  ⇔  j is i or an ancestor of i
               └ 96 ─ Fargo                                log p(response) = Σ of log p(token | parent's hidden state)

Notable:
- The prompt is computed once for all responses to it, and so is whatever else begins alike: responses, and the prompts
  of one user at several moments. Above, "2." is answered by Alien or Fargo, and then "3." by Aliens or Speed.
- A response's last token is predicted, but predicts nothing: it gets a node only where a later prompt goes on from it.
- It is exact but for rounding: every node sees the tokens and positions that it would see in a row of its own.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F


def tree(examples):
    """Merge equal beginnings. Examples (prompt ids, [response ids, ..]) -> (tokens, parents, edges, paths).

    An edge (node, token) is a token of a response and the node that predicts it; prompt tokens are not predicted.
    paths[example][response] are the numbers of its edges, whose log-probabilities add up to the response's. Examples of
    one shot share most: each prompt goes on where the one before it was answered by its positive.

    >>> tree([([7, 8], [[1, 2, 3], [1, 2, 4], [5]])])       # the prompt's nodes are 0 and 1
    ([7, 8, 1, 2], [-1, 0, 1, 2], [(1, 1), (2, 2), (3, 3), (3, 4), (1, 5)], [[[0, 1, 2], [0, 1, 3], [4]]])
    """
    tokens, parents, children = [], [], {}  # children: (node, token) -> node
    edges, paths = {}, []                   # edges: (node, token) -> number, in order

    def child(node, token):
        if (node, token) not in children:
            children[node, token] = len(tokens)
            tokens.append(token)
            parents.append(node)
        return children[node, token]

    for prompt, responses in examples:
        end = -1  # before the first token
        for token in prompt:
            end = child(end, token)
        paths.append([])
        for response in responses:
            node, path = end, []
            for depth, token in enumerate(response, 1):
                path.append(edges.setdefault((node, token), len(edges)))
                if depth < len(response):  # the last token gets a node only from a later prompt
                    node = child(node, token)
            paths[-1].append(path)
    return tokens, parents, list(edges), paths


def padded(nodes):
    """`nodes` rounded up to a multiple of 16, so that shapes recur: a CPU's matrix library prepares every new shape,
    which takes time, and keeps what it prepared, which takes memory."""
    return -(-nodes // 16) * 16


def group(shots, budget):
    """Split the indices of `shots`, lists of examples, into groups of like size whose padded trees hold at most
    `budget` nodes together; one that is larger gets a group of its own."""
    sizes = [padded(len(tree(examples)[0])) for examples in shots]
    groups = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):  # ascending: sizes[i] is its group's largest so far
        if not groups or (len(groups[-1]) + 1) * sizes[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


@dataclass
class Batch:
    """B trees, padded to T nodes each. Together they hold N examples, of at most R responses of at most L tokens, and E
    edges (predicted tokens, see `tree`) that start from P of the nodes."""
    ids: torch.Tensor         # (B, T) int64, the nodes' tokens
    positions: torch.Tensor   # (B, T) int64, their depths
    mask: torch.Tensor        # (B, T, T) bool, the node itself and its ancestors
    predicting: torch.Tensor  # (P,) int64, the nodes (b * T + t) that predict a token
    sources: torch.Tensor     # (E,) int64, which of those P an edge starts from
    targets: torch.Tensor     # (E,) int64, the token that it predicts
    paths: torch.Tensor       # (N, R, L) int64, each response's edges; E where there is none

    @property
    def nodes(self):
        """How many of the B T places are no padding: position 0 is that of padding, and of one root in each tree."""
        return int((self.positions > 0).sum()) + len(self.ids)

    def to(self, device):
        """The same batch on another device."""
        return Batch(*(value.to(device) for value in vars(self).values()))


def pack(shots):
    """Pack shots, lists of examples as `tree` takes them, into a Batch, one tree per shot."""
    examples = [example for shot in shots for example in shot]
    trees = [tree(shot) for shot in shots]
    B, T = len(trees), padded(max(len(tokens) for tokens, *_ in trees))
    N, R = len(examples), max(len(responses) for _, responses in examples)
    L, E = max(len(r) for _, responses in examples for r in responses), sum(len(edges) for _, _, edges, _ in trees)
    ids, positions, paths = np.zeros((B, T), int), np.zeros((B, T), int), np.full((N, R, L), E)
    mask = np.eye(T, dtype=bool)[None].repeat(B, 0)  # padding attends to itself: a softmax needs something
    nodes, targets, n = [], [], 0
    for b, (tokens, parents, edges, by_example) in enumerate(trees):
        ids[b, :len(tokens)] = tokens
        for node, parent in enumerate(parents):
            if parent >= 0:
                mask[b, node] |= mask[b, parent]
        positions[b, :len(tokens)] = mask[b, :len(tokens)].sum(-1) - 1  # depth: the number of ancestors
        for example_paths in by_example:
            for r, path in enumerate(example_paths):
                paths[n, r, :len(path)] = np.add(path, len(targets))
            n += 1
        nodes += [b * T + node for node, _ in edges]
        targets += [token for _, token in edges]
    predicting, sources = np.unique(nodes, return_inverse=True)
    return Batch(*map(torch.from_numpy, (ids, positions, mask, predicting, sources, np.array(targets), paths)))


class LogSumExp(torch.autograd.Function):
    """log Σ_v exp(h · w_v) over a frozen vocabulary projection w (V, D), for h (P, D) -> (P,) float32.

    Its gradient in h is the expected embedding Σ_v p_v w_v, taken right away, piece by piece of the vocabulary: neither
    (P, V) logits nor probabilities ever exist. It is flash attention (arXiv 2205.14135) with w for keys and values.
    """

    @staticmethod
    def forward(ctx, h, weight):
        top = h.new_full((len(h), 1), -torch.inf, dtype=torch.float32)            # (P, 1), the largest logit so far
        total, expected = torch.zeros_like(top), torch.zeros_like(h, dtype=torch.float32)
        for piece in weight.split(4096):
            logits = (h @ piece.T).float()                                        # (P, 4096)
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            mass, shrink = logits.sub_(higher).exp_(), (top - higher).exp()
            top, total = higher, total * shrink + mass.sum(-1, keepdim=True)
            if ctx.needs_input_grad[0]:
                expected.mul_(shrink).add_(mass.to(h.dtype) @ piece)              # (P, D)
        ctx.save_for_backward(expected / total)
        ctx.dtype = h.dtype
        return (top + total.log())[:, 0]

    @staticmethod
    def backward(ctx, grad):
        return (grad[:, None] * ctx.saved_tensors[0]).to(ctx.dtype), None


def response_logps(model, batch, past=None):
    """Each response's Σ log π(token | all tokens before it) -> (N, R) float32; 0 where an example has fewer than R.

    Only the nodes that predict something meet the vocabulary, and a predicted token's own logit is taken in float32.
    """
    hidden = model(batch.ids, batch.positions, batch.mask, past)               # (B, T, D)
    hidden = hidden.flatten(0, 1)[batch.predicting]                            # (P, D)
    # F.embedding(sources, hidden) is hidden[sources]; its backward adds up the gradients of a node's tokens in a fixed
    # order, so that the same run gives the same bits. Indexing a vector, as below, does so by itself.
    chosen = (F.embedding(batch.sources, hidden).float() * model.head[batch.targets]).sum(-1)  # (E,)
    logps = chosen - LogSumExp.apply(hidden, model.head)[batch.sources]        # (E,)
    return F.pad(logps, (0, 1))[batch.paths].sum(-1)  # (N, R, L) -> (N, R); padded paths point to E, the 0 appended


# The losses, of sequence log-probabilities (N, 1+k): policy's, reference's; column 0 is the positive's


def sft_loss(logps, tokens):
    """-Σ log π(positive) / tokens, for logps (N, R), of which only column 0, the positives', counts. `tokens`: those of
    all positives of the step, so that the losses of its groups (see train.backward) add up to the mean over tokens."""
    return -logps[:, 0].sum() / tokens


def rewards(policy, reference, beta):
    """DPO's implicit rewards, r_i = beta (log π(y_i|x) - log π_ref(y_i|x)) -> (N, 1+k); arXiv 2305.18290, eq. 5."""
    return beta * (policy - reference)


def dmpo_loss(policy, reference, beta):
    """-log σ(r_0 - mean(r_1 .. r_k)), averaged over the batch; arXiv 2405.16127. With k = 1 it is DPO."""
    r = rewards(policy, reference, beta)
    return -F.logsigmoid(r[:, 0] - r[:, 1:].mean(-1)).mean()


def sdpo_loss(policy, reference, beta):
    """-log σ(r_0 - log Σ_i exp(r_i)), averaged over the batch; arXiv 2406.09215. With k = 1 it is DPO."""
    r = rewards(policy, reference, beta)
    return -F.logsigmoid(r[:, 0] - r[:, 1:].logsumexp(-1)).mean()


LOSSES = {"dmpo": dmpo_loss, "dpo": dmpo_loss, "sdpo": sdpo_loss}  # DPO is DMPO with one negative


# A whole catalogue after one prompt (for eval.py alone)


def pack_catalogue(responses, nodes, titles=64):
    """Pack, once, responses that will be scored after many prompts in turn -> [(Batch, [a tree's indices, ..]), ..].

    Sorted, responses that begin alike are neighbours; they are cut into trees of `titles` responses each, whose root
    stands for the prompt's last token, which `catalogue_logps` fills in. A batch holds at most `nodes` nodes.
    """
    order = sorted(range(len(responses)), key=responses.__getitem__)
    parts = [order[at:at + titles] for at in range(0, len(order), titles)]
    shots = [[([0], [responses[i] for i in part])] for part in parts]
    return [(pack([shots[i] for i in some]), [parts[i] for i in some]) for some in group(shots, nodes)]


@torch.no_grad()
def catalogue_logps(model, prompt, catalogue):
    """The log-probabilities of a catalogue's responses after one prompt (token ids) -> (responses,) float64 array.

    The prompt is computed once; all its trees then attend to its keys and values. ValueError if one is not finite.
    """
    device, past = model.head.device, [[] for _ in model.model.layers]
    seen = len(prompt) - 1
    model(torch.tensor([prompt[:-1]], device=device), past=past)  # for the keys and values that it puts into past
    logps = torch.empty(sum(len(part) for _, parts in catalogue for part in parts), device=device)
    for batch, parts in catalogue:
        batch = batch.to(device)
        ids = batch.ids.clone()
        ids[:, 0] = prompt[-1]
        mask = F.pad(batch.mask, (seen, 0), value=True)  # (rows, T, seen + T)
        batch = replace(batch, ids=ids, positions=batch.positions + seen, mask=mask)
        found = response_logps(model, batch, past)
        for row, part in enumerate(parts):
            logps[part] = found[row, :len(part)]
    if not logps.isfinite().all():
        raise ValueError("the model's log-probabilities are not finite: the weights are broken")
    return logps.double().cpu().numpy()
