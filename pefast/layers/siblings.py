"""Layers of one block that read the same x (query, key and value; gate and up) computed together: when the
first of them is called, all are, in one walk over x, and the others hand out what is there.

A sibling takes its result only for the very same x: the same object, unchanged, under the same grad mode and
choice of adapters. Where a model calls the layers on different inputs they fall apart for good; under
autocast, torch.compile and saved-tensor hooks (gradient checkpointing), for decoding steps and where no
kernel takes them together, each computes alone.
"""

import weakref

import torch
from torch import Tensor, nn

from pefast import dispatch
from pefast.formats import FORMATS, format_of
from pefast.layers.bottleneck import Across
from pefast.layers.decode import few_rows
from pefast.layers.fused_lora import FusedLoRALinear
from pefast.layers.hosts import DeltaHost, EmbeddingHost, ModuleHost
from pefast.layers.on_peft import PeftLinear
from pefast.native import through_the_registry
from pefast.ops.delta_linear import Segment
from pefast.ops.sibling_linear import OP, Call, Part, prepare, run

# names of linear layers under one module that read the same input, in the order in which they are called
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)


class Group:
    """Layers that read the same x, in the order in which they are called."""

    def __init__(self, members: list[nn.Module]):
        self.members = members
        self.apart = ""  # why they no longer compute together
        self._forget()

    def __getstate__(self) -> dict:
        return {"members": self.members, "apart": self.apart}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self, reference=None) -> None:
        if reference is None or reference is self._x:
            self._x, self._key, self._results = None, None, {}

    def take(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """member(x), computed now with its siblings or a moment ago; None: it computes alone."""
        if self.apart or not _joins(x):
            return None
        key = _key(member, x)
        if self._x is not None:
            same = self._x() is x and self._key == key
            y = self._results.pop(id(member), None) if same else None
            if y is None and self._results:
                # somebody did not ask for its result, or asks for another
                self._fall_apart("its layers are not called on the same input")
            if not self._results:
                self._forget()
            if y is not None or self.apart:
                return y
        if member is not self.members[0]:
            return None
        ys = self._together(x)
        if ys is None:
            return None
        self._results = {id(one): y for one, y in zip(self.members[1:], ys[1:], strict=True)}
        self._x, self._key = weakref.ref(x, self._forget), key
        return ys[0]

    def _together(self, x: Tensor) -> tuple[Tensor, ...] | None:
        parts, ids = [], None
        for member in self.members:
            part = _part(member, x)
            if part is None:
                return None
            parts.append(part)
            if isinstance(member, DeltaHost):
                ids = member.router.rows
        hand, asked = OP.hands["native"], Call(x, tuple(parts))
        # asked before a seed is drawn: each alone then draws what it would have drawn
        if hand.refuse(asked) or hand.decline(asked):
            return None
        return run(x, prepare(x, parts, ids), "native")

    def _fall_apart(self, why: str) -> None:
        self.apart = why
        self._forget()


def _joins(x: Tensor) -> bool:
    """Whether siblings may compute together on x at all."""
    if x.dtype not in (torch.bfloat16, torch.float32) or through_the_registry(x):
        return False
    if dispatch.forced() not in (None, "native") or torch.is_autocast_enabled(x.device.type):
        return False
    # what is saved for backward must be the same when a checkpointed block runs again
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    return torch.is_grad_enabled() or not few_rows(x)


def _key(member: nn.Module, x: Tensor) -> tuple:
    """What must be the same when a sibling asks."""
    router = getattr(member, "router", None)
    choice = None if router is None else (router.turns, id(router.rows))
    return (0 if x.is_inference() else x._version), torch.is_grad_enabled(), member.training, choice


def _part(member: nn.Module, x: Tensor) -> Part | None:
    """The layer as a part of one call; None where it is more than a frozen product and its segments."""
    if isinstance(member, FusedLoRALinear):
        segment = Segment(
            member.lora_a, member.lora_b, member.scale, dropout=member.dropout if member.training else 0.0
        )
        return Part(member.weight, (segment,), member.bias, compute=member.compute)
    if isinstance(member, PeftLinear):
        if member._elsewhere(x):
            return None
        base = member.get_base_layer()
        segments = [member._segment(name, None) for name in member.active_adapters if name in member.lora_A]
        return Part(format_of(base).weight(base), tuple(segments), base.bias, compute=member.compute)
    if not isinstance(member, DeltaHost) or member.merged:
        return None
    segments = []
    for name, index in member.router.turns:
        for delta in member.deltas[name].values() if name in member.deltas else ():
            if delta.gains or not delta.rides or isinstance(delta, Across):
                return None
            segments.append(delta.segment(index))
    return Part(FORMATS[member.format].weight(member), tuple(segments), member.bias, compute=member.compute)


def _takes(module: nn.Module | None) -> bool:
    plain = isinstance(module, DeltaHost) and not isinstance(module, (ModuleHost, EmbeddingHost))
    return plain or isinstance(module, (FusedLoRALinear, PeftLinear))


def _weight(member: nn.Module) -> Tensor:  # [N, K]
    if isinstance(member, DeltaHost):
        return FORMATS[member.format].weight(member)
    if isinstance(member, FusedLoRALinear):
        return member.weight
    base = member.get_base_layer()
    return format_of(base).weight(base)


def _gain(members: list[nn.Module]) -> bool:
    """Whether there is a kernel for layers of these sizes and dtype, faster than each alone."""
    weights = [_weight(member) for member in members]
    if len({w.shape[1] for w in weights}) > 1:
        return False
    x = torch.empty(64, weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device)
    call, hand = Call(x, tuple(Part(w) for w in weights)), OP.hands["native"]
    return not hand.refuse(call) and not hand.decline(call)


def groups(model: nn.Module) -> list[Group]:
    """The groups that there are in a model now."""
    found = {id(g): g for m in model.modules() if (g := m.__dict__.get("siblings")) is not None}
    return list(found.values())


def switch(model: nn.Module, on: bool) -> None:
    """Groups layers that read the same x, by the names that families give them; or takes all groups apart."""
    for module in model.modules():
        module.__dict__.pop("siblings", None)
    if not on:
        return
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            members = [children[name] for name in names if _takes(children.get(name))]
            if len({type(member) for member in members}) == 1 and len(members) > 1 and _gain(members):
                group = Group(members)
                for member in members:
                    member.siblings = group
