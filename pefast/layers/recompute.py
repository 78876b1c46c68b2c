"""Gradient checkpointing computes a block once more in backward. Here that second time computes what the
first did, although another adapter may be at work by then.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn


class Recomputed:
    """A checkpoint function whose blocks compute inside a context, the second time too."""

    def __init__(self, function: Callable, context: Callable[[], AbstractContextManager]):
        self.function, self.context = function, context

    def __call__(self, forward: Callable, *args, **kwargs):
        if torch.compiler.is_compiling():
            # a graph holds both times, and Python has no second one
            return self.function(forward, *args, **kwargs)

        def inside(*given, **named):
            with self.context():
                return forward(*given, **named)

        return self.function(inside, *args, **kwargs)


@contextlib.contextmanager
def recomputed(model: nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """What the model's blocks checkpoint meanwhile is computed inside `context` whenever backward comes."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [(block, vars(block).get("_gradient_checkpointing_func")) for block in blocks]
    functions = [(block, function) for block, function in functions if function is not None]
    for block, function in functions:
        block._gradient_checkpointing_func = Recomputed(function, context)
    try:
        yield
    finally:
        for block, function in functions:
            block._gradient_checkpointing_func = function
