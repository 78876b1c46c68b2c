"""Mixture of fine-tuning by importance: what the gradient says matters to the task trains, and nothing else.

The scores and their papers: pefast/methods/scores.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from pefast.methods.choosing import Choosing
from pefast.methods.replacing import Plan
from pefast.methods.scores import MEASURES, Scores, score
from pefast.methods.units import check_share, check_unit


@dataclass
class Importance(Choosing):
    """Trained copies of the units with the highest scores.

    batches     what `attach` scores the model on: mappings that the model takes as keywords and returns a
                loss for, or anything together with loss(model, batch)
    scores      instead: what pefast.score or pefast.learn_gates gave
    threshold, fraction, budget     one of them: scores above it; a share of the entries; so many entries
    unit        tensor, row, column, head, tile or element
    measure     "absolute" |∂L/∂θ|, "square" (Fisher), "signed" ∂L/∂θ as it is, "norm" of a unit's gradient
    tile        size of a tile, or height and width
    keep        of elements, the share of each tensor that is remembered from batch to batch
    targets, exclude, layers    tensors to choose from, as LoRA's; targets="all" takes every parameter
    """

    batches: Iterable | None = None
    loss: Callable | None = None
    scores: Scores | None = None
    threshold: float | None = None
    fraction: float | None = None
    budget: int | None = None
    unit: str = "row"
    measure: str = "absolute"
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    tile: int | Sequence[int] = 16
    keep: float = 0.1
    saved: Plan | None = None

    kind: ClassVar[str] = "importance"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_IMPORTANCE",)

    def __deepcopy__(self, memo) -> "Importance":
        """A copy without the batches, which may be a stream, and with the same scores."""
        return replace(self, batches=None)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if self.saved is not None:
            return
        if sum(given is not None for given in (self.threshold, self.fraction, self.budget)) != 1:
            raise ValueError("Importance: one of threshold, fraction and budget would be right")
        if (self.scores is None) == (self.batches is None):
            raise ValueError("Importance: batches, or scores of pefast.score, would be right")
        if self.fraction is not None:
            check_share("Importance", "fraction", self.fraction)
        if self.measure not in MEASURES:
            raise ValueError(
                f"Importance: measure is {self.measure!r}; one of {', '.join(MEASURES)} would be right"
            )
        check_unit("Importance", self.unit, self.tile)

    def choose(self, model: nn.Module) -> Plan:
        """The entries of the units that score highest. Raises ValueError where none is above the line."""
        scores = self.scores
        if scores is None:
            scores = score(
                model,
                self.batches,
                self.loss,
                unit=self.unit,
                measure=self.measure,
                targets=self.targets,
                exclude=self.exclude,
                layers=self.layers,
                tile=self.tile,
                keep=self.keep,
            )
        return scores.choose(threshold=self.threshold, fraction=self.fraction, budget=self.budget)

    def settings(self) -> dict[str, Any]:
        """How the entries were chosen."""
        names = ("threshold", "fraction", "budget", "unit", "measure")
        return {name: getattr(self, name) for name in names}
