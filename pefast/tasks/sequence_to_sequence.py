"""Text to text with an encoder and a decoder: translation, summarisation.

loss      cross entropy of the target's tokens
bleu      corpus BLEU of sacrebleu's usual tokenizer, 0 to 1 (Post 2018, arXiv:1804.08771)
chrf      F-score of character n-grams, 0 to 1 (Popović 2015)
rouge_l   longest common subsequence of words with the target, F1 (Lin 2004)
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .batches import SAFE, Adapters, by_length, routed, rows_of, text_tokens
from .rows import Row

ROLES = {"text": "source", "label": "target"}
METRIC = "chrf"
STRATUM = None
NEW_TOKENS = 64
_NO_LABEL = -100


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Nothing: texts have no names."""
    return {}


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained encoder and decoder."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, **SAFE)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """Source and target of each row, each cut at `max_length` and not padded."""
    sources, targets = [str(row["text"]) for row in rows], [str(row["label"]) for row in rows]
    encoded = tokenizer(sources, text_target=targets, truncation=True, max_length=max_length)
    return rows_of(encoded)


def collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Callable:
    """Pads each batch, labels too, to its own longest row."""
    return DataCollatorForSeq2Seq(tokenizer, model)


def hits(outputs, batch) -> Tensor:
    """The share of the targets' tokens that were the likeliest; NaN where the loss came without logits."""
    if outputs.get("logits") is None:
        return torch.tensor(math.nan)
    counted = batch["labels"] != _NO_LABEL
    right = (outputs["logits"].argmax(-1) == batch["labels"]) & counted
    return right.sum() / counted.sum().clamp(min=1)


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> tuple[str, list[str]]:
    """The source itself."""
    return "the source as it is", [str(row["text"]) for row in rows]


@torch.no_grad()
def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 16,
    adapters: Adapters = None,
) -> list[str]:
    """A text for each row, by greedy search, in the rows' order."""
    was_training = model.training
    model.eval()
    sources = [tokens["input_ids"] for tokens in text_tokens(rows, tokenizer, max_length)]
    texts = [""] * len(rows)
    for chosen in by_length([len(ids) for ids in sources], batch):
        inputs = tokenizer.pad({"input_ids": [sources[index] for index in chosen]}, return_tensors="pt")
        with routed(model, adapters, chosen):
            written = model.generate(
                **inputs.to(model.device), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
            )
        for index, text in zip(
            chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
    model.train(was_training)
    return texts


def metrics(said: list[str], rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """chrf, bleu and rouge_l."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    wanted = [str(row["label"]) for row in rows]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(one, other)["rougeL"].fmeasure for one, other in zip(wanted, said, strict=True)]
    return {
        "chrf": sacrebleu.corpus_chrf(said, [wanted]).score / 100,
        "bleu": sacrebleu.corpus_bleu(said, [wanted]).score / 100,
        "rouge_l": sum(rouge) / len(rouge),
    }


def say(said: list[str], names: dict[str, str]) -> list[dict[str, object]]:
    """The texts."""
    return [{"text": text} for text in said]
