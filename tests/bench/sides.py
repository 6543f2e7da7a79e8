"""The sides of a race: models, batches, and what each side computes in one training step.

    minicot        score(): shared prompts, packing, logits of scored tokens only
    padded         score_padded() below: what score() does, without sharing prompts and packing
    plain          score_plain(): one padded forward, all logits
    transformers   Llama or Llava, one padded forward, all logits; its own loss for SFT, else ours
    TRL            DPOTrainer.compute_loss, reference log-probabilities precomputed; GRPOTrainer
    policy step    pruner.py: repeats in one batch, a shot encoded once; naive: one prompt at a time
    PRM scoring    step_logits(): the shared prompt once; padded: step_logits_plain(), one padded forward

All have the same weights and the same batch on the device, and a step is forward + backward: no optimizer.
A GRPO step is whole, as in align.py: responses drawn, scored, learnt from, AdamW.
B groups   K responses a group   N = B K rows   T tokens   P, R tokens of a prompt and a response
"""

import copy
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from minicot.data import Row, collate, to_groups
from minicot.losses import aft_loss, better_than, dpo_loss, group_advantages, grpo_loss, sequence_logps
from minicot.losses import sft_loss, token_logps
from minicot.pruner import Pruner, judge_by, leave_one_out, log_policy, look, reward, rollout, sample_actions
from minicot.records import shot_text
from minicot.model import ModelConfig, RewardModel, Transformer
from minicot.sampling import generate
from minicot.selection import Encoder, size_by, texts_of
from minicot.scoring import chunked_logps, score, score_plain, step_logits, step_logits_plain
from minicot.sets import read_problems
from minicot.tokenizer import Tokenizer
from minicot.training import clip_gradients, make_optimizer, resolve, set_layers
from minicot.vision import VisionConfig, VisionLanguageConfig, VisionLanguageModel
from minicot.weights import llava_name, save_model

BETA = 0.1
COMPILE = False  # minicot's layers (and those of "padded" and "plain")
COMMON = dict(
    model_type="llama",
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)
MODELS = {
    "toy 1M": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        **COMMON,
    ),
    "SmolLM2-135M, 4 layers": ModelConfig(num_hidden_layers=4, **SMOLLM2, **COMMON),
    "SmolLM2-135M": ModelConfig(num_hidden_layers=30, **SMOLLM2, **COMMON),
    "Llama 1.1B": ModelConfig(  # TinyLlama's shape
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        **COMMON | {"tie_word_embeddings": False},
    ),
    "tiny": ModelConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **COMMON,
    ),  # for the test
}
CLIP = dict(model_type="clip_vision_model", hidden_act="quick_gelu", num_channels=3, layer_norm_eps=1e-5)
SMALL = VisionConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=6,
    image_size=224,
    patch_size=16,
    **CLIP,
)
TOWERS = {
    "toy 1M": VisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        **CLIP,
    ),
    "SmolLM2-135M, 4 layers": SMALL,
    "SmolLM2-135M": SMALL,
    "tiny": VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        **CLIP,
    ),
}
WITH_TOWER = ", CLIP tower"  # "toy 1M, CLIP tower": the model with its TOWERS; 64 and 196 tokens
PLACEHOLDER = 1
MODELS |= {
    name + WITH_TOWER: VisionLanguageConfig(MODELS[name], vision, PLACEHOLDER, vision_feature_layer=-1)
    for name, vision in TOWERS.items()
}


def our_model(name, device):
    kind = VisionLanguageModel if name.endswith(WITH_TOWER) else Transformer
    model = kind(MODELS[name], torch.Generator().manual_seed(0)).to(device)
    set_layers(model, compile=COMPILE)
    return model


