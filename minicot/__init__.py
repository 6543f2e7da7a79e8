"""minicot: chain-of-thought alignment, from scratch and in the open.

Read in this order:

    losses.py      every loss, pure functions of tensors: what the papers are about
    model.py       the decoder that the losses train (Llama, Mistral, Qwen)
    vision.py      a CLIP or SigLIP encoder and a projector, with which the decoder reads pictures (LLaVA)
    families.py    config.json of a model family <-> what model.py and vision.py are built from
    weights.py     Hugging Face folders in and out
    tokenizer.py   text <-> ids, and the chat template
    answers.py     what the answer of a response is, and whether it is right
    images.py      picture files -> pixels
    toy/           a small world of problems, told and drawn, whose truth is known
    records.py     problems, responses and samples, and their JSON lines
    sets.py        published sets, as they are published
    data.py        rows of token ids, batches of tensors, pairs and groups
    scoring.py     log-probabilities of a batch, shared prompts computed once
    sampling.py    new responses, graded
    chat.py        a server's model, asked: cache, retries, many requests at a time
    synthesis.py   solutions by a teacher, step labels by rollouts
    mme_cot/       MME-CoT: a cache of what judges say of a model's chains, scored as the official scripts do
    verifier.py    judging responses, by a DPO or a reward model, and choosing: best-of-n, weighted vote
    selection.py   worked examples before a question: retrieved, and fitted into a budget of tokens
    pruner.py      CoT-Influx: learn which examples and which of their tokens to keep; its loop stands there
    metrics.py     accuracies with intervals
    view.py        a page to read chains in, of the template view.html
    training.py    what a training loop needs besides the loop, which stands in train.py
    runs.py        the run folder: whole files, a lock, signals, checkpoints
    rewards.py     what a response is worth to GRPO: its outcome, and what a PRM thinks of its steps
    rollouts.py    a step's groups: given samples, or drawn from the policy
    evaluation.py  held-out problems, before and after
"""
