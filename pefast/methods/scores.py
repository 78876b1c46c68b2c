"""How much each part of a model matters to a loss: scores from gradients, and the parts above a threshold.

    signed      S = mean ∂L/∂θ                 absolute    S = mean |∂L/∂θ|
    square      S = mean (∂L/∂θ)²  (Fisher)    norm        S = √(mean over batches of Σ (∂L/∂θ)²)

The mean goes over batches and over the entries of a unit. Each tensor's gradient is scored as soon as it is
made and freed at once, so that one of them lives at a time. Of single elements the highest scores of each
tensor are kept from batch to batch, a share `keep` of it, and no more can be chosen; an element counts from
the first batch in which it is among them, so with one batch, or keep=1, the scores are exact.

Papers: |∂L/∂θ| and its square, Molchanov et al. 2019, arXiv:1906.10771; Sung et al. 2021, arXiv:2111.09839.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

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

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": torch.abs,
    "square": torch.square,
    "signed": lambda gradient: gradient,
    "norm": torch.square,
}
_LOW = torch.tensor(-torch.inf, dtype=torch.float64)


def score(
    model: nn.Module,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    *,
    unit: str = "row",
    measure: str = "absolute",
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    tile: int | Sequence[int] = 16,
    keep: float = 0.1,
) -> "Scores":
    """Scores of a model's units over some batches, a forward and backward for each; the model stays as it is.

    A batch is a mapping that the model takes as keywords and returns a loss for; or anything, with
    `loss(model, batch)`. unit is tensor, row, column, head, tile (of `tile`, or height and width) or element,
    of which the `keep` share of each tensor with the highest scores is kept. measure is absolute, square,
    signed or norm. targets, exclude and layers are LoRA's; targets="all" takes every parameter.

    The model computes in eval mode, with the adapters that are active. Raises ValueError for settings that
    cannot be, without a batch, or where the loss is not a finite number.
    """
    check_unit("score", unit, tile)
    check_share("score", "keep", keep)
    if measure not in MEASURES:
        raise ValueError(f"score: measure is {measure!r}; one of {', '.join(MEASURES)} would be right")
    heads = head_plans(model, layers) if unit == "head" else None
    if heads is None:
        plan = {
            path: index_of("score", path, shape_of(model, path), unit, tile)
            for path in pick_tensors(model, targets, exclude, layers)
        }
    else:
        # lines of q, k, v and o, of which the heads' scores are made
        plan = {path: _every(shape_of(model, path), index) for each in heads for path, index in each.items()}
    parts = {path: Part(index, shape_of(model, path), keep) for path, index in plan.items()}
    count = 0
    with _gradients_to(model, parts, MEASURES[measure]):
        for batch in batches:
            loss_of("score", model, batch, loss, count).backward()
            count += 1
    if not count:
        raise ValueError("score: no batch came; at least one would be right")
    for part in parts.values():
        # what the loss does not reach has no gradient
        part.total = torch.zeros(part.count) if part.total is None else part.total
    mean = (
        (lambda total, size: (total / count).sqrt())
        if measure == "norm"
        else (lambda total, size: total / (size * count))
    )
    return Scores(model, unit, parts, heads, mean)


def loss_of(who: str, model: nn.Module, batch, loss: Callable | None, number: int) -> Tensor:
    """The loss of one batch, the model's own or the caller's. Raises ValueError unless it is one finite
    number."""
    if loss is None and not isinstance(batch, Mapping):
        raise ValueError(f"{who}: a batch is a {type(batch).__name__}; a mapping, or loss=, would be right")
    value = getattr(model(**batch), "loss", None) if loss is None else loss(model, batch)
    if value is None:
        raise ValueError(f"{who}: the model gave no loss; labels in the batch, or loss=, would be right")
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
        raise ValueError(f"{who}: the loss of batch {number} is {value}; one finite number would be right")
    return value


def _every(shape: tuple[int, ...], like: Index) -> Index:
    return like._replace(at=torch.arange(shape[1] if like.kind == "columns" else shape[0]))


class Part:
    """The running sums of one tensor's units."""

    def __init__(self, index: Index | None, shape: tuple[int, ...], keep: float):
        self.index, self.shape = index, shape
        self.size = unit_size(shape, index)
        self.total: Tensor | None = None  # [U]  None: nothing came
        self.at: Tensor | None = None  # [U]  which elements, where not all are kept
        count = 1 if index is None else len(index.at)
        self.count = count
        large = index is not None and index.kind == "elements" and len(shape) == 2
        self.cap = max(1, round(keep * count)) if large else count

    def add(self, values: Tensor) -> None:
        """One batch's measured gradient, in the formula's order of sizes."""
        found = sums(values, self.index)
        if self.total is not None:
            if self.at is None:
                found = found + self.total
            else:
                found = found.index_add(0, self.at, self.total)
        if self.cap < len(found):
            found, self.at = found.topk(self.cap)
        self.total = found.clone()

    def numbers(self) -> Tensor:
        """Which unit each sum belongs to."""
        return torch.arange(len(self.total)) if self.at is None else self.at.cpu()


