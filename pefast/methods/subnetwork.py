"""A sub-network trains: entries of the weights that a mask picks; only they cost gradient and optimizer.

The mask is given, drawn at random, or takes the largest weights; gates that are learned come from
pefast.learn_gates. A fixed sparse mask: Sung et al. 2021, arXiv:2111.09839.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefast.methods.choosing import Choosing, check_index
from pefast.methods.replacing import Plan, own_tensors, shape_of, turned
from pefast.methods.units import (
    check_share,
    check_unit,
    head_plans,
    index_of,
    pick_tensors,
    sums,
    union,
    unit_size,
)
from pefast.ops.partial_linear import Index


@dataclass
class Subnetwork(Choosing):
    """Trained copies of the entries that a mask picks.

    mask        {path of a parameter: True where it trains}, each as large as the parameter; or what `choose`
                of pefast.score and pefast.learn_gates gives
    fraction    without a mask: the share of each tensor's units that train, at least one
    by          "random", by `seed`; or "magnitude": the units with the largest mean |w|
    unit        row, column, head, tile, element or tensor
    tile        size of a tile, or height and width
    targets, exclude, layers    tensors to choose from, as LoRA's; targets="all" takes every parameter
    """

    mask: Mapping[str, Tensor | Index | None] | None = None
    fraction: float | None = None
    by: str = "random"
    unit: str = "element"
    tile: int | Sequence[int] = 16
    seed: int = 0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    saved: Plan | None = None

    kind: ClassVar[str] = "subnetwork"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_SUBNETWORK",)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if self.saved is not None:
            return
        if (self.mask is None) == (self.fraction is None):
            raise ValueError("Subnetwork: a mask or a fraction, and not both, would be right")
        if self.fraction is not None:
            check_share("Subnetwork", "fraction", self.fraction)
        if self.by not in ("random", "magnitude"):
            raise ValueError(f"Subnetwork: by is {self.by!r}; random or magnitude would be right")
        check_unit("Subnetwork", self.unit, self.tile)

    def choose(self, model: nn.Module) -> Plan:
        """The entries that train. Raises ValueError for a mask that does not fit the model."""
        if self.mask is not None:
            return self._by_mask(model)
        generator = torch.Generator().manual_seed(self.seed)
        if self.unit == "head":
            plans = head_plans(model, self.layers)
            scores = torch.stack([_magnitude(model, plan) for plan in plans])
            return union(own_tensors(model), [plans[i] for i in self._pick(scores, generator).tolist()])
        plan: Plan = {}
        for path in pick_tensors(model, self.targets, self.exclude, self.layers):
            index = index_of("Subnetwork", path, shape_of(model, path), self.unit, self.tile)
            if index is None:
                plan[path] = None
            else:
                at = self._pick(sums(_formula(model, path).abs(), index), generator)
                plan[path] = index._replace(at=at)
        if self.unit == "tensor":
            means = torch.stack([_formula(model, path).float().abs().mean() for path in plan])
            kept = set(self._pick(means, generator).tolist())
            plan = {path: None for i, path in enumerate(plan) if i in kept}
        return plan

    def _pick(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of the chosen units, rising."""
        count = max(1, round(self.fraction * len(scores)))
        if self.by == "random":
            return torch.randperm(len(scores), generator=generator)[:count].sort().values
        return scores.float().topk(count).indices.cpu().sort().values

    def _by_mask(self, model: nn.Module) -> Plan:
        own, plan = own_tensors(model), {}
        if lost := [path for path in self.mask if path not in own]:
            raise ValueError(
                f"Subnetwork: the mask names {lost[0]}, which is no parameter; names are as {next(iter(own))}"
            )
        for path in own:
            given = self.mask.get(path, False)
            if isinstance(given, Tensor):
                if given.shape != own[path].shape or given.dtype != torch.bool:
                    raise ValueError(
                        f"Subnetwork: the mask of {path} is {given.dtype} {list(given.shape)};"
                        f" torch.bool {list(own[path].shape)} would be right"
                    )
                if given.any():
                    plan[path] = as_index(given.t() if turned(model, path) else given)
            elif given is not False:
                if given is not None:
                    check_index("Subnetwork", path, given, shape_of(model, path))
                plan[path] = given
        if not plan:
            raise ValueError("Subnetwork: the mask is False everywhere; some True would be right")
        return plan

    def settings(self) -> dict[str, Any]:
        """How the entries were chosen."""
        return {"fraction": self.fraction, "by": self.by, "unit": self.unit, "seed": self.seed}


def as_index(mask: Tensor) -> Index | None:
    """The index of a mask: rows or columns where it is made of whole ones, else elements; None for all."""
    if mask.all():
        return None
    if mask.dim() == 2:
        for kind, across in (("rows", 1), ("columns", 0)):
            line = mask.any(across)
            if torch.equal(line.unsqueeze(across).expand_as(mask), mask):
                return Index(kind, line.nonzero()[:, 0].cpu())
    return Index("elements", mask.reshape(-1).nonzero()[:, 0].cpu())


def _formula(model: nn.Module, path: str) -> Tensor:
    own = own_tensors(model)[path].detach()
    return own.t() if turned(model, path) else own


def _magnitude(model: nn.Module, plan: Plan) -> Tensor:
    """The mean |w| of a plan's rows and columns."""
    found, count = torch.zeros(()), 0
    for path, index in plan.items():
        values = sums(_formula(model, path).float().abs(), index)[index.at]
        found, count = (
            found + values.sum().cpu(),
            count + len(values) * unit_size(shape_of(model, path), index),
        )
    return found / count
