"""delta_linear's compiled kernels for sm_80 and sm_90a, executed on the CPU: no worse than PyTorch."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from delta_linear_check import FORMS, ROADS, SEED, check, taking
from ptx import on_ptx
from ptx_rung import FULL, TARGETS, rung

from pefast.ops import OPS
from pefast.ops.delta_linear import Call, Segment
from pefast.ops.dropout import keep_mask
from pefast.testing import make_inputs

pytestmark = rung
hand = OPS["delta_linear"].hands["triton"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# every kernel in every variant that a form asks for, on one target each; both run with LADDER=full
REPRESENTATIVE = [
    ("sm80", "split", "dropped", BF16),
    ("sm90", "split", "hybrid", BF16),
    ("sm80", "whole", "activated", BF16),
    ("sm90", "whole", "dropped", BF16),
    ("sm90", "split", "routed", BF16),
    ("sm80", "library", "given", BF16),
    ("sm90", "whole", "one_of_many", FP16),
    ("sm80", "split", "lora", FP16),
    ("sm80", "whole", "activated", FP32),
    ("sm90", "split", "activated", FP32),
]
EVERY = list(itertools.product(TARGETS, ROADS, FORMS, (BF16, FP16, FP32)))


@pytest.fixture(scope="module")
def seen():
    """Names of the kernels that were executed."""
    return set()


@pytest.mark.parametrize(("target", "road", "form", "dtype"), EVERY if FULL else REPRESENTATIVE, ids=str)
def test_every_form_by_every_road(seen, nan_filled_empty, target, road, form, dtype):
    with taking(hand, road), on_ptx(target) as launched:
        check(hand, FORMS[form], make_inputs("ragged", dtype), "cpu")
    seen |= {launch.name for launch in launched}
    assert launched


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("road", ["whole", "split"])
def test_several_tiles_and_strips(nan_filled_empty, road, target):
    # 2 by 3 tiles of y and more, K in four steps, and rows that begin at multiples of 16 numbers: vectors of
    # loads, asynchronous copies and their pipelines
    m, k, n, r = 150, 208, 272, 48
    inputs = {
        "x": torch.randn(m, k),
        "w": torch.randn(n, k) / k**0.5,
        "bias": torch.randn(n),
        "a": torch.randn(r, k) / k**0.5,
        "b": torch.randn(n, r) / r**0.5,
        "dy": torch.randn(m, n),
    }
    inputs = {name: t.bfloat16() for name, t in inputs.items()}
    with taking(hand, road), on_ptx(target) as launched:
        check(hand, FORMS["lora"], inputs, "cpu")
    assert max(launch.grid[0] for launch in launched) >= 6
    assert any("cp.async.wait_group" in launch.text for launch in launched)


# by the allowed one chain of sums along K, N or M would be 1.1, 2.2, 1.2 (h, in db), 2.6 (da), 2.6 (da)
LONG = [
    ("whole", 16, 1024, 64),
    ("split", 16, 1024, 64),
    ("split", 16, 4096, 17),
    ("whole", 16, 33, 2048),
    ("split", 2048, 17, 33),
]


@pytest.mark.parametrize(("road", "m", "k", "n"), LONG)
def test_fp32_along_a_wide_layer(nan_filled_empty, monkeypatch, road, m, k, n):
    def one_strip(m, columns, block_m, programs):
        return 1, -(-m // block_m) * block_m

    # so many rows for one program take many columns, or more rows than there is time for
    monkeypatch.setattr(hand.tiles, "strips", one_strip)
    r = 3
    shapes = {"x": (m, k), "w": (n, k), "bias": (n,), "a": (r, k), "b": (n, r), "dy": (m, n)}
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {name: inputs[name] / inputs[name].shape[1] ** 0.5 for name in "wab"}
    with taking(hand, road), on_ptx("sm80"):
        check(hand, FORMS["lora"], inputs, "cpu")


@pytest.mark.parametrize("target", TARGETS)
def test_the_mask_is_the_cpus_bit_for_bit(target):
    # an x of ones and an a that is the identity show the mask itself in h
    k = 150
    x, w, a = torch.ones(19, k), torch.zeros(8, k), torch.eye(k)
    segment = Segment(a.bfloat16(), torch.zeros(8, k).bfloat16(), 1.0, dropout=0.3)
    call = Call(x.bfloat16(), w.bfloat16(), None, None, None, SEED, (segment,))
    with taking(hand, "split"), on_ptx(target):
        _, ((h, _),) = hand.forward(call)
    assert torch.equal(h != 0, keep_mask(19, k, 0.3, SEED))


def test_every_kernel_was_executed(seen):
    if not seen:
        pytest.skip("counts what the tests above it launched, and none of them ran")
    source = Path(hand.__file__).read_text(encoding="utf-8")
    assert seen == set(re.findall(r"(?:products|gradients)\.(\w+)\[", source))
