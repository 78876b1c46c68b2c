"""What Heads, Subnetwork and Importance share: they train some entries of tensors, and keep which.

adapter_config.json holds the kind of each tensor's index under "kinds", the file `<path>.indices` [C] (rising
numbers of rows, columns, tiles or elements) and `<path>.values`; so a folder loads without choosing again.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from pefast.methods.replacing import Plan, Replacing, own_tensors, replaced_by_path, shape_of
from pefast.ops.partial_linear import KINDS, Index


class Choosing(Replacing):
    """Whoever inherits is a dataclass with a field `saved`, and says in `choose` what is chosen."""

    saved: Plan | None

    def choose(self, model: nn.Module) -> Plan:
        """The entries that train. Changes nothing; raises ValueError where nothing fits."""
        raise NotImplementedError

    def plan(self, model: nn.Module) -> Plan:
        """The entries that train: those of a folder, or those that the settings choose. Changes nothing."""
        if self.saved is not None:
            _check_saved(type(self).__name__, model, self.saved)
            return {path: self.saved[path] for path in own_tensors(model) if path in self.saved}
        return self.choose(model)

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """What adapter_config.json says of it."""
        kinds = {}
        for path, (_, replacement) in replaced_by_path(model, name, key).items():
            index = replacement.index
            kinds[path] = ["all"] if index is None else [index.kind, *index.tile]
        return {"peft_type": self.peft_types[0], "kinds": kinds, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """What the folder says of how the entries were chosen, for people to read."""
        return {}

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Choosing":
        """The same entries again; the values come from the tensors. Raises ValueError for entries that cannot
        be."""
        saved: Plan = {}
        for path, (kind, *tile) in config["kinds"].items():
            if kind == "all":
                saved[path] = None
                continue
            at = tensors.get(f"{path}.indices")
            if at is None:
                raise ValueError(f"{cls.__name__}: there is no tensor {path}.indices")
            saved[path] = Index(kind, at.to(torch.int64), tuple(tile))
        known = {field.name for field in fields(cls)} - {"saved"}
        return cls(**{name: value for name, value in config.items() if name in known}, saved=saved)


def _check_saved(who: str, model: nn.Module, saved: Plan) -> None:
    own = own_tensors(model)
    for path, index in saved.items():
        if path not in own:
            raise ValueError(f"{who}: the model has no tensor {path}")
        if index is not None:
            check_index(who, path, index, shape_of(model, path))


def check_index(who: str, path: str, index: Index, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the index names entries of a tensor of that shape, rising, each once."""
    h, wide = index.tile
    if index.kind not in KINDS or (index.kind != "elements" and len(shape) != 2):
        raise ValueError(f"{who}: {path} is {list(shape)} and has no {index.kind}")
    if index.kind == "tiles" and (h < 1 or wide < 1 or shape[0] % h or shape[1] % wide):
        raise ValueError(f"{who}: {path} is {list(shape)}, which tiles of {h}x{wide} do not divide")
    total = {"rows": shape[0], "columns": shape[-1]}.get(index.kind, torch.Size(shape).numel() // (h * wide))
    at = index.at
    if at.dim() != 1 or (len(at) and (at[0] < 0 or at[-1] >= total or not (at[1:] > at[:-1]).all())):
        raise ValueError(
            f"{who}: the indices of {path} are not rising numbers of its {total} {index.kind}, each once"
        )