def their_model(ours):
    """The same weights in transformers, float32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        auto = (
            transformers.LlavaForConditionalGeneration
            if hasattr(ours, "vlm_config")
            else transformers.AutoModelForCausalLM
        )
        theirs = auto.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.to(next(ours.parameters()).device)


# ---- batches -------------------------------------------------------------------------------------


def gsm8k_lengths(N, seed=0):
    """N pairs (prompt, response with EOS) of lengths like GSM8K's training set under SmolLM2's tokenizer:
    questions of 60 +- 22 tokens (12 to 223), solutions without calculator marks of 93 +- 42 (24 to 342), both
    log-normal, their logarithms correlated by 0.5. (16 such rows, padded to the longest: 1.8x the tokens.)"""
    spread = np.array([0.35, 0.44])
    correlated = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], N)
    drawn = np.exp(np.log([60.3, 93.0]) - spread**2 / 2 + spread * correlated)
    return (drawn.clip([12, 24], [223, 342]).round().astype(int) + [0, 1]).tolist()


def make_batch(name, lengths, device):
    """Groups of random tokens: lengths says of each group its P and its responses' R; every response ends
    with token 0. Every other response is right, beginning with the first. A model that sees gets a picture a
    group, whose placeholders end the prompt, on top of its P tokens."""
    draw, groups, config = torch.Generator().manual_seed(1), [], MODELS[name]
    sees = isinstance(config, VisionLanguageConfig)
    vocabulary = config.text.vocab_size if sees else config.vocab_size
    text = lambda n: torch.randint(PLACEHOLDER + 1, vocabulary, (n,), generator=draw).tolist()
    n_image = config.image_seq_length if sees else 0
    for b, (P, responses) in enumerate(lengths):
        prompt = text(P) + [PLACEHOLDER] * n_image
        groups.append(
            [
                Row(f"{b}", [*prompt, *text(R - 1), 0], len(prompt), reward=float(k % 2 == 0))
                for k, R in enumerate(responses)
            ]
        )
    batch = collate(groups, pad_id=0)
    if sees:
        size = config.vision.image_size
        batch = replace(
            batch,
            images=torch.randn(len(groups), 3, size, size, generator=draw),
            image_group=torch.arange(len(groups)),
        )
    return batch.to(device)


# ---- losses and sides ----------------------------------------------------------------------------


def score_padded(model, batch):
    """What score() does, without sharing prompts and packing: one padded forward, the head on the positions
    before scored tokens only, in the same chunks."""
    hidden = model.hidden_states(model.embed(batch.ids), pad_mask=batch.pad_mask)
    before = F.pad(batch.loss_mask[:, 1:], (0, 1))
    logps = chunked_logps(model.head, hidden[before], batch.ids[batch.loss_mask])
    return logps.new_zeros(batch.ids.shape).masked_scatter(batch.loss_mask, logps)


def loss_of(work, logps, batch, ref_logps):
    """Token log-probabilities (N,T) -> the loss of an SFT, a DPO or a group (AFT, detached) step."""
    if work == "SFT":
        return sft_loss(logps, batch.loss_mask)
    if work == "DPO":
        sums = to_groups(sequence_logps(logps, batch.loss_mask, reduce="sum"), batch)
        return dpo_loss(sums, ref_logps, beta=BETA).mean()
    means = to_groups(sequence_logps(logps, batch.loss_mask, reduce="mean"), batch)
    return aft_loss(means, better_than(batch.rewards, batch.present)).mean()


def reference_logps(model, batch):
    """(B,K) made-up reference sums: the policy's own, shifted by -5 to 5 nats: with equal ones, the loss
    would be ln 2 whatever is computed."""
    with torch.no_grad():
        sums = to_groups(sequence_logps(score_padded(model, batch), batch.loss_mask, reduce="sum"), batch)
    return sums + torch.linspace(-5, 5, sums.numel(), device=sums.device).view_as(sums)


def make_sides(work, name, batch, names):
    """{side: (its model, a function that computes its loss)} for the sides in `names`."""
    ours = our_model(name, batch.ids.device)
    theirs = their_model(ours) if {"transformers", "TRL"} & set(names) else None
    ref_logps = reference_logps(ours, batch) if work == "DPO" else None
    inputs = dict(input_ids=batch.ids, attention_mask=batch.pad_mask.long())
    if batch.images is not None:
        inputs["pixel_values"] = batch.images[batch.group]
    labels = batch.ids.masked_fill(~batch.loss_mask, -100)
    paths = {"minicot": score, "padded": score_padded, "plain": score_plain}
    made = {}
    for side in names:
        if side in paths:
            path = paths[side]
            made[side] = ours, lambda path=path: loss_of(work, path(ours, batch), batch, ref_logps)
        elif side == "TRL":
            made[side] = trl_side(copy.deepcopy(theirs), batch, ref_logps)
        elif work == "SFT":
            made[side] = theirs, lambda: theirs(**inputs, labels=labels, use_cache=False).loss
        else:
            made[side] = (
                theirs,
                lambda: loss_of(
                    work, token_logps(theirs(**inputs, use_cache=False).logits, batch.ids), batch, ref_logps
                ),
            )
    return made


def trl_side(model, batch, ref_logps):
    """(model, loss function) of TRL's DPOTrainer, built as a user would on text (token i is the word "ti").

    The loss is its compute_loss on the batch that its collator makes once: forward, loss and the metrics that
    it logs. Gradient checkpointing, on by default, is off: nobody else here computes twice. Its precomputed
    reference log-probabilities, equal to the policy's, are overwritten with ours."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    text = lambda ids: " ".join(f"t{i}" for i in ids.tolist())
    rows = [
        {
            "prompt": text(batch.ids[n][batch.pad_mask[n] & ~batch.loss_mask[n]]) + " ",
            "chosen": text(batch.ids[n][batch.loss_mask[n]]),
            "rejected": text(batch.ids[n + 1][batch.loss_mask[n + 1]]),
        }
        for n in range(0, len(batch.ids), 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            folder,
            beta=BETA,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            max_length=None,
            bf16=False,
            use_cpu=not batch.ids.is_cuda,
            per_device_train_batch_size=len(rows),
            dataloader_pin_memory=False,
            report_to="none",
        )
        trainer = trl.DPOTrainer(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=word_tokenizer(model.config.vocab_size),
        )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    inputs |= {"ref_chosen_logps": ref_logps[:, 0], "ref_rejected_logps": ref_logps[:, 1]}
    inputs = {key: value.to(batch.ids.device) for key, value in inputs.items()}
    return trainer.model.train(), lambda: trainer.compute_loss(trainer.model, inputs)


def word_tokenizer(vocab_size):
    """transformers' tokenizer of texts like "t5 t0 t7"."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0")


# ---- scores of a PRM -----------------------------------------------------------------------------


def prm_sides(name, device, *, K, P, R, step=16):
    """{side: function that scores the steps of K solutions to one question}; a step is so many tokens long.
    Before: both have the same logits."""
    model = RewardModel(our_model(name, device), "prm", torch.Generator().manual_seed(3)).eval()
    batch = make_batch(name, [[P, [R] * K]], device)
    ends = torch.arange(P + step - 1, P + R, step, device=device).expand(K, -1)
    batch = replace(batch, step_ends=ends, step_labels=torch.ones_like(ends, dtype=torch.bool))
    ours, padded = (
        torch.no_grad()(lambda path=path: path(model, batch)) for path in (step_logits, step_logits_plain)
    )
    apart, spread = (ours() - padded()).abs().max().item(), padded().std().item()
    assert apart <= (5e-2 if device.type == "cuda" else 1e-3) * spread, f"logits {apart:.1e} apart"
    return {"minicot": ours, "padded": padded}


# ---- a step of CoT-Influx's pruner ---------------------------------------------------------------


def one_by_one(pruner, encoder, problem, repeats, seed):
    """The naive loop, the oracle of `rollout`: yields (pruned problem, its log pi) for each repeat, the shots
    encoded anew for each. The actions are those that rollout draws."""
    for r in range(repeats):
        encoder.cache.clear()
        seen = look(encoder, problem)
        z_shot, z_token = pruner(seen.states, seen.real)
        drawn = sample_actions(z_shot, z_token, repeats, torch.Generator().manual_seed(seed))
        shots, tokens = (actions[r : r + 1] for actions in drawn)
        keep = (shots[:, :, None] & (tokens | ~seen.free) & seen.real)[0].tolist()
        pruned = replace(problem, shots=texts_of(seen.ids, keep, encoder.decode))
        yield pruned, log_policy(z_shot, z_token, shots, tokens, seen.free)[0]


def policy_sides(name, device, *, B, R, k, new):
    """{side: function of a policy step}: R prunings of k shots before each of B toy questions, scored and
    answered by the frozen model (`new` tokens at most), REINFORCE's gradient. No shot's states are cached
    when a step begins, as in a first pass over the data. Before: both have the same rewards and gradients."""
    model, tokenizer = our_model(name, device).eval(), Tokenizer(resolve("toy"))
    rows = read_problems("toy", "train", limit=B * (k + 1))
    texts = [shot_text(row.question, row.solution) for row in rows[B:]]
    problems = [replace(row, shots=texts[b * k : b * k + k]) for b, row in enumerate(rows[:B])]
    encoder, size = Encoder(model, tokenizer), size_by(tokenizer)
    judge = judge_by(model, tokenizer, mode="plain", style="hash", max_new_tokens=new)
    pruner = Pruner(model.config.hidden_size, seed=3).to(device)
    target = sum(map(size, texts)) // (2 * B)

    def learn_from(pruned, logps, losses, correct):
        t = torch.tensor([[sum(map(size, one.shots)) for one in group] for group in pruned])
        rewards = reward(losses, correct, t, target)
        pruner.zero_grad(set_to_none=True)
        (-(leave_one_out(rewards).to(logps) * logps).mean()).backward()
        return rewards, [p.grad.clone() for p in pruner.parameters()]

    def ours():
        encoder.cache.clear()
        rolled = [rollout(pruner, encoder, one, R, b) for b, one in enumerate(problems)]
        pruned = [one.pruned for one in rolled]
        return learn_from(pruned, torch.stack([one.logps for one in rolled]), *judge(pruned))

    def naive():
        rolled = [list(one_by_one(pruner, encoder, one, R, b)) for b, one in enumerate(problems)]
        found = [[judge([[one]]) for one, _ in group] for group in rolled]
        losses, correct = (torch.stack([torch.cat([f[i][0] for f in row]) for row in found]) for i in (0, 1))
        logps = torch.stack([torch.stack([logp for _, logp in group]) for group in rolled])
        return learn_from([[one for one, _ in group] for group in rolled], logps, losses, correct)

    (our_rewards, our_gradient), (rewards, gradient) = ours(), naive()
    tolerance = 5e-2 if device.type == "cuda" else 1e-3
    apart = sum((a - b).square().sum() for a, b in zip(our_gradient, gradient)).sqrt()
    length = sum(g.square().sum() for g in gradient).sqrt()
    assert (our_rewards - rewards).abs().max() <= tolerance * rewards.abs().max(), "rewards differ"
    assert apart <= tolerance * length, f"gradients {apart / length:.1e} apart"
    return {"minicot": ours, "naive": naive}


# ---- a GRPO step ---------------------------------------------------------------------------------


def rewards_of(B, K):
    """(B,K): every other response is right, whatever stands in it, so that no group is dead."""
    return (torch.arange(B * K) % 2 == 0).double().view(B, K)


def learn(model, optimizer, groups):
    """The update of a GRPO step on groups of Rows, as align.py makes it; without an optimizer the gradients
    alone."""
    device = next(model.parameters()).device
    batch = collate(groups, pad_id=0).to(device)
    advantages = group_advantages(batch.rewards, batch.present)[batch.group, batch.slot]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logps = score(model, batch)
    grpo_loss(logps, logps.detach(), None, advantages, batch.loss_mask).mean().backward()
    if optimizer:
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def as_groups(prompts, responses):
    """Prompts and their K responses each -> groups of Rows with rewards_of."""
    rewards = rewards_of(len(prompts), len(responses[0])).tolist()
    return [
        [Row(f"{b}", [*prompt, *ids], len(prompt), reward=r) for ids, r in zip(responses[b], rewards[b])]
        for b, prompt in enumerate(prompts)
    ]


def grpo_sides(name, device, *, B, K, P, new):
    """{side: function of a whole GRPO step}: K responses of `new` tokens (none ends) to each of B prompts at
    temperature 1, rewards_of, GRPO's loss without KL, AdamW. Before: both have the same gradients on the same
    responses, TRL's."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    model = our_model(name, device)
    theirs, draw = their_model(model), torch.Generator().manual_seed(2)
    vocabulary, flat = MODELS[name].vocab_size, rewards_of(B, K).flatten().tolist()
    prompts = [torch.randint(1, vocabulary, (P,), generator=draw).tolist() for _ in range(B)]
    rows = [{"prompt": " ".join(f"t{i}" for i in prompt)} for prompt in prompts for _ in range(K)]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            folder,
            loss_type="grpo",
            num_generations=K,
            per_device_train_batch_size=B * K,
            max_completion_length=new,
            generation_kwargs={"min_new_tokens": new},
            gradient_checkpointing=False,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            report_to="none",
        )
        trainer = trl.GRPOTrainer(
            theirs,
            reward_funcs=lambda completions, **_: flat,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows[::K]),
            processing_class=word_tokenizer(vocabulary),
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    made = trainer._generate_and_score_completions(rows)
    assert made["completion_mask"].sum() == B * K * new, "a response of TRL's has ended early"
    trainer.compute_loss(trainer.model, made).backward()
    learn(model, None, as_groups(prompts, made["completion_ids"].view(B, K, new).tolist()))
    gradients = {key: p.grad for key, p in model.named_parameters()}
    apart = sum((p.grad - gradients[key]).square().sum() for key, p in theirs.named_parameters()).sqrt()
    length = sum(g.square().sum() for g in gradients.values()).sqrt()
    assert apart <= (5e-2 if device.type == "cuda" else 1e-3) * length, (
        f"gradients {apart / length:.1e} apart"
    )

    our_optimizer = make_optimizer(model, 1e-6, 0.0)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    seeds = iter(range(10**9))

    def ours():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            drawn = generate(
                model, prompts, n=K, max_new_tokens=new, stop_ids=[], seed=[next(seeds) for _ in prompts]
            )
        learn(model, our_optimizer, as_groups(prompts, drawn))

    def trls():
        trainer.training_step(trainer.model, rows, None)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)

    model.zero_grad(set_to_none=True)
    theirs.zero_grad(set_to_none=True)
    return {"minicot": ours, "TRL": trls}


