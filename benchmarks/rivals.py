"""Other ways to compute a LoRA layer, each a module made from one frozen nn.Linear, a rank and a dropout."""

import copy

import torch
from torch import Tensor, nn

import pefast


class _HandFunction(torch.autograd.Function):
    """Autograd by hand over library products, the strongest rival without a compiler; it stores x̂."""

    @staticmethod
    def forward(ctx, x, w, a, b, scale, rate):
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        x_hat = nn.functional.dropout(x, rate) if rate else x  # [M, K]
        h = x_hat @ a.t()  # [M, R]
        ctx.save_for_backward(x_hat, w, a, b, h, (x_hat != 0) if rate else None)
        ctx.scale, ctx.rate = scale, rate
        return (x @ w.t()).addmm_(h, b.t())

    @staticmethod
    def backward(ctx, dy):
        x_hat, w, a, b, h, kept = ctx.saved_tensors
        dh, dx = dy @ b, dy @ w
        if kept is None:
            dx.addmm_(dh, a)
        else:
            dx.add_((dh @ a).mul_(kept).mul_(1 / (1 - ctx.rate)))
        return dx, None, (dh.t() @ x_hat).float(), (dy.t() @ h).float() * ctx.scale, None, None


class HandLinear(nn.Module):
    """A LoRA layer over _HandFunction; a and b are fp32, as PEFT's."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float):
        super().__init__()
        self.weight, self.rate = base.weight.detach(), dropout
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return _HandFunction.apply(x, self.weight, self.a, self.b, 2.0, self.rate if self.training else 0.0)


def _peft(base: nn.Linear, rank: int, dropout: float, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"])
    net = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return net


RIVALS = {
    "frozen": lambda base, rank, dropout: base,
    "peft": lambda base, rank, dropout: _peft(base, rank, dropout, torch.float32),
    "peft, same dtype": lambda base, rank, dropout: _peft(base, rank, dropout, base.weight.dtype),
    "hand": HandLinear,
    "pefast": lambda base, rank, dropout: pefast.FusedLoRALinear.from_linear(
        copy.deepcopy(base), rank=rank, alpha=2 * rank, dropout=dropout
    ),
}
