"""score(model, batch): the log-probability of every scored token of every row, without doing work twice.

The loops call `score` and never know how it was computed. Its plain twin, `score_plain`, pads all rows, runs
them in one forward and makes all logits. `score` saves three things and changes none of the numbers:

- **Shared prompts.** The rows of a group begin with the same prompt: it is computed once. All groups' prompts
  and responses stand behind each other in one packed row; a response sees its group's prompt and itself, and
  its positions go on from the prompt's. A group of one row (SFT) is a document of its own, so the same code
  packs SFT batches without padding.
- **Attention** is a BlockMask (FlexAttention) on CUDA; elsewhere in two parts, each prompt causally and each
  response over prompt + itself, because a dense mask over the packed row costs more than sharing saves.
- **No logits that nobody reads**: the head runs on the positions before scored tokens only, in chunks that
  the backward computes again, so that memory does not grow with their number times the vocabulary.

Prefix sharing for DPO: arXiv 2410.20305; for GRPO: PrefixGrouper, arXiv 2506.05433.
Letters: N rows of B groups, T tokens, L tokens of the packed row, M scored tokens, V vocabulary; P prompt and
R response tokens of the longest; H heads, D channels of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from minicot.losses import token_logps
from minicot.model import attend

CHUNK = 2**26  # logits held at once: 256 MiB in float32


def score_plain(model, batch):
    """Batch -> (N,T) log-probabilities of all real tokens by one padded forward and all logits (N,T,V): the
    oracle of `score`."""
    images = None
    if batch.images is not None:
        of_row = [(batch.image_group == b).nonzero()[:, 0] for b in batch.group]
        images = model.encode_images(batch.images)[torch.cat(of_row)]
    return token_logps(model(batch.ids, images, batch.pad_mask), batch.ids)


def score(model, batch):
    """Batch -> (N,T) float32 (or wider): entry [n, t] is log p(ids[n, t] | ids[n, :t]) wherever loss_mask is
    True, else 0. Equals `score_plain` there, gradients included."""
    packed = pack(batch)
    attention = packed.block_mask() if batch.ids.is_cuda else TwoParts(packed)
    embeds = model.embed(packed.ids, batch.images)  # a group's pictures stand in its prompt: once
    hidden = model.hidden_states(embeds, positions=packed.positions, attention=attention)
    logps = chunked_logps(model.head, hidden[0, packed.before], batch.ids[batch.loss_mask])
    return logps.new_zeros(batch.ids.shape).masked_scatter(batch.loss_mask, logps)


def chunked_logps(head, hidden, ids):
    """log p(ids[m]) under head(hidden[m]), (M,E) and (M,) -> (M,), holding at most CHUNK logits: a chunk's
    are computed again in backward. Plain twin: token_logps(head(hidden), ...)."""

    def logps(hidden, ids):
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return -F.cross_entropy(logits, ids, reduction="none")  # fewer passes over the logits than by hand

    rows = max(1, CHUNK // head(hidden[:1]).shape[-1])
    if len(ids) <= rows:
        return logps(hidden, ids)
    return torch.cat(
        [checkpoint(logps, *part, use_reentrant=False) for part in zip(hidden.split(rows), ids.split(rows))]
    )


# ---- packing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """B groups as one row of L tokens: each group's shared prompt, then what is left of each of its rows."""

    ids: torch.Tensor  # (1,L)
    positions: torch.Tensor  # (1,L) within a row's own text
    group: torch.Tensor  # (L,) which group a token belongs to
    row: torch.Tensor  # (L,) which row; -1 = the prompt that the group's rows share
    before: torch.Tensor  # (M,) where the token before each scored one stands, in loss_mask's order
    prompt_at: torch.Tensor  # (B,P) where each group's prompt stands, -1 behind its end
    row_at: torch.Tensor  # (N,R) where the rest of each row stands, -1 behind its end
    group_of: torch.Tensor  # (N,) the group of each row

    def visible(self):
        """The one mask function: may token q look at token k? Where k is not later, of q's group, and in the
        prompt or in q's own row."""
        row, group = self.row, self.group

        def visible(_batch, _head, q, k):
            return (k <= q) & (group[k] == group[q]) & ((row[k] == -1) | (row[k] == row[q]))

        return visible

    def block_mask(self):
        """`visible` as FlexAttention takes it."""
        L = len(self.row)
        return create_block_mask(self.visible(), None, None, L, L, device=self.row.device)

    def dense_mask(self):
        """`visible` as a bool mask (L,L): the oracle of `block_mask` and of TwoParts."""
        at = torch.arange(len(self.row), device=self.row.device)
        return self.visible()(None, None, at[:, None], at[None, :])


