"""score(model, batch): the log-probability of every token of every row.

The loops call this and nothing else, so they never know how it was computed. Letters: N rows, T tokens, V
vocabulary.
"""

from minicot.losses import token_logps


def score(model, batch):
    """Batch -> (N,T) float32 (or wider) log-probabilities: entry [n, t] is log p(ids[n, t] | ids[n, :t]),
    column 0 is 0.

    The plain path: the whole padded batch in one forward, logits (N,T,V) and all."""
    return token_logps(model(batch.ids, pad_mask=batch.pad_mask), batch.ids)
