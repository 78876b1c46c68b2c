"""Bottleneck adapters: scale · up(σ(down(x))), parallel or serial, around a block's sublayers or any module.

Parallel (He et al. 2021, arXiv:2110.04366) reads what a sublayer reads and is added to its output; serial
(Houlsby et al. 2019, arXiv:1902.00751) reads and is added to the sublayer's output, before the residual sum;
serial on the stream (Pfeiffer et al. 2020, arXiv:2005.00247) reads the sum behind it.
No maintained library on transformers v5 has a file format for them, so this one is pefast's: tensors
`<path>.a`, `.b`, `.c`, `.d`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor, nn

from pefast.architectures import FAMILIES, Sublayer, base_modules, blocks
from pefast.formats import format_of
from pefast.layers.bottleneck import Across, After, Beside, Tap
from pefast.layers.hosts import add_delta
from pefast.layers.lowrank import check_activation, check_rate, master_dtype
from pefast.methods.method import Method
from pefast.methods.places import block_number, deltas_of, pick_modules

KINDS = ("attention", "feedforward", "cross")


@dataclass
class Adapter(Method):
    """scale · (σ(dropout(x) aᵀ + c) bᵀ + d) at each chosen place; b and d zero, so it starts as the base
    model.

    size        width of the bottleneck; None: the place's width divided by `reduction`
    reduction   the reduction factor, used where size is None
    sizes       {number of a block: width} for blocks that differ
    parallel    True: from the sublayer's input to its output; False: from its output to its output
    reads       "sublayer", or "stream": the residual stream instead, parallel before the block's norm, serial
                after the sum and its norm (`par_bn` and `seq_bn` of the library `adapters` read the stream)
    around      "attention", "feedforward", "cross" (an encoder-decoder's cross-attention), or several
    modules     names of modules instead, whole paths or their ends: around these, in any model
    activation  relu, gelu, silu, tanh ... (pefast.eager.activations.ACTIVATIONS)
    norm        "in", "out", "both": a trained LayerNorm before the way down, after the way up; None: neither
    layers      numbers of the blocks; None: all
    """

    size: int | None = None
    reduction: float = 16
    sizes: dict[int, int] | None = None
    parallel: bool = True
    reads: str = "sublayer"
    around: str | Sequence[str] = ("attention", "feedforward")
    modules: str | Sequence[str] | None = None
    activation: str = "relu"
    norm: str | None = None
    dropout: float = 0.0
    scale: float = 1.0
    layers: Sequence[int] | None = None

    kind: ClassVar[str] = "adapter"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_ADAPTER",)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        check_rate("Adapter", self.dropout)
        check_activation("Adapter", self.activation)
        for size in (self.size, *(self.sizes or {}).values()):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(
                    f"Adapter: size is {size!r}; a whole number from 1 up, or None, would be right"
                )
        if self.size is None and not self.reduction > 0:
            raise ValueError(f"Adapter: reduction is {self.reduction!r}; a number above 0 would be right")
        if odd := set(_listed(self.around)) - set(KINDS):
            raise ValueError(
                f"Adapter: around has {sorted(odd)}; attention, feedforward and cross are there,"
                " and modules= takes names"
            )
        if self.reads not in ("sublayer", "stream"):
            raise ValueError(f"Adapter: reads is {self.reads!r}; 'sublayer' or 'stream' would be right")
        if self.reads == "stream" and self.modules is not None:
            raise ValueError("Adapter: modules= has no stream to read; reads='sublayer' would be right")
        if self.norm not in (None, "in", "out", "both"):
            raise ValueError(f"Adapter: norm is {self.norm!r}; 'in', 'out', 'both' or None would be right")

    def plan(self, model: nn.Module) -> list[Sublayer]:
        """The places that it will enter. Changes nothing; raises ValueError where there are none."""
        if self.modules is not None:
            return [
                Sublayer("module", path, path)
                for path in pick_modules(model, self.modules, self.layers, "Adapter")
            ]
        found = [
            sublayer
            for block in self._blocks(model)
            if self.layers is None or block.number in self.layers
            for sublayer in block.sublayers
            if sublayer.kind in _listed(self.around)
        ]
        if not found:
            raise ValueError(
                f"Adapter: the model has no {' or '.join(_listed(self.around))} in layers {self.layers}"
            )
        if self.reads == "stream" and not all(sublayer.stream for sublayer in found):
            raise ValueError(
                f"Adapter: where the stream of a {type(model).__name__} could be read is not known;"
                " reads='sublayer' would be right"
            )
        return found

    def _blocks(self, model: nn.Module):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in FAMILIES:
            raise ValueError(
                f"Adapter: the blocks of model type {kind!r} are not known here; known are"
                f" {', '.join(FAMILIES)}. modules= takes names instead, such as {_such_as(model)}"
            )
        return blocks(model, "Adapter")

    def enter(self, model: nn.Module, name: str, key: str, plan: list[Sublayer], router) -> None:
        """Puts one delta on each place, and a tap where it reads something else than its host does."""
        for place in plan:
            delta = self._delta(model, place)
            add_delta(model.get_submodule(place.exit), router, name, key, delta)
            if isinstance(delta, Across) or self.reads == "stream":
                tapped = model.get_submodule(place.stream if self.reads == "stream" else place.entry)
                delta.tap = tapped.register_forward_pre_hook(Tap(delta, name, router))

    def _delta(self, model: nn.Module, place: Sublayer) -> Across | After | Beside:
        exit = model.get_submodule(place.exit)
        n = _width(model, exit, 0)
        k = (
            n
            if self.reads == "stream" or not self.parallel
            else _width(model, model.get_submodule(place.entry), 1)
        )
        weight = next(exit.parameters())
        size = (self.sizes or {}).get(block_number(place.exit), self.size)
        settings = {
            "scale": self.scale,
            "activation": self.activation,
            "dropout": self.dropout,
            "norm_in": self.norm in ("in", "both"),
            "norm_out": self.norm in ("out", "both"),
            "device": weight.device,
            "dtype": master_dtype(weight.dtype),
        }
        kind = After if not self.parallel else Beside if place.entry == place.exit else Across
        delta = kind(size or max(1, int(n / self.reduction)), k, n, **settings)
        if not self.parallel and self.reads == "stream":
            delta.reads_stream = True
            delta.block_norm = (model.get_submodule(place.norm),) if place.norm else ()
        return delta

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes the taps off."""
        for _, delta in deltas_of(model, name, key):
            if hasattr(delta, "tap"):
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
        settings["around"] = _listed(self.around)
        settings["modules"] = None if self.modules is None else _listed(self.modules)
        settings["layers"] = None if self.layers is None else list(self.layers)
        return {"peft_type": "PEFAST_ADAPTER", **settings}

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return not key.startswith("base_model.")

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Adapter":
        """The settings that `config` wrote."""
        settings = {key: value for key, value in config.items() if key in cls.__dataclass_fields__}
        if settings.get("sizes"):
            # JSON has words as keys
            settings["sizes"] = {int(number): size for number, size in settings["sizes"].items()}
        return cls(**settings)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _width(model: nn.Module, module: nn.Module, side: int) -> int:
    """Columns that a module writes (side 0) or reads (side 1): a linear's own, or the model's width."""
    if form := format_of(module):
        return form.weight(module).shape[side]
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is None:
        raise ValueError(
            f"Adapter: how wide a {type(module).__name__} is cannot be seen; names of linear layers are right"
        )
    return width


def _such_as(model: nn.Module) -> str:
    """Ends of the paths of a few modules that repeat in every block."""
    ends: dict[str, int] = {}
    for path, module in base_modules(model):
        if (
            block_number(path) is not None
            and not path.rsplit(".", 1)[-1].isdigit()
            and any(module.children())
        ):
            end = path.rsplit(".", 1)[-1]
            ends[end] = ends.get(end, 0) + 1
    return ", ".join(sorted(ends, key=lambda end: -ends[end])[:4]) or "the paths of its layers"
