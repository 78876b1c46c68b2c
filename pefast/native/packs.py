"""Frozen weights in the order in which csrc reads them, kept beside the weight.

The packs hang on the weight's storage, so that every view of it finds them and they are freed with it; they
are made again when its version, its place in memory (FSDP2 gives the memory back between two uses), or a mark
of 32 of its numbers, has changed.
"""

from collections.abc import Callable, Hashable

from torch import Tensor


def packed(w: Tensor, form: Hashable, make: Callable[[], tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """w [N, K] in one form, and its mark; from the storage, or made now by make()."""
    if kept := found(w).get(form):
        return kept
    store = w.untyped_storage()
    packs = getattr(store, "pefast_packs", None)
    if packs is None:
        packs = store.pefast_packs = {}
    version = _version(w)
    clear(packs, version, store)
    kept = make()
    packs.setdefault((w.data_ptr(), w.stride(), w.shape), (version, {}))[1][form] = kept
    return kept


def found(w: Tensor) -> dict[Hashable, tuple[Tensor, int]]:
    """The pack and the mark of each form that is kept of w as it is now."""
    packs = getattr(w.untyped_storage(), "pefast_packs", None)
    if packs is not None and (kept := packs.get((w.data_ptr(), w.stride(), w.shape))):
        version, forms = kept
        if version == _version(w):
            return forms
    return {}


def _version(w: Tensor) -> int:
    try:
        return w._version
    except RuntimeError:  # a tensor of inference mode, which counts no writes
        return 0


def clear(packs: dict, version: int, store) -> None:
    """Drops what was packed of a storage before a write, or where it lay before."""
    begin, end = store.data_ptr(), store.data_ptr() + store.nbytes()
    for old in [old for old, pack in packs.items() if pack[0] != version or not begin <= old[0] < end]:
        del packs[old]


def room(w: Tensor, form: Hashable, size: int) -> bool:
    """Whether w is packed in this form, or a pack of so many bytes leaves a quarter of the memory free."""
    packs = getattr(w.untyped_storage(), "pefast_packs", {})
    # a pack of where it lay before gives its room to the next
    like = w.stride(), w.shape
    if any(place[1:] == like and form in forms for place, (_, forms) in packs.items()):
        return True
    free, whole = _memory()
    return free - size > whole / 4


def _memory() -> tuple[int, int]:
    """Bytes of memory that are free, and all there is."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemAvailable"], sizes["MemTotal"]


def drop(w: Tensor) -> None:
    """Frees every pack of this weight: somebody wrote to it through .data, which leaves its version alone."""
    # another thread may have done it
    vars(w.untyped_storage()).pop("pefast_packs", None)


def packed_bytes(w: Tensor) -> int:
    """How much memory the packs of this weight take now."""
    packs = getattr(w.untyped_storage(), "pefast_packs", {})
    return sum(pack.nbytes for _, forms in packs.values() for pack, _ in forms.values())
