"""accelerate: what pefast has kernels for computes through them, whoever built the model."""

from types import ModuleType

from torch import nn

from pefast.layers import attention as attention_layer
from pefast.layers import chunked_loss, counter_dropout, frozen_linear, on_peft
from pefast.layers import siblings as sibling_layers
from pefast.layers.in_place import mix_in, take_out

# switch: the file that says which modules it takes, and the class that is mixed into them
SWITCHES: dict[str, tuple[ModuleType, type, str]] = {
    "dropout": (counter_dropout, counter_dropout.CounterDropout, "Counter"),
    "loss": (chunked_loss, chunked_loss.ChunkedLoss, "Chunked"),
    "peft": (on_peft, on_peft.PeftLinear, "Fused"),
}


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    dropout: bool = True,
    loss: bool = True,
    peft: bool = True,
    siblings: bool = True,
    linear: bool | None = None,
    compute: str | None = None,
) -> nn.Module:
    """Lets a model compute through pefast's kernels where it can, in place; returns the model.

    attention a transformers model that uses "sdpa" computes attention through pefast where there is a kernel
              for the call (bf16 on AMX), dropout on its weights included; other calls stay with sdpa
    dropout   every nn.Dropout makes its mask from a counter: the same rates, another mask; the seed comes
              from torch's generator, so torch.manual_seed still fixes a run
    loss      in training, a causal language model with a frozen output embedding and labels computes
              the loss some rows at a time and returns it without logits
    peft      LoRA layers that Hugging Face PEFT made: frozen product and adapters in one call. State dicts,
              saving, set_adapter, disable_adapter, adapter_names, merging and the Trainer stay as they are;
              DoRA, lora_bias and merged layers go PEFT's own way
    siblings  layers with deltas that read the same input (query, key and value; gate and up) compute in one
              walk over it where there is a kernel for that (bf16 and fp32 on AMX)
    linear    frozen linear layers without a delta compute through pefast where there is a kernel for them
              (fp32 on AMX), to the precision of fp32; None: where `compute` is given
    compute   "bf16" lets every product of an fp32 layer that pefast computes round its factors to bf16,
              where that is faster; activations, sums, gradients and trained parameters stay fp32. None: full
              fp32

    A switch that is False takes its part out again. Weights and names never change; `pefast.explain` lists
    what runs how. Models that pefast.attach made compute their deltas through pefast already. Raises
    ValueError for a `compute` that there is not.
    """
    frozen_linear.check_compute("accelerate", compute)
    attention_layer.switch(model, attention)
    for name, on in (("dropout", dropout), ("loss", loss), ("peft", peft)):
        rule, mixin, prefix = SWITCHES[name]
        for module in list(model.modules()):
            if isinstance(module, mixin):
                if not on:
                    take_out(module, mixin)
            elif on and rule.takes(module):
                mix_in(module, mixin, prefix)
    frozen_linear.switch(model, compute is not None if linear is None else linear)
    frozen_linear.choose_compute(model, compute)
    sibling_layers.switch(model, siblings)
    return model
