"""Without a GPU and outside the interpreter every Triton hand refuses in words, before triton is asked."""

import os

import pytest
import torch
from pefast.kernels import delta_linear_decode

import pefast
from pefast import kernels
from pefast.native.delta_linear_decode import RowDelta
from pefast.ops import OPS, Index, delta_linear, dropout, partial_linear, prefix_attention
from pefast.ops.delta_linear import Segment

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors"),
]
X, W, A, B = torch.randn(3, 32), torch.randn(24, 32), torch.randn(4, 32), torch.randn(24, 4)
HEADS = torch.randn(1, 2, 5, 8)
ROWS = Index("rows", torch.tensor([0, 5]))
CALLS = {
    "delta_linear": lambda: delta_linear(X, W, Segment(A, B), backend="triton"),
    "dropout": lambda: dropout(X, 0.5, seed=1, backend="triton"),
    "partial_linear": lambda: partial_linear(X, W, W[:2], ROWS, backend="triton"),
    "prefix_attention": lambda: prefix_attention(HEADS, HEADS, HEADS, backend="triton"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_cpu_tensor_is_refused_in_words(name):
    with pytest.raises(ValueError, match=f"^{name}: back end 'triton' .* needs a GPU, . is on cpu"):
        CALLS[name]()
    assert "triton" in OPS[name].hands


def test_operators_called_past_the_table_refuse_too():
    at = torch.tensor([1])
    for call in (
        lambda: torch.ops.pefast.partial_linear_triton(X, X, at, "rows", 1, 1),
        lambda: torch.ops.pefast.dropout_triton(X, 0.5, at, 0),
    ):
        with pytest.raises(RuntimeError, match="the Triton kernels cannot run: needs a GPU, x is on cpu"):
            call()


def test_a_decoding_step_is_the_general_paths():
    delta = RowDelta(0, A, B, 1.0)
    assert not delta_linear_decode.takes(X, named=True)
    assert "needs a GPU, the weight is on cpu" in delta_linear_decode.why_not(W, None, [delta])
    layer = torch.nn.Sequential(torch.nn.Linear(32, 24))
    pefast.attach(layer, pefast.LoRA(rank=2, targets=["0"]))
    with torch.no_grad(), pefast.backend("triton"), pytest.raises(ValueError, match="needs a GPU"):
        layer(X)
