"""How a frozen weight is stored: one file a format, and FORMATS, asked in order who knows a module."""

from types import ModuleType

from torch import nn

from pefast.formats import dense

FORMATS = {"dense": dense}


def format_of(module: nn.Module) -> ModuleType | None:
    """The format that knows this module's weight, or None."""
    return next((form for form in FORMATS.values() if form.knows(module)), None)
