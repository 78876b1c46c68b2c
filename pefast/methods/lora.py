"""LoRA: a low-rank update beside any linear layer. Hu et al. 2021, arXiv:2106.09685.

DoRA (Liu et al. 2024, arXiv:2402.09353), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) and LoRA+ (Hayou et
al. 2024, arXiv:2402.12354) are settings of it. Files are Hugging Face PEFT's own: adapter_config.json with
peft_type LORA, tensors `<path>.lora_A.weight` [R, K], `<path>.lora_B.weight` [N, R] and, for DoRA,
`<path>.lora_magnitude_vector` [N].
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.gain import Directed
from pefast.layers.hosts import add_delta
from pefast.layers.lowrank import Lookup, LowRank, Shifted, check_rate, lora_scale, master_dtype
from pefast.methods.lora_start import STARTS, factors
from pefast.methods.method import Method
from pefast.methods.places import check_expression, deltas_of, pick_embeddings, pick_linears

# what PEFT adds to a layer's path
_OWN = re.compile(r"\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_[AB])$")
# starts of PEFT that took something else out of the base model's weight than is known here
_MOVED = ("corda", "loftq", "lora_ga")


@dataclass
class LoRA(Method):
    """scale · dropout(x) aᵀ bᵀ beside each chosen linear layer; a random, b zero, so it starts as the base
    model.

    targets     "all-linear" (every linear but the output embedding and the task head, as PEFT means it), a
                regular
                expression for whole paths, or names: whole paths or their ends ("q_proj", "mlp.up_proj")
    exclude     the same forms; taken out of targets
    layers      numbers of the blocks to choose from; None: all
    rank, alpha scale is alpha / rank, or alpha / √rank with rslora; alpha None means alpha = rank
    dropout     on x, its own mask for each layer
    dora        trains the length of each row of the weight apart from its direction
    init        "zero" (b is zero), "pissa" or "olora": where a and b start, methods/lora_start.py
    bias        a bias d trains with b: scale · (dropout(x) aᵀ bᵀ + d); such a LoRA does not merge
    plus        LoRA+: the learning rate of b as a multiple of that of a, for pefast.parameter_groups
    ranks, alphas   {path: value} for layers that differ, as PEFT's rank_pattern and alpha_pattern
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    rslora: bool = False
    dora: bool = False
    init: str = "zero"
    bias: bool = False
    plus: float = 1.0
    ranks: dict[str, int] | None = None
    alphas: dict[str, float] | None = None

    kind: ClassVar[str] = "lora"
    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)

    @property
    def merges(self) -> bool:
        """Whether it is a change of the weight and nothing else."""
        return not self.bias

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        lora_scale("LoRA", self.rank, self.alpha, self.rslora)
        check_rate("LoRA", self.dropout)
        if self.init not in ("zero", *STARTS):
            raise ValueError(
                f"LoRA: init is {self.init!r}; 'zero', {', '.join(map(repr, STARTS))} would be right"
            )
        if self.dora and self.init in STARTS:
            raise ValueError(
                f"LoRA: init={self.init!r} and dora=True are not known together; one of them is right"
            )
        if self.bias and (self.dora or self.init in STARTS):
            raise ValueError(
                "LoRA: bias=True is known for a plain LoRA; without dora and with init='zero' is right"
            )
        if not isinstance(self.plus, Real) or not self.plus > 0:
            raise ValueError(f"LoRA: plus is {self.plus!r}; a factor above 0 would be right")
        for pattern in (*(self.ranks or {}), *(self.alphas or {})):
            check_expression("LoRA", pattern)

    def plan(self, model: nn.Module) -> list[str]:
        """Paths of the layers it will enter. Changes nothing; raises ValueError where nothing matches."""
        tables = pick_embeddings(model, self.targets, self.exclude)
        if tables and self.dora:
            raise ValueError(
                f"LoRA: {tables[0]} is a table of embeddings, which has no DoRA; dora=False is right"
            )
        found = pick_linears(model, self.targets, self.exclude, self.layers, needed=not tables)
        for path in found if self.init in STARTS else ():
            linear = model.get_submodule(path)
            rank, most = _for_path(self.ranks, path, self.rank), min(linear.weight.shape)
            if rank > most:
                raise ValueError(
                    f"LoRA: rank is {rank}; {path} has no more than {most} for {self.init} to start at"
                )
        return tables + found

    def enter(self, model: nn.Module, name: str, key: str, plan: list[str], router) -> None:
        """Puts its deltas on the planned layers."""
        for path in plan:
            linear = model.get_submodule(path)
            rank, alpha = _for_path(self.ranks, path, self.rank), _for_path(self.alphas, path, self.alpha)
            settings = {
                "scale": lora_scale("LoRA", rank, alpha, self.rslora),
                "dropout": self.dropout,
                "device": linear.weight.device,
                "dtype": master_dtype(linear.weight.dtype),
            }
            add_delta(linear, router, name, key, self._delta(linear, rank, settings))

    def _delta(self, linear: nn.Module, rank: int, settings: dict) -> LowRank:
        if isinstance(linear, nn.Embedding):
            return Lookup(rank, *linear.weight.shape, **settings)
        weight = format_of(linear).weight(linear)  # [N, K]
        if self.dora:
            return Directed(rank, weight, **settings)
        if self.init in STARTS:
            return Shifted(*factors(self.init, weight, rank, settings["scale"]), **settings)
        delta = LowRank(rank, *weight.shape[::-1], **settings)
        if self.bias:
            delta.d = nn.Parameter(torch.zeros(len(weight), device=weight.device, dtype=settings["dtype"]))
        return delta

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its parameters under the names that the file gives them."""
        found = {}
        for path, delta in deltas_of(model, name, key):
            found |= dict(zip(file_names(path, delta), (delta.a, delta.b), strict=True))
            if delta.d is not None:
                found[f"base_model.model.{path}.lora_B.bias"] = delta.d
            if self.dora:
                found[f"base_model.model.{path}.lora_magnitude_vector"] = delta.m
        return found

    def rates(self, model: nn.Module, name: str, key: str) -> dict[str, float]:
        """LoRA+'s factor, for every b."""
        names = self.tensors(model, name, key) if self.plus != 1 else ()
        return {each: self.plus for each in names if each.endswith((".lora_B.weight", "_B"))}

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """PEFT's adapter_config.json."""
        hosts = {path: model.get_submodule(path) for path, _ in deltas_of(model, name, key)}
        alphas = dict(self.alphas or {})
        if self.alpha is None:
            # here a layer of another rank has its own rank as alpha; PEFT would take the common one
            alphas = {**alphas, **{key: r for key, r in (self.ranks or {}).items() if key not in alphas}}
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "lora_bias": self.bias,
            **({"lora_plus": self.plus} if self.plus != 1 else {}),
            "bias": "none",
            "fan_in_fan_out": any(
                form.transposed(host) for host in hosts.values() if (form := format_of(host))
            ),
            "target_modules": sorted(hosts),
            "rank_pattern": _in_any_order(self.ranks or {}, hosts),
            "alpha_pattern": _in_any_order(alphas, hosts),
            "init_lora_weights": True if self.init == "zero" else self.init,
        }

    @staticmethod
    def repeats(key: str) -> bool:
        """PEFT writes the whole table beside a LoRA of it."""
        return key.endswith(".base_layer.weight")

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return _OWN.search(key) is not None

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "LoRA":
        """The settings of a PEFT checkpoint. Raises ValueError for PEFT options that change the arithmetic
        and are not here."""
        for option in (
            "alora_invocation_tokens",
            "target_parameters",
            "layer_replication",
            "use_qalora",
        ):
            if config.get(option):
                raise ValueError(f"load: the checkpoint uses {option}, which pefast's LoRA does not have")
        # the model's own biases come as a method beside this one
        if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
            raise ValueError(f"load: the checkpoint has bias={bias!r}; none, all or lora_only is right")
        paths = {_OWN.sub("", key).removeprefix("base_model.model.") for key in tensors if cls.owns(key)}
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith(_MOVED):
            raise ValueError(
                f"load: the checkpoint counts from weights that {start} changed;"
                " PEFT can write it as a plain LoRA"
            )
        return cls(
            rank=config["r"],
            alpha=config.get("lora_alpha"),
            dropout=config.get("lora_dropout", 0.0),
            targets=sorted(paths),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
            bias=config.get("lora_bias", False),
            init=next((known for known in STARTS if start.startswith(known)), "zero"),
            plus=config.get("lora_plus", 1.0),
            ranks=config.get("rank_pattern") or None,
            alphas=config.get("alpha_pattern") or None,
        )


def file_names(path: str, delta: LowRank) -> tuple[str, str]:
    """What PEFT calls a and b of a delta on the layer of this path."""
    kind = (
        ("lora_embedding_A", "lora_embedding_B")
        if isinstance(delta, Lookup)
        else ("lora_A.weight", "lora_B.weight")
    )
    return tuple(f"base_model.model.{path}.{name}" for name in kind)


def _in_any_order(pattern: dict, paths) -> dict:
    """A pattern that means the same after its keys were sorted, which is how PEFT and pefast write them."""
    ordered = dict(sorted(pattern.items()))
    values = {path: _for_path(pattern, path, None) for path in paths}
    if all(_for_path(ordered, path, None) == value for path, value in values.items()):
        return pattern
    return {path: value for path, value in values.items() if value is not None}


def _for_path(pattern: dict | None, path: str, otherwise):
    """The value that PEFT's rank_pattern or alpha_pattern gives a path: the first key that ends it, as a
    regular expression."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return otherwise
