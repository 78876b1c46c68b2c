"""Keys and values of a text, as a model's own attentions compute them: where a prefix may start from.

A causal model then starts as if it had read the text. Li and Liang 2021, arXiv:2101.00190, section 7.4: with
few rows to learn from, a start from words is better than a random one.
"""

import torch
from torch import Tensor, nn

from pefast.layers import attention
from pefast.layers.router import Router


class Listener:
    """Stands in the place of a prefix's slot and hears the keys and values that an attention is given."""

    def __init__(self):
        self.heard: Tensor | None = None  # [2, G, S, D]

    def ahead(self, key: Tensor, value: Tensor) -> None:
        """Keeps those of the batch's first row; there is nothing ahead of them."""
        self.heard = torch.stack((key[0], value[0]))


@torch.no_grad()
def read_text(
    model: nn.Module, body: nn.Module, paths: list[str], ids: Tensor, router: Router
) -> dict[str, Tensor]:
    """Keys and values [2, G, V, D] of the tokens ids [1, V] in each attention, by its path.

    The base model reads them, in eval mode; a decoder beside an encoder reads the same tokens.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    slots = {path: vars(module).get("prefix_slot") for path, module in modules.items()}
    modes, turns = [(module, module.training) for module in body.modules()], router.turns
    fed = {"input_ids": ids}
    if getattr(body.config, "is_encoder_decoder", False) and hasattr(body, "decoder"):
        fed["decoder_input_ids"] = ids
    lent = attention.lend(model)
    listeners = {path: Listener() for path in paths}
    try:
        router.turns = ()
        body.eval()
        for path, module in modules.items():
            module.prefix_slot = listeners[path]
        body(**fed)
    finally:
        router.turns = turns
        attention.give_back(lent)
        for module, training in modes:
            module.training = training
        for path, module in modules.items():
            if slots[path] is None:
                del module.prefix_slot
            else:
                module.prefix_slot = slots[path]
    return {path: listener.heard for path, listener in listeners.items()}
