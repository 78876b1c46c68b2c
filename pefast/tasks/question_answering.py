"""Extractive question answering: the span of a context that answers a question.

loss         cross entropy of the span's first and last token, averaged
exact_match  the share of answers that are a right one, word for word
f1           of the words that answer and right answer share, averaged over rows

Words are compared as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250): without case, punctuation,
articles.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedTokenizerBase

from .batches import SAFE, Adapters, answers, each
from .rows import Row

ROLES = {"question": "question", "context": "context", "label": "answer"}
METRIC = "f1"
STRATUM = None
# the longest answer that is looked for, in tokens
_LONGEST = 30


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Nothing: spans have no names. Raises ValueError for a row whose answer is not in its context."""
    for number, row in enumerate(rows, 1):
        if str(row["label"]) not in str(row["context"]):
            raise ValueError(
                f"question-answering: the answer of row {number}, {row['label']!r}, is not in its context"
            )
    return {}


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained model with a fresh head that scores every token as first and as last."""
    return AutoModelForQuestionAnswering.from_pretrained(folder, dtype=dtype, **SAFE)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """The windows of each row that hold its answer, or its first window with the span on the first token."""
    features = []
    for row in rows:
        begin = str(row["context"]).index(str(row["label"]))
        end = begin + len(str(row["label"]))
        windows = _windows(row, tokenizer, max_length)
        spans = [_span(window, begin, end) for window in windows]
        if not any(spans):
            windows, spans = windows[:1], [(0, 0)]
        for window, span in zip(windows, spans, strict=True):
            if span:
                features.append(window.inputs | {"start_positions": span[0], "end_positions": span[1]})
    return features


class _Window:
    """A piece of a row's context behind its question."""

    def __init__(self, inputs: dict, places: dict[int, tuple[int, int]]):
        self.inputs = inputs
        self.places = places  # token of the context: its first and last letter there


def _question(row: Row, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """The question, cut at `most` tokens: its context needs room."""
    text = str(row["question"])
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(places) <= most else text[: places[most - 1][1]]


def _windows(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Window]:
    encoded = tokenizer(
        _question(row, tokenizer, max_length // 2),
        str(row["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for index, offsets in enumerate(encoded["offset_mapping"]):
        sequence = encoded.sequence_ids(index)
        inputs = {key: encoded[key][index] for key in tokenizer.model_input_names if key in encoded}
        found.append(_Window(inputs, {at: place for at, place in enumerate(offsets) if sequence[at] == 1}))
    return found


def _span(window: _Window, begin: int, end: int) -> tuple[int, int] | None:
    """The tokens that cover letters begin to end, or None where the window does not hold them all."""
    inside = [at for at, (first, last) in window.places.items() if first < end and last > begin]
    if not inside or window.places[inside[0]][0] > begin or window.places[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


def collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Callable:
    """Pads each batch to its own longest window."""
    return DataCollatorWithPadding(tokenizer)


def hits(outputs, batch) -> Tensor:
    """The share of windows whose first and last token are both right."""
    first = outputs["start_logits"].argmax(-1) == batch["start_positions"]
    return (first & (outputs["end_logits"].argmax(-1) == batch["end_positions"])).float().mean()


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> tuple[str, list[str]]:
    """The whole context as the answer."""
    return "the whole context", [str(row["context"]) for row in rows]


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 384,
    batch: int = 32,
    adapters: Adapters = None,
) -> list[str]:
    """The best span of each row's context, over all its windows, as a text."""
    lengths = each(max_length, rows)
    windows = [
        (index, window)
        for index, row in enumerate(rows)
        for window in _windows(row, tokenizer, lengths[index])
    ]
    scores = answers(
        model,
        tokenizer,
        [window.inputs for _, window in windows],
        lambda output, place, index: (output.start_logits[place].float(), output.end_logits[place].float()),
        batch,
        adapters and [adapters[index] for index, _ in windows],
    )
    best = [(float("-inf"), "")] * len(rows)
    for (index, window), (starts, ends) in zip(windows, scores, strict=True):
        score, text = _best(window, starts, ends, str(rows[index]["context"]))
        if score > best[index][0]:
            best[index] = (score, text)
    return [text for _, text in best]


def _best(window: _Window, starts: Tensor, ends: Tensor, context: str) -> tuple[float, str]:
    places = sorted(window.places)
    if not places:
        return float("-inf"), ""
    low = places[0]
    both = starts[low : places[-1] + 1, None] + ends[None, low : places[-1] + 1]
    # an end before its start, or too far behind it, is no span
    allowed = torch.ones_like(both, dtype=torch.bool).triu() & ~torch.ones_like(both, dtype=torch.bool).triu(
        _LONGEST
    )
    both = both.masked_fill(~allowed, float("-inf"))
    first, last = divmod(int(both.argmax()), both.shape[1])
    begin, end = window.places[low + first][0], window.places[low + last][1]
    return both[first, last].item(), context[begin:end]


def metrics(said: list[str], rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """f1 and exact match."""
    pairs = [(_words(one), _words(str(row["label"]))) for one, row in zip(said, rows, strict=True)]
    return {
        "f1": sum(_f1(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(one == other for one, other in pairs) / len(pairs),
    }


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(guessed: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(guessed) & Counter(wanted)).values())
    return 2 * shared / (len(guessed) + len(wanted)) if shared else float(guessed == wanted)


def say(said: list[str], names: dict[str, str]) -> list[dict[str, object]]:
    """The answers."""
    return [{"answer": text} for text in said]
