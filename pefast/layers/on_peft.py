"""Hugging Face PEFT's LoRA layer, computed by pefast. Parameters, switches, files and merging stay PEFT's."""

import torch
from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.decode import Lora, few_rows, step
from pefast.ops.delta_linear import Segment, delta_linear


class PeftLinear(nn.Module):
    """Mixed into peft's lora.Linear: the active adapters beside the frozen layer in one call.

    What pefast has no kernel for (DoRA and other variants, lora_bias, merged or switched off, a base layer
    that is not plain) goes PEFT's own way; `why_not` says which.
    """

    compute: str | None = None  # "bf16": products of fp32 numbers may be in bf16
    siblings = None  # a Group of pefast/layers/siblings.py that computes this layer beside others

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:  # [..., K] -> [..., N]
        if self.siblings is not None and not args and not kwargs:
            if (y := self.siblings.take(self, x)) is not None:
                return y
        names = kwargs.get("adapter_names")
        if args or set(kwargs) - {"adapter_names"} or self._elsewhere(x):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        base = self.get_base_layer()
        used = tuple(dict.fromkeys(names)) if names is not None else tuple(self.active_adapters)
        ids = None if names is None else tuple(used.index(name) for name in names)
        if not torch.is_grad_enabled() and few_rows(x):
            # an adapter that is deleted and made again is another module
            routed = (used, ids, tuple(self.lora_A._modules.values()))
            y = step(self, x, (base, format_of(base).weight), routed, lambda: self._loras(used, ids))
            if y is not None:
                return y
        segments = [
            self._segment(name, None if names is None else i)
            for i, name in enumerate(used)
            if name in self.lora_A
        ]
        if not segments:
            return base(x)
        ids = None if ids is None else torch.tensor(ids, device=x.device)
        return delta_linear(
            x, format_of(base).weight(base), segments, base.bias, ids=ids, compute=self.compute
        )

    def _segment(self, name: str, adapter: int | None) -> Segment:
        drop = self.lora_dropout[name]
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return Segment(a, b, self.scaling[name], dropout=rate, adapter=adapter)

    def _loras(self, used: tuple[str, ...], ids: tuple[int, ...] | None) -> list[Lora] | None:
        """The adapters of a decoding step; None where one drops a part of its input."""
        found = []
        for i, name in enumerate(used):
            if name in self.lora_A:
                if self._segment(name, None).dropout:
                    return None
                a, b = ((part[name]._parameters, "weight") for part in (self.lora_A, self.lora_B))
                found.append(Lora(a, b, (self.scaling, name), None if ids is None else i))
        return found

    def _elsewhere(self, x: Tensor) -> bool:
        """Whether this call is PEFT's: the engine does not take the layer's state or x's dtype."""
        weight = self.get_base_layer().weight
        mixed = x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)
        return mixed or bool(self.why_not())

    def why_not(self) -> str:
        """Why this layer goes PEFT's own way now, or ""."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapters are merged"
        for name in self.lora_A:
            if name in self.lora_variant:
                return f"{name} is a {type(self.lora_variant[name]).__name__}"
            if self.lora_bias.get(name):
                return f"{name} has lora_bias"
        return ""


def takes(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA layer around a plain one; by its name, without importing peft."""
    cls = type(module)
    if cls.__name__ != "Linear" or cls.__module__ != "peft.tuners.lora.layer":
        return False
    return format_of(module.get_base_layer()) is not None
