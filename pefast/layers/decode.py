"""Decoding steps of a layer with LoRAs: a few rows, no gradient, the same adapters again and again.

What the general path finds out at each call, which segments there are and whether they fit, is found out once
here and kept as a plan until other adapters compute or somebody writes to a parameter.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pefast import dispatch
from pefast.formats import FORMATS
from pefast.kernels import delta_linear_decode as triton_hand
from pefast.layers.lowrank import LowRank
from pefast.native import delta_linear_decode as native_hand
from pefast.native import through_the_registry
from pefast.native.delta_linear_decode import RowDelta

# who takes such steps; each says so in `takes`, `ROWS` and `why_not`, and makes a Plan
HANDS = {"native": native_hand, "triton": triton_hand}
# a dict that holds a parameter or a number, and its name there: where to look whether it is still the same
Place = tuple[dict, str]


class Lora(NamedTuple):
    """One LoRA of a layer."""

    a: Place  # [R, K]
    b: Place  # [N, R]
    scale: Place
    index: int | None  # the rows with this id; None: every row


class Remembered:
    """The plan of a layer's last step, or None where it can have none. Copies of a layer begin anew."""

    def __init__(self, key: tuple = (), plan=None, tensors=(), numbers=()):
        self.key, self.plan = key, plan
        self.tensors: tuple[Place, ...] = tensors
        self.numbers: tuple[Place, ...] = numbers
        self.state = self.now()

    def __reduce__(self):
        return Remembered, ()

    def now(self) -> list:
        """Versions and addresses of the parameters, and the scales, as they are."""
        tensors = [own[name] for own, name in self.tensors]
        state = [t._version for t in tensors] + [t.data_ptr() for t in tensors]
        return state + [own[name] for own, name in self.numbers]


def forget(layer: nn.Module) -> None:
    """Drops the layer's plan."""
    layer.__dict__.pop("remembered", None)


def decoded(host: nn.Module, x: Tensor) -> Tensor | None:  # [..., K] -> [..., N]
    """y of a DeltaHost where this call is a decoding step that a kernel takes, else None."""
    router = host.router
    if host.merged or not router.turns or not few_rows(x):
        return None
    owner = (host, FORMATS[host.format].weight)
    return step(host, x, owner, (router.turns, router.ids), lambda: _loras(host))


def few_rows(x: Tensor) -> bool:
    """Whether x [..., K] may be a decoding step: what can be said without its layer."""
    return _hand(x) is not None


def _hand(x: Tensor) -> ModuleType | None:
    """Who may take x [..., K] as a decoding step, by its device, dtype and rows."""
    named = dispatch.forced()
    for name, hand in HANDS.items():
        if named in (None, name) and hand.takes(x, named == name):
            plain = not through_the_registry(x) and not torch.is_autocast_enabled(x.device.type)
            return hand if plain and 0 < x.numel() <= hand.ROWS * x.shape[-1] else None
    return None


def step(
    layer: nn.Module,  # that remembers
    x: Tensor,  # [..., K]
    frozen: tuple[nn.Module, Callable],  # the frozen layer, and what gives its weight [N, K]
    routed: tuple,  # who computes, and the id of each row or sequence, or None
    loras: Callable[[], list[Lora] | None],
) -> Tensor | None:  # [..., N]
    """y by the layer's plan, made first where it has none for this; None where the general path computes."""
    key = (*routed, x.shape[:-1], x.dtype, layer.training, dispatch.forced())
    memory = layer.__dict__.get("remembered")
    # written to through .data, which leaves versions alone, a parameter is seen by the plan alone
    for _ in range(2):
        if memory is None or memory.key != key or memory.state != memory.now():
            memory = layer.__dict__["remembered"] = _remember(key, x, frozen, loras())
        if memory.plan is None:
            return None
        y = memory.plan.run(x)
        if y is not None:
            return y
        memory = None
    return None


def _remember(key: tuple, x: Tensor, frozen: tuple, loras: list[Lora] | None) -> Remembered:
    """The plan of a step, or that there is none."""
    base, weight = frozen
    ids, rows = key[1], x.shape[:-1].numel()
    # one id a row, or one a sequence; anything else is the general path's to complain about
    each = 1 if ids is None or len(ids) == rows else rows // x.shape[0]
    fits = ids is None or len(ids) == rows or (x.dim() > 2 and len(ids) == x.shape[0])
    w, own = weight(base), base._parameters
    if not loras or not fits or x.dtype is not w.dtype or x.shape[-1] != w.shape[1]:
        return Remembered(key)
    deltas = [
        RowDelta(row, lora.a[0][lora.a[1]], lora.b[0][lora.b[1]], lora.scale[0][lora.scale[1]])
        for row in range(rows)
        for lora in loras
        if lora.index is None or ids[row // each] == lora.index
    ]
    bias = own.get("bias")
    hand = _hand(x)
    if hand.why_not(w, bias, deltas):
        return Remembered(key)
    places = [(own, "weight")] + ([] if bias is None else [(own, "bias")])
    places += [place for lora in loras for place in (lora.a, lora.b)]
    plan = hand.Plan(w, bias, deltas, rows)
    return Remembered(key, plan, tuple(places), tuple(lora.scale for lora in loras))


def _loras(host: nn.Module) -> list[Lora] | None:
    """The LoRAs of a host's turns; None where it computes anything else."""
    found = []
    # what stands in the place of the weight or bias may train between two steps
    if "replaced" in host._modules:
        return None
    for name, index in host.router.turns:
        for delta in host.deltas[name].values() if name in host.deltas else ():
            plain = (
                type(delta) is LowRank
                and delta.activation == "identity"
                and delta.c is None
                and delta.d is None
            )
            if not plain or (delta.dropout and delta.training):
                return None
            own = delta._parameters
            found.append(Lora((own, "a"), (own, "b"), (delta.__dict__, "scale"), index))
    return found
