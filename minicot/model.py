"""One decoder for the Llama family: Llama 1 to 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3.

A pre-norm transformer (Touvron et al., LLaMA, arXiv:2302.13971, section 2.2): RMSNorm, rotary positions,
grouped-query attention, SwiGLU. The families differ only in what ModelConfig says: where biases are, whether
query and key are normed (Qwen3), how the rotary frequencies are stretched (Llama 3.1). Modules carry Hugging
Face's names, so the keys of state_dict() are the names in a Hugging Face checkpoint and no key table is
needed.

Letters:
    N  rows of a batch             H  query heads               D  channels of a head
    T  new positions of a row      K  key/value heads           E  hidden_size
    S  keys: cached + new          G  query heads a kv head     V  vocab_size
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FEW_ROWS, WIDE, BLOCK = 64, 2**22, 1536  # head on a CPU: most rows, weights from where on, rows of a block


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary frequencies, `rope_type` "llama3"; see `rope_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What a config.json says, checked and without gaps, in Hugging Face's names (families.parse_config)."""

    model_type: str  # "llama", "mistral", "qwen2" or "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than num_attention_heads: grouped-query attention
    head_dim: int  # hidden_size / num_attention_heads, except in Qwen3 and a few others
    max_position_embeddings: int  # the context it was trained for; not enforced here
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False  # the head is the embedding, transposed
    qkv_bias: bool = False  # q_proj, k_proj, v_proj (Qwen2)
    o_bias: bool = False  # o_proj (Llama and Qwen3 with attention_bias)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every head's query and key before the rotation (Qwen3)
    initializer_range: float = 0.02  # standard deviation of random weights
    bos_token_id: int | None = None  # these three are carried for whoever reads the saved config.json
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich, arXiv:1910.07467, eq. 4).

    The kernel works in float32 whatever narrower dtype comes in, and in float64 for float64.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config: ModelConfig, device=None, dtype=torch.float32) -> torch.Tensor:
    """Radians a position for the D/2 rotated pairs: theta^(-2i/D) (Su et al., arXiv:2104.09864, eq. 15).

    Llama 3.1 stretches them to reach a longer context: wavelengths beyond original / low_freq_factor grow by
    `factor`, those below original / high_freq_factor stay, between them are blends, linear in frequency.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).to(dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    stretch = config.rope_scaling
    if stretch is None:
        return frequencies
    turns = stretch.original_max_position_embeddings * frequencies / (2 * torch.pi)  # in the old context
    keep = (turns - stretch.low_freq_factor) / (stretch.high_freq_factor - stretch.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / stretch.factor


def rope_tables(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype):
    """What `rotate` takes, twice (N,1,T,D) for positions (N,T): the cosine of every angle for both channels
    of a pair, its sine for the right one and minus that for the left; float32, or float64 where the model is.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[:, None, :, None].to(wide) * rope_frequencies(config, positions.device, wide)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (i, i + D/2) of x (N,H,T,D) by its angle, computed in the tables' dtype:

        left cos - right sin,  right cos + left sin     =     x cos + (x, its halves swapped) (-sin, sin)

    The paper pairs neighbours (2i, 2i + 1); Hugging Face checkpoints come permuted so that halves are pairs.
    """
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((right, left), dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of the positions so far, in buffers of fixed length: for generation, not for gradients.

    Every call of `hidden_states` with this cache appends its T positions to all N rows. The cache remembers
    which of them were padding, so padded prompts may be on either side and later calls need no mask.
    """

    def __init__(self, config: ModelConfig, rows: int, max_length: int, *, dtype=None, device=None):
        shape = (rows, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.real = torch.ones(rows, max_length, dtype=torch.bool, device=device)
        self.padded = False  # whether any position so far is padding; if none is, no mask needed
        self.length = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Write k and v (N,K,T,D) of one layer behind what is there; returns all S, as views (N,K,S,D)."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
        """Attention of one layer's new q (N,H,T,D) over all S positions, k and v added."""
        return attend(q, *self.update(layer, k, v), mask)

    def append_padding(self, pad_mask: torch.Tensor | None, rows: int, T: int) -> torch.Tensor | None:
        """Remember which of the next T are real; returns it for all S (N,S), or None if all are."""
        end, (N, S) = self.length + T, self.real.shape
        assert rows == N and end <= S, f"cache of {N} rows x {S} got {rows} rows x {end}"
        if pad_mask is not None:
            self.real[:, self.length : end] = pad_mask
            self.padded = self.padded or not pad_mask.all()
        return self.real[:, :end] if self.padded else None

    def select(self, rows: torch.Tensor) -> None:
        """Keep, reorder or repeat rows: row i becomes old row rows[i]; `rows` are indices or a bool mask."""
        self.real = self.real[rows]
        for layer in range(len(self.keys)):  # one at a time, so that only one layer is in memory twice
            self.keys[layer], self.values[layer] = self.keys[layer][rows], self.values[layer][rows]


def attention_mask(attention, real: torch.Tensor | None, T: int, S: int, device):
    """What each of T queries, the last of S positions, may look at: bool broadcastable to (N,1,T,S), or None.

    None stands for plain causal attention with nothing to hide (the fused kernels' fast way). `attention`:
    None (causal), a bool mask, or a BlockMask or a callable (q, k, v) -> what `attend` returns: these two are
    passed on and have to know about padding themselves.
    `real` (N,S), if given, hides padding keys from everybody. A query that then sees nothing (it is padding
    itself) sees everything, lest softmax yield NaN; nobody sees it.
    """
    if attention is not None and not isinstance(attention, torch.Tensor):
        assert real is None and T == S, "a BlockMask or callable goes with neither pad_mask nor cache"
        return attention
    if attention is None:
        if real is None and T in (1, S):
            return None
        if T == S and bool((real[:, 1:] <= real[:, :-1]).all()):
            return None  # padding on the right only: causality hides it already
        attention = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    mask = attention if real is None else attention & real[:, None, None, :]
    return mask | ~mask.any(dim=-1, keepdim=True)


@functools.cache
def compiled(function):
    """torch.compile for all sizes. A function is compiled anew for each kind of model and of batch (one row,
    many; with gradients, without; in autocast, or not): more often than PyTorch's limit of 8 allows, behind
    which it would run as it is."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


def flex_attention(fused: bool):
    """PyTorch's FlexAttention; compiled, it is a fused kernel, else a slow check of the mask (CPU)."""
    from torch.nn.attention import flex_attention as module

    return compiled(module.flex_attention) if fused else module.flex_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for q (N,H,T,D) and k, v (N,K,S,D), -> (N,H,T,D).

    Grouped-query attention: query heads gG to gG + G - 1 share kv head g (Ainslie et al., arXiv:2305.13245,
    section 2.2). `mask` comes from `attention_mask`.
    """
    N, H, T, D = q.shape
    K, S = k.shape[1:3]
    if callable(mask):
        return mask(q, k, v)
    if mask is not None and not isinstance(mask, torch.Tensor):
        return flex_attention(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=H != K)
    if T == 1:  # decoding: the G heads that share a kv head stand in as G queries, so no key is copied
        q = q.reshape(N, K, H // K, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(N, H, T, D)
    if H != K:  # not enable_gqa: with a mask, or in float32, CUDA then has no fused kernel
        k, v = (x[:, :, None].expand(N, K, H // K, S, D).reshape(N, H, S, D) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """The projections around `attend`: to heads, whose q and k are normed (Qwen3) and rotated, and back."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        E, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(E, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(E, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(E, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, E, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, cos, sin):
        """x (N,T,E) -> q (N,H,T,D), k and v (N,K,T,D)."""
        N, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(N, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(N, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def join(self, heads):
        """heads (N,H,T,D) -> (N,T,E)."""
        N, _, T, _ = heads.shape
        return self.o_proj(heads.transpose(1, 2).reshape(N, T, -1))


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(E, inner, bias=bias)
        self.up_proj = nn.Linear(E, inner, bias=bias)
        self.down_proj = nn.Linear(inner, E, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    compiled = False  # are the halves before and after attention compiled?

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x, cos, sin):
        """What stands before attention: x (N,T,E) -> q, k, v."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x, heads):
        """What stands behind it: x (N,T,E), and what each head read (N,H,T,D) -> (N,T,E)."""
        x = x + self.self_attn.join(heads)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, mask, cache=None):
        before, after = Block.before, Block.after
        if self.compiled:
            before, after = compiled(before), compiled(after)
        q, k, v = before(self, x, cos, sin)
        if cache is None:
            return after(self, x, attend(q, k, v, mask))
        return after(self, x, cache.attend(self.self_attn.layer, q, k, v, mask))


class Transformer(nn.Module):
    """The language model: ids (N,T) -> logits (N,T,V), logits[:, t] being about ids[:, t + 1].

    Weights are drawn from `generator` (or the global one); built under `torch.device("meta")` it has none.
    """

    checkpoint_activations = False  # keep the layers' inputs alone; backward computes the rest again

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # so that nn.Linear draws nothing from the global generator
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                    "layers": nn.ModuleList(
                        Block(config, layer) for layer in range(config.num_hidden_layers)
                    ),
                    "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
                }
            )
            tied, shape = config.tie_word_embeddings, (config.hidden_size, config.vocab_size)
            self.lm_head = None if tied else nn.Linear(*shape, bias=False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, initializer_range^2), biases 0, norms 1: Hugging Face's scheme."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    @torch.no_grad()
    def grow_vocabulary(self, vocab_size: int) -> None:
        """Add rows for new tokens; they start as the mean of the old ones (Hewitt 2021)."""
        self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        tables = {"embed_tokens": self.model} | ({} if self.lm_head is None else {"lm_head": self._modules})
        for name, modules in tables.items():
            old = modules[name].weight
            new = old.mean(0, keepdim=True).expand(vocab_size - len(old), -1)
            modules[name].weight = nn.Parameter(torch.cat([old, new]))

    def embed(self, ids: torch.Tensor, images=None) -> torch.Tensor:
        """ids (N,T) -> (N,T,E). A text model sees no images."""
        assert images is None, f"a {self.config.model_type} model reads text only, but images were given"
        return self.model.embed_tokens(ids)

    def hidden_states(self, embeds, *, pad_mask=None, positions=None, attention=None, cache=None):
        """embeds (N,T,E) -> what the head reads, after the final norm (N,T,E).

        pad_mask (N,T): True = a real token. Padding may be on either side, is seen by nobody, and its own
            outputs mean nothing. Leaving right padding's mask out gives the same outputs.
        positions (N,T) or (1,T): default, the number of real tokens before.
        attention: None = causal, else see `attention_mask`.
        cache: a KVCache; pad_mask and positions are then those of the T new positions only.
        """
        N, T, _ = embeds.shape
        past = cache.length if cache is not None else 0
        real = pad_mask if cache is None else cache.append_padding(pad_mask, N, T)
        if positions is None and real is None:
            positions = torch.arange(past, past + T, device=embeds.device)[None]
        elif positions is None:
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        cos, sin = rope_tables(self.config, positions, embeds.dtype)
        mask = attention_mask(attention, real, T, past + T, embeds.device)
        x = embeds
        again = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        for block in self.model.layers:
            rest = (cos, sin, mask, cache)
            x = checkpoint(block, x, *rest, use_reentrant=False) if again else block(x, *rest)
        if cache is not None:
            cache.length += T
        return self.model.norm(x)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (...,E) -> logits (...,V). On a CPU a few rows meet a wide matrix a block of it at a time.
        At once, 32 rows, V = 49,152 and E = 576 take 1.3 times as long (two threads)."""
        weight = (self.lm_head or self.model.embed_tokens).weight
        few = 1 < hidden.shape[:-1].numel() <= FEW_ROWS and weight.numel() > WIDE
        if few and hidden.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([F.linear(hidden, block) for block in weight.split(BLOCK)], -1)
        return F.linear(hidden, weight)

    def forward(self, ids, images=None, pad_mask=None):
        """ids (N,T) -> logits (N,T,V)."""
        return self.head(self.hidden_states(self.embed(ids, images), pad_mask=pad_mask))


class RewardModel(nn.Module):
    """A model with a scalar head in the place of its lm_head: ids (N,T) -> (N,T), one logit a position, the
    sigmoid of which is the chance that all is right up to there.

    backbone: a Transformer or a VisionLanguageModel, which gives up its parts, uncopied and under their own
        names, and its lm_head altogether. kind: "prm" (read at the end of each step) or "orm" (at the end of
        the response). The head's weights come from `generator` as in `reset_parameters`, its bias is 0.
    URSA's has a dropout of 0.1 before the head, in training; this has none, as nothing here has.
    """

    def __init__(self, backbone: nn.Module, kind: str, generator: torch.Generator | None = None):
        super().__init__()
        self.kind = kind
        getattr(backbone, "language_model", backbone).lm_head = None
        for name, part in backbone.named_children():
            setattr(self, name, part)
        for name in ("config", "vlm_config", "embed", "encode_images", "hidden_states"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        like, E = next(backbone.parameters()), self.config.hidden_size
        self.score = nn.utils.skip_init(nn.Linear, E, 1, device=like.device, dtype=like.dtype)
        with torch.no_grad():  # drawn on the CPU: the same on every device
            drawn = torch.empty(1, E).normal_(0.0, self.config.initializer_range, generator=generator)
            self.score.weight.copy_(drawn)
            self.score.bias.zero_()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (...,E) -> logits (...)."""
        return self.score(hidden).squeeze(-1)

    def forward(self, ids, images=None, pad_mask=None):
        """ids (N,T) -> logits (N,T)."""
        return self.head(self.hidden_states(self.embed(ids, images), pad_mask=pad_mask))