def multiplications(name, K, P, R, *, shared):
    """Of a group's forward, in all: weights times tokens, the head on scored ones, and attention."""
    c = MODELS[name]
    E, width = c.hidden_size, c.num_attention_heads * c.head_dim
    layer = 2 * E * (width + c.num_key_value_heads * c.head_dim) + 3 * E * c.intermediate_size
    tokens, seen = K * (P + R), K * (P + R) ** 2 / 2
    if shared:
        tokens, seen = P + K * R, P**2 / 2 + K * (R * P + R**2 / 2)
    return c.num_hidden_layers * (tokens * layer + seen * 2 * width) + K * R * E * c.vocab_size


def step(model, loss):
    """Forward and backward, on CUDA in bfloat16 autocast as train.py and align.py do it; -> the loss."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = loss()
    value.backward()
    return value.item()


def check_same_work(sides):
    """Run a step of each side and assert that all agree with the first: the loss, and the whole gradient by
    the length of the difference. Within 1e-4 and 1e-3, relative; in bfloat16 within 1e-2 and 5e-2."""
    expected = None
    our_name = llava_name if any(hasattr(model, "vlm_config") for model, _ in sides.values()) else str
    for side, (model, loss) in sides.items():
        value = step(model, loss)
        gradient = {
            our_name(key): p.grad.clone() for key, p in model.named_parameters() if p.grad is not None
        }
        if expected is None:
            expected = value, gradient
            wide = next(iter(gradient.values())).is_cuda
            loss_tolerance, gradient_tolerance = (1e-2, 5e-2) if wide else (1e-4, 1e-3)
            length = sum(g.double().square().sum() for g in gradient.values()).sqrt()
            continue
        assert gradient.keys() == expected[1].keys(), f"{side} has other parameters"
        apart = sum((g - expected[1][key]).double().square().sum() for key, g in gradient.items()).sqrt()
        assert abs(value - expected[0]) <= loss_tolerance * abs(expected[0]), (side, value, expected[0])
        assert apart <= gradient_tolerance * length, f"{side}: gradients {apart / length:.1e} apart"
    for model, _ in sides.values():
        model.zero_grad(set_to_none=True)