def pack(batch):
    """Batch -> Packed. What a group's rows share is their longest common beginning before any scored token;
    a group of one row shares nothing. Padding, on either side, is left out. (A group's rows have the same
    prompt, pictures included; were they to differ before a picture, embed would count too few of them.)"""
    texts = [ids[real].tolist() for ids, real in zip(batch.ids.cpu(), batch.pad_mask.cpu())]
    scored = [
        mask[real].nonzero()[:, 0].tolist() for mask, real in zip(batch.loss_mask.cpu(), batch.pad_mask.cpu())
    ]
    ids, positions, group, row, prompts, rows, before = [], [], [], [], [], {}, {}

    def put(text, first, b, n):
        ids.extend(text)
        positions.extend(range(first, first + len(text)))
        group.extend([b] * len(text))
        row.extend([n] * len(text))
        return range(len(ids) - len(text), len(ids))

    group_of = batch.group.tolist()
    for b in range(len(batch.present)):
        members = [n for n, its_group in enumerate(group_of) if its_group == b]
        limit = min((scored[n][0] for n in members if scored[n]), default=0)
        shared = common_beginning([texts[n] for n in members], limit)
        prompts.append(put(texts[members[0]][:shared], 0, b, -1))
        for n in members:
            rows[n] = put(texts[n][shared:], shared, b, n)
            where = [*prompts[b], *rows[n]]
            before[n] = [where[t - 1] for t in scored[n]]
    in_order = range(len(texts))
    tensor = lambda values: torch.tensor(values, dtype=torch.long, device=batch.ids.device)
    return Packed(
        tensor([ids]),
        tensor([positions]),
        tensor(group),
        tensor(row),
        tensor([at for n in in_order for at in before[n]]),
        tensor(rectangle(prompts)),
        tensor(rectangle([rows[n] for n in in_order])),
        batch.group,
    )


def common_beginning(texts, limit):
    """How many tokens all texts begin with: at most `limit`, less than any text has, 0 for a single text."""
    if len(texts) == 1:
        return 0
    limit = min(limit, *(len(text) - 1 for text in texts))
    unlike = (t for t in range(limit) if len({text[t] for text in texts}) > 1)
    return next(unlike, limit)


def rectangle(spans):
    """Ranges of places -> lists of one length, -1 behind their ends."""
    longest = max(map(len, spans))
    return [[*span, *[-1] * (longest - len(span))] for span in spans]


class TwoParts:
    """Attention over a packed row (q, k, v of (1,H,L,D)) in two parts: the prompts causally as a batch of
    (B,P), the rows as a batch of (N,R) over their group's prompt and themselves. Twin: `dense_mask`."""

    def __init__(self, packed):
        self.prompt_at, self.row_at = packed.prompt_at, packed.row_at
        (_, P), (_, R) = self.prompt_at.shape, self.row_at.shape
        self.key_at = torch.cat([self.prompt_at[packed.group_of], self.row_at], 1)
        causal = self.row_at.new_ones(R, P + R).bool().tril(P)
        self.mask = (self.key_at >= 0)[:, None, None] & causal if P else None  # without prompts: causal
        at = torch.cat([self.prompt_at.flatten(), self.row_at.flatten()])
        self.back = torch.empty_like(packed.row)  # where the two parts' result of a token is
        self.back[at[at >= 0]] = (at >= 0).nonzero()[:, 0]

    def __call__(self, q, k, v):
        parts = [attend(take(q, self.row_at), take(k, self.key_at), take(v, self.key_at), self.mask)]
        if self.mask is not None:
            parts.insert(0, attend(*(take(x, self.prompt_at) for x in (q, k, v)), None))
        flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # (BP + NR,H,D)
        return flat.index_select(0, self.back).transpose(0, 1)[None]


def take(x, at):
    """x (1,H,L,D) at the places (n,t) -> (n,H,t,D); what stands at place -1 means nothing."""
    flat = x[0].transpose(0, 1).index_select(0, at.clamp(min=0).flatten())
    return flat.unflatten(0, at.shape).transpose(1, 2)
