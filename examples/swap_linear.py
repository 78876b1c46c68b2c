"""FusedLoRALinear in place of nn.Linear: a small trained net learns a second task through low ranks.

python examples/swap_linear.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import pefast


def task(turn: float, rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 16 dimensions, and on which side of a curved border each lies; `turn` moves the border."""
    x = torch.randn(rows, 16)  # [rows, 16]
    return x, (torch.sin(x[:, 0] + turn) + turn * x[:, 1] > 0).long()


def learn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Adam over what trains; gives the accuracy on the same points."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return accuracy(net, x, y)


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return (net(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    """One net, two tasks."""
    torch.manual_seed(0)
    first, second = task(0.0), task(2.0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    print(f"first task, all weights train:      {learn(net, *first):.3f}")
    print(f"second task, before:                {accuracy(net, *second):.3f}")

    net.requires_grad_(False)
    for index in (0, 2, 4):
        net[index] = pefast.FusedLoRALinear.from_linear(net[index], rank=4)
    print(f"second task, only rank 4 trains:    {learn(net, *second):.3f}")

    trains = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"parameters that train:              {trains} of {sum(p.numel() for p in net.parameters())}")


if __name__ == "__main__":
    main()
