"""explain: which hand each layer runs on, and why the others do not."""

import torch
from torch import nn

from pefast import dispatch
from pefast.formats import format_of
from pefast.layers import attention, siblings
from pefast.layers.chunked_loss import ChunkedLoss
from pefast.layers.counter_dropout import CounterDropout
from pefast.layers.frozen_linear import FrozenLinear
from pefast.layers.fused_lora import FusedLoRALinear
from pefast.layers.hosts import DeltaHost, ModuleHost
from pefast.layers.lowrank import LowRank
from pefast.layers.on_peft import PeftLinear
from pefast.layers.replaced import ChosenHost
from pefast.ops.delta_linear import OP, Call, Segment
from pefast.ops.partial_linear import OP as PARTIAL
from pefast.ops.partial_linear import Call as PartialCall

_PROBE_ROWS = 512


def explain(model: nn.Module) -> str:
    """One line a layer that pefast computes: its deltas, the back end for 512 rows, and why not the others.

    Layers that say the same stand in one line with their number; a last line tells the memory of packed
    weights, once something has run. Raises nothing: a model without pefast's layers says so.
    """
    lines: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            what, segments = (
                "LoRA",
                [Segment(module.lora_a, module.lora_b, module.scale, dropout=module.dropout)],
            )
            lines.setdefault(_line(what, module, segments, module.compute), []).append(path or "(the layer)")
        elif isinstance(module, DeltaHost):
            names = [name for name, _ in module.router.turns if name in module.deltas]
            deltas = [(name, key, delta) for name in names for key, delta in module.deltas[name].items()]
            lines.setdefault(_host_line(module, deltas), []).append(path)
        elif isinstance(module, PeftLinear):
            lines.setdefault(_peft_line(module), []).append(path)
        elif isinstance(module, FrozenLinear):
            line = _line("frozen layer alone", module, [], module.compute)
            lines.setdefault(line, []).append(path or "(the layer)")
        elif isinstance(module, ChunkedLoss):
            lines.setdefault("loss in chunks while training, without logits", []).append(
                path or "(the model)"
            )
        elif isinstance(module, CounterDropout):
            lines.setdefault(f"dropout of {module.p:g} from a counter", []).append(path)
        if "replaced" in module._modules:
            lines.setdefault(_replaced_line(module), []).append(path or "(the model)")
        if attention.runs_on(module) and not any(attention.NAME in line for line in lines):
            lines.setdefault(_attention_line(model, module), []).append(path or "(the model)")
    if not lines:
        return f"{type(model).__name__}: no layer computes through pefast"
    for group in siblings.groups(model):
        names = [path for path, module in model.named_modules() if module in group.members]
        line = f"apart, {group.apart}" if group.apart else "computed together, in one walk over their input"
        lines.setdefault(line, []).append(" + ".join([names[0], *(n.rpartition(".")[2] for n in names[1:])]))
    said = [f"{_paths(paths)}: {line}" for line, paths in lines.items()]
    return "\n".join(said + _packs(model))


def fused_layers(model: nn.Module, rows: int = _PROBE_ROWS) -> tuple[int, int]:
    """How many layers a hand other than eager computes with their deltas, for so many rows of x, and how many
    layers have an active delta."""
    fused = whole = 0
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            segments = [Segment(module.lora_a, module.lora_b, module.scale, dropout=module.dropout)]
        elif isinstance(module, PeftLinear):
            segments = [] if module.why_not() else _peft_segments(module)
        elif isinstance(module, DeltaHost) and not module.merged:
            names = [name for name, _ in module.router.turns if name in module.deltas]
            deltas = [delta for name in names for delta in module.deltas[name].values()]
            if not deltas:
                continue
            segments = [] if isinstance(module, ModuleHost) else _segments(deltas)
        else:
            continue
        whole += 1
        if segments:
            layer = module.get_base_layer() if isinstance(module, PeftLinear) else module
            fused += _choice(_reasons(layer, segments, module.compute, rows))[0] != "eager"
    return fused, whole


