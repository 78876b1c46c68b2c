"""The Triton dropout, on a GPU or in the interpreter: the one mask, the values, the registered operators."""

import pytest
import torch
from pefast.kernels import tl, triton
from pefast.kernels.dropout import keep_tile, mask_numbers
from planted_faults import mutant

from pefast.ops.dropout import OP, keep_mask, reference
from pefast.testing import assert_no_worse

hand = OP.hands["triton"]
SHAPES = [(1, 1), (9, 300), (33, 128), (7, 1027)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [0, 1, 2**31 + 1, 2**32 + 5, 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_the_mask_is_the_formulas_bit_for_bit(device, seed, p):
    x = torch.ones(11, 387)
    y = hand.forward(x.to(device), p, torch.tensor([seed]), 3)
    assert torch.equal(y.cpu() != 0, keep_mask(11, 387, p, seed, 3))


@triton.jit
def _mask(y_ptr, columns, threshold, seed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr):
    first, row = tl.program_id(0) * BLOCK_N, tl.arange(0, BLOCK_M)
    keep = KEEP(row, first, threshold, seed, 3, BLOCK_M, BLOCK_N)
    tl.store(y_ptr + row[:, None] * columns + first + tl.arange(0, BLOCK_N)[None, :], keep)


def mask_in_tiles(device, width, keep_tile):
    """The mask [16, 512], made in tiles of some columns."""
    y, (threshold, _) = torch.empty(16, 512, dtype=torch.bool, device=device), mask_numbers(0.3)
    _mask[(512 // width,)](y, 512, threshold, 2**40 + 1, 16, width, keep_tile)
    return y.cpu()


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_a_tile_of_any_width_has_the_same_mask(device, width):
    assert torch.equal(mask_in_tiles(device, width, keep_tile), keep_mask(16, 512, 0.3, 2**40 + 1, 3))


@pytest.mark.parametrize(
    ("width", "line", "fault"),
    [
        (16, "counter += first % 32 // 2", "counter += 0"),
        (32, "tl.where(part == 0, word_0, word_1)", "tl.where(part == 0, word_1, word_0)"),
        (32, "part = first % 128 // 32", "part = first % 128 // 64"),
        (64, "right = first % 128 >= 64", "right = first % 128 >= 128"),
    ],
)
def test_a_fault_in_a_narrow_tile_is_found(device, tmp_path, width, line, fault):
    changed = mutant(hand, tmp_path, line, fault).keep_tile
    assert not torch.equal(mask_in_tiles(device, width, changed), keep_mask(16, 512, 0.3, 2**40 + 1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_references(device, nan_filled_empty, shape, dtype):
    x = torch.randn(shape).to(dtype)
    y = hand.forward(x.to(device), 0.3, torch.tensor([7]), 0)
    assert y.dtype == dtype and torch.equal(y.cpu(), reference(x, 0.3, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rounds_the_sum_once(device, dtype):
    y, t, seed = torch.randn(13, 259).to(dtype), torch.randn(13, 259).to(dtype), torch.tensor([5])
    got = y.to(device, copy=True)
    hand.add_(got, t.to(device), 0.4, seed, 2)
    near, exact = y + reference(t, 0.4, 5, 2), y.double() + reference(t.double(), 0.4, 5, 2)
    assert_no_worse("y", got.cpu(), near, exact)


def test_both_is_forward_and_add_under_one_mask(device):
    x, t, y, seed = *(torch.randn(3, 5, 200).to(device)), torch.tensor([9])
    sum_apart = y.clone()
    hand.add_(sum_apart, t, 0.2, seed, 1)
    x_hat = hand.both_(x, t, y, 0.2, seed, 1)
    assert torch.equal(x_hat, hand.forward(x, 0.2, seed, 1)) and torch.equal(y, sum_apart)


def test_what_is_dropped_may_be_infinite(device):
    y = hand.forward(torch.full((4, 256), torch.inf, device=device), 0.5, torch.tensor([3]), 0)
    assert sorted(set(y.flatten().tolist())) == [0.0, torch.inf] and not torch.signbit(y).any()


def test_any_strides_and_no_rows(device):
    x, seed = torch.randn(300, 40, device=device), torch.tensor([4])
    assert torch.equal(hand.forward(x.t(), 0.5, seed, 0), hand.forward(x.t().contiguous(), 0.5, seed, 0))
    assert hand.forward(x[:0], 0.5, seed, 0).shape == (0, 40)
    with pytest.raises(ValueError, match="contiguous"):
        hand.add_(x.t(), x.t(), 0.5, seed, 0)


def test_the_operators_keep_the_registrys_rules(device):
    x, seed = torch.randn(6, 130, device=device), torch.tensor([8])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pefast.dropout_triton, (x, 0.3, seed, 0), test_utils=checks)
    torch.library.opcheck(
        torch.ops.pefast.dropout_triton_add_, (x.clone(), x, 0.3, seed, 0), test_utils=checks
    )
    compiled = torch.compile(lambda x: hand.forward(x, 0.3, seed, 0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), hand.forward(x, 0.3, seed, 0))
