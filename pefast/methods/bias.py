"""BitFit: only biases train. Ben Zaken et al. 2021, arXiv:2106.10199.

Files hold the biases under the model's own names.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor, nn

from pefast.methods.layers import block_numbers, in_blocks
from pefast.methods.replacing import Plan, Replacing, own_tensors


@dataclass
class Bias(Replacing):
    """Trained copies of the biases, where a model has some: the families of BERT and GPT-2.

    layers      numbers of the blocks, from the end below zero; None: all, and what lies outside of blocks
    norms       whether the biases of normalisations train too
    """

    layers: Sequence[int] | None = None
    norms: bool = True

    kind: ClassVar[str] = "bias"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_BIAS",)

    def check(self) -> None:
        """There is nothing that no model could take."""

    def plan(self, model: nn.Module) -> Plan:
        """Every chosen bias. Changes nothing; raises ValueError where there is none."""
        inside = in_blocks(model, "Bias", block_numbers(model, "Bias", self.layers)) if self.layers else None
        found = []
        for path in own_tensors(model):
            owner, _, tensor = path.rpartition(".")
            norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
            if tensor == "bias" and (self.norms or not norm) and (inside is None or path.startswith(inside)):
                found.append(path)
        if not found:
            raise ValueError(
                f"Bias: this {type(model).__name__} has no bias there; Layers or LoRA would be right for it"
            )
        return dict.fromkeys(found)

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """What adapter_config.json says of it."""
        layers = None if self.layers is None else list(self.layers)
        return {"peft_type": "PEFAST_BIAS", **asdict(self), "layers": layers}

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Bias":
        """The settings that `config` wrote."""
        return cls(config["layers"], config["norms"])
