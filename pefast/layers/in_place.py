"""Changing what a layer computes while it stays the object that it is: its class is exchanged for one that
mixes the new forward in, and given back later. Names, hooks, ties and state dicts do not notice.
"""

import functools

from torch import nn


def _parts(module: nn.Module, protocol: int):
    """What pickle keeps of a module: its class has no name that it could be found by, its parts have."""
    return (_again, _under(type(module), None), module.__getstate__())


def _again(cls: type, later: list[tuple[type, str]]) -> nn.Module:
    """An empty module of a mixed class; the first to be mixed in is the first of `later`."""
    for mixin, prefix in later:
        cls = _mixed(mixin, cls, prefix)
    return cls.__new__(cls)


@functools.cache
def _mixed(mixin: type, cls: type, prefix: str) -> type:
    own = {
        "__doc__": f"{cls.__name__}, computed by pefast.",
        "mixed_prefix": prefix,
        "__reduce_ex__": _parts,
    }
    return type(f"{prefix}{cls.__name__}", (mixin, cls), own)


def mix_in(module: nn.Module, mixin: type, prefix: str, lowest: bool = False) -> None:
    """Puts `mixin` before the module's own class, and before what was mixed in; `lowest`: behind that."""
    cls, later = _under(type(module), None) if lowest else (type(module), [])
    for each, name in ((mixin, prefix), *later):
        cls = _mixed(each, cls, name)
    module.__class__ = cls


def _under(cls: type, mixin: type | None) -> tuple[type, list[tuple[type, str]]]:
    """The class under a mixin, or under all of them, and what was mixed in over it, the first first."""
    later = []
    while "mixed_prefix" in vars(cls) and cls.__bases__[0] is not mixin:
        later.insert(0, (cls.__bases__[0], vars(cls)["mixed_prefix"]))
        cls = cls.__bases__[1]
    return cls, later


def own_class(module: nn.Module, mixin: type) -> type:
    """The class that the module had before `mixin` came."""
    line = type(module).__mro__
    return line[line.index(mixin) + 1]


def plain_class(module: nn.Module) -> type:
    """The class that the module had before anything was mixed in."""
    return _under(type(module), None)[0]


def take_out(module: nn.Module, mixin: type) -> None:
    """Takes `mixin` from the module's class; what was mixed in after it stays."""
    with_mixin, later = _under(type(module), mixin)
    cls = with_mixin.__bases__[1]
    for each, name in later:
        cls = _mixed(each, cls, name)
    module.__class__ = cls
