"""Which adapters of a model compute: for the whole batch, or row by row."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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


@contextlib.contextmanager
def one_of_each_beam(encoder: nn.Module, router: Router) -> Iterator[None]:
    """Inside this context an encoder, which reads a sequence once for all its beams, takes one name of each.

    Raises ValueError, when the encoder is called, where the beams of a sequence have several names.
    """
    rows, ids = router.rows, router.ids
    fewer: dict[int, Tensor] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        batch = (kwargs["inputs_embeds"] if given is None else given).shape[0]
        beams = len(ids) // max(batch, 1)
        # inside another route that one's hooks choose
        if router.ids is not ids or beams < 2 or len(ids) % batch:
            return
        if any(ids[i] != ids[i - i % beams] for i in range(len(ids))):
            raise ValueError(
                f"route: {len(ids)} rows for {batch} sequences, so {beams} beams each, and the beams of one"
                " sequence have several names; a sequence's name once for each of its beams would be right"
            )
        router.rows = fewer.setdefault(batch, rows[::beams])

    def behind(module: nn.Module, args: tuple, output) -> None:
        if router.ids is ids and router.rows is not rows:
            router.rows = rows

    hooks = (
        encoder.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        encoder.register_forward_hook(behind),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def row_mask(rows: Tensor, index: int, like: Tensor) -> Tensor:
    """1 where a sequence takes the adapter of this index, shaped to broadcast over `like` [B, ...]."""
    return (rows == index).to(like.dtype).view(-1, *[1] * (like.dim() - 1))
