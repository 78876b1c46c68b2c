"""Rows through a model in batches of like length, answers in the rows' own order."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices of rows, the shortest first, in groups of at most `batch`."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[dict],
    take: Callable[[object, int, int], object],
    batch: int = 64,
) -> list:
    """take(the model's output, place in the batch, index of the row) for every row, in the rows' order.

    features holds what the tokenizer gave for each row, without padding. The model is in eval mode meanwhile.
    """
    was_training = model.training
    model.eval()
    found = [None] * len(features)
    for chosen in by_length([len(row["input_ids"]) for row in features], batch):
        wanted = {key: [features[index][key] for index in chosen] for key in features[chosen[0]]}
        inputs = tokenizer.pad(wanted, return_tensors="pt").to(model.device)
        output = model(**inputs)
        for place, index in enumerate(chosen):
            found[index] = take(output, place, index)
    model.train(was_training)
    return found


def rows_of(encoded) -> list[dict]:
    """A tokenizer's columns as one dictionary a row."""
    columns = {key: encoded[key] for key in encoded}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def text_tokens(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Token ids of each row's text, and of its pair where rows have one, cut at `max_length`."""
    texts = [[str(row[role]) for row in rows] for role in ("text", "pair") if rows and role in rows[0]]
    return rows_of(tokenizer(*texts, truncation=True, max_length=max_length)) if texts else []
