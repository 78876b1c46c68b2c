"""Full fine-tuning: every parameter trains, as an adapter that can be taken off again.

Files hold the tensors under the model's own names, one that modules share once.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pefast.methods.replacing import Plan, Replacing, own_tensors


@dataclass
class Full(Replacing):
    """Trained copies of all the model's parameters; the task head's is the one that attach makes.

    The base model stays beside its copy, so the weights take twice the memory. Copies have the model's own
    dtype: load the model in float32 and train under autocast where bf16 steps would be too coarse.
    """

    kind: ClassVar[str] = "full"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_FULL",)

    def check(self) -> None:
        """There are no settings."""

    def plan(self, model: nn.Module) -> Plan:
        """Every parameter of the base model. Changes nothing."""
        return dict.fromkeys(own_tensors(model))

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """What adapter_config.json says of it."""
        return {"peft_type": "PEFAST_FULL"}

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Full":
        """The same method again; the values come from its tensors."""
        return cls()
