"""Attention of transformers models by ops/prefix_attention, registered under the name "pefast".

transformers asks two registries: one for the function, one for the mask that it wants. A name missing from
the second silently loses the padding mask, so both are filled together.
"""

import torch
from torch import Tensor, nn

from pefast.ops.prefix_attention import OP, Call, prefix_attention

NAME = "pefast"
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
    """One attention of a transformers model: by pefast's kernel, or by sdpa where `why_not` has a reason."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # as transformers means it: a mask, where there is one, has the causal order in it
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    if causal and key.shape[2] > query.shape[2]:
        # the first turn of a static cache: keys that are not written yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if why_not(query, key, value, attention_mask, causal, scaling, dropout, options):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, causal, **options)
    o = prefix_attention(
        query, key, value, mask=attention_mask, causal=causal, scale=scaling, dropout=dropout
    )
    return o.transpose(1, 2).contiguous(), None


def why_not(query, key, value, mask, causal, scaling, dropout, options) -> str:
    """Why transformers' own function computes this call, or ""."""
    if options.get("position_bias") is not None or options.get("softcap") is not None:
        return "scores have a bias or a cap, which the kernel has not"
    if options.get("cache") is not None:
        return "the cache is paged"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return "the mask is not one of booleans for all heads"
    if value.shape[-1] != key.shape[-1]:
        return "keys and values have different widths"
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    call = Call(query, key, value, None, None, mask, causal, scale, dropout, None, None)
    return OP.reasons(call)["native"]


def takes(module: nn.Module) -> bool:
    """Whether a module is a transformers model whose attention goes through the registry, to sdpa."""
    return hasattr(module, "set_attn_implementation") and module.config._attn_implementation == "sdpa"


def runs_on(module: nn.Module) -> bool:
    """Whether a module is a transformers model whose attention comes here."""
    return hasattr(module, "set_attn_implementation") and module.config._attn_implementation == NAME
