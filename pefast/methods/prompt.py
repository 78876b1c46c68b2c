"""Prompt tuning: trained vectors before the input embeddings. Lester et al. 2021, arXiv:2104.08691.

Files are Hugging Face PEFT's own: peft_type PROMPT_TUNING, one tensor `prompt_embeddings` [V, D].
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefast.architectures import backbone
from pefast.layers.lowrank import master_dtype
from pefast.layers.prompt_host import PromptTokens, add_prompt, drop_prompt
from pefast.methods.method import Method


@dataclass
class Prompt(Method):
    """`tokens` trained vectors of the embeddings' width before every input. It does not start as the base
    model.

    init        "random": normal, as wide as the model's own embeddings; "text": the embeddings of `text`
    text        repeated or cut to the number of tokens, as PEFT does
    tokenizer   a tokenizer, or None: the one of the model's own folder
    place       "start", where PEFT puts it, or "after_first": behind the first real token ([CLS], <s>), so
                that what pools
                the first position still finds that token there

    Encoders and decoders with one stack; left and right padding; generate() with a dynamic cache.
    """

    tokens: int = 5
    init: str = "random"
    text: str | None = None
    tokenizer: Any = None
    place: str = "start"

    kind: ClassVar[str] = "prompt"
    peft_types: ClassVar[tuple[str, ...]] = ("PROMPT_TUNING",)
    prompt_learning: ClassVar[bool] = True
    routes: ClassVar[bool] = False

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"Prompt: tokens is {self.tokens!r}; a whole number from 1 up would be right")
        if self.init not in ("random", "text"):
            raise ValueError(f"Prompt: init is {self.init!r}; random or text would be right")
        if self.place not in ("start", "after_first"):
            raise ValueError(f"Prompt: place is {self.place!r}; start or after_first would be right")
        if self.init == "text" and not self.text:
            raise ValueError(
                "Prompt: init is 'text' and no text came; text='classify this review' would be right"
            )

    def plan(self, model: nn.Module) -> nn.Module:
        """The backbone that it will enter. Changes nothing."""
        body = backbone(model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "Prompt: encoder-decoder models have two inputs; models with one stack are what it knows"
            )
        if not hasattr(body, "get_input_embeddings"):
            raise ValueError(
                f"Prompt: {type(model).__name__} has no input embeddings; a transformers model would be right"
            )
        return body

    def enter(self, model: nn.Module, name: str, key: str, plan: nn.Module, router) -> None:
        """Puts the vectors and their hooks on the backbone."""
        if hasattr(plan, "prompts") and name in plan.prompts:
            raise ValueError("attach: one Prompt for each adapter name would be right")
        table = plan.get_input_embeddings().weight
        start = self._from_text(model, table) if self.init == "text" else self._random(table)
        add_prompt(
            plan,
            router,
            name,
            PromptTokens(start.to(master_dtype(table.dtype))),
            int(self.place == "after_first"),
        )

    def _random(self, table: Tensor) -> Tensor:  # [V, D]
        return torch.randn(self.tokens, table.shape[1], device=table.device) * table.detach().float().std()

    def _from_text(self, model: nn.Module, table: Tensor) -> Tensor:  # [V, D]
        tokenizer = self.tokenizer
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"Prompt: the tokenizer finds no token in {self.text!r}")
        repeats = -(-self.tokens // len(ids))
        return table.detach()[torch.tensor((ids * repeats)[: self.tokens], device=table.device)].clone()

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes the vectors away."""
        drop_prompt(backbone(model), name)

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its parameter under the name that the file gives it."""
        return {"prompt_embeddings": backbone(model).prompts[name].embeddings}

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """PEFT's adapter_config.json, with `place` beside it."""
        config = model.config
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.tokens,
            "token_dim": backbone(model).get_input_embeddings().weight.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",
            "place": self.place,
        }

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return key == "prompt_embeddings"

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Prompt":
        """The settings of a PEFT checkpoint; the values come from its tensor."""
        return cls(tokens=config["num_virtual_tokens"], place=config.get("place", "start"))
