"""(IA)³: one trained factor for each column of keys, values and the feed-forward's inner activations.

    y ← y ⊙ l      l [N]
    x ← x ⊙ l      l [K], where a feed-forward layer reads

Paper: Liu et al. 2022, arXiv:2205.05638, section 3.3. Files are PEFT's: peft_type IA3, tensors
`<path>.ia3_l`, [N, 1], and [1, K] for feed-forward layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.gain import Gain
from pefast.layers.hosts import add_delta
from pefast.layers.lowrank import master_dtype
from pefast.methods.method import Method
from pefast.methods.places import deltas_of, matches, pick_linears

# keys and values, and then what reads the inner activations; PEFT's choice
_USUAL = {
    "bert": (("key", "value"), ("output.dense",)),
    "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "t5": (("k", "v"), ("wo",)),
    "mt5": (("k", "v"), ("wo",)),
    "llama": (("k_proj", "v_proj"), ("down_proj",)),
}
_USUAL |= dict.fromkeys(("roberta", "xlm-roberta", "electra", "camembert"), _USUAL["bert"])


@dataclass
class IA3(Method):
    """Factors on what the chosen linear layers give, or read; all 1, so it starts as the base model.

    targets      names of linear layers, a regular expression or "all-linear", as LoRA's; None: keys, values
                 and the feed-forward's last layer, as PEFT chooses them
    feedforward  those of them whose input is multiplied instead; None with targets None: the feed-forward's
    """

    targets: str | Sequence[str] | None = None
    feedforward: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None

    kind: ClassVar[str] = "ia3"
    peft_types: ClassVar[tuple[str, ...]] = ("IA3",)
    merges: ClassVar[bool] = True

    def check(self) -> None:
        """Nothing that could be wrong for every model."""

    def plan(self, model: nn.Module) -> list[tuple[str, str]]:
        """(path, "input" or "output") of the layers it will enter. Raises ValueError where none matches."""
        targets, inputs = self.targets, self.feedforward
        if targets is None:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            outputs, usual = _USUAL.get(kind, _USUAL["llama"])
            inputs = usual if inputs is None else inputs
            targets = [*outputs, *([inputs] if isinstance(inputs, str) else inputs)]
        paths = pick_linears(model, targets, self.exclude, self.layers)
        return [(path, "input" if inputs and matches(path, inputs) else "output") for path in paths]

    def enter(self, model: nn.Module, name: str, key: str, plan: list[tuple[str, str]], router) -> None:
        """Puts its factors on the planned layers."""
        for path, at in plan:
            linear = model.get_submodule(path)
            size = format_of(linear).weight(linear).shape[1 if at == "input" else 0]
            place = {"device": linear.weight.device, "dtype": master_dtype(linear.weight.dtype)}
            add_delta(linear, router, name, key, Gain(size, at, **place))

    def parameters(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """The factors themselves."""
        return {f"base_model.model.{path}.ia3_l": gain.l for path, gain in deltas_of(model, name, key)}

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """The factors in the shapes that PEFT's files have."""
        return {
            f"base_model.model.{path}.ia3_l": gain.l[None, :] if gain.gains == "input" else gain.l[:, None]
            for path, gain in deltas_of(model, name, key)
        }

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """PEFT's adapter_config.json."""
        found = dict(deltas_of(model, name, key))
        hosts = [model.get_submodule(path) for path in found]
        return {
            "peft_type": "IA3",
            "target_modules": sorted(found),
            "feedforward_modules": sorted(path for path, gain in found.items() if gain.gains == "input"),
            "fan_in_fan_out": any(format_of(host).transposed(host) for host in hosts),
            "init_ia3_weights": True,
        }

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return key.endswith(".ia3_l")

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "IA3":
        """The settings of a PEFT checkpoint."""
        shapes = {
            key.removeprefix("base_model.model.").removesuffix(".ia3_l"): tensor.shape
            for key, tensor in tensors.items()
            if cls.owns(key)
        }
        inputs = sorted(path for path, shape in shapes.items() if len(shape) == 2 and shape[0] == 1)
        return cls(targets=sorted(shapes), feedforward=inputs)
