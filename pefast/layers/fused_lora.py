"""FusedLoRALinear: a drop-in for nn.Linear that trains a low-rank update of a frozen weight."""

import math

import torch
from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.frozen_linear import check_compute
from pefast.layers.lowrank import check_rate, lora_scale, master_dtype
from pefast.ops.delta_linear import one_lora


class FusedLoRALinear(nn.Linear):
    """y = x wᵀ + bias + scale · dropout(x) aᵀ bᵀ, with w and bias frozen.

    `weight` [N, K] and `bias` [N] keep nn.Linear's names, so the state dict of an nn.Linear loads; `lora_a`
    [R, K] starts as PEFT's does (kaiming uniform, a = √5), `lora_b` [N, R] at zero, so the layer starts as
    the frozen one. On a bf16 or fp16 weight both are fp32, as in PEFT. scale is alpha / rank, or alpha /
    √rank with `rslora`; alpha None means alpha = rank. compute="bf16" lets the products of an fp32 layer
    round their factors to bf16 where that is faster; everything else stays fp32.

    x may have any leading dimensions. Raises ValueError for a rank below 1, a dropout outside [0, 1) or
    another compute.
    Papers: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732.
    """

    compute: str | None = None
    siblings = None  # a Group of pefast/layers/siblings.py that computes this layer beside others

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        compute: str | None = None,
    ):
        check_rate("FusedLoRALinear", dropout)
        check_compute("FusedLoRALinear", compute)
        scale = lora_scale("FusedLoRALinear", rank, alpha, rslora)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank, self.alpha, self.dropout, self.scale = (
            rank,
            rank if alpha is None else alpha,
            float(dropout),
            scale,
        )
        self.compute = compute
        self._add_lora()

    def _add_lora(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        place = {"device": self.weight.device, "dtype": master_dtype(self.weight.dtype)}
        self.lora_a = nn.Parameter(torch.empty(self.rank, self.in_features, **place))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, self.rank, **place))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        compute: str | None = None,
    ) -> "FusedLoRALinear":
        """The same layer with a LoRA beside it. Shares the weight and bias, and freezes them.

        Takes nn.Linear and transformers' Conv1D, whose [K, N] weight is shared as a transposed view.
        Raises TypeError for any other module.
        """
        form = format_of(linear)
        if form is None:
            raise TypeError(
                f"FusedLoRALinear.from_linear: got {type(linear).__name__}; nn.Linear or Conv1D is right"
            )
        weight = form.weight(linear)
        n, k = weight.shape
        options = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora, "compute": compute}
        layer = cls(k, n, bias=linear.bias is not None, device="meta", dtype=weight.dtype, **options)
        layer.weight = (
            weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
        )
        layer.bias = linear.bias
        layer._add_lora()
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        if self.siblings is not None and (y := self.siblings.take(self, x)) is not None:
            return y
        # straight from the dict: four look-ups through nn.Module cost 3 µs
        own = self._parameters
        rate = self.dropout if self.training else 0.0
        pair = own["lora_a"], own["lora_b"]
        return one_lora(x, own["weight"], *pair, self.scale, rate, own["bias"], self.compute)

    def merged(self) -> nn.Linear:
        """A plain nn.Linear that computes the same: weight + scale · b a, in fp32 or wider, rounded once."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype
        )
        delta = self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(
            (self.weight + delta).to(self.weight.dtype).detach(), requires_grad=False
        )
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # the state dict of a plain nn.Linear is complete: the update then stays as it is
        own = {prefix + "lora_a", prefix + "lora_b"}
        found: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, found, unexpected_keys, error_msgs
        )
        plain = own.isdisjoint(state_dict)
        missing_keys.extend(key for key in found if not (plain and key in own))
