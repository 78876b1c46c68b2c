"""The causal loss without the logits: the output embedding and the cross entropy together, some rows at a
time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefast.ops.linear_cross_entropy import linear_cross_entropy

# families whose logits are the output embedding of the last hidden state, and nothing more
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2")


class ChunkedLoss(nn.Module):
    """Mixed into a ...ForCausalLM: in training, a forward with labels gives the loss and no logits."""

    def forward(self, *args, labels: Tensor | None = None, **kwargs):
        if labels is None or not self.takes_now(args, kwargs):
            return super().forward(*args, labels=labels, **kwargs)
        count = kwargs.get("num_items_in_batch")
        head = self.get_output_embeddings()
        head.forward = _pass  # the instance's own forward goes before its class's
        try:
            output = super().forward(*args, labels=None, **kwargs)
        finally:
            del head.forward
        hidden = output.logits  # [B, L, D]
        ahead = F.pad(labels, (0, 1), value=-100)[:, 1:]  # a row predicts the next word
        loss = linear_cross_entropy(hidden, head.weight, ahead.to(hidden.device), count)
        return type(output)(loss=loss, **{key: value for key, value in output.items() if key != "logits"})

    def takes_now(self, args: tuple, kwargs: dict) -> bool:
        """Whether this forward needs nothing but the loss."""
        plain = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # PEFT hands these on as None where nobody set them
        keep = kwargs.get("logits_to_keep")
        odd = (
            kwargs.get("shift_labels") is not None
            or kwargs.get("ignore_index") is not None
            or kwargs.get("return_dict") is False
            or not (keep is None or (isinstance(keep, int) and keep == 0))
        )
        frozen = not self.get_output_embeddings().weight.requires_grad
        return plain and frozen and not odd and not args[1:]


def _pass(hidden: Tensor) -> Tensor:
    return hidden


def takes(module: nn.Module) -> bool:
    """Whether a module is a causal language model of a known family with a plain output embedding."""
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    if getattr(getattr(module, "config", None), "model_type", None) not in _FAMILIES:
        return False
    head = module.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None
