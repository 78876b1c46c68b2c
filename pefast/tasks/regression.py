"""Regression: one number for one text, or for a pair of texts.

loss      mean squared error of the head's output, in the labels' standardised unit
rmse      root of the mean squared error, in the labels' own unit
pearson   correlation of the answers with the labels; spearman: of their ranks
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from . import text_classification
from .batches import SAFE, Adapters, text_tokens
from .rows import Row

ROLES = {"text": "text", "pair": None, "label": "label"}
METRIC = "pearson"
STRATUM = None
# whose first logit the answer is; a batch may mix what shares a kind of head
HEAD = text_classification


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Mean and standard deviation of the labels: what the head learns is (label - mean) / deviation.

    Raises ValueError where a label is no number, or where all are the same.
    """
    if given is not None:
        return given
    labels = torch.tensor([_number(row) for row in rows], dtype=torch.float64)
    deviation = labels.std().item()
    if not deviation > 0:
        raise ValueError(f"regression: every row has the label {labels[0].item():g}; they should differ")
    return {"mean": repr(labels.mean().item()), "deviation": repr(deviation)}


def _number(row: Row) -> float:
    try:
        return float(row["label"])
    except ValueError:
        raise ValueError(f"regression: the label {row['label']!r} is no number") from None


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained model with a fresh head of one output."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, problem_type="regression", dtype=dtype, **SAFE
    )


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """Token ids of each row, cut at `max_length` and not padded, with the standardised label."""
    mean, deviation = float(names["mean"]), float(names["deviation"])
    return [
        tokens | {"labels": (_number(row) - mean) / deviation}
        for tokens, row in zip(text_tokens(rows, tokenizer, max_length), rows, strict=True)
    ]


def collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Callable:
    """Pads each batch to its own longest row; labels come in the model's dtype."""
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict]):
        batch = pad(rows)
        return batch if model is None else batch | {"labels": batch["labels"].to(model.dtype)}

    return collate


def hits(outputs, batch) -> Tensor:
    """The share of answers within half a deviation of their label."""
    return ((outputs["logits"].squeeze(-1) - batch["labels"]).abs() < 0.5).float().mean()


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> tuple[str, Tensor]:
    """Always the mean of the training rows: in words, and as standardised answers [n]."""
    mean = sum(map(_number, train)) / len(train)
    said = (mean - float(names["mean"])) / float(names["deviation"])
    return f"always {mean:.3f}", torch.full((len(rows),), said)


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 64,
    adapters: Adapters = None,
) -> Tensor:
    """Standardised answers [n] in the order of the rows."""
    return text_classification.predict(model, tokenizer, rows, max_length, batch, adapters)[:, 0]


def metrics(said: Tensor, rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """pearson, spearman and rmse of answers [n] against the rows' labels."""
    # scipy comes with scikit-learn in the [train] extra
    from scipy.stats import pearsonr, spearmanr

    labels = torch.tensor([_number(row) for row in rows])
    found = said * float(names["deviation"]) + float(names["mean"])
    # an answer that never changes goes with nothing
    told = len(rows) > 1 and found.std() > 0 and labels.std() > 0
    return {
        "pearson": float(pearsonr(found, labels)[0]) if told else 0.0,
        "spearman": float(spearmanr(found, labels)[0]) if told else 0.0,
        "rmse": float((found - labels).square().mean().sqrt()),
    }


def say(said: Tensor, names: dict[str, str]) -> list[dict[str, object]]:
    """The number for each row, in the labels' own unit."""
    return [{"value": value * float(names["deviation"]) + float(names["mean"])} for value in said.tolist()]
