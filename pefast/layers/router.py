"""Which adapters of a model compute: for the whole batch, or row by row."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Router:
    """One object that every delta of a model looks at, so that a switch reaches all of them at once.

    Without a route `turns` is ((name, None), ...) for the active adapters. Inside `pefast.route` it is
    ((name, i), ...) for all adapters that the batch uses and `rows` [B] says with i which of them a sequence
    takes; -1 is the base model.
    """

    def __init__(self):
        self.active: tuple[str, ...] = ()
        self.turns: tuple[tuple[str, int | None], ...] = ()
        self.ids: tuple[int, ...] | None = None
        self.rows: Tensor | None = None  # the ids as a tensor

    def activate(self, names: tuple[str, ...]) -> None:
        """These adapters compute, together, on every row."""
        self.active = names
        self.turns = tuple((name, None) for name in names)
        self.ids = self.rows = None

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside this context every layer is the base model's."""
        turns, self.turns = self.turns, ()
        try:
            yield
        finally:
            self.turns = turns

    def route(self, turns: tuple[str, ...], ids: tuple[int, ...], device) -> None:
        """Sequence i computes with adapter turns[ids[i]], or with none where ids[i] is -1."""
        self.turns = tuple((name, i) for i, name in enumerate(turns))
        self.ids, self.rows = ids, torch.tensor(ids, device=device)


def row_mask(rows: Tensor, index: int, like: Tensor) -> Tensor:
    """1 where a sequence takes the adapter of this index, shaped to broadcast over `like` [B, ...]."""
    return (rows == index).to(like.dtype).view(-1, *[1] * (like.dim() - 1))
