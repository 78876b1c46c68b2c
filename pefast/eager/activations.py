"""The activations a waist can have, each with its derivative, by the name that recipes and settings use."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


class Activation(NamedTuple):
    """σ and its gradient, both elementwise on z [M, R]."""

    forward: Callable[[Tensor], Tensor]  # z -> σ(z)
    backward: Callable[[Tensor, Tensor], Tensor]  # dh, z -> dh ⊙ σ'(z)


def _tanh_backward(dh: Tensor, z: Tensor) -> Tensor:
    return _aten.tanh_backward(dh, torch.tanh(z))


def _sigmoid_backward(dh: Tensor, z: Tensor) -> Tensor:
    return _aten.sigmoid_backward(dh, torch.sigmoid(z))


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _quick_gelu_backward(dh: Tensor, z: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * z)
    return dh * gate * (1 + 1.702 * z * (1 - gate))


ACTIVATIONS = {
    "identity": Activation(lambda z: z, lambda dh, z: dh),
    "relu": Activation(F.relu, lambda dh, z: _aten.threshold_backward(dh, z, 0)),
    "gelu": Activation(F.gelu, lambda dh, z: _aten.gelu_backward(dh, z)),
    # the tanh form, under the name that transformers gives it
    "gelu_new": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda dh, z: _aten.gelu_backward(dh, z, approximate="tanh")
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "silu": Activation(F.silu, lambda dh, z: _aten.silu_backward(dh, z)),
    "tanh": Activation(torch.tanh, _tanh_backward),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, 0.01), lambda dh, z: _aten.leaky_relu_backward(dh, z, 0.01, False)
    ),
    "elu": Activation(F.elu, lambda dh, z: _aten.elu_backward(dh, 1.0, 1.0, 1.0, False, z)),
    "softplus": Activation(F.softplus, lambda dh, z: _aten.softplus_backward(dh, z, 1, 20)),
    "mish": Activation(F.mish, lambda dh, z: _aten.mish_backward(dh, z)),
}
