"""What pefast computes: one file an operation, and OPS, the table of their tables of back ends."""

from pefast.ops import delta_linear as _delta_linear
from pefast.ops import dropout as _dropout
from pefast.ops import prefix_attention as _prefix_attention

OPS = {operation.name: operation for operation in (_dropout.OP, _delta_linear.OP, _prefix_attention.OP)}

Segment = _delta_linear.Segment
# a function takes its file's name here; `from pefast.ops.dropout import OP` still finds the file
dropout = _dropout.dropout
delta_linear = _delta_linear.delta_linear
prefix_attention = _prefix_attention.prefix_attention

__all__ = ["OPS", "Segment", "delta_linear", "dropout", "prefix_attention"]
