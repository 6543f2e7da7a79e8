"""Generation with a KV cache that n samples share, and K graded responses a problem.

Each sample draws its tokens by inverting the cumulative distribution at uniform numbers of its own, u_1, u_2,
..., which depend on its seed alone: what else is in the batch changes nothing but rounding.

Letters: B prompts at work (slots), n samples a prompt, R = B * n rows, P prompt tokens, S own tokens of a
row, V vocabulary; H query heads, K key/value heads, G = H / K, D channels of a head.
"""

from functools import partial

import numpy as np
import torch

from minicot.data import grade_answers, prompt_text, seed_of
from minicot.errors import InputError
from minicot.model import KVCache, attend, compiled
from minicot.parallel import spread
from minicot.records import Response, Samples

BLOCK = 64  # CUDA: the keys that a step reads are rounded up to it times a power of two
PIECE = 2048  # CPU: tokens of prompts that are computed at a time
GRAPHS = True  # CUDA: decode by CUDA graphs


def filter_logits(logits, top_k, top_p):
    """Set to -inf what top-k and top-p (nucleus, Holtzman et al. 2020) leave out; (R,V) -> (R,V).

    top-k keeps the k likeliest (ties with the k-th stay in); top-p keeps the smallest set of likeliest tokens
    whose probability reaches top_p, and always the likeliest."""
    if top_k and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def choose(logits, uniforms, temperature, top_k, top_p):
    """Next token of each row, on the CPU: the likeliest at temperature 0, else the first whose cumulative
    probability exceeds u. ValueError where a row has no finite logit or a NaN."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature:
        if temperature != 1:  # softmax takes the largest off itself
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        cumulative = filter_logits(logits, top_k, top_p).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]  # finite where the largest logit is
        u = uniforms.to(cumulative)[:, None] * total
        u = torch.minimum(u, total.nextafter(torch.zeros_like(total)))  # u may have rounded up to the total
        sound, chosen = total[:, 0], torch.searchsorted(cumulative, u, right=True)[:, 0]
    else:
        sound, chosen = logits.max(-1)
    chosen = torch.where(sound.isfinite(), chosen, -1).cpu()  # the one time that a step waits for a GPU
    if (chosen < 0).any():
        raise InputError("the model's logits are not finite; its weights are broken or have diverged")
    return chosen


class DecodeCache:
    """Keys and values of sequences that are continued token by token: n rows for each of `slots` prompts.

    With n = 1 a row's buffer holds its prompt and what came after. With n > 1 the n rows of a slot read one
    copy of the prompt, as in Hydragen (arXiv 2402.05099): on long prompts decoding is reading keys. Both
    parts' scores go through one softmax. Twin: KVCache with the prompt copied n times. Slots are refilled."""

    def __init__(self, config, slots, n, max_prompt, max_new, *, dtype, device, block=1, fused=False):
        make = lambda rows, length: KVCache(config, rows, length, dtype=dtype, device=device)
        self.n, self.length, self.dtype, self.block = n, 0, dtype, block
        self.two_parts = compiled(two_parts) if fused else two_parts
        self.prompts = make(slots, max_prompt) if n > 1 else None
        self.own = make(slots * n, max_new + (max_prompt if n == 1 else 0))
        for cache in (self.own, self.prompts) if n > 1 else (self.own,):
            for buffer in (*cache.keys, *cache.values):
                buffer.zero_()  # masked, but 0 * NaN would not be 0
        self.prompt_length = torch.zeros(slots, dtype=torch.long, device=device)
        self.own_length = torch.zeros(slots * n, dtype=torch.long, device=device)
        self.lengths = np.zeros(slots, int), np.zeros(slots * n, int)  # the same two on the host

    def rows_of(self, slots):
        """The rows of slots, both arrays."""
        return (slots[:, None] * self.n + np.arange(self.n)).flatten()

    def admit(self, slots, prefill, lengths):
        """Put prefilled prompts (right-padded rows of a KVCache) of these lengths into slots; arrays both."""
        cache, P, rows = self.prompts or self.own, prefill.length, self.rows_of(slots)
        self.lengths[0][slots], self.lengths[1][rows] = lengths, 0 if self.prompts else lengths
        slots, rows, lengths = (
            torch.from_numpy(x).to(self.own_length.device) for x in (slots, rows, lengths)
        )
        for layer in range(len(cache.keys)):
            cache.keys[layer][slots, :, :P] = prefill.keys[layer][:, :, :P]
            cache.values[layer][slots, :, :P] = prefill.values[layer][:, :, :P]
        self.prompt_length[slots] = lengths
        self.own_length[rows] = 0 if self.prompts else lengths

    def select(self, slots):
        """Keep these slots (an array) only."""
        rows = self.rows_of(slots)
        self.lengths = self.lengths[0][slots], self.lengths[1][rows]
        slots, rows = (torch.from_numpy(x).to(self.own_length.device) for x in (slots, rows))
        self.own.select(rows)
        if self.prompts:
            self.prompts.select(slots)
        self.prompt_length, self.own_length = self.prompt_length[slots], self.own_length[rows]

    def plan(self, live):
        """Before each step, on the host: how much of the buffers the rows at work (an array of bool) read,
        rounded up to `block` times a power of two (block 1: exact), and whether all of them read all of it
        (no mask is needed then), of their own tokens and of prompts. A step's shapes depend on it alone."""
        found = []
        for cache, lengths in (
            (self.own, self.lengths[1][live] + 1),
            (self.prompts, self.lengths[0][live.reshape(-1, self.n).any(1)]),
        ):
            longest = int(lengths.max()) if cache else 0
            end = longest if self.block == 1 else self.block << (-(-longest // self.block) - 1).bit_length()
            end = min(end, cache.real.shape[1]) if cache else 0
            found.append((end, self.block == 1 and end == int(lengths.min())))
        self.lengths[1][live] += 1
        self.reads = *found[0], *found[1]

    def begin(self, live):
        """A planned step of one token a row: its positions (R,1); rows that are not live stay where they
        are. live (R,) bool, on the device."""
        S, whole, P, whole_prompt = self.reads
        places = lambda length: torch.arange(length, device=live.device)
        self.rows, self.at = places(len(live)), self.own_length.clone()
        self.own_seen = None if whole else (places(S) <= self.at[:, None])[:, None, None]  # (R,1,1,S)
        self.prompt_seen, before = None, 0
        if self.prompts:
            before = self.prompt_length.repeat_interleave(self.n)
            if not whole_prompt:
                self.prompt_seen = (places(P) < self.prompt_length[:, None])[:, None, None]  # (B,1,1,P)
        self.own_length += live
        return (before + self.at)[:, None]

    def append_padding(self, pad_mask, rows, T):
        assert pad_mask is None and T == 1 and rows == len(self.own_length), f"{rows} rows x {T}"

    def attend(self, layer, q, k, v, mask):
        """q (R,H,1,D), k, v (R,K,1,D) -> (R,H,1,D)."""
        S, _, P, _ = self.reads
        self.own.keys[layer][self.rows, :, self.at] = k[:, :, 0]
        self.own.values[layer][self.rows, :, self.at] = v[:, :, 0]
        keys, values = self.own.keys[layer][:, :, :S], self.own.values[layer][:, :, :S]
        if not self.prompts:
            return attend(q, keys, values, self.own_seen)
        prompt = (cache[layer][:, :, :P] for cache in (self.prompts.keys, self.prompts.values))
        return self.two_parts(q, keys, values, self.own_seen, *prompt, self.prompt_seen)


def two_parts(q, keys, values, seen, prompt_keys, prompt_values, prompt_seen):
    """A step's attention of R = B n rows to B prompts and to their own tokens, by one softmax.

    q (R,H,1,D), keys and values (R,K,S,D) and (B,K,P,D), seen (R,1,1,S) and (B,1,1,P), None = all of it ->
    (R,H,1,D)."""
    (R, H, _, D), (B, K, P, _) = q.shape, prompt_keys.shape
    n, G = R // B, H // K
    hide = lambda scores, seen: scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    of_slots = lambda x: x.view(B, n, K, G, -1).transpose(1, 2).reshape(B, K, n * G, -1)
    of_rows = lambda x: x.view(B, K, n, G, -1).transpose(1, 2).reshape(R, K, G, -1)
    q = q.view(R, K, G, D) * D**-0.5
    to_own = hide(q @ keys.transpose(2, 3), seen)  # (R,K,G,S)
    to_prompt = of_rows(hide(of_slots(q) @ prompt_keys.transpose(2, 3), prompt_seen))  # (R,K,G,P)
    weights = torch.cat([to_prompt, to_own], -1).softmax(-1)
    from_prompt = of_rows(of_slots(weights[..., :P]) @ prompt_values)
    return (from_prompt + weights[..., P:] @ values).reshape(R, H, 1, D)


def decode(model, cache, tokens, live):
    """A planned step: tokens (R,) and live (R,) bool, on the device -> (R,E), what the head reads. No value
    comes back to the host, and all shapes depend on the plan alone."""
    embeds = getattr(model, "language_model", model).embed(tokens[:, None])
    return model.hidden_states(embeds, positions=cache.begin(live), cache=cache)[:, 0]


class Graphs:
    """decode() of a cache as CUDA graphs, one for each plan: a step's kernels, recorded once, are launched at
    once on the same addresses. After the cache's `select` its buffers are others: make new ones."""

    def __init__(self, model, cache):
        self.decode, self.reads = partial(decode, model, cache), lambda: cache.reads
        self.made, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, tokens, live):
        if self.reads() not in self.made:
            self.made[self.reads()] = self.record(tokens, live)
        graph, inputs, hidden = self.made[self.reads()]
        for mine, given in zip(inputs, (tokens, live)):
            mine.copy_(given)
        graph.replay()
        return hidden

    def record(self, tokens, live):
        inputs, stream = (tokens.clone(), torch.zeros_like(live)), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as no row is live, this leaves the cache as it is
            self.decode(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self.decode(*inputs)
        return graph, inputs, hidden


@torch.no_grad()
def generate(
    model,
    prompts,
    *,
    n=1,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids,
    seed,
    images=None,
    max_rows=0,
):
    """Sample n continuations of each prompt (lists of token ids).

    Returns [prompt][sample] -> new ids, the stop id included where one came. temperature 0 is greedy. seed: a
    list holds one seed a prompt (its samples then depend on nothing else; sample j has the same stream
    whatever n is), an int s stands for s, s + 1, .... images: a list of pixel tensors (C,H,W) a prompt, which
    carries n placeholders for each. At most max_rows sequences (0: all) run at once; the next prompts take
    the place of finished ones. A prompt, or equal ones in a row, is computed once. ValueError: an empty
    prompt, no room in the context."""
    if not prompts or not all(prompts):
        raise ValueError(
            f"prompts: {len(prompts)} given, of lengths {[len(p) for p in prompts][:8]}; each needs a token"
        )
    if max_new_tokens < 1 or n < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"n {n}, max_new_tokens {max_new_tokens}, temperature {temperature}, "
            f"top_k {top_k}, top_p {top_p}; "
            "allowed: n >= 1, max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1"
        )
    seeds = list(range(seed, seed + len(prompts))) if isinstance(seed, int) else seed
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; one a prompt is needed")
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {context}"
        )

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    if torch.is_autocast_enabled(device.type):  # keys and values come in its dtype
        dtype = torch.get_autocast_dtype(device.type)
    slots = min(len(prompts), max(1, max_rows // n)) if max_rows else len(prompts)
    graphs = GRAPHS and device.type == "cuda"
    fused = getattr(model, "language_model", model).model.layers[0].compiled
    room = dict(dtype=dtype, device=device, block=BLOCK if graphs else 1, fused=fused)
    cache = DecodeCache(model.config, slots, n, longest, max_new_tokens, **room)
    make_step = lambda: Graphs(model, cache) if graphs else partial(decode, model, cache)
    step = make_step()
    placeholder = model.vlm_config.image_token_id if hasattr(model, "vlm_config") else -1
    ends = np.zeros(max(model.config.vocab_size, *stop_ids, 0) + 1, bool)  # is a token a stop id?
    ends[list(stop_ids)] = True
    waiting, responses = list(range(len(prompts)))[::-1], [[[]] * n for _ in prompts]
    owner, live = np.zeros(slots, int), np.zeros(slots * n, bool)  # a slot's prompt; rows at work
    drawn, count = np.zeros((slots * n, max_new_tokens), int), np.zeros(slots * n, int)  # a row's tokens
    uniforms = np.zeros((slots * n, max_new_tokens))
    on_device = lambda array: torch.from_numpy(array).to(device)

    def advance(rows, logits):
        """Choose the next token of these rows (an array), note it, and note who is done."""
        at = count[rows]
        if 0 <= placeholder < logits.shape[-1]:
            logits[:, placeholder] = -torch.inf  # no model draws a picture
        u = on_device(uniforms[rows, at]) if temperature else None
        drawn[rows, at] = chosen = choose(logits, u, temperature, top_k, top_p).numpy()
        count[rows] += 1
        live[rows] = going = ~ends[chosen] & (at + 1 < max_new_tokens)
        for row in rows[~going].tolist():
            responses[owner[row // n]][row % n] = drawn[row, : count[row]].tolist()

    while True:
        busy = live.reshape(-1, n).any(1)
        free = (~busy).nonzero()[0]
        if waiting and 4 * len(free) >= len(owner):
            free = free[: len(waiting)]
            owner[free] = new = [waiting.pop() for _ in free]
            rows = cache.rows_of(free)
            uniforms[rows] = [
                np.random.default_rng([seeds[b], j]).random(max_new_tokens) for b in new for j in range(n)
            ]
            count[rows] = 0
            pictures = [images[b] if images else [] for b in new]
            logits = prefill(model, cache, free, [prompts[b] for b in new], pictures)
            advance(rows, logits.repeat_interleave(n, 0))
            continue
        if not busy.any():
            return responses
        if not waiting and 4 * len(free) >= len(owner):
            left = busy.nonzero()[0]
            rows = cache.rows_of(left)
            cache.select(left)
            step, owner = make_step(), owner[left]
            live, drawn, count, uniforms = live[rows], drawn[rows], count[rows], uniforms[rows]
        cache.plan(live)
        hidden = step(on_device(drawn[np.arange(len(live)), count - 1]), on_device(live))
        rows = live.nonzero()[0]
        advance(rows, model.head(hidden if len(rows) == len(live) else hidden[on_device(rows)]))


def prefill(model, cache, slots, prompts, images):
    """Compute prompts, equal ones once, put them into slots (an array) of the DecodeCache -> logits
    (len(prompts),V) after their last tokens. Padding is on the right: nothing needs to hide it. A CPU takes
    about PIECE tokens at a time, whose activations stay in its cache."""
    device, last = cache.own_length.device, []
    keys = [(tuple(prompt), tuple(map(id, pictures))) for prompt, pictures in zip(prompts, images)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    unique = sorted(first.values())
    of = np.array([unique.index(first[key]) for key in keys])
    piece = max(1, PIECE // max(map(len, prompts))) if device.type == "cpu" else len(unique)
    for start in range(0, len(unique), piece):
        part = unique[start : start + piece]
        lengths = np.array([len(prompts[i]) for i in part])
        P = int(lengths.max())
        ids = torch.tensor([[*prompts[i], *[0] * (P - len(prompts[i]))] for i in part], device=device)
        pixels = [picture for i in part for picture in images[i]]
        embeds = model.embed(ids, torch.stack(pixels).to(device)) if pixels else model.embed(ids)
        computed = KVCache(model.config, len(part), P, dtype=cache.dtype, device=device)
        hidden = model.hidden_states(embeds, cache=computed)
        last += [hidden[torch.arange(len(part), device=device), torch.from_numpy(lengths - 1).to(device)]]
        takers = ((start <= of) & (of < start + piece)).nonzero()[0]
        if len(takers) > len(part):
            computed.select(torch.from_numpy(of[takers] - start).to(device))
        cache.admit(slots[takers], computed, lengths[of[takers] - start])
    return model.head(torch.cat(last))[torch.from_numpy(of).to(device)]


def encode_prompts(model, tokenizer, problems, *, mode, max_new_tokens, reader=None, begun=None):
    """Prompts as generate takes them, pictures' placeholders expanded: a list of ids a problem. `begun`: for
    each problem the beginning of a response, which goes on from there. InputError where one does not fit into
    the context, with max_new_tokens behind it, or a picture cannot be seen."""
    context, prompts = model.config.max_position_embeddings, []
    for problem, beginning in zip(problems, begun or [""] * len(problems), strict=True):
        prompt = tokenizer.encode(prompt_text(tokenizer, problem, mode) + beginning)
        if reader is not None:
            prompt = reader.expand(prompt, problem.id, len(problem.images))
        elif problem.images:
            raise InputError(f"problem {problem.id!r} has a picture, but the model reads text only")
        if not 0 < len(prompt) <= context - max_new_tokens:
            raise InputError(
                f"problem {problem.id!r}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones "
                f"do not fit into the context of {context}; allowed: a prompt of one token or more"
            )
        prompts.append(prompt)
    return prompts


def sample_groups(
    model,
    tokenizer,
    problems,
    *,
    n,
    mode,
    style,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    batch_size=64,
    grade=None,
    reader=None,
):
    """Yield Samples, n graded responses a problem, in the order of the problems, about batch_size sequences
    at a time. Each problem's seed comes from `seed` and its id, so the samples don't depend on the other
    problems. `reader` (data.image_reader) reads pictures; a problem whose picture can't be read is yielded
    without responses, its `error` saying why. It works while it is iterated: an autocast must be on then.
    With torchrun the ranks share the problems, and each is yielded all Samples.

    grade: a grader, which gets a list of Samples with ungraded responses and returns them graded, in order;
    it replaces the one by final answers of `style` (data.grade_answers)."""
    grade = grade or partial(grade_answers, mode=mode, style=style)
    window = 8 * max(1, batch_size // n)  # results come a window at a time
    room = dict(mode=mode, max_new_tokens=max_new_tokens, reader=reader)
    all_prompts = encode_prompts(model, tokenizer, problems, **room)

    def sample_part(part):
        """The same of some of the problems, by number."""
        images, unread, drawn = {}, {}, []
        for i in part:
            try:
                images[i] = reader.pixels(problems[i].images) if reader else []
            except (InputError, OSError) as error:
                unread[i] = Samples(problems[i], error=str(error))
        order = sorted(images, key=lambda i: len(all_prompts[i]))  # like lengths are prefilled together
        if order:
            drawn = generate(
                model,
                [all_prompts[i] for i in order],
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_ids=tokenizer.stop_ids,
                seed=[seed_of(seed, problems[i].id) for i in order],
                images=[images[i] for i in order],
                max_rows=batch_size,
            )
        responses = {i: [respond(tokenizer, ids) for ids in rows] for i, rows in zip(order, drawn)}
        graded = grade([Samples(problems[i], responses[i]) for i in sorted(order)])
        assert len(graded) == len(order), f"the grader made {len(graded)} Samples of {len(order)}"
        samples_of = unread | dict(zip(sorted(order), graded))
        yield from (samples_of[i] for i in part)

    def in_windows(part):
        for start in range(0, len(part), window):
            yield from sample_part(part[start : start + window])

    yield from spread(in_windows, range(len(problems)), window)


def respond(tokenizer, ids):
    """Sampled ids -> a Response without a grade."""
    finish = "stop" if ids[-1] in tokenizer.stop_ids else "length"
    return Response(tokenizer.decode(ids), finish=finish, ids=ids)


def model_chat(model, tokenizer, *, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """A model as a chat, messages -> text (see chat.py): the same messages get the same reply. Threads would
    only wait for each other: many(..., limit=1). InputError: a picture, no room in the context."""
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)

    def chat(messages):
        if not all(isinstance(message["content"], str) for message in messages):
            raise InputError("a message holds a picture; allowed: text, which is all that model_chat reads")
        text = tokenizer.chat_prompt(messages)
        prompt, seeds = tokenizer.encode(text), [seed_of(seed, text)]
        replies = generate(model, [prompt], stop_ids=tokenizer.stop_ids, seed=seeds, **options)
        return respond(tokenizer, replies[0][0]).text

    return chat
