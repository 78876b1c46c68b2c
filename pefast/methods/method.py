"""What every method promises, and what it may leave at its usual.

A method is a dataclass of settings with these, called in this order by pefast.attach and its kin:

    check()                                     ValueError for settings that no model could take
    plan(model) -> plan                         where it will enter; changes nothing, may raise ValueError
    enter(model, name, key, plan, router)       puts itself on the model as part `key` of the adapter `name`
    leave(model, name, key)                     takes itself off
    tensors(model, name, key) -> {name: Tensor} its parameters, under the names that the file gives them
    config(model, name, key) -> dict            adapter_config.json; peft_type is one of PEFT_TYPES
    owns(key) -> bool                           whether a tensor of a file is the method's, and not the head's
    from_config(config, tensors) -> method      its settings, read from a folder
"""

from typing import ClassVar

from torch import Tensor, nn


class Method:
    """The usual behaviour of a method, for those that need no other."""

    kind: ClassVar[
        str
    ]  # its name in lower case; the folder of its files inside an adapter of several methods
    peft_types: ClassVar[tuple[str, ...]]  # the peft_type of folders that it reads; it writes the first
    prompt_learning: ClassVar[bool] = False  # PEFT keeps the head of such a folder one level higher
    heads: ClassVar[bool] = True  # whether attach gives the adapter a trained copy of the task head
    merges: ClassVar[bool] = False  # whether `merge` can put it into the weights
    routes: ClassVar[bool] = True  # whether the rows of one batch may differ in it

    def claims(self, plan) -> dict:
        """Which of the model's tensors it puts its own in the place of: {path: Index, or None for all}."""
        return {}

    def switch(self, model: nn.Module, name: str, key: str, on: bool) -> None:
        """Called when its adapter begins (on) or ceases to compute, once for each change. Methods whose
        parameters are looked up through the router have nothing to do."""

    def merge(self, model: nn.Module, name: str, key: str) -> None:
        """Puts itself into the frozen weights. The deltas of hosts are merged for it."""

    def unmerge(self, model: nn.Module, name: str, key: str) -> None:
        """Takes that back, bit for bit."""

    def parameters(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """What trains, by name: its tensors, unless the file holds something that is computed from them."""
        return self.tensors(model, name, key)

    def resume(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """The parameters, where the file's tensors are not enough to go on training; kept in a second file.

        `load` puts them back where that file is there (the config then has "resumes": true), and the file's
        tensors otherwise.
        """
        return {}

    @staticmethod
    def repeats(key: str) -> bool:
        """Whether a tensor of that name in a file is the base model's own, and needs no reading."""
        return False

    def rates(self, model: nn.Module, name: str, key: str) -> dict[str, float]:
        """Factors on the learning rate of some parameters, by the names that `tensors` gives them."""
        return {}

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Nothing of its own to undo where hosts hold its deltas: they drop them."""
