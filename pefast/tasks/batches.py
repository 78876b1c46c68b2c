"""Rows through a model in batches of like length, answers in the rows' own order.

Each row may compute with an adapter of its own.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pefast.model import route

# a base model's folder is data: no pickle of it is read and no code of it is run
SAFE = {"use_safetensors": True, "trust_remote_code": False}
# an adapter's name for each row (None: the base model), or None where the active one computes
Adapters = Sequence[str | None] | None


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices of rows, the shortest first, in groups of at most `batch`."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def routed(model: nn.Module, adapters: Adapters, chosen: Sequence[int]):
    """The context in which a batch of the rows `chosen` computes."""
    return contextlib.nullcontext() if adapters is None else route(model, [adapters[i] for i in chosen])


def each(value: int | Sequence[int], rows: Sequence) -> list[int]:
    """A number for each row, where one was given for all of them."""
    return [value] * len(rows) if isinstance(value, int) else list(value)


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[dict],
    take: Callable[[object, int, int], object],
    batch: int = 64,
    adapters: Adapters = None,
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
        with routed(model, adapters, chosen):
            output = model(**inputs)
        for place, index in enumerate(chosen):
            found[index] = take(output, place, index)
    model.train(was_training)
    return found


def rows_of(encoded) -> list[dict]:
    """A tokenizer's columns as one dictionary a row."""
    columns = {key: encoded[key] for key in encoded}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def text_tokens(
    rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | Sequence[int]
) -> list[dict]:
    """Token ids of each row's text, and of its pair where it has one, cut at `max_length`."""
    found: list[dict] = [{}] * len(rows)
    alike: dict[tuple[int, bool], list[int]] = {}
    for index, longest in enumerate(each(max_length, rows)):
        alike.setdefault((longest, "pair" in rows[index]), []).append(index)
    for (longest, paired), chosen in alike.items():
        texts = [[str(rows[i][role]) for i in chosen] for role in ("text", "pair")[: 1 + paired]]
        encoded = rows_of(tokenizer(*texts, truncation=True, max_length=longest))
        for index, tokens in zip(chosen, encoded, strict=True):
            found[index] = tokens
    return found
