"""Bottleneck adapters, parallel or serial, around attention and feed-forward: up(σ(down(x))).

Parallel (He et al. 2021, arXiv:2110.04366) reads the sublayer's input and is added to its output; serial
(Houlsby et al. 2019, arXiv:1902.00751) reads and is added to the sublayer's output, before the residual sum.
No maintained library on transformers v5 has a file format for them, so this one is pefast's: tensors
`<path>.a`, `.b`, `.c`, `.d`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor, nn

from pefast.architectures import Sublayer, blocks
from pefast.formats import format_of
from pefast.layers.hosts import Across, After, Tap, add_delta
from pefast.layers.lowrank import check_activation, check_rate, master_dtype
from pefast.methods.method import Method
from pefast.methods.places import deltas_of


@dataclass
class Adapter(Method):
    """scale · (σ(dropout(x) aᵀ + c) bᵀ + d) in each chosen block; b and d zero, so it starts as the base
    model.

    size        width of the bottleneck; None: the block's width divided by `reduction`
    reduction   the reduction factor, used where size is None
    parallel    True: from the sublayer's input to its output; False: from its output to its output
    around      "attention", "feedforward", "cross" (an encoder-decoder's cross-attention), or several
    activation  relu, gelu, silu, tanh ... (pefast.eager.activations.ACTIVATIONS)
    layers      numbers of the blocks; None: all
    """

    size: int | None = None
    reduction: float = 16
    parallel: bool = True
    around: str | Sequence[str] = ("attention", "feedforward")
    activation: str = "relu"
    dropout: float = 0.0
    scale: float = 1.0
    layers: Sequence[int] | None = None

    kind: ClassVar[str] = "adapter"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_ADAPTER",)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        check_rate("Adapter", self.dropout)
        check_activation("Adapter", self.activation)
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(
                f"Adapter: size is {self.size!r}; a whole number from 1 up, or None, would be right"
            )
        if self.size is None and not self.reduction > 0:
            raise ValueError(f"Adapter: reduction is {self.reduction!r}; a number above 0 would be right")
        if odd := set(self._around()) - {"attention", "feedforward", "cross"}:
            raise ValueError(f"Adapter: around has {sorted(odd)}; attention, feedforward and cross are there")

    def _around(self) -> tuple[str, ...]:
        return (self.around,) if isinstance(self.around, str) else tuple(self.around)

    def plan(self, model: nn.Module) -> list[Sublayer]:
        """The sublayers it will enter. Changes nothing; raises ValueError where there are none."""
        found = [
            sublayer
            for block in blocks(model, "Adapter")
            if self.layers is None or block.number in self.layers
            for sublayer in block.sublayers
            if sublayer.kind in self._around()
        ]
        if not found:
            raise ValueError(
                f"Adapter: the model has no {' or '.join(self._around())} in layers {self.layers}"
            )
        return found

    def enter(self, model: nn.Module, name: str, key: str, plan: list[Sublayer], router) -> None:
        """Puts one delta on each sublayer's exit, and for a parallel one a tap at its entry."""
        for sublayer in plan:
            entry, exit = model.get_submodule(sublayer.entry), model.get_submodule(sublayer.exit)
            n = format_of(exit).weight(exit).shape[0]
            k = format_of(entry).weight(entry).shape[1] if self.parallel else n
            settings = {
                "scale": self.scale,
                "activation": self.activation,
                "dropout": self.dropout,
                "biases": True,
                "device": exit.weight.device,
                "dtype": master_dtype(exit.weight.dtype),
            }
            size = self.size or max(1, round(n / self.reduction))
            delta = (Across if self.parallel else After)(size, k, n, **settings)
            add_delta(exit, router, name, key, delta)
            if self.parallel:
                delta.tap = entry.register_forward_pre_hook(Tap(delta, name, router))

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes the taps off the entries."""
        for _, delta in deltas_of(model, name, key):
            if isinstance(delta, Across):
                delta.tap.remove()

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its parameters under the names that the file gives them."""
        return {
            f"{path}.{part}": parameter
            for path, delta in deltas_of(model, name, key)
            for part, parameter in delta.named_parameters()
        }

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """What adapter_config.json says of it."""
        settings = asdict(self)
        settings["around"] = list(self._around())
        settings["layers"] = None if self.layers is None else list(self.layers)
        return {"peft_type": "PEFAST_ADAPTER", **settings}

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return not key.startswith("base_model.")

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Adapter":
        """The settings that `config` wrote."""
        known = cls.__dataclass_fields__
        return cls(**{key: value for key, value in config.items() if key in known})
