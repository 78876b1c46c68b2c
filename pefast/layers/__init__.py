"""The few modules that a model holds."""

from pefast.layers.fused_lora import FusedLoRALinear

__all__ = ["FusedLoRALinear"]
