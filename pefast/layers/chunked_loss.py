"""The causal loss without the logits: the output embedding and the cross entropy together, some rows at a
time.

Logits [M, V] in fp32, their softmax and their gradient are three tensors that can outweigh a small model.
Here they live for a few rows, and as the embedding is frozen the gradient of the hidden states is all that
stays:

    z = x wᵀ                        [rows, V]  rounded as the model would
    loss = Σ (log Σ_v exp z_v - z_t) / count       in fp32
    dx = (softmax(z) - onehot(t)) w / count

torch.nn.functional.linear_cross_entropy does the same in chunks, but gives the loss in x's dtype: 11.0 for
10.92.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# families whose logits are the output embedding of the last hidden state, and nothing more
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2")
_ROWS = 128


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, target, count):
        kept = (target >= 0).nonzero()[:, 0]
        x_kept, target = x[kept], target[kept]
        loss, dx = x.new_zeros((), dtype=torch.float32), torch.zeros_like(x)
        for rows, t, at in zip(x_kept.split(_ROWS), target.split(_ROWS), kept.split(_ROWS), strict=True):
            logs = torch.log_softmax(rows @ w.t(), -1, dtype=torch.float32)  # [rows, V]
            loss -= logs.gather(1, t[:, None]).sum()
            dz = logs.exp_().scatter_add_(1, t[:, None], logs.new_full((len(t), 1), -1.0)).to(x.dtype)
            dx[at] = (dz @ w).div_(count)
        ctx.save_for_backward(dx)
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (dx,) = ctx.saved_tensors
        return dx * dloss, None, None, None


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
        ahead = ahead.flatten().to(hidden.device)
        count = (ahead >= 0).sum() if count is None else count
        loss = _Loss.apply(hidden.flatten(0, 1), head.weight, ahead, count)
        return type(output)(loss=loss, **{key: value for key, value in output.items() if key != "logits"})

    def takes_now(self, args: tuple, kwargs: dict) -> bool:
        """Whether this forward needs nothing but the loss."""
        plain = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        odd = {"logits_to_keep", "shift_labels", "ignore_index", "return_dict"} & set(kwargs)
        frozen = not self.get_output_embeddings().weight.requires_grad
        return plain and frozen and not odd and not args[1:]


def _pass(hidden: Tensor) -> Tensor:
    return hidden


def takes(module: nn.Module) -> bool:
    """Whether a module is a causal language model of a family that is known, with a plain frozen output
    embedding."""
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    if getattr(getattr(module, "config", None), "model_type", None) not in _FAMILIES:
        return False
    head = module.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None
