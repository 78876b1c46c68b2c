"""For the tests: named inputs, and the one measure of closeness.

A hand is close enough where its largest error and its root-mean-square error, against the formula in float64,
are each at most twice the formula's own error in the hand's dtype, plus half a rounding step of the result's
size.
"""

import torch
from torch import Tensor

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# name: M, K, N, R
CASES = {
    "one row": (1, 64, 48, 4),
    "ragged": (37, 129, 65, 3),
    "wide rank": (40, 96, 80, 64),
    "rank one": (19, 33, 17, 1),
    "rank above width": (9, 24, 40, 256),
    "tile multiple": (64, 128, 96, 16),
    "minilm": (96, 384, 384, 8),
    "zero rows": (0, 32, 24, 8),
}


def make_inputs(
    case: str, dtype: torch.dtype, masters: torch.dtype | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """x [M, K], w [N, K], bias [N], gain [N], a [R, K], b [N, R], c [R], d [N] and dy [M, N] of a named case:
    signed, seeded.

    a, b, c, d come in `masters`, or in dtype.
    """
    m, k, n, r = CASES[case]
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape, size=1.0, kind=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(kind)

    small = {"kind": masters or dtype}
    return {
        "x": normal(m, k),
        "w": normal(n, k, size=k**-0.5),
        "bias": normal(n),
        "gain": normal(n),
        "a": normal(r, k, size=k**-0.5, **small),
        "b": normal(n, r, size=r**-0.5, **small),
        "c": normal(r, **small),
        "d": normal(n, **small),
        "dy": normal(m, n),
    }


def assert_no_worse(name: str, got: Tensor, near: Tensor, exact: Tensor) -> None:
    """Fails unless `got` is as close to `exact` (float64) as `near`, the plain formula in got's dtype,
    allows."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {int((~got.isfinite()).sum())} values are not finite"
    if not exact.numel():
        return
    half_step = EPS[got.dtype] / 2
    error, allowed = (got.double() - exact).abs(), (near.double() - exact).abs()
    largest, most = float(error.max()), float(2 * allowed.max() + half_step * exact.abs().max())
    assert largest <= most, f"{name}: largest error {largest:.3g}, allowed {most:.3g}"
    rms, rms_most = _rms(error), 2 * _rms(allowed) + half_step * _rms(exact)
    assert rms <= rms_most, f"{name}: root-mean-square error {rms:.3g}, allowed {rms_most:.3g}"


def _rms(values: Tensor) -> float:
    return float(values.double().pow(2).mean().sqrt())
