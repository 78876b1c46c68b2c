"""Where a LoRA starts, if not at zero.

    y = x wᵀ + s · (x aᵀ bᵀ − x a₀ᵀ b₀ᵀ)      a = a₀, b = b₀ at the start, so it starts as the base model

    PiSSA   s·b₀ a₀ is w's best approximation of that rank: b₀ = U √(Σ/s), a₀ = √(Σ/s) Vᵀ
    OLoRA   b₀ and a₀ are the first columns and rows of w = Q R

PEFT takes s·b₀ a₀ out of the weight; here the frozen pair stands beside it: the weight is never written to,
rows of a batch may differ, and detaching has nothing to undo. The product is the same.
Papers: Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775.
"""

import torch
from torch import Tensor

STARTS = ("pissa", "olora")


@torch.no_grad()
def factors(start: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a₀ [R, K] and b₀ [N, R] for a weight [N, K], in fp32 or wider."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if start == "olora":
        q, r = torch.linalg.qr(wide)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, v_t = torch.linalg.svd(wide, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v_t[:rank], u[:, :rank] * root
