"""Which adapters of a model compute: for the whole batch, or row by row."""

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
        self.rows: Tensor | None = None

    def activate(self, names: tuple[str, ...]) -> None:
        """These adapters compute, together, on every row."""
        self.active = names
        self.turns = tuple((name, None) for name in names)
        self.rows = None

    def route(self, turns: tuple[str, ...], rows: Tensor) -> None:
        """Sequence i computes with adapter turns[rows[i]], or with none where rows[i] is -1."""
        self.turns = tuple((name, i) for i, name in enumerate(turns))
        self.rows = rows
