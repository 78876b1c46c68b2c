"""Causal generation: a text that answers a prompt, as in chat.

loss            cross entropy of the answer's tokens; the prompt's are not counted
log_likelihood  mean over the answers' tokens, in nats: the model's own measure of a right answer
perplexity      exp(-log_likelihood)
rouge_l         longest common subsequence of words with the right answer, F1 (Lin 2004), greedy generation

A tokenizer with a chat template gets the prompt as a user's turn.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from .batches import SAFE, Adapters, answers, by_length, each, routed
from .rows import Row

ROLES = {"text": "prompt", "label": "answer"}
METRIC = "log_likelihood"
STRATUM = None
NEW_TOKENS = 48
_NO_LABEL = -100


class Answer(NamedTuple):
    """What the model writes, and how likely it finds the right answer."""

    text: str
    log_likelihood: float  # of the right answer, summed; NaN where none was given
    tokens: int  # of the right answer


def names(rows: Sequence[Row], given: dict[str, str] | None = None) -> dict[str, str]:
    """Nothing: texts have no names."""
    return {}


def model(folder: str | Path, names: dict[str, str], dtype: torch.dtype) -> nn.Module:
    """The pretrained language model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **SAFE)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: dict[str, str], max_length: int
) -> list[dict]:
    """Prompt and answer; a prompt that is too long loses its beginning, never the answer."""
    return [_pair(row, tokenizer, max_length) for row in rows]


def _prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = str(row["text"])
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    answer = tokenizer(str(row["label"]), add_special_tokens=False)["input_ids"]
    answer = [*answer[: max_length // 2], tokenizer.eos_token_id]
    prompt = _prompt(row, tokenizer)[-(max_length - len(answer)) :]
    ids = prompt + answer
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [_NO_LABEL] * len(prompt) + answer,
    }


def collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Callable:
    """Pads each batch, labels too, to its own longest row."""
    _has_pad(tokenizer)
    return DataCollatorForTokenClassification(tokenizer)


def _has_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def hits(outputs, batch) -> Tensor:
    """The share of the answers' tokens that were the likeliest; NaN where the loss came without logits."""
    logits = outputs.get("logits")
    if logits is None or logits.dim() != 3 or logits.shape[:2] != batch["labels"].shape:
        return torch.tensor(math.nan)
    wanted = batch["labels"][:, 1:]
    counted = wanted != _NO_LABEL
    return ((logits[:, :-1].argmax(-1) == wanted) & counted).sum() / counted.sum().clamp(min=1)


def baseline(train: Sequence[Row], rows: Sequence[Row], names: dict[str, str]) -> None:
    """None: what is to be beaten is the base model, whose numbers stand beside."""


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | Sequence[int] = 512,
    batch: int = 16,
    adapters: Adapters = None,
) -> list[Answer]:
    """A greedy answer to each row's prompt, and the likelihood of its right answer where it has one."""
    _has_pad(tokenizer)
    lengths = each(max_length, rows)
    prompts = [_prompt(row, tokenizer)[-longest:] for row, longest in zip(rows, lengths, strict=True)]
    texts = _generate(model, tokenizer, prompts, batch, adapters)
    answered = [index for index, row in enumerate(rows) if "label" in row]
    pairs = [_pair(rows[index], tokenizer, lengths[index]) for index in answered]
    of_them = adapters and [adapters[index] for index in answered]
    likely = iter(_likelihoods(model, tokenizer, pairs, batch, of_them))
    return [
        Answer(text, *(next(likely) if "label" in row else (math.nan, 0)))
        for text, row in zip(texts, rows, strict=True)
    ]


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch: int,
    adapters: Adapters = None,
) -> list[str]:
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    texts = [""] * len(prompts)
    for chosen in by_length([len(prompt) for prompt in prompts], batch):
        inputs = tokenizer.pad({"input_ids": [prompts[index] for index in chosen]}, return_tensors="pt")
        with routed(model, adapters, chosen):
            written = model.generate(
                **inputs.to(model.device),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(
            chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
    tokenizer.padding_side = side
    model.train(was_training)
    return texts


def _likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    batch: int,
    adapters: Adapters = None,
) -> list[tuple[float, int]]:
    """The log-likelihood of each answer, summed over its tokens, and how many these are."""

    def take(output, place, index):
        labels = torch.tensor(pairs[index]["labels"], device=output.logits.device)
        counted = labels[1:] != _NO_LABEL
        # rows stand at the left: padding is behind them
        logits = output.logits[place, : len(labels) - 1][counted].float()
        found = logits.log_softmax(-1).gather(1, labels[1:][counted][:, None]).sum()
        return found.item(), int(counted.sum())

    features = [{key: pair[key] for key in ("input_ids", "attention_mask")} for pair in pairs]
    side, tokenizer.padding_side = tokenizer.padding_side, "right"
    found = answers(model, tokenizer, features, take, batch, adapters)
    tokenizer.padding_side = side
    return found


def metrics(said: list[Answer], rows: Sequence[Row], names: dict[str, str]) -> dict[str, float]:
    """log_likelihood, perplexity and rouge_l."""
    from rouge_score.rouge_scorer import RougeScorer

    mean = sum(one.log_likelihood for one in said) / max(sum(one.tokens for one in said), 1)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        scorer.score(str(row["label"]), one.text)["rougeL"].fmeasure
        for one, row in zip(said, rows, strict=True)
    ]
    return {"log_likelihood": mean, "perplexity": math.exp(-mean), "rouge_l": sum(rouge) / len(rouge)}


def say(said: list[Answer], names: dict[str, str]) -> list[dict[str, object]]:
    """The texts."""
    return [{"answer": one.text} for one in said]
