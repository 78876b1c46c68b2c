"""Choosing who computes. Each operation has a table of hands; nothing else chooses.

A hand is a module:
    refuse(call) -> str      "" or why it cannot run this call
    decline(call) -> str     optional: "" or why another hand is faster here; only the automatic choice asks
    forward, backward        see the operation's file

A hand that the caller names runs or raises with its reason. Chosen automatically, the first of the table that
neither refuses nor declines computes, and `Operation.reasons` says why the ones before it did not.
"""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

_forced: str | None = os.environ.get("PEFAST_BACKEND") or None


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Inside this context every pefast operation runs on the back end `name` ("eager", "native", "triton"),
    or raises.

    None gives the choice back to pefast. The environment variable PEFAST_BACKEND does the same for a whole
    process.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The back end that a context or PEFAST_BACKEND names, or None."""
    return _forced


class Operation:
    """One operation's table of back ends, the fastest first."""

    def __init__(self, name: str, hands: dict[str, ModuleType]):
        self.name = name
        self.hands = hands
        self.backends = tuple(hands)
        self._declines = {key: getattr(hand, "decline", None) for key, hand in hands.items()}

    def why_not(self, backend: str, call) -> str:
        """Why the back end of that name cannot run this call, or "" if it can."""
        if backend not in self.hands:
            return f"there is no back end {backend!r}, there are {', '.join(self.backends)}"
        return self.hands[backend].refuse(call)

    def reasons(self, call) -> dict[str, str]:
        """For each back end, why the automatic choice passes it by; "" for one that it would take."""
        found = {}
        for name, hand in self.hands.items():
            decline = self._declines[name]
            found[name] = hand.refuse(call) or (decline(call) if decline else "")
        return found

    def free(self, backend: str) -> bool:
        """Whether the choice is pefast's, or names this back end."""
        return _forced is None or _forced == backend

    def pick(self, call, backend: str | None = None) -> str:
        """The back end that computes this call. Raises ValueError where one was named that cannot."""
        named = backend or _forced
        if named:
            if why := self.why_not(named, call):
                raise ValueError(f"{self.name}: back end {named!r} cannot run this call: {why}")
            return named
        for name, hand in self.hands.items():
            if hand.refuse(call):
                continue
            decline = self._declines[name]
            if decline is None or not decline(call):
                return name
        raise ValueError(f"{self.name}: no back end takes this call: {self.reasons(call)}")
