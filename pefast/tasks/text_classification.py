"""Text classification: one label for one text, or for a pair of texts.

loss      cross entropy of the head's logits [B, C]
accuracy  the share of rows whose largest logit is the label's
macro F1  F1 of each class, averaged with equal weight
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from .batches import SAFE, Adapters, answers, text_tokens
from .rows import Row

ROLES = {"text": "text", "pair": None, "label": "label"}
METRIC = "accuracy"
# every part of the rows has these in like shares
STRATUM = "label"


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Each label that occurs, sorted, and the name to show for it.

    Raises ValueError where there is only one label, or one without a name.
    """
    found = sorted({str(row["label"]) for row in rows})
    if len(found) < 2:
        raise ValueError(
            f"text-classification: every row has the label {found[0]!r}; at least two are needed"
        )
    if given is None:
        return {label: label for label in found}
    unknown = [label for label in found if label not in given]
    if unknown:
        raise ValueError(
            f"data.names: no name for the label {unknown[0]!r}; there are names for {', '.join(given)}"
        )
    return given


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained model with a fresh head of one output a label."""
    shown = list(names.values())
    return AutoModelForSequenceClassification.from_pretrained(
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
    """Token ids of each row, cut at `max_length` and not padded, with the label's number."""
    numbers = _numbers(rows, names)
    return [
        row | {"labels": number}
        for row, number in zip(text_tokens(rows, tokenizer, max_length), numbers, strict=True)
    ]


def _numbers(rows: Sequence[Row], names: dict[str, str]) -> list[int]:
    number = {label: index for index, label in enumerate(names)}
    for row in rows:
        if str(row["label"]) not in number:
            raise ValueError(
                f"text-classification: the label {row['label']!r} is new; known labels are {', '.join(names)}"
            )
    return [number[str(row["label"])] for row in rows]


def collator(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None
) -> Callable[[list[dict]], dict[str, Tensor]]:
    """Pads each batch to its own longest row."""
    return DataCollatorWithPadding(tokenizer)


def hits(outputs, batch) -> Tensor:
    """The share of right answers in a batch, as a tensor, so that nothing waits for it."""
    return (outputs["logits"].argmax(-1) == batch["labels"]).float().mean()


def metrics(logits: Tensor, rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """accuracy and macro F1 of logits [n, C] against the rows' labels."""
    # scikit-learn belongs to the [train] extra and takes a second to load: only scoring needs it
    from sklearn.metrics import accuracy_score, f1_score

    labels, guessed = np.array(_numbers(rows, names)), logits.argmax(-1).numpy()
    return {
        "accuracy": float(accuracy_score(labels, guessed)),
        "macro_f1": float(f1_score(labels, guessed, average="macro")),
    }


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> tuple[str, Tensor]:
    """Always the commonest label of the training rows: in words, and as logits [n, C]."""
    (common, _), *_ = Counter(str(row["label"]) for row in train).most_common(1)
    logits = torch.zeros(len(rows), len(names))
    logits[:, list(names).index(common)] = 1
    return f"always {names[common]!r}", logits


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 64,
    adapters: Adapters = None,
) -> Tensor:
    """Logits [n, C] in the order of the rows; batches are made of rows of like length. With adapters whose
    heads differ, C is the widest one's, and what a row lacks is -inf."""
    found = answers(
        model,
        tokenizer,
        text_tokens(rows, tokenizer, max_length),
        lambda output, place, index: output.logits[place].float().cpu(),
        batch,
        adapters,
    )
    if not found:
        return torch.empty(0, model.config.num_labels)
    return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=float("-inf"))


def say(logits: Tensor, names: dict[str, str]) -> list[dict[str, object]]:
    """The most likely label's name for each row, and its probability."""
    shown = list(names.values())
    shares, chosen = logits.softmax(-1).max(-1)
    return [
        {"label": shown[index], "probability": share}
        for index, share in zip(chosen.tolist(), shares.tolist(), strict=True)
    ]
