"""Prompt tuning: trained vectors before the input embeddings. Lester et al. 2021, arXiv:2104.08691.

Files are Hugging Face PEFT's own: peft_type PROMPT_TUNING, one tensor `prompt_embeddings` [V, D], or [2V, D]
for an encoder and a decoder, of which PEFT uses the first half, in the encoder. A template is pefast's: one
tensor `word_weights` [W].
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pefast.architectures import backbone
from pefast.layers.lowrank import master_dtype
from pefast.layers.prompt_host import PromptTokens, PromptWords, add_prompt, drop_prompt
from pefast.layers.prompt_slot import add_slot, drop_slot
from pefast.methods.method import Method

INITS = ("random", "vocabulary", "text", "template")
STACKS = {"encoder": ("encoder",), "decoder": ("decoder",), "both": ("encoder", "decoder")}
SLOT = "{text}"
# of the models with two stacks, those whose positions are relative, so that a prompt moves nothing
_TWO_STACKS = ("t5", "mt5")


class Words(NamedTuple):
    """A template as tokens."""

    ids: list[int]  # [V]
    word: list[int]  # [V]  the number of the word that a token is part of
    lead: int  # how many of them stand before the input


@dataclass
class Prompt(Method):
    """`tokens` trained vectors of the embeddings' width before every input. It does not start as the base
    model.

    init        "random": normal, as wide as the model's own embeddings; "vocabulary": the embeddings of words
                drawn from the vocabulary; "text": those of `text`, repeated or cut to the number of tokens,
                as PEFT does; "template": `text` says what stands before and behind the input, "Classify this
                review: {text} Sentiment:"; each of its words is one trained weight times the word's own
                embedding, from weight 1 on, and `tokens` is not read
    tokenizer   a tokenizer, or None: the one of the model's own folder
    place       "start", where PEFT puts it; "after_first": behind the first real token ([CLS], <s>), so that
                what pools the first position still finds that token there; "inside": also before the last
                real token ([SEP], </s>), which matters to words behind the input
    stacks      of a model with encoder and decoder: "encoder" (None means this, as PEFT), "decoder" or "both"

    Words behind the input of a causal language model stand before the first label, at `slot_end` [B] if the
    model's forward is given one, and where generate begins. Left and right padding, masks of two and four
    dimensions, dynamic and static caches.
    """

    tokens: int = 5
    init: str = "random"
    text: str | None = None
    tokenizer: Any = None
    place: str = "start"
    stacks: str | None = None

    kind: ClassVar[str] = "prompt"
    peft_types: ClassVar[tuple[str, ...]] = ("PROMPT_TUNING", "PEFAST_PROMPT_TEMPLATE")
    prompt_learning: ClassVar[bool] = True
    # a template that was read from a folder brings its tokens, and needs no tokenizer
    words = None

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise ValueError(f"Prompt: tokens is {self.tokens!r}; a whole number from 1 up would be right")
        if self.init not in INITS:
            raise ValueError(f"Prompt: init is {self.init!r}; one of {', '.join(INITS)} would be right")
        if self.place not in ("start", "after_first", "inside"):
            raise ValueError(f"Prompt: place is {self.place!r}; start, after_first or inside would be right")
        if self.stacks not in (None, *STACKS):
            raise ValueError(f"Prompt: stacks is {self.stacks!r}; one of {', '.join(STACKS)} would be right")
        if self.init in ("text", "template") and not self.text and self.words is None:
            raise ValueError(
                f"Prompt: init is {self.init!r} and no text came; text='classify this review' would be right"
            )
        if self.init == "template" and self.words is None and self.text.count(SLOT) != 1:
            raise ValueError(
                f"Prompt: the template {self.text!r} has {self.text.count(SLOT)} places for the input;"
                f" one {SLOT} would be right"
            )
        if self.init == "template" and self.stacks not in (None, "encoder"):
            raise ValueError(
                f"Prompt: a template in the {self.stacks}; the encoder, which has the input, would be right"
            )

    def plan(self, model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The backbone and the stacks of it that it will enter. Changes nothing."""
        body = backbone(model)
        if not hasattr(body, "get_input_embeddings"):
            raise ValueError(
                f"Prompt: {type(model).__name__} has no input embeddings; a transformers model would be right"
            )
        two = getattr(model.config, "is_encoder_decoder", False) and hasattr(body, "decoder")
        if two and model.config.model_type not in _TWO_STACKS:
            raise ValueError(
                f"Prompt: {type(model).__name__} has two stacks of a kind that is not known here;"
                f" known are {', '.join(_TWO_STACKS)}, and every model with one stack"
            )
        if self.stacks is not None and not two:
            raise ValueError(
                f"Prompt: stacks is {self.stacks!r} and {type(model).__name__} has one stack;"
                " None would be right"
            )
        return body, {"encoder": body.encoder, "decoder": body.decoder} if two else {"only": body}

    def enter(self, model: nn.Module, name: str, key: str, plan, router) -> None:
        """Puts the vectors and their hooks on the stacks."""
        body, stacks = plan
        if hasattr(body, "prompts") and name in body.prompts:
            raise ValueError("attach: one Prompt for each adapter name would be right")
        table = body.get_input_embeddings().weight
        first, last = int(self.place != "start"), int(self.place == "inside")
        if self.init == "template":
            words = self.words or _template(self._tokenizer(model), self.text)
            stack = "encoder" if "encoder" in stacks else "only"
            part = PromptWords(*words, stack, first, last).to(table.device)
            part.weights.data = part.weights.data.to(master_dtype(table.dtype))
        else:
            start = torch.cat([self._start(model, table) for _ in stacks])
            chosen = STACKS[self.stacks or "encoder"] if len(stacks) == 2 else ("only",)
            halves = {
                stack: slice(i * self.tokens, (i + 1) * self.tokens)
                for i, stack in enumerate(stacks)
                if stack in chosen
            }
            part = PromptTokens(start.to(master_dtype(table.dtype)), halves, first, last)
        add_prompt(body, stacks, router)
        body.prompts[name] = part
        if "only" in stacks and part.sizes("only")[1]:
            add_slot(model, body)

    def _start(self, model: nn.Module, table: Tensor) -> Tensor:  # [V, D]
        table = table.detach()
        if self.init == "random":
            return torch.randn(self.tokens, table.shape[1], device=table.device) * table.float().std()
        if self.init == "vocabulary":
            return table[torch.randint(table.shape[0], (self.tokens,), device=table.device)].clone()
        ids = self._tokenizer(model)(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"Prompt: the tokenizer finds no token in {self.text!r}")
        repeats = -(-self.tokens // len(ids))
        return table[torch.tensor((ids * repeats)[: self.tokens], device=table.device)].clone()

    def _tokenizer(self, model: nn.Module):
        if self.tokenizer is not None:
            return self.tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model.config.name_or_path)

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes the vectors away."""
        body = backbone(model)
        drop_prompt(body, name)
        if not hasattr(body, "prompts"):
            drop_slot(model)

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its parameter under the name that the file gives it."""
        part = backbone(model).prompts[name]
        if isinstance(part, PromptWords):
            return {"word_weights": part.weights}
        return {"prompt_embeddings": part.embeddings}

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """PEFT's adapter_config.json, with `place` and `stacks` beside it; a template's own."""
        body, config = backbone(model), model.config
        if self.init == "template":
            kind = {"peft_type": "PEFAST_PROMPT_TEMPLATE", "text": self.text, "place": self.place}
            part = body.prompts[name]
            return kind | Words(part.ids.tolist(), part.spread.argmax(1).tolist(), part.lead)._asdict()
        width = body.get_input_embeddings().weight.shape[1]
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.tokens,
            "token_dim": width,
            "num_transformer_submodules": body.prompts[name].embeddings.shape[0] // self.tokens,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",
            "place": self.place,
            "stacks": self.stacks,
        }

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return key in ("prompt_embeddings", "word_weights")

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Prompt":
        """The settings of a checkpoint of PEFT's or pefast's; the values come from its tensor."""
        place = config.get("place", "start")
        if config["peft_type"] == "PEFAST_PROMPT_TEMPLATE":
            made = cls(init="template", text=config["text"], place=place)
            made.words = Words(config["ids"], config["word"], config["lead"])
            return made
        return cls(tokens=config["num_virtual_tokens"], place=place, stacks=config.get("stacks"))


def _template(tokenizer, text: str) -> Words:
    """The tokens of what stands before and behind the input, and the word that each is part of."""
    before, behind = text.split(SLOT)
    ids, word, lead = [], [], 0
    # a space before the input would be a token of its own
    for part in (before.rstrip(), behind):
        lead = len(ids)
        start = word[-1] + 1 if word else 0
        if not getattr(tokenizer, "is_fast", False):
            found = tokenizer(part, add_special_tokens=False)["input_ids"]
            numbers = range(len(found))
        else:
            encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            found = encoded["input_ids"]
            numbers = [_word_at(part, *span) for span in encoded["offset_mapping"]]
        ids += found
        word += [start + number for number in numbers]
    if not ids:
        raise ValueError(f"Prompt: the tokenizer finds no token in {text!r} beside the input")
    # every number from 0 on is there, also where a word became no token
    order = {number: index for index, number in enumerate(sorted(set(word)))}
    return Words(ids, [order[number] for number in word], lead)


def _word_at(text: str, begin: int, end: int) -> int:
    """The number of the word, between spaces, in which a token ends."""
    return max(len(text[:end].split()) - 1, 0) if text[begin:end].strip() else len(text[:end].split())
