"""Prefix tuning: trained keys and values before every attention's own. Li and Liang 2021, arXiv:2101.00190.

Files are Hugging Face PEFT's own: peft_type PREFIX_TUNING, one tensor `prompt_embeddings` [V, 2·A·G·D] for A
attentions with G key heads of width D. PEFT reaches the self-attention of a T5's decoder alone, so a prefix
that is in more of a T5 has the type PEFAST_PREFIX.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pefast.architectures import backbone, blocks
from pefast.layers.attention import why_not_lend
from pefast.layers.lowrank import master_dtype
from pefast.layers.prefix_host import (
    PrefixHost,
    PrefixTokens,
    Sizes,
    add_prefix,
    drop_prefix,
    positions_left,
    switch_prefix,
)
from pefast.layers.prefix_text import read_text
from pefast.methods.method import Method

KINDS = ("encoder", "decoder", "cross")


class _Plan(NamedTuple):
    """Where a prefix will enter, and the one that it shares."""

    body: nn.Module
    sizes: Sizes
    shared: PrefixTokens | None
    ids: Tensor | None  # [1, V]  the text that it starts from


@dataclass
class Prefix(Method):
    """`tokens` trained keys and values before those of the sequence in every attention. It does not start as
    the base model.

    reparameterize  False: keys and values themselves train; True or a hidden size: they come out of a network
                    Linear, tanh, Linear, as PEFT's prefix_projection; it is dropped in the file that PEFT
                    reads and kept in a second one, so that `load` can go on training it
    attentions      "encoder", "decoder", "cross", or several; None: all that the model has. A T5 with
                    ("decoder",) is PEFT's: its block i reads pair 2i mod the number of blocks, so that the
                    upper half of an even number shares with the lower
    positions       "shifted", as PEFT: the sequence stands V positions further on; "none": the prefix has no
                    position, and inputs may be as long as without it
    init            "random": normal, as PEFT; "vocabulary": the keys and values of words drawn from the
                    vocabulary, in the frozen model; "text": those of `text`, repeated or cut to the number
                    of tokens: a causal model starts as if it had read the text
    tokenizer       a tokenizer, or None: the one of the model's own folder
    share           the name of another adapter of the model: one prefix for both, trained by the rows of
                    either, in memory once. Its tokens, attentions and network are then those of the other;
                    saved alone an adapter is whole; saved together the prefix is stored once

    Attention is computed by pefast while an adapter with a prefix is active, and as before otherwise. Every
    query sees the prefix, beyond a sliding window too. Vectors P [l, d] before the input, which are called
    prefix tuning as well, are Prompt.
    """

    tokens: int = 20
    reparameterize: bool | int = False
    attentions: str | Sequence[str] | None = None
    positions: str = "shifted"
    init: str = "random"
    text: str | None = None
    tokenizer: Any = None
    share: str | None = None

    kind: ClassVar[str] = "prefix"
    peft_types: ClassVar[tuple[str, ...]] = ("PREFIX_TUNING", "PEFAST_PREFIX")
    prompt_learning: ClassVar[bool] = True
    # the tensor of a file that shared its prefix: it shares again where the other has the same numbers
    saved = None

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise ValueError(f"Prefix: tokens is {self.tokens!r}; a whole number from 1 up would be right")
        if not isinstance(self.reparameterize, int) or self.reparameterize < 0:
            raise ValueError(
                f"Prefix: reparameterize is {self.reparameterize!r}; False, True or a hidden size is right"
            )
        if self.positions not in ("shifted", "none"):
            raise ValueError(f"Prefix: positions is {self.positions!r}; shifted or none would be right")
        if self.init not in ("random", "vocabulary", "text"):
            raise ValueError(f"Prefix: init is {self.init!r}; random, vocabulary or text would be right")
        if self.init == "text" and not self.text:
            raise ValueError(
                "Prefix: init is 'text' and no text came; text='classify this review' would be right"
            )
        if self.init != "random" and self.reparameterize:
            raise ValueError(
                f"Prefix: init is {self.init!r} and a network makes the prefix; random, or"
                " no network, would be right"
            )
        if self.attentions is not None and (
            not self._kinds() or not all(kind in KINDS for kind in self._kinds())
        ):
            raise ValueError(
                f"Prefix: attentions is {self.attentions!r}; {', '.join(KINDS)}, several or None is right"
            )

    def _kinds(self) -> tuple[str, ...] | None:
        if isinstance(self.attentions, str):
            return (self.attentions,)
        return None if self.attentions is None else tuple(self.attentions)

    def plan(self, model: nn.Module) -> _Plan:
        """Where it will enter. Changes nothing; raises ValueError where it does not fit the model."""
        places = _attentions(model)
        if why := why_not_lend(model):
            raise ValueError(f"Prefix: {type(model).__name__} cannot have one: {why}")
        has = dict.fromkeys(kind for _, kind in places)
        kinds = tuple(has) if self.attentions is None else self._kinds()
        if odd := [kind for kind in kinds if kind not in has]:
            raise ValueError(
                f"Prefix: {type(model).__name__} has no attention of kind {odd[0]!r}; it has {', '.join(has)}"
            )
        body = backbone(model)
        host = getattr(body, "prefix_host", None)
        if host is not None and host.positions != self.positions:
            raise ValueError(
                f"Prefix: positions is {self.positions!r} and the model has a prefix with {host.positions!r};"
                " one for all would be right"
            )
        shared = self._shared(host)
        tokens = self.tokens if shared is None else shared.tokens
        left = positions_left(body)
        if self.positions == "shifted" and left is not None and tokens >= left:
            raise ValueError(
                f"Prefix: tokens is {tokens} and the model has {left} positions; fewer would be right"
            )
        ids = self._ids(model) if self.init == "text" and shared is None else None
        return _Plan(body, _sizes(model.config, places, kinds), shared, ids)

    def _ids(self, model: nn.Module) -> Tensor:  # [1, V]
        tokenizer = self.tokenizer
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"Prefix: the tokenizer finds no token in {self.text!r}")
        repeats = -(-self.tokens // len(ids))
        return torch.tensor([(ids * repeats)[: self.tokens]], device=next(model.parameters()).device)

    def _shared(self, host: PrefixHost | None) -> PrefixTokens | None:
        """The prefix of the adapter that it shares with. Raises ValueError where there is none."""
        if self.share is None:
            return None
        other = host.prefixes[self.share] if host is not None and self.share in host.prefixes else None
        if other is None and self.saved is None:
            raise ValueError(
                f"Prefix: share is {self.share!r}; the name of an adapter with a prefix would be right"
            )
        if other is not None and self.saved is not None:
            flat = other.flat().detach()
            same = flat.shape == self.saved.shape and torch.equal(flat.cpu(), self.saved.to(flat.dtype))
            return other if same else None
        return other

    def enter(self, model: nn.Module, name: str, key: str, plan: _Plan, router) -> None:
        """Puts the prefix on the backbone, where the attentions find it."""
        host = getattr(plan.body, "prefix_host", None) or PrefixHost(router, self.positions)
        if name in host.prefixes:
            raise ValueError("attach: one Prefix for each adapter name would be right")
        tokens = plan.shared
        if tokens is None:
            weight = next(plan.body.parameters())
            wide = plan.sizes.heads * plan.sizes.width
            hidden = wide if self.reparameterize is True else int(self.reparameterize)
            place = {"device": weight.device, "dtype": master_dtype(weight.dtype)}
            tokens = PrefixTokens(self.tokens, plan.sizes, hidden, **place)
            ids = plan.ids
            if self.init == "vocabulary":
                words = plan.body.get_input_embeddings().num_embeddings
                ids = torch.randint(words, (1, self.tokens), device=weight.device)
            if ids is not None:
                tokens.start_from(read_text(model, plan.body, list(plan.sizes.pairs), ids, router))
        add_prefix(model, plan.body, host, name, tokens)

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes the prefix away."""
        drop_prefix(backbone(model), name)

    def switch(self, model: nn.Module, name: str, key: str, on: bool) -> None:
        """Brings the model's attention to pefast while the adapter computes."""
        switch_prefix(model, backbone(model), name, on)

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """What PEFT's file has: the keys and values, without the network that made them."""
        return {"prompt_embeddings": _prefix(model, name).flat()}

    def parameters(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """What trains: the keys and values, or the network."""
        tokens = _prefix(model, name)
        return dict(tokens.named_parameters()) if tokens.hidden else self.tensors(model, name, key)

    def resume(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """The network, where there is one."""
        tokens = _prefix(model, name)
        return dict(tokens.named_parameters()) if tokens.hidden else {}

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """PEFT's adapter_config.json, with `positions`, `attentions` and `share` beside it."""
        tokens = _prefix(model, name)
        sizes, kinds = tokens.sizes, {kind for path, kind in _attentions(model) if path in tokens.sizes.pairs}
        two = bool(getattr(model.config, "is_encoder_decoder", False))
        config = {
            "peft_type": "PREFIX_TUNING" if not two or kinds == {"decoder"} else "PEFAST_PREFIX",
            "num_virtual_tokens": tokens.tokens,
            "token_dim": sizes.heads * sizes.width,
            "num_transformer_submodules": 2 if two else 1,
            "num_attention_heads": sizes.heads,
            "num_layers": sizes.count,
            "prefix_projection": bool(tokens.hidden),
            "encoder_hidden_size": tokens.hidden or None,
            "positions": self.positions,
            "attentions": [kind for kind in KINDS if kind in kinds],
        }
        return config | ({"share": self.share} if self.share else {})

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return key == "prompt_embeddings"

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Prefix":
        """The settings of a PEFT checkpoint; the values come from its tensor."""
        attentions = config.get("attentions")
        if attentions is None and config.get("num_transformer_submodules") == 2:
            attentions = ["decoder"]
        method = cls(
            tokens=config["num_virtual_tokens"],
            reparameterize=(config["encoder_hidden_size"] or True) if config.get("resumes") else False,
            attentions=attentions,
            positions=config.get("positions", "shifted"),
            share=config.get("share"),
        )
        method.saved = tensors.get("prompt_embeddings")
        return method


def _prefix(model: nn.Module, name: str) -> PrefixTokens:
    return backbone(model).prefix_host.prefixes[name]


def _attentions(model: nn.Module) -> list[tuple[str, str]]:
    """Path and kind of every attention of the model: encoder, decoder, or a decoder's cross-attention."""
    found = []
    for block in blocks(model, "Prefix"):
        stack = "encoder" if re.search(r"(^|\.)encoder\.", block.path) else "decoder"
        for sublayer in block.sublayers:
            if sublayer.kind in ("attention", "cross"):
                kind = "cross" if sublayer.kind == "cross" else stack
                found.append((sublayer.entry.rpartition(".")[0], kind))
    return found


def _sizes(config, places: list[tuple[str, str]], kinds: Sequence[str]) -> Sizes:
    """Which pair of the prefix each attention reads, and how wide it is."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    chosen = [path for path, kind in places if kind in kinds]
    if getattr(config, "is_encoder_decoder", False) and set(kinds) == {"decoder"}:
        # as PEFT lays it out: four entries a block, of which it has half, so that it begins again
        count = config.num_hidden_layers
        return Sizes({path: 2 * i % count for i, path in enumerate(chosen)}, count, heads, width)
    return Sizes({path: i for i, path in enumerate(chosen)}, len(chosen), heads, width)