def _packs(model: nn.Module) -> list[str]:
    """What the native hand keeps of the weights, one that layers share counted once."""
    hand, stores = OP.hands["native"], {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_cpu:
            stores[weight.data_ptr()] = weight
    packed = sum(hand.packed_bytes(weight) for weight in stores.values())
    kept = sum(hand.kept_bytes(p) for p in model.parameters() if p.dim() == 2 and p.is_cpu)
    sizes = {"packed copies of frozen weights": packed, "packed copies of LoRA factors": kept}
    return [f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items() if size]


def _host_line(host: DeltaHost, deltas: list[tuple[str, str, LowRank]]) -> str:
    if host.merged:
        return f"frozen layer alone, {', '.join(host.merged)} merged into its weight"
    what = " + ".join(f"{key} of {name}" for name, key, _ in deltas)
    segments = _segments([delta for _, _, delta in deltas])
    if not deltas:
        return "frozen layer alone, no active adapter"
    if isinstance(host, ModuleHost):
        return f"{what}: beside the whole module, eager"
    if not segments:
        return f"{what}: after the frozen layer, eager"
    return _line(what, host, segments, host.compute)


def _segments(deltas: list[LowRank]) -> list[Segment]:
    """What of a layer's deltas rides on its product."""
    return [
        Segment(delta.a, delta.b, delta.scale, delta.activation, delta.c, delta.d, delta.dropout)
        for delta in deltas
        if delta.rides
    ]


def _replaced_line(module: nn.Module) -> str:
    """What trains in the place of a module's own tensors, and who computes where entries of a weight do."""
    what, parts = [], []
    for tensor in module._parameters:
        for each in module.replaced.active(tensor):
            what.append(f"all of {tensor}" if each.at is None else f"{each.kind} of {tensor}")
            if each.at is not None and tensor == "weight":
                parts.append((each.values, each.index))
    if not what:
        return "its own tensors, no active adapter"
    said = f"{' and '.join(what)} of an adapter"
    if not isinstance(module, ChosenHost) or not parts:
        return said
    own = module._parameters["weight"]
    w = own.t() if module.turned else own
    x = torch.empty(_PROBE_ROWS, w.shape[1], dtype=w.dtype, device=w.device)
    taken, others = _choice(PARTIAL.reasons(PartialCall(x, w, module.bias, tuple(parts))))
    return f"{said}: {taken}{others}"


def _choice(reasons: dict[str, str]) -> tuple[str, str]:
    """The hand that computes, and in brackets why the others do not."""
    taken = dispatch.forced() or next(name for name, why in reasons.items() if not why)
    others = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if why and name != taken)
    return taken, f" ({others})" if others else ""


def _peft_line(module: PeftLinear) -> str:
    if why := module.why_not():
        return f"PEFT's own forward: {why}"
    return _line("LoRA of PEFT", module.get_base_layer(), _peft_segments(module), module.compute)


def _peft_segments(module: PeftLinear) -> list[Segment]:
    return [module._segment(name, None) for name in module.active_adapters if name in module.lora_A]


def _line(what: str, module: nn.Module, segments: list[Segment], compute: str | None) -> str:
    taken, others = _choice(_reasons(module, segments, compute, _PROBE_ROWS))
    rounded = taken == "native" and module.weight.dtype is torch.float32 and compute == "bf16"
    return f"{what}: {taken}{', products in bf16' if rounded else ''}{others}"


def _reasons(module: nn.Module, segments: list[Segment], compute: str | None, rows: int) -> dict[str, str]:
    """Each hand, and why it does not compute a layer for so many rows."""
    weight = format_of(module).weight(module) if format_of(module) else module.weight
    x = torch.empty(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seed = torch.zeros(1, dtype=torch.int64) if any(s.dropout for s in segments) else None
    return OP.reasons(Call(x, weight, module.bias, None, None, seed, tuple(segments), None, compute))


def _attention_line(model: nn.Module, module: nn.Module) -> str:
    q = torch.empty(
        1, 1, 64, 64, dtype=next(module.parameters()).dtype, device=next(module.parameters()).device
    )
    host = next((each.prefix_host for each in model.modules() if hasattr(each, "prefix_host")), None)
    tokens = 0 if host is None else host.longest()
    if not tokens:
        why = attention.why_not(q, q, q, None, False, None, 0.0, {})
        return f"attention through {attention.NAME}: " + (f"sdpa, not native: {why}" if why else "native")
    taken, others = "sdpa", "not native: scores have a bias or a cap, which the kernel has not"
    if not any(getattr(each, "has_relative_attention_bias", False) for each in model.modules()):
        ahead = q[0, :, :1].expand(-1, tokens, -1)  # [G, P, D]
        reasons = attention.OP.reasons(
            attention.Call(q, q, q, ahead, ahead, None, False, 1.0, 0.0, None, None)
        )
        taken = dispatch.forced() or next(name for name, why in reasons.items() if not why)
        others = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if why and name != taken)
    what = f"attention through {attention.NAME}, behind a prefix of {tokens} tokens: {taken}"
    return what + (f" ({others})" if others else "")


def _paths(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} layers, {paths[0]} ... {paths[-1]}"
