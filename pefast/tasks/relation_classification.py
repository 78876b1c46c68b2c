"""Relation classification: what two marked mentions in a text have to do with each other.

The first mention stands between asterisks, the second between hashes (entity markers; Zhou and Chen 2021,
arXiv:2102.01373); what follows is text classification.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import text_classification
from .batches import Adapters
from .rows import Row
from .text_classification import METRIC, STRATUM, baseline, collator, hits, metrics, model, names, say

__all__ = ["HEAD", "METRIC", "OVER", "ROLES", "STRATUM", "baseline", "collator", "encode", "hits", "marked"]
__all__ += ["metrics", "model", "names", "predict", "say"]

ROLES = {"text": "text", "head": "head", "tail": "tail", "label": "label"}
# whose rows and answers this task's are, once marked; a batch may mix what shares a kind of head
OVER = HEAD = text_classification


def marked(row: Row) -> Row:
    """The row with its mentions marked in the text. Raises ValueError where the text lacks one of them."""
    text = str(row["text"])
    for role, mark in (("head", "*"), ("tail", "#")):
        mention = str(row[role])
        if mention not in text:
            raise ValueError(f"relation-classification: {role} {mention!r} is not in the text {text!r}")
        text = text.replace(mention, f"{mark} {mention} {mark}", 1)
    return {**row, "text": text}


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """Token ids of each marked text, cut at `max_length` and not padded, with the label's number."""
    return text_classification.encode([marked(row) for row in rows], tokenizer, names, max_length)


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 64,
    adapters: Adapters = None,
) -> Tensor:
    """Logits [n, C] in the order of the rows."""
    texts = [marked(row) for row in rows]
    return text_classification.predict(model, tokenizer, texts, max_length, batch, adapters)
