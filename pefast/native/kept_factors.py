"""a and b of a LoRA in the order in which csrc reads them, kept while nobody writes to them.

Every call needs them packed, forward one way and backward another. Where several calls come between two
writes, as when the gradients of several batches are added up, under checkpointing or where nothing trains,
the later ones find them packed. They hang on the storage of a, as the packs of frozen weights do on theirs
(packs.py), and belong to one version of a and b, their places in memory and a scale; a write through .data,
which leaves versions alone, shows in a mark of 32 places of each.
"""

import weakref

import torch
from torch import Tensor
from torch.nn import Parameter

from pefast.native import C


class Kept:
    """What is kept of one version of a and b.

    The first call of a version packs nothing that stays, unless the version before was used more than once:
    with one batch a step that would be memory for nothing.
    """

    __slots__ = ("b", "backwards", "for_dx", "for_y", "forwards", "mark", "often", "scale", "version")

    def __init__(self, version: tuple[int, ...], b: Tensor, scale: float, before: "Kept | None"):
        self.version, self.b, self.scale = version, weakref.ref(b), scale
        self.often = (False, False) if before is None else (before.forwards > 1, before.backwards > 1)
        self.forwards = self.backwards = 0
        self.for_y: Tensor | None = None
        self.for_dx: Tensor | None = None
        self.mark: int | None = None

    def room_for_y(self, a: Tensor, b: Tensor) -> tuple[Tensor | None, int | None]:
        """Where a call finds a and b packed, and their mark; or where it packs them to stay, and None."""
        self.forwards += 1
        if self.for_y is not None:
            return self.for_y, self.mark
        if not self.often[0] and self.forwards == 1:
            return None, None
        self.mark = C.one_lora_mark(a, b)
        return _room(a, b), None

    def holds(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are a and b for y: a hook of autograd may hand over copies that it has saved."""
        return self.for_y is not None and self.version[2:] == (a.data_ptr(), b.data_ptr())

    def room_for_dx(self, a: Tensor, b: Tensor) -> tuple[Tensor | None, bool]:
        """The same for dx, and whether they are there. Asked where holds() says yes; it shares the mark."""
        self.backwards += 1
        if self.for_dx is not None:
            return self.for_dx, True
        return (_room(a, b) if self.often[1] or self.backwards > 1 else None), False


def of(a: Tensor, b: Tensor, scale: float) -> Kept | None:
    """What is kept of a and b as they are now; None where writes to them cannot be seen."""
    if type(a) is not Parameter or type(b) is not Parameter:
        return None
    store = a.untyped_storage()
    kept = getattr(store, "pefast_kept", None)
    try:
        version = a._version, b._version, a.data_ptr(), b.data_ptr()
    except RuntimeError:  # a tensor of inference mode, which counts no writes
        return None
    if kept is None or kept.b() is not b or kept.scale != scale:
        if store.nbytes() != a.nbytes:  # a part of a larger memory, which others write to
            return None
        kept = store.pefast_kept = Kept(version, b, scale, None)
    elif kept.version != version:
        # calls of the version before have no backward to come: autograd refuses a and b that were written to
        if kept.for_y is None and kept.forwards == 1:
            kept.version, kept.forwards = version, 0
        else:
            kept = store.pefast_kept = Kept(version, b, scale, kept)
    return kept


def drop(a: Tensor) -> None:
    """Forgets what is kept of a: somebody wrote to it or to its b through .data."""
    # another thread may have done it
    vars(a.untyped_storage()).pop("pefast_kept", None)


def kept_bytes(a: Tensor) -> int:
    """How much memory is kept of a, and of its b, now."""
    kept = getattr(a.untyped_storage(), "pefast_kept", None)
    packs = () if kept is None else (kept.for_y, kept.for_dx)
    return sum(pack.nbytes for pack in packs if pack is not None)


def _room(a: Tensor, b: Tensor) -> Tensor:
    (r, k), n = a.shape, b.shape[0]
    return torch.empty(C.one_lora_kept_size(r, n, k), dtype=torch.bfloat16)