@contextlib.contextmanager
def _gradients_to(model: nn.Module, parts: dict[str, Part], measure: Callable) -> Iterator[None]:
    """Inside, backward hands each scored tensor's gradient to its part, and keeps none."""
    own = own_tensors(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {path: own[path].grad for path in parts}
    modes = {module: module.training for module in model.modules()}
    hooks = []

    def listen(path: str, turn: bool) -> None:
        def heard(parameter: Tensor) -> None:
            gradient = parameter.grad.detach()
            wide = gradient.double() if gradient.dtype == torch.float64 else gradient.float()
            parameter.grad = None
            parts[path].add(measure(wide.t() if turn else wide))

        own[path].grad = None
        hooks.append(own[path].register_post_accumulate_grad_hook(heard))

    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for path in parts:
            own[path].requires_grad_(True)
            listen(path, turned(model, path))
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for path, gradient in kept.items():
            own[path].grad = gradient
        for module, mode in modes.items():
            module.training = mode


class Scores:
    """What `score` and `learn_gates` found: one number for each unit.

    values [U] are the scores, sizes [U] how many entries each unit has, entries how many there were to choose
    from; `choose` makes of them what Importance and Subnetwork take.
    """

    def __init__(self, model: nn.Module, unit: str, parts: dict, heads: list[Plan] | None, mean: Callable):
        self.unit, self.heads, self.order = unit, heads, list(own_tensors(model))
        whole = parts if heads is None else union(self.order, heads)
        self.entries = sum(torch.Size(parts[path].shape).numel() for path in whole)
        if heads is None:
            self.sources = {path: (part.index, part.numbers()) for path, part in parts.items()}
            found = [mean(part.total.double().cpu(), part.size) for part in parts.values()]
            sizes = [torch.full((len(part.total),), part.size) for part in parts.values()]
        else:
            self.entries = sum(_size(parts, {path: index}) for path, index in whole.items())
            found = [mean(_sum(parts, plan), _size(parts, plan)).view(1) for plan in heads]
            sizes = [torch.tensor([_size(parts, plan)]) for plan in heads]
        self.values, self.sizes = torch.cat(found), torch.cat(sizes)

    def choose(
        self, *, threshold: float | None = None, fraction: float | None = None, budget: int | None = None
    ) -> Plan:
        """The entries of the units whose score is above `threshold`; or of the best ones that together have
        at most `fraction` of the entries, or `budget` of them.

        Raises ValueError unless one of the three is given, or where nothing would be chosen.
        """
        kept = self._kept(threshold, fraction, budget)
        if self.heads is not None:
            return union(self.order, [self.heads[i] for i in kept.tolist()])
        plan, begin = {}, 0
        for path, (index, numbers) in self.sources.items():
            mine = kept[(kept >= begin) & (kept < begin + len(numbers))] - begin
            if len(mine):
                plan[path] = None if index is None else index._replace(at=numbers[mine].sort().values)
            begin += len(numbers)
        return {path: plan[path] for path in self.order if path in plan}

    def threshold(self, fraction: float) -> float:
        """Where to draw the line so that about that fraction of the entries is above it."""
        order = self.values.argsort(descending=True, stable=True)
        total = self.sizes[order].cumsum(0)
        count = int((total <= fraction * self.entries).sum())
        if count in (0, len(order)):
            return float(self.values[order[0]] if count == 0 else self.values[order[-1]].nextafter(_LOW))
        return float((self.values[order[count - 1]] + self.values[order[count]]) / 2)

    def _kept(self, threshold, fraction, budget) -> Tensor:
        """Numbers of the chosen units, rising."""
        if sum(given is not None for given in (threshold, fraction, budget)) != 1:
            raise ValueError("choose: one of threshold, fraction and budget would be right")
        if threshold is not None:
            kept = (self.values > threshold).nonzero()[:, 0]
            if not len(kept):
                raise ValueError(
                    f"choose: no {self.unit} scores above {threshold:g};"
                    f" the largest score is {float(self.values.max()):g}"
                )
            return kept
        if fraction is not None:
            check_share("choose", "fraction", fraction)
        budget = int(fraction * self.entries) if budget is None else budget
        order = self.values.argsort(descending=True, stable=True)
        count = int((self.sizes[order].cumsum(0) <= budget).sum())
        if not count:
            raise ValueError(
                f"choose: a budget of {budget} entries came, and the best {self.unit} has"
                f" {int(self.sizes[order[0]])}; as many or more would be right"
            )
        return order[:count].sort().values


def _size(parts: dict, plan: Plan) -> int:
    return sum(len(index.at) * parts[path].size for path, index in plan.items())


def _sum(parts: dict, plan: Plan) -> Tensor:
    return sum(parts[path].total.double().cpu()[index.at].sum() for path, index in plan.items())
