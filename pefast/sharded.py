"""Parameters of which each process holds a shard, as FSDP2 (fully_shard) leaves them between two uses.

Forward and backward need nothing of this: FSDP2 puts whole tensors into the modules for them. Files do.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked so that torch.distributed is not imported for it."""
    return hasattr(tensor, "device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share this model's parameters between them."""
    return any(is_shard(parameter) for parameter in model.parameters())


def refuse_shards(who: str, model: nn.Module) -> None:
    """Raises ValueError where what would be changed is spread over processes."""
    if is_sharded(model):
        raise ValueError(
            f"{who}: this {type(model).__name__} is spread over processes; before fully_shard, or on a model"
            " that is loaded whole, would be right"
        )


@contextlib.contextmanager
def whole(model: nn.Module, without: tuple[str, ...]) -> Iterator[bool]:
    """Inside this context the parameters are whole tensors, but for those of these names; then shards again.

    Every process of a sharded model has to come here. Gives whether this one is to write.
    """
    if not is_sharded(model):
        yield True
        return
    from torch import distributed

    shards, found = [], {}
    base = {id(model.get_parameter(name)) for name in without}
    try:
        for module in model.modules():
            for name, own in module._parameters.items():
                if own is None or not is_shard(own) or id(own) in base:
                    continue
                if id(own) not in found:
                    found[id(own)] = nn.Parameter(own.detach().full_tensor(), own.requires_grad)
                shards.append((module, name, own))
                module._parameters[name] = found[id(own)]
        yield distributed.get_rank() == 0
    finally:
        for module, name, own in shards:
            module._parameters[name] = own


def fill(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter, or this process's shard of it, the value that a file has."""
    if is_shard(parameter):
        from torch.distributed.tensor import distribute_tensor

        place = parameter.device_mesh
        # every process has read the file, so nobody waits for another
        value = distribute_tensor(
            value.to(place.device_type, parameter.dtype), place, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)
