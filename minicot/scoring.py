"""score(model, batch): the log-probability of every scored token of every row, without doing work twice.

The loops call `score` and never know how it was computed. It is `hidden_at`, the hidden states at chosen
places of every row (any head can stand on them), and the language model's head. The plain twins,
`hidden_plain` and `score_plain`, pad all rows, run them in one forward and make all logits. Three things are
saved, and none of the numbers changes:

- **Shared prompts.** The rows of a group begin with the same prompt: it is computed once. All groups' prompts
  and responses stand behind each other in one packed row; a response sees its group's prompt and itself, and
  its positions go on from the prompt's. A group of one row (SFT) is a document of its own, so the same code
  packs SFT batches without padding.
- **Attention** is a BlockMask (FlexAttention) on CUDA, made a few query blocks at a time; elsewhere in two
  parts, each prompt causally and each response over prompt + itself, because a dense mask over the packed row
  costs more than sharing saves.
- **No logits that nobody reads**: the head runs on the positions before scored tokens only, in chunks that
  the backward computes again, so that memory does not grow with their number times the vocabulary; a chunk's
  gradient is written over its log-probabilities (PickedLogps).

The rule is `pays` below: where packing spares too little, rows are padded, with the same savings at the head.

Prefix sharing for DPO: arXiv 2410.20305; for GRPO: PrefixGrouper, arXiv 2506.05433.
Letters: N rows of B groups, T tokens, L tokens of the packed row, M scored tokens, V vocabulary; P prompt and
R response tokens of the longest; E hidden size; H heads, D channels of a head.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from minicot.losses import token_logps
from minicot.model import attend

CHUNK = 2**26  # logits in memory at once: 256 MiB in float32
BLOCK = 128  # FlexAttention's blocks of queries and of keys
SPARED = 1 / 8  # CUDA: least share of the tokens that packing has to spare
# CPU, fitted to toy steps on 2 threads (tests/test_scoring.py): multiplications in the time
GATHER = 10  # of a number gathered
FIXED = 10**7  # of what packing costs a layer in any case
MASK = 2**24  # entries of the mask in memory at once: 16 MiB each of a few bool tensors


def hidden_plain(model, batch):
    """Batch -> (N,T,E) final hidden states of all tokens by one padded forward: the oracle of `hidden_at`."""
    images = None
    if batch.images is not None:
        of_row = [(batch.image_group == b).nonzero()[:, 0] for b in batch.group]
        images = model.encode_images(batch.images)[torch.cat(of_row)]
    return model.hidden_states(model.embed(batch.ids, images), pad_mask=batch.pad_mask)


def score_plain(model, batch):
    """Batch -> (N,T) log-probabilities of all real tokens by one padded forward and all logits (N,T,V): the
    oracle of `score`."""
    return token_logps(model.head(hidden_plain(model, batch)), batch.ids)


def hidden_at(model, batch, places):
    """The final hidden states of chosen tokens, what a head reads: places (N,T) bool -> (M,E), row by row.
    Equals hidden_plain(model, batch)[places], gradients included. A place must be a real token."""
    assert places.shape == batch.ids.shape, f"places {tuple(places.shape)}, ids {tuple(batch.ids.shape)}"
    assert not (places & ~batch.pad_mask).any(), "a place is padding"
    packed = pack(batch)
    if not pays(packed, model.config):
        return hidden_plain(model, batch)[places]
    attention = packed.block_mask() if batch.ids.is_cuda else TwoParts(packed)
    at = packed.at[places]  # before the model runs, for which a GPU would else have to be waited for
    embeds = model.embed(packed.ids, batch.images)  # a group's pictures stand in its prompt: once
    return model.hidden_states(embeds, positions=packed.positions, attention=attention)[0, at]


def score(model, batch):
    """Batch -> (N,T) float32 (or wider): entry [n, t] is log p(ids[n, t] | ids[n, :t]) wherever loss_mask is
    True, else 0. Equals `score_plain` there, gradients included."""
    assert not batch.loss_mask[:, 0].any(), "a row's first token is scored, but nothing stands before it"
    before = F.pad(batch.loss_mask[:, 1:], (0, 1))  # a token is predicted where the one before it stands
    scored = batch.loss_mask.flatten().nonzero()[:, 0]
    ids = batch.ids.flatten()[scored]
    logps = chunked_logps(model.head, hidden_at(model, batch, before), ids)
    return logps.new_zeros(batch.ids.numel()).index_copy(0, scored, logps).view_as(batch.ids)


def step_logits(model, batch):
    """Batch -> (N,S) logits of a RewardModel at the ends of the steps, 0 where there is none. Equals
    `step_logits_plain`, gradients included; the prompt that a group's solutions share is computed once."""
    real = batch.step_ends >= 0
    places = torch.zeros_like(batch.pad_mask)
    places[real.nonzero()[:, 0], batch.step_ends[real]] = True
    logits = model.head(hidden_at(model, batch, places))
    return logits.new_zeros(real.shape).masked_scatter(real, logits)  # both row by row, steps in order


