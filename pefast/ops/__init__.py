"""What pefast computes: one file an operation, and OPS, the table of their tables of back ends."""

from pefast.ops import delta_linear as _delta_linear
from pefast.ops import dropout as _dropout
from pefast.ops import linear_cross_entropy as _linear_cross_entropy
from pefast.ops import partial_linear as _partial_linear
from pefast.ops import prefix_attention as _prefix_attention
from pefast.ops import sibling_linear as _sibling_linear

_FILES = (
    _dropout,
    _delta_linear,
    _sibling_linear,
    _linear_cross_entropy,
    _prefix_attention,
    _partial_linear,
)
OPS = {file.OP.name: file.OP for file in _FILES}

Part = _sibling_linear.Part
Segment = _delta_linear.Segment
Index = _partial_linear.Index
# a function takes its file's name here; `from pefast.ops.dropout import OP` still finds the file
dropout = _dropout.dropout
delta_linear = _delta_linear.delta_linear
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
partial_linear = _partial_linear.partial_linear
prefix_attention = _prefix_attention.prefix_attention
sibling_linear = _sibling_linear.sibling_linear

__all__ = [
    "OPS",
    "Index",
    "Part",
    "Segment",
    "delta_linear",
    "dropout",
    "linear_cross_entropy",
    "partial_linear",
    "prefix_attention",
    "sibling_linear",
]
