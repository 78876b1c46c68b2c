"""Frozen weights in the order in which csrc reads them, kept beside the weight.

The packs hang on the weight's storage, so that every view of it finds them and they are freed with it; they
are made again when its version, its place in memory (FSDP2 gives the memory back between two uses), or a mark
of 32 of its numbers, has changed.
"""

from collections.abc import Callable, Hashable

from torch import Tensor


def packed(w: Tensor, form: Hashable, make: Callable[[], tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """w [N, K] in one form, and its mark; from the storage, or made now by make()."""
    if kept := found(w, form):
        return kept[0][1:]
    store = w.untyped_storage()
    packs = getattr(store, "pefast_packs", None)
    if packs is None:
        packs = store.pefast_packs = {}
    version = _version(w)
    clear(packs, version, store)
    pack, mark = make()
    packs[w.data_ptr(), w.stride(), w.shape, form] = (version, pack, mark)
    return pack, mark


def found(w: Tensor, *forms: Hashable) -> list[tuple[int, Tensor, int]] | None:
    """The version, the pack and the mark of each form, where all of them are kept and of w as it is now."""
    packs = getattr(w.untyped_storage(), "pefast_packs", None)
    if not packs:
        return None
    place = w.data_ptr(), w.stride(), w.shape
    all_forms = [packs.get((*place, form)) for form in forms]
    version = _version(w)
    return all_forms if all(one is not None and one[0] == version for one in all_forms) else None


def _version(w: Tensor) -> int:
    return 0 if w.is_inference() else w._version


def clear(packs: dict, version: int, store) -> None:
    """Drops what was packed of a storage before a write, or where it lay before."""
    begin, end = store.data_ptr(), store.data_ptr() + store.nbytes()
    for old in [old for old, pack in packs.items() if pack[0] != version or not begin <= old[0] < end]:
        del packs[old]


def room(w: Tensor, form: Hashable, size: int) -> bool:
    """Whether w is packed in this form, or a pack of so many bytes leaves a quarter of the memory free."""
    packs = getattr(w.untyped_storage(), "pefast_packs", {})
    if (w.data_ptr(), w.stride(), w.shape, form) in packs:
        return True
    # a pack of where it lay before gives its room to the next
    if any(place[1:] == (w.stride(), w.shape, form) for place in packs):
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
    del w.untyped_storage().pefast_packs


def packed_bytes(w: Tensor) -> int:
    """How much memory the packs of this weight take now."""
    packs = getattr(w.untyped_storage(), "pefast_packs", {})
    return sum(pack.numel() * pack.element_size() for _, pack, _ in packs.values())