def step_logits_plain(model, batch):
    """The oracle of `step_logits`: one padded forward, a logit for every token, from which it picks."""
    logits = model.head(hidden_plain(model, batch))
    return logits.gather(1, batch.step_ends.clamp(min=0)).masked_fill(batch.step_ends < 0, 0.0)


def chunked_logps(head, hidden, ids):
    """log p(ids[m]) under head(hidden[m]), (M,E) and (M,) -> (M,), holding at most CHUNK logits: a chunk's
    are computed again in backward. Plain twin: token_logps(head(hidden), ...)."""

    logps = lambda hidden, ids: PickedLogps.apply(head(hidden), ids)
    rows = max(1, CHUNK // head(hidden[:0]).shape[-1])
    if len(ids) <= rows:
        return logps(hidden, ids)
    return torch.cat(
        [checkpoint(logps, *part, use_reentrant=False) for part in zip(hidden.split(rows), ids.split(rows))]
    )


class PickedLogps(torch.autograd.Function):
    """log_softmax(logits)[m, ids[m]] in float32 or wider, (M,V) and (M,) -> (M,).

        d logp_m / d logit_mv = [v = ids_m] - p_mv

    is written over the log-probabilities, so that backward makes no second table (M,V). It works once: a
    second backward through the same forward is autograd's error about a tensor that was changed in place."""

    @staticmethod
    def forward(ctx, logits, ids):
        logps = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.save_for_backward(logps, ids)
        ctx.dtype = logits.dtype
        return logps.gather(-1, ids[:, None])[:, 0]

    @staticmethod
    def backward(ctx, above):
        logps, ids = ctx.saved_tensors
        gradient = logps.exp_().mul_(-above[:, None]).scatter_add_(-1, ids[:, None], above[:, None])
        return gradient.to(ctx.dtype), None


# ---- packing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """B groups as one row of L tokens: each group's shared prompt, then what is left of each of its rows."""

    ids: torch.Tensor  # (1,L)
    positions: torch.Tensor  # (1,L) within a row's own text
    group: torch.Tensor  # (L,) which group a token belongs to
    row: torch.Tensor  # (L,) which row; -1 = the prompt that the group's rows share
    at: torch.Tensor  # (N,T) where each token of a row stands, -1 for padding
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
        """`visible` as FlexAttention takes it: for every block of BLOCK queries the blocks of keys that it
        sees whole and those that it sees in part. Equals create_block_mask, which makes the (L,L) mask; here
        at most max(MASK, BLOCK * L) entries of it are in memory at once."""
        visible, L, in_part, whole = self.visible(), len(self.row), [], []
        keys = torch.arange(L, device=self.row.device)
        for queries in keys.split(BLOCK * max(1, MASK // (BLOCK * L))):
            seen = F.pad(
                visible(None, None, queries[:, None], keys), (0, -L % BLOCK, 0, -len(queries) % BLOCK)
            )
            seen = seen.view(-1, BLOCK, seen.shape[1] // BLOCK, BLOCK)
            whole.append(seen.all(3).all(1))
            in_part.append(seen.any(3).any(1) & ~whole[-1])
        return BlockMask.from_kv_blocks(
            *numbered(torch.cat(in_part)),
            *numbered(torch.cat(whole)),
            BLOCK_SIZE=BLOCK,
            mask_mod=visible,
            seq_lengths=(L, L),
        )

    def dense_mask(self):
        """`visible` as a bool mask (L,L): the oracle of `block_mask` and of TwoParts."""
        at = torch.arange(len(self.row), device=self.row.device)
        return self.visible()(None, None, at[:, None], at[None, :])


def pack(batch):
    """Batch -> Packed. What a group's rows share is their longest common beginning before any scored token;
    a group of one row shares nothing. Padding, on either side, is left out. (A group's rows have the same
    prompt, pictures included; were they to differ before a picture, embed would count too few of them.)"""
    all_ids, real, scored = (x.cpu().numpy() for x in (batch.ids, batch.pad_mask, batch.loss_mask))
    texts = [ids[mask] for ids, mask in zip(all_ids, real)]
    limits = [int(marks[mask].argmax()) for marks, mask in zip(scored, real)]  # 0: none is scored
    ids, positions, group, row, prompts, rows, end = [], [], [], [], [], {}, 0

    def put(text, first, b, n):
        nonlocal end
        ids.append(text)
        positions.append(np.arange(first, first + len(text)))
        group.append(np.full(len(text), b))
        row.append(np.full(len(text), n))
        end += len(text)
        return np.arange(end - len(text), end)

    group_of = batch.group.cpu().numpy()
    for b in range(len(batch.present)):
        members = np.flatnonzero(group_of == b).tolist()
        limit = min((limits[n] for n in members if limits[n]), default=0)
        shared = common_beginning([texts[n] for n in members], limit)
        prompts.append(put(texts[members[0]][:shared], 0, b, -1))
        for n in members:
            rows[n] = put(texts[n][shared:], shared, b, n)
    own = [rows[n] for n in range(len(texts))]
    tensor = lambda values: torch.from_numpy(values).to(batch.ids.device)
    at = np.full(all_ids.shape, -1)
    at[real] = np.concatenate([place for n in range(len(own)) for place in (prompts[group_of[n]], own[n])])
    return Packed(
        tensor(np.concatenate(ids))[None],
        tensor(np.concatenate(positions))[None],
        tensor(np.concatenate(group)),
        tensor(np.concatenate(row)),
        tensor(at),
        tensor(rectangle(prompts)),
        tensor(rectangle(own)),
        batch.group,
    )


def pays(packed, config):
    """Does packing pay? On a CPU, in multiplications of a layer:

    (NT - L) (2E (HD + KD) + 3EF)                          tokens spared, F the MLP's inner size
    + (N T^2 - B P^2 - 2N R (P + R)) HD                    attention; TwoParts masks the rows', so that no
                                                           half is spared (without prompts it is: N R^2)
    >= GATHER ((BP + NR + L) HD + 2 (BP + N (P + R)) KD)   queries to both parts and back, keys and values
       + FIXED                                             which few tokens do not earn

    On CUDA, which gathers nothing, where it spares SPARED of the tokens: FlexAttention is slower than the
    fused causal kernel that padded rows take (tests/bench says by how much).
    """
    (N, T), (B, P), R, L = packed.at.shape, packed.prompt_at.shape, packed.row_at.shape[1], len(packed.row)
    if packed.ids.is_cuda:
        return N * T - L >= SPARED * N * T
    width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    token = config.hidden_size * (2 * (width + keys) + 3 * config.intermediate_size)
    seen = B * P**2 + N * R * (2 * (P + R) if P else R)
    gathered = (B * P + N * R + L) * width + 2 * (B * P + N * (P + R)) * keys
    return (N * T - L) * token + (N * T**2 - seen) * width >= GATHER * gathered + FIXED


def common_beginning(texts, limit):
    """How many tokens all texts begin with: at most `limit`, less than any text has, 0 for a lone text."""
    if len(texts) == 1:
        return 0
    limit = min(limit, *(len(text) - 1 for text in texts))
    differ = np.any([np.not_equal(text[:limit], texts[0][:limit]) for text in texts], axis=0)
    return int(differ.argmax()) if differ.any() else limit


def rectangle(spans):
    """Arrays of places -> one row each, -1 behind their ends."""
    table = np.full((len(spans), max(map(len, spans))), -1)
    for places, span in zip(table, spans):
        places[: len(span)] = span
    return table


def numbered(blocks):
    """Blocks of keys (queries, keys) bool that each block of queries sees -> as FlexAttention lists them, of
    shapes (1,1,queries) and (1,1,queries,keys): how many they are, and their numbers, the others' behind."""
    order = blocks.int().argsort(descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


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
