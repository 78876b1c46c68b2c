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

from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.gain import Directed
from pefast.layers.hosts import add_delta
from pefast.layers.lowrank import LowRank, check_rate, lora_scale, master_dtype
from pefast.methods.method import Method
from pefast.methods.places import check_expression, deltas_of, pick_linears

# what PEFT adds to a layer's path
_OWN = re.compile(r"\.(lora_[AB]\.weight|lora_magnitude_vector)$")


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
    plus: float = 1.0
    ranks: dict[str, int] | None = None
    alphas: dict[str, float] | None = None

    kind: ClassVar[str] = "lora"
    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)
    merges: ClassVar[bool] = True

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        lora_scale("LoRA", self.rank, self.alpha, self.rslora)
        check_rate("LoRA", self.dropout)
        if not isinstance(self.plus, Real) or not self.plus > 0:
            raise ValueError(f"LoRA: plus is {self.plus!r}; a factor above 0 would be right")
        for pattern in (*(self.ranks or {}), *(self.alphas or {})):
            check_expression("LoRA", pattern)

    def plan(self, model: nn.Module) -> list[str]:
        """Paths of the layers it will enter. Changes nothing; raises ValueError where nothing matches."""
        return pick_linears(model, self.targets, self.exclude, self.layers)

    def enter(self, model: nn.Module, name: str, key: str, plan: list[str], router) -> None:
        """Puts its deltas on the planned layers."""
        for path in plan:
            linear = model.get_submodule(path)
            weight = format_of(linear).weight(linear)  # [N, K]
            rank, alpha = _for_path(self.ranks, path, self.rank), _for_path(self.alphas, path, self.alpha)
            settings = {
                "scale": lora_scale("LoRA", rank, alpha, self.rslora),
                "dropout": self.dropout,
                "device": linear.weight.device,
                "dtype": master_dtype(linear.weight.dtype),
            }
            if self.dora:
                delta = Directed(rank, weight, **settings)
            else:
                delta = LowRank(rank, *weight.shape[::-1], **settings)
            add_delta(linear, router, name, key, delta)

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its parameters under the names that the file gives them."""
        found = {}
        for path, delta in deltas_of(model, name, key):
            found[f"base_model.model.{path}.lora_A.weight"] = delta.a
            found[f"base_model.model.{path}.lora_B.weight"] = delta.b
            if self.dora:
                found[f"base_model.model.{path}.lora_magnitude_vector"] = delta.m
        return found

    def rates(self, model: nn.Module, name: str, key: str) -> dict[str, float]:
        """LoRA+'s factor, for every b."""
        names = self.tensors(model, name, key) if self.plus != 1 else ()
        return {each: self.plus for each in names if each.endswith(".lora_B.weight")}

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
            **({"lora_plus": self.plus} if self.plus != 1 else {}),
            "bias": "none",
            "fan_in_fan_out": any(format_of(host).transposed(host) for host in hosts.values()),
            "target_modules": sorted(hosts),
            "rank_pattern": _in_any_order(self.ranks or {}, hosts),
            "alpha_pattern": _in_any_order(alphas, hosts),
            "init_lora_weights": True,
        }

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return _OWN.search(key) is not None

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "LoRA":
        """The settings of a PEFT checkpoint. Raises ValueError for PEFT options that change the arithmetic
        and are not here."""
        for option in (
            "lora_bias",
            "alora_invocation_tokens",
            "target_parameters",
            "layer_replication",
            "use_qalora",
        ):
            if config.get(option):
                raise ValueError(f"load: the checkpoint uses {option}, which pefast's LoRA does not have")
        if config.get("bias", "none") != "none":
            raise ValueError(
                f"load: the checkpoint has bias={config['bias']!r}; pefast's LoRA loads bias='none'"
            )
        paths = {_OWN.sub("", key).removeprefix("base_model.model.") for key in tensors if cls.owns(key)}
        return cls(
            rank=config["r"],
            alpha=config.get("lora_alpha"),
            dropout=config.get("lora_dropout", 0.0),
            targets=sorted(paths),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
            plus=config.get("lora_plus", 1.0),
            ranks=config.get("rank_pattern") or None,
            alphas=config.get("alpha_pattern") or None,
        )


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
