"""PET: a language model classifies by the words that it would put in a template's place.

    s(w) = Σ_i log p(w_i | text, template, w_<i)        [B, W]   causal; every word's tokens in turn
    s(w) = Σ_i log p(w_i | text, template, n masks)     [B, W]   masked; all n tokens of the word at once
    z(y) = log mean_{w of y} exp(s(w) - prior(w))       [B, C]   the logits of the labels

prior is 0, or after `calibrate` the words' log probability without a text. No parameter is added: it works
without training, and any method of pefast on the model trains through it.

Papers: PET, Schick and Schütze 2021, arXiv:2001.07676 and, for several masks, arXiv:2009.07118; calibration,
Zhao et al. 2021, arXiv:2102.09690.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from pefast.architectures import backbone
from pefast.layers.prompt_host import positions_left

from .pet_template import TEXTS, Template, Verbalizer

# texts that say nothing, of which contextual calibration takes the average
NOTHING = ("N/A", "", "[MASK]")


class Pet(nn.Module):
    """A masked or causal language model, a template and a verbaliser: texts in, label logits [B, C] out.

    model       ...ForMaskedLM or ...ForCausalLM of transformers, with or without adapters
    max_length  tokens of a row at most, the template among them; None: as many as the model has positions.
                A longer text is cut at its end, the template never

    `pet.logits(texts)` is differentiable, `pet.predict(texts)` is for many rows without gradients.
    `pet(**pet.collate(rows))` gives loss and logits, as transformers' Trainer wants them.

    Raises ValueError for a tokenizer without offsets, a masked model without a mask token, a text behind the
    mask of a causal model, and a word that the tokenizer cannot make. In a causal model nothing behind the
    mask is read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | str,
        verbalizer: Verbalizer | Mapping[str, Sequence[str]],
        max_length: int | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.training = model.training
        self.template = Template(template) if isinstance(template, str) else template
        self.verbalizer = verbalizer if isinstance(verbalizer, Verbalizer) else Verbalizer(verbalizer)
        self.masked = "MaskedLM" in type(model).__name__
        _check(model, tokenizer, self.template, self.masked)
        words = self.verbalizer.tokens(tokenizer, self.template)
        self.words = [ids for _, ids in words]
        label = F.one_hot(torch.tensor([number for number, _ in words])).bool()  # [W, C]
        self.register_buffer("label", label, persistent=False)
        self.register_buffer("prior", torch.zeros(len(words)), persistent=False)  # [W]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def encode(self, rows: Sequence[str | Sequence[str]]) -> list[dict]:
        """input_ids and the place of the answer of each row: a text, or a pair for {text_a} and {text_b}.

        Raises ValueError for a row that has not as many texts as the template, and for a template that alone
        is too long.
        """
        left = positions_left(backbone(self.model))
        most = min((each for each in (left, self.max_length) if each is not None), default=None)
        if most is not None:
            # the first mask is in the template; a causal model reads all but the last token of a word
            most -= max(map(len, self.words)) - 1
        mask = self.tokenizer.mask_token if self.masked else None
        found = []
        for row in rows:
            texts = (row,) if isinstance(row, str) else tuple(row)
            if len(texts) != len(self.template.texts):
                raise ValueError(
                    f"Pet: a row has {len(texts)} texts and the template {len(self.template.texts)};"
                    " as many would be right"
                )
            slots = dict(zip(TEXTS, texts, strict=False))
            ids, at = self.template.encode(slots, self.tokenizer, mask, most)
            found.append({"input_ids": ids, "answer_at": at})
        return found

    def collate(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Rows of `encode`, or {"text", "labels"}, as one batch padded on the right; labels as numbers."""
        encoded = [row if "input_ids" in row else self.encode([row["text"]])[0] for row in rows]
        width = max(len(row["input_ids"]) for row in encoded)
        pad = self.tokenizer.pad_token_id or 0
        batch = {
            "input_ids": torch.tensor(
                [row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in encoded]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in encoded]
            ),
            "answer_at": torch.tensor([row["answer_at"] for row in encoded]),
        }
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([self._number(row["labels"]) for row in rows])
        return batch

    def _number(self, label: str | int) -> int:
        if isinstance(label, str):
            if label not in self.verbalizer.words:
                raise ValueError(
                    f"Pet: the label {label!r} came; labels are {', '.join(self.verbalizer.labels)}"
                )
            return self.verbalizer.labels.index(label)
        return int(label)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]  padded on the right
        attention_mask: Tensor,  # [B, L]
        answer_at: Tensor,  # [B]  the mask, or in a causal model the end of the row
        labels: Tensor | None = None,  # [B]
    ) -> SequenceClassifierOutput:
        """Label logits [B, C], and their cross entropy where labels came."""
        logits = self.by_label(self._scores(input_ids, attention_mask, answer_at))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def by_label(self, scores: Tensor) -> Tensor:
        """The words' log probabilities [B, W] as label logits [B, C], less the prior."""
        hidden = (scores - self.prior)[:, :, None].masked_fill(~self.label, -torch.inf)  # [B, W, C]
        return hidden.logsumexp(1) - self.label.sum(0).log()

    def logits(self, rows: Sequence[str | Sequence[str]]) -> Tensor:
        """Label logits [B, C] of a batch of texts, or of pairs of texts; differentiable."""
        batch = self.collate(self.encode(rows))
        return self(**{key: value.to(self.device) for key, value in batch.items()}).logits

    def predict(self, rows: Sequence[str | Sequence[str]], batch: int = 32) -> Tensor:
        """Label logits [n, C] in the order of the rows, without gradients."""
        return self.by_label(self.score(rows, batch))

    @torch.no_grad()
    def score(self, rows: Sequence[str | Sequence[str]], batch: int = 32) -> Tensor:
        """The words' log probabilities [n, W]; batches are made of rows of like length."""
        encoded, was_training = self.encode(rows), self.training
        self.eval()
        order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]["input_ids"]), index))
        found = torch.zeros(len(encoded), len(self.words), device=self.device)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            fed = self.collate([encoded[index] for index in chosen])
            found[chosen] = self._scores(*(value.to(self.device) for value in fed.values()))
        self.train(was_training)
        return found

    def calibrate(self, rows: Sequence[str | Sequence[str]] | None = None) -> Tensor:
        """Takes the words' mean probability over `rows` as their prior [W] and returns its logarithm.

        None takes texts that say nothing; rows without labels do as well.
        """
        if rows is None:
            rows = [each if len(self.template.texts) == 1 else (each, each) for each in NOTHING]
        self.prior = self.score(rows).logsumexp(0) - math.log(len(rows))
        return self.prior

    def _scores(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:  # [B, W]
        """log p of every word; one pass for the words of one token, and one for each group of longer ones."""
        scores: list[Tensor | None] = [None] * len(self.words)
        lengths = sorted(set(map(len, self.words)))
        for length in lengths:
            group = [index for index, word in enumerate(self.words) if len(word) == length]
            tokens = torch.tensor([self.words[index] for index in group], device=ids.device)  # [w, n]
            if self.masked:
                between = torch.full((length - 1,), self.tokenizer.mask_token_id, device=ids.device)
                found = self._read(ids, mask, at, between, at, length)  # [B, n, V]
                found = [found[:, range(length), word].sum(1) for word in tokens]
            elif length == 1:
                found = self._read(ids, mask, at, tokens[0, :0], at - 1, 1)
                found = [found[:, 0, word[0]] for word in tokens]
            else:
                found = [
                    self._read(ids, mask, at, word[:-1], at - 1, length)[:, range(length), word].sum(1)
                    for word in tokens
                ]
            for index, score in zip(group, found, strict=True):
                scores[index] = score
        return torch.stack(scores, 1)

    def _read(self, ids, mask, at, more: Tensor, begin: Tensor, count: int) -> Tensor:
        """log p [B, count, V] at `begin` and behind it, with the tokens `more` put in at `at`."""
        ids, mask = _put_in(ids, at, more), _put_in(mask, at, torch.ones_like(more))
        places = begin[:, None] + torch.arange(count, device=ids.device)  # [B, count]

        def pick(module, args, output):
            # the head sees the states that are asked for and no others: logits of a whole row are large
            states = output[0]
            picked = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
            if isinstance(output, tuple):
                return (picked, *output[1:])
            output["last_hidden_state"] = picked
            return output

        # words of a prompt that stand behind the input stand before the answer
        slot = {"slot_end": at} if hasattr(self.model, "prompt_slot") and not self.masked else {}
        handle = backbone(self.model).register_forward_hook(pick)
        try:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **slot).logits
        finally:
            handle.remove()
        return logits.float().log_softmax(-1)


def _put_in(row: Tensor, at: Tensor, more: Tensor) -> Tensor:
    """row [B, L] with the tokens more [k] before position at[b] of each row: [B, L + k]."""
    length, count = row.shape[1], len(more)
    place = torch.arange(length + count, device=row.device).expand(len(row), -1)
    at = at[:, None]
    source = torch.where(
        place < at, place, torch.where(place < at + count, length + place - at, place - count)
    )
    return torch.cat((row, more.expand(len(row), -1)), 1).gather(1, source)


def _check(model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: Template, masked: bool) -> None:
    name = type(model).__name__
    if not masked and not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"Pet: {name} is no language model; a ...ForMaskedLM or ...ForCausalLM would be right"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"Pet: {type(tokenizer).__name__} does not say where its tokens stand; a fast one would be right"
        )
    if masked and tokenizer.mask_token is None:
        raise ValueError("Pet: the tokenizer has no mask token; that of the masked model would be right")
    if not masked and template.behind_mask():
        raise ValueError(
            f"Pet: {{{template.behind_mask()[0]}}} stands behind {{mask}} in {template.text!r}, where a"
            " causal model does not read; the mask behind the texts would be right"
        )
