"""Attention of transformers models by ops/prefix_attention, registered under the name "pefast".

transformers asks two registries: one for the function, one for the mask that it wants. A name missing from
the second silently loses the padding mask, so both are filled together.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefast.ops.prefix_attention import OP, Call, prefix_attention

NAME = "pefast"
# what a model may have been before its attention comes here and goes back
LENT = ("sdpa", "eager", NAME)
# transformers' own function, for calls that pefast has no kernel for; set by register
_sdpa = None


def register() -> None:
    """Makes the name known to transformers. Raises ImportError where transformers is not installed."""
    global _sdpa
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    _sdpa = sdpa_attention_forward
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, G, S, D]
    value: Tensor,  # [B, G, S, D]
    attention_mask: Tensor | None,  # [B, 1, L, S]  bool, True: attend
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:  # [B, L, H, D]
    """One attention of a transformers model: by pefast's kernel, or by sdpa where `why_not` has a reason.

    A module with a `prefix_slot` attends to the keys and values that the slot has for it as well.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # as transformers means it: a mask, where there is one, has the causal order in it
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    if causal and key.shape[2] > query.shape[2]:
        # the first turn of a static cache: keys that are not written yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if options.get("position_bias") is not None:
            options["position_bias"] = options["position_bias"][..., : query.shape[2]]
    slot = getattr(module, "prefix_slot", None)
    ahead = None if slot is None else slot.ahead(key, value)
    if ahead is not None:
        if ahead.see is None and not _odd(key, value, attention_mask, options):
            given = (query, key, value, ahead.k, ahead.v, attention_mask)
            o = prefix_attention(*given, causal, scaling, dropout)
            return o.transpose(1, 2).contiguous(), None
        p = ahead.k.shape[-2]
        if options.get("position_bias") is not None:
            options["position_bias"] = _widen_bias(slot, p, options)
        attention_mask = _widen_mask(ahead.see, p, attention_mask, causal, query, key)
        key, value, causal = _behind(ahead.k, key), _behind(ahead.v, value), False
    if why_not(query, key, value, attention_mask, causal, scaling, dropout, options):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, causal, **options)
    o = prefix_attention(
        query, key, value, mask=attention_mask, causal=causal, scale=scaling, dropout=dropout
    )
    return o.transpose(1, 2).contiguous(), None


def _behind(prefix: Tensor, t: Tensor) -> Tensor:  # [B, G, P+S, D]
    """A prefix [G, P, D] or [B, G, P, D] before t [B, G, S, D]."""
    return torch.cat((prefix.to(t.dtype).expand(t.shape[0], *prefix.shape[-3:]), t), 2)


def _widen_bias(slot, p: int, options: dict) -> Tensor:  # [1 or B, H, L, P+S]
    """The bias of the sequence's keys, with that of the prefix's before it."""
    bias = options["position_bias"]
    ahead = slot.bias(bias, p, options.get("prefix_buckets"))
    rows = max(ahead.shape[0], bias.shape[0])
    return torch.cat([t.expand(rows, -1, -1, -1) for t in (ahead, bias)], 3)


def _widen_mask(see: Tensor | None, p: int, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor):
    """The mask over [prefix ; sequence], or None; `see` [B, 1, 1, P] tells who sees what of the prefix."""
    length, keys = query.shape[2], key.shape[2]
    if causal:
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    elif mask is None:
        if see is None:
            return None
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=query.device)
    yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    if see is None:
        return F.pad(mask, (p, 0), value=yes)
    ahead = mask.new_full((), yes).where(see, mask.new_full((), no))  # [B, 1, 1, P]
    rows = (see.shape[0], *mask.shape[1:3])
    return torch.cat((ahead.expand(*rows, p), mask.expand(*rows, keys)), 3)


def _odd(key, value, mask, options) -> str:
    """Why ops/prefix_attention has no words for a call, or ""."""
    if options.get("position_bias") is not None or options.get("softcap") is not None:
        return "scores have a bias or a cap, which the kernel has not"
    if options.get("cache") is not None:
        return "the cache is paged"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return "the mask is not one of booleans for all heads"
    if value.shape[-1] != key.shape[-1]:
        return "keys and values have different widths"
    return ""


def why_not(query, key, value, mask, causal, scaling, dropout, options) -> str:
    """Why transformers' own function computes this call, or ""."""
    if why := _odd(key, value, mask, options):
        return why
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    call = Call(query, key, value, None, None, mask, causal, scale, dropout, None, None)
    return OP.reasons(call)["native"]


def takes(module: nn.Module) -> bool:
    """Whether a module is a transformers model whose attention goes through the registry, to sdpa."""
    return hasattr(module, "set_attn_implementation") and module.config._attn_implementation == "sdpa"


def runs_on(module: nn.Module) -> bool:
    """Whether a module is a transformers model whose attention comes here."""
    return hasattr(module, "set_attn_implementation") and module.config._attn_implementation == NAME


def why_not_lend(model: nn.Module) -> str:
    """Why a model's attention cannot come here for a while, or ""."""
    configs = _configs(model)
    if not configs or not model._can_set_attn_implementation():
        return "its attention does not go through transformers' registry"
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        return "its attention caps the scores"
    odd = [each._attn_implementation for each in configs if each._attn_implementation not in LENT]
    fit = "model.set_attn_implementation('sdpa') first would be right"
    return f"its attention is {odd[0]!r}; {fit}" if odd else ""


def lend(model: nn.Module) -> list[list]:
    """Attention of this model comes here until `give_back`; returns [config, what it was] of each part."""
    register()
    lent = [[config, config._attn_implementation] for config in _configs(model)]
    for config, _ in lent:
        config._attn_implementation = NAME
    return lent


def give_back(lent: list[list]) -> None:
    """Each part's attention is again what it was."""
    for config, was in lent:
        config._attn_implementation = was


def switch(model: nn.Module, on: bool) -> None:
    """Attention that is sdpa's comes here, or goes back; where it is lent, that holds for its return."""
    lent = {}
    for module in model.modules():
        if hasattr(module, "prefix_host"):
            lent |= {id(pair[0]): pair for pair in module.prefix_host.lent}
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and id(module.config) in lent:
            pair = lent[id(module.config)]
            pair[1] = {True: {"sdpa": NAME}, False: {NAME: "sdpa"}}[on].get(pair[1], pair[1])
        elif on and takes(module):
            register()
            module.set_attn_implementation(NAME)
        elif not on and runs_on(module):
            module.set_attn_implementation("sdpa")


def _configs(model: nn.Module) -> list:
    """The configurations that say how the parts of a model attend, each once."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "set_attn_implementation")}
    return list(found.values())
