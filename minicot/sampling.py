"""Generation with a KV cache, and K graded responses a problem.

Each sample draws its tokens by inverting the cumulative distribution at uniform numbers of its own, u_1, u_2,
..., which depend on its seed alone: what else is in the batch changes nothing but rounding.

Letters: B prompts, n samples a prompt, R = B * n sequences, P prompt tokens, V vocabulary.
"""

import numpy as np
import torch

from minicot.data import Response, Samples, grade, prompt_text, seed_of
from minicot.model import KVCache


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
    """Next token of each row: the likeliest at temperature 0, else the first whose cumulative probability
    exceeds u. ValueError where a row has no finite logit or a NaN."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    largest, likeliest = logits.max(-1)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite; its weights are broken or have diverged")
    if temperature == 0:
        return likeliest
    logits = filter_logits((logits - largest[:, None]) / temperature, top_k, top_p)
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    u = uniforms.to(cumulative)[:, None] * total
    u = torch.minimum(u, total.nextafter(torch.zeros_like(total)))  # u may have rounded up to the total
    return torch.searchsorted(cumulative, u, right=True)[:, 0]


@torch.no_grad()
def generate(model, prompts, *, n=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids, seed):
    """Sample n continuations of each prompt (lists of token ids); one prefill serves the n samples of a
    prompt.

    Returns [prompt][sample] -> new ids, the stop id included where one came. temperature 0 is greedy. seed: a
    list holds one seed a prompt (its samples then depend on nothing else; sample j has the same stream
    whatever n is), an int s stands for s, s + 1, .... Finished sequences leave the batch. ValueError: an
    empty prompt, no room in the context."""
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
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {context}"
        )

    device, B = next(model.parameters()).device, len(prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    pad_mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    cache = KVCache(
        model.config, B, longest + max_new_tokens, device=device, dtype=next(model.parameters()).dtype
    )
    padded = not bool(pad_mask.all())
    hidden = model.hidden_states(model.embed(ids), pad_mask=pad_mask if padded else None, cache=cache)[:, -1:]
    logits = model.head(hidden)[:, -1].repeat_interleave(n, 0)
    if n > 1:
        cache.select(torch.arange(B, device=device).repeat_interleave(n))

    uniforms = (
        torch.tensor(
            np.stack([np.random.default_rng([s, j]).random(max_new_tokens) for s in seeds for j in range(n)]),
            device=device,
        )
        if temperature > 0
        else None
    )
    stop = torch.tensor(sorted(set(stop_ids)), device=device)
    responses = [[] for _ in range(B * n)]
    live = torch.arange(B * n)  # which sequence a row of the batch is
    for t in range(max_new_tokens):
        tokens = choose(
            logits, None if uniforms is None else uniforms[live.to(device), t], temperature, top_k, top_p
        )
        for row, token in zip(live.tolist(), tokens.tolist()):
            responses[row].append(token)
        going = ~torch.isin(tokens, stop)
        if t == max_new_tokens - 1 or not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            cache.select(keep)
            tokens, live = tokens[keep], live[keep.cpu()]
        logits = model.head(model.hidden_states(model.embed(tokens[:, None]), cache=cache))[:, -1]
    return [responses[b * n : (b + 1) * n] for b in range(B)]


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
    reward=None,
):
    """Yield Samples, n graded responses a problem, in the order of the problems, a batch of about batch_size
    sequences at a time. Each problem's seed comes from `seed` and its id, so the samples don't depend on the
    other problems.

    reward(problem, text) -> float, where given, sets the responses' reward; else it is their correctness."""
    per_batch = max(1, batch_size // n)
    window = 8 * per_batch  # like lengths together, without holding back results long
    context = model.config.max_position_embeddings
    all_prompts = [tokenizer.encode(prompt_text(tokenizer, problem, mode)) for problem in problems]
    for problem, prompt in zip(problems, all_prompts):
        if not 0 < len(prompt) <= context - max_new_tokens:
            raise ValueError(
                f"problem {problem.id!r}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones "
                f"do not fit into the context of {context}; allowed: a prompt of one token or more"
            )
    for start in range(0, len(problems), window):
        group = problems[start : start + window]
        prompts = all_prompts[start : start + window]
        order = sorted(range(len(group)), key=lambda i: len(prompts[i]))
        found = [None] * len(group)
        for i in range(0, len(order), per_batch):
            part = order[i : i + per_batch]
            drawn = generate(
                model,
                [prompts[j] for j in part],
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_ids=tokenizer.stop_ids,
                seed=[seed_of(seed, group[j].id) for j in part],
            )
            for j, responses in zip(part, drawn):
                found[j] = Samples(
                    group[j], [respond(tokenizer, group[j], ids, mode, style, reward) for ids in responses]
                )
        yield from found


def respond(tokenizer, problem, ids, mode, style, reward):
    """Sampled ids -> a graded Response."""
    finish = "stop" if ids[-1] in tokenizer.stop_ids else "length"
    text = tokenizer.decode(ids)
    answer, correct = grade(problem, text, mode=mode, style=style)
    return Response(
        text=text,
        correct=correct,
        finish=finish,
        ids=ids,
        answer=answer,
        reward=reward(problem, text) if reward else None,
    )
