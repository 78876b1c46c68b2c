"""nn.Dropout by the counter: no mask in memory, and a fraction of the time of torch's generator on a CPU."""

from torch import Tensor, nn

from pefast.ops.dropout import dropout


class CounterDropout(nn.Module):
    """Mixed into an nn.Dropout: the same rates and switches, another mask."""

    def forward(self, x: Tensor) -> Tensor:  # [...] -> [...]
        return dropout(x, self.p, self.training)


def takes(module: nn.Module) -> bool:
    """Whether a module is a plain nn.Dropout, whose mask pefast can make."""
    return type(module) is nn.Dropout and not module.inplace and module.p < 1
