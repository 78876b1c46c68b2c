"""Learned gates: which units of a model a task wants changed, found by training all of them for a while.

    w' = w + z ⊙ δ                  z one gate for each unit, drawn at each step
    z  = min(1, max(0, s̄))          s̄ = s (ζ - γ) + γ,  s = sigmoid((log u/(1-u) + log α) / β),  u uniform
    loss + λ · Σ P(z > 0) / U       P(z > 0) = sigmoid(log α - β log(-γ/ζ)),  over all U units

β = 2/3, γ = -0.1, ζ = 1.1: the hard concrete distribution of Louizos et al. 2018, arXiv:1712.01312; on the
changes of a frozen model, Guo et al. 2021, arXiv:2012.07463. While gates are learned δ is as large as what is
gated; afterwards only the units that were left open train, with Importance or Subnetwork.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pefast.layers.lowrank import master_dtype
from pefast.methods.replacing import own_tensors, shape_of, turned
from pefast.methods.scores import Part, Scores, loss_of
from pefast.methods.units import check_unit, head_plans, index_of, pick_tensors
from pefast.ops.partial_linear import Index

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def drawn(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One hard concrete number for each log α, from 0 to 1, both ends included."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(log_alpha)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chance_open(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def learn_gates(
    model: nn.Module,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    *,
    unit: str = "row",
    penalty: float = 0.01,
    lr: float = 1e-3,
    gate_lr: float = 0.1,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    tile: int | Sequence[int] = 16,
    seed: int = 0,
) -> Scores:
    """How likely each unit's gate is to stay open, after one step of AdamW on each of the batches.

    batches and loss are those of pefast.score. `penalty` is λ, the price of all gates open: too high, and all
    of them shut. lr is that of the changes, gate_lr that of the gates. unit is row, column, head or tile. The
    model is afterwards as it was; `choose(threshold=0.5)` of the result keeps what is rather open than shut.

    Raises ValueError for settings that cannot be, without a batch, or where the loss is not a finite number.
    """
    check_unit("learn_gates", unit, tile)
    if unit in ("tensor", "element"):
        raise ValueError(f"learn_gates: unit is {unit!r}; row, column, head or tile would be right")
    if hasattr(model, "_pefast"):
        raise ValueError("learn_gates: the model has adapters; pefast.detach first would be right")
    gated = _Gated(model, unit, targets, exclude, layers, tile)
    generator = torch.Generator().manual_seed(seed)
    groups = [{"params": list(gated.deltas.values()), "lr": lr}, {"params": [gated.log_alpha], "lr": gate_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    count = 0
    with gated.alone(model):
        for batch in batches:
            gated.draw(generator)
            value = loss_of("learn_gates", model, batch, loss, count)
            (value + penalty * chance_open(gated.log_alpha).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            count += 1
    if not count:
        raise ValueError("learn_gates: no batch came; at least one would be right")
    return gated.scores(model)


class _Gated:
    """Gates and changes beside the tensors of a model."""

    def __init__(self, model: nn.Module, unit: str, targets, exclude, layers, tile):
        own, self.unit = own_tensors(model), unit
        self.heads = head_plans(model, layers) if unit == "head" else None
        self.index: dict[str, Index] = {}
        # where a tensor's gates are: a slice of all, or which heads a line belongs to [U, lines]
        self.gates: dict[str, slice | Tensor] = {}
        begin = 0
        if self.heads is None:
            for path in pick_tensors(model, targets, exclude, layers):
                self.index[path] = index_of("learn_gates", path, shape_of(model, path), unit, tile)
                end = begin + len(self.index[path].at)
                self.gates[path], begin = slice(begin, end), end
        else:
            begin = len(self.heads)
            for number, plan in enumerate(self.heads):
                for path, index in plan.items():
                    self._mark(path, number, index, shape_of(model, path))
        self.turn = {path: turned(model, path) for path in self.index}
        self.own = {path: own[path] for path in self.index}
        self.places = [
            (module, tensor, path)
            for path in self.index
            for module in model.modules()
            for tensor, parameter in module._parameters.items()
            if parameter is own[path]
        ]
        first = next(iter(self.own.values()))
        # rather open than shut
        self.log_alpha = torch.full((begin,), 1.0, device=first.device, requires_grad=True)
        self.deltas = {
            path: torch.zeros_like(w, dtype=master_dtype(w.dtype)).requires_grad_()
            for path, w in self.own.items()
        }

    def _mark(self, path: str, number: int, index: Index, shape: tuple[int, ...]) -> None:
        lines = shape[1] if index.kind == "columns" else shape[0]
        self.index.setdefault(path, index._replace(at=torch.arange(lines)))
        self.gates.setdefault(path, torch.zeros(len(self.heads), lines))[number, index.at] = 1.0

    def draw(self, generator: torch.Generator) -> None:
        """Draws all gates and puts w + z ⊙ δ before each tensor."""
        z = drawn(self.log_alpha, generator)
        changed = {}
        for path, w in self.own.items():
            wide = self._spread(z, path, (w.t() if self.turn[path] else w).shape)
            wide = wide.t() if self.turn[path] else wide
            changed[path] = w + (wide * self.deltas[path]).to(w.dtype)
        for module, tensor, path in self.places:
            # what stands in the instance's own dictionary is found before its parameter
            module.__dict__[tensor] = changed[path]

    def _spread(self, z: Tensor, path: str, shape: torch.Size) -> Tensor:
        """Each unit's gate on all of its entries."""
        index, gates = self.index[path], self.gates[path]
        # lines of several heads are open where one of them is
        own = z[gates] if isinstance(gates, slice) else (gates.to(z) * z[:, None]).amax(0)
        if index.kind == "tiles":
            h, wide = index.tile
            grid = own.view(shape[0] // h, shape[1] // wide)
            return grid.repeat_interleave(h, 0).repeat_interleave(wide, 1)
        return (
            own if index.kind == "elements" else own.unsqueeze(1 if index.kind == "rows" else 0).expand(shape)
        )

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Inside, nothing else of the model trains; afterwards the model is as it was."""
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        modes = {module: module.training for module in model.modules()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            model.eval()
            with torch.enable_grad():
                yield
        finally:
            for module, tensor, _ in self.places:
                module.__dict__.pop(tensor, None)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode

    def scores(self, model: nn.Module) -> Scores:
        """The chance of each unit's gate to be open."""
        chances = chance_open(self.log_alpha.detach().double().cpu())
        parts = {path: Part(index, shape_of(model, path), 1.0) for path, index in self.index.items()}
        for path, part in parts.items():
            gates = self.gates[path]
            part.total = chances[gates] if isinstance(gates, slice) else torch.zeros(part.count)
        found = Scores(model, self.unit, parts, self.heads, lambda total, size: total)
        found.values = chances
        return found
