"""Token classification: a tag for each word, as in named entities (BIO) or parts of speech.

loss       cross entropy of the logits [B, L, C] at the first token of each word
f1         of whole entities, kind and both ends right (CoNLL's measure, by seqeval); precision, recall
accuracy   the share of words whose tag is right
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from .batches import SAFE, Adapters, answers, each
from .rows import Row

ROLES = {"tokens": "tokens", "label": "tags"}
METRIC = "f1"
STRATUM = None
# what torch's cross entropy passes over
_NO_LABEL = -100


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Each tag that occurs, sorted with O first, and the name to show for it.

    Raises ValueError where a row has not one tag for each word, or there is only one tag.
    """
    found = set()
    for number, row in enumerate(rows, 1):
        if len(row["tokens"]) != len(row["label"]):
            raise ValueError(
                f"token-classification: row {number} has {len(row['tokens'])} words and"
                f" {len(row['label'])} tags; one tag for each word would be right"
            )
        found |= set(row["label"])
    if len(found) < 2:
        raise ValueError(f"token-classification: every word has the tag {sorted(found)}; two are needed")
    return given or {tag: tag for tag in sorted(found, key=lambda tag: (tag != "O", tag))}


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained model with a fresh head of one output a tag."""
    shown = list(names.values())
    return AutoModelForTokenClassification.from_pretrained(
        folder,
        num_labels=len(shown),
        id2label=dict(enumerate(shown)),
        label2id={name: index for index, name in enumerate(shown)},
        dtype=dtype,
        **SAFE,
    )


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """Token ids of each row, cut at `max_length` and not padded; the first token of a word has its tag."""
    number = {tag: index for index, tag in enumerate(names)}
    encoded = []
    for row, (tokens, firsts) in zip(rows, _tokens(rows, tokenizer, max_length), strict=True):
        labels = [_NO_LABEL] * len(tokens["input_ids"])
        for word, place in firsts.items():
            if row["label"][word] not in number:
                raise ValueError(
                    f"token-classification: the tag {row['label'][word]!r} is new;"
                    f" known tags are {', '.join(names)}"
                )
            labels[place] = number[row["label"][word]]
        encoded.append(tokens | {"labels": labels})
    return encoded


def _tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | Sequence[int]
) -> list[tuple[dict, dict[int, int]]]:
    """Each row's tokens, and for each word that is left the place of its first token."""
    found = []
    for row, longest in zip(rows, each(max_length, rows), strict=True):
        words = list(row["tokens"])
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=longest)
        firsts: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                firsts.setdefault(word, place)
        found.append(({key: encoded[key] for key in encoded}, firsts))
    return found


def collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Callable:
    """Pads each batch, labels too, to its own longest row."""
    return DataCollatorForTokenClassification(tokenizer)


def hits(outputs, batch) -> Tensor:
    """The share of words in a batch whose tag is right."""
    counted = batch["labels"] != _NO_LABEL
    return ((outputs["logits"].argmax(-1) == batch["labels"]) & counted).sum() / counted.sum().clamp(min=1)


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> tuple[str, list[list[int]]]:
    """Each word's commonest tag in the training rows, the commonest of all for new words."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["label"], strict=True):
            counts[word][tag] += 1
            # None stands for words that are new
            counts[None][tag] += 1
    number = {tag: index for index, tag in enumerate(names)}
    tag_of = {word: number[found.most_common(1)[0][0]] for word, found in counts.items()}
    said = [[tag_of.get(word, tag_of[None]) for word in row["tokens"]] for row in rows]
    return "each word's commonest tag", said


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 64,
    adapters: Adapters = None,
) -> list[list[int]]:
    """A tag's number for each word of each row, in the rows' order; 0 for words beyond `max_length`.

    A row may bring a text instead of words; it is parted at its spaces.
    """
    rows = [row if "tokens" in row else {"tokens": str(row["text"]).split()} for row in rows]
    encoded = _tokens(rows, tokenizer, max_length)
    tags = answers(
        model,
        tokenizer,
        [tokens for tokens, _ in encoded],
        lambda output, place, index: output.logits[place].argmax(-1).tolist(),
        batch,
        adapters,
    )
    return [
        [found[firsts[word]] if word in firsts else 0 for word in range(len(row["tokens"]))]
        for row, found, (_, firsts) in zip(rows, tags, encoded, strict=True)
    ]


def metrics(said: list[list[int]], rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """Entity f1, precision and recall where tags are BIO, and the accuracy of words."""
    tags = list(names)
    guessed = [[tags[index] for index in row] for row in said]
    wanted = [list(row["label"]) for row in rows]
    pairs = [
        pair for one, other in zip(guessed, wanted, strict=True) for pair in zip(one, other, strict=True)
    ]
    accuracy = sum(one == other for one, other in pairs) / max(len(pairs), 1)
    if not any(tag.startswith(("B-", "I-")) for tag in tags):
        return {"f1": accuracy, "accuracy": accuracy}
    from seqeval.metrics import f1_score, precision_score, recall_score

    return {
        "f1": float(f1_score(wanted, guessed)),
        "precision": float(precision_score(wanted, guessed)),
        "recall": float(recall_score(wanted, guessed)),
        "accuracy": accuracy,
    }


def say(said: list[list[int]], names: dict[str, str]) -> list[dict[str, object]]:
    """The tags' names for each row, one a word."""
    shown = list(names.values())
    return [{"tags": " ".join(shown[index] for index in row)} for row in said]
