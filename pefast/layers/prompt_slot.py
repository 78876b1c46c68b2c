"""Where the input of each row ends, for words that stand behind it: a caller says so, labels say so, or the
input is what generate began with.
"""

import types

from torch import nn

from pefast.layers.prompt_host import PromptHooks


class SlotHook:
    """A hook on the whole model that tells where the input of each row ends, where words stand behind it: at
    `slot_end`, given to the model's forward, or at the first label of a causal language model."""

    def __init__(self, hooks: PromptHooks):
        self.hooks = hooks
        self.asked: int | None = None  # length of the input that generate began with
        self.handle = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        """Takes `slot_end` [B] out of the arguments, or finds it in labels [B, L]."""
        self.hooks.slot_end, labels = kwargs.pop("slot_end", None), kwargs.get("labels")
        if self.hooks.slot_end is None and labels is not None and labels.dim() == 2 and self.hooks.causal:
            if module.get_output_embeddings() is not None:
                # the first label, or the end of a row that has none
                self.hooks.slot_end = (labels == -100).cumprod(1).sum(1)
        return args, kwargs


def _prepare_inputs_for_generation(
    self,
    input_ids,
    next_sequence_length=None,
    past_key_values=None,
    attention_mask=None,
    inputs_embeds=None,
    is_first_iteration=False,
    **kwargs,
):
    """The model's own; without a cache it also says how long the input was when generate began."""
    given = type(self).prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=next_sequence_length,
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )
    if is_first_iteration:
        first = given.get("input_ids")
        self.prompt_slot.asked = (given["inputs_embeds"] if first is None else first).shape[1]
    if kwargs.get("use_cache") is False:
        given["slot_end"] = self.prompt_slot.asked
    return given


def add_slot(model: nn.Module, owner: nn.Module) -> None:
    """Lets a whole model say where its input ends, once; `owner` has its prompts."""
    (hooks,) = owner.prompt_hooks
    if model is owner or hasattr(model, "prompt_slot"):
        return
    model.prompt_slot = SlotHook(hooks)
    model.prompt_slot.handle = model.register_forward_pre_hook(model.prompt_slot, with_kwargs=True)
    if hooks.causal and hasattr(model, "prepare_inputs_for_generation"):
        model.prepare_inputs_for_generation = types.MethodType(_prepare_inputs_for_generation, model)


def drop_slot(model: nn.Module) -> None:
    """Takes that away, where it is."""
    if hasattr(model, "prompt_slot"):
        model.prompt_slot.handle.remove()
        del model.prompt_slot
        model.__dict__.pop("prepare_inputs_for_generation", None)
