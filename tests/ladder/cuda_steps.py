"""Decoding steps for the tests of csrc/cuda: named shapes, and what a step must satisfy."""

import torch

from pefast.ops.delta_linear import Call, Segment, reference
from pefast.testing import assert_no_worse

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# name: M, K, N, the ranks of the adapters; the last of three or more belongs to every row
STEPS = {
    "one row": (1, 64, 48, [16]),
    "one row, no adapter": (1, 40, 24, []),
    "each its own": (16, 96, 70, [1, 3, 8, 16, 64]),
    "ragged": (7, 57, 33, [3, 1]),
    "long": (4, 1096, 40, [8]),
    "as wide as a warp": (9, 8, 3, [16, 16, 2]),
    "no rows": (0, 64, 48, [4]),
}
# processors of an imagined GPU: for one blocks are wide where there are 24 columns, for many narrow
WIDE, NARROW = 1, 132


def make(name: str, dtype, masters=None, seed=0) -> Call:
    """A step of STEPS, with an id for each row; a, b and the bias in `masters`, or in dtype."""
    m, k, n, ranks = STEPS[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0, kind=dtype):
        return (torch.randn(*shape, generator=generator) * size).to(kind)

    masters = masters or dtype
    segments = []
    for adapter, rank in enumerate(ranks):
        a = normal(rank, k, size=k**-0.5, kind=masters)
        b = normal(n, rank, size=rank**-0.5, kind=masters)
        every = adapter >= 2 and adapter == len(ranks) - 1
        segments.append(Segment(a, b, 0.5 + adapter / 4, adapter=None if every else adapter))
    ids = torch.randint(-1, len(ranks) + 1, (m,), generator=generator)
    x, w = normal(m, k), normal(n, k, size=k**-0.5)
    return Call(x, w, normal(n, kind=masters), normal(n), ids, None, tuple(segments))


def in_dtype(call: Call, dtype) -> torch.Tensor:
    """y by the formula."""
    x, w, bias, gain = (None if t is None else t.to(dtype) for t in call[:4])
    segments = [s._replace(a=s.a.to(dtype), b=s.b.to(dtype)) for s in call.segments]
    return reference(x, w, segments, bias, gain, call.ids)


def check(step, call: Call, processors=NARROW) -> torch.Tensor:
    """y by `step`, no worse than PyTorch."""
    y = step(call, processors)
    assert_no_worse("y", y, in_dtype(call, call.x.dtype), in_dtype(call, torch.float64))
    return y
