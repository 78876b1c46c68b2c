"""What a waist passes through, in Triton: σ and σ' of pefast/eager/activations.py, in fp32 on tiles of z.

Only the kinds that a call uses are compiled into its kernels.
"""

from . import tl, triton

# in the order of pefast/eager/activations.py
KINDS = (
    "identity",
    "relu",
    "gelu",
    "gelu_new",
    "quick_gelu",
    "silu",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "elu",
    "softplus",
    "mish",
)


@triton.jit
def _tanh(z):
    # 1 - e loses what is small, so there the series
    e = tl.exp(-2.0 * tl.abs(z))
    far = tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    square = z * z
    near = z * (1.0 - square * (0.33333333 - square * (0.13333333 - square * 0.05396825)))
    return tl.where(tl.abs(z) < 0.1, near, far)


@triton.jit
def _expm1(z):
    near = z * (1.0 + z * (0.5 + z * (0.16666667 + z * (0.04166667 + z * 0.00833333))))
    return tl.where(tl.abs(z) < 0.1, near, tl.exp(z) - 1.0)


@triton.jit
def _mish_gate(z):
    # tanh(log(1 + e)), e = exp(z), without either function
    e = tl.exp(tl.minimum(z, 20.0))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def activate(z, KIND: tl.constexpr):
    """σ(z)."""
    h = z
    if KIND == "relu":
        h = tl.maximum(z, 0.0)
    elif KIND == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.70710678))
    elif KIND == "gelu_new":
        h = 0.5 * z * (1.0 + _tanh(0.79788456 * (z + 0.044715 * z * z * z)))
    elif KIND == "quick_gelu":
        h = z * tl.sigmoid(1.702 * z)
    elif KIND == "silu":
        h = z * tl.sigmoid(z)
    elif KIND == "tanh":
        h = _tanh(z)
    elif KIND == "sigmoid":
        h = tl.sigmoid(z)
    elif KIND == "leaky_relu":
        h = tl.where(z > 0, z, 0.01 * z)
    elif KIND == "elu":
        h = tl.where(z > 0, z, _expm1(tl.minimum(z, 0.0)))
    elif KIND == "softplus":
        h = tl.where(z > 20.0, z, tl.log(1.0 + tl.exp(tl.minimum(z, 20.0))))
    elif KIND == "mish":
        h = z * _mish_gate(z)
    return h


@triton.jit
def slope(z, KIND: tl.constexpr):
    """σ'(z)."""
    s = tl.full(z.shape, 1.0, tl.float32)
    if KIND == "relu":
        s = tl.where(z > 0, 1.0, 0.0)
    elif KIND == "gelu":
        s = 0.5 * (1.0 + tl.erf(z * 0.70710678)) + z * 0.39894228 * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_new":
        t = _tanh(0.79788456 * (z + 0.044715 * z * z * z))
        s = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.79788456 * (1.0 + 0.134145 * z * z)
    elif KIND == "quick_gelu":
        g = tl.sigmoid(1.702 * z)
        s = g * (1.0 + 1.702 * z * (1.0 - g))
    elif KIND == "silu":
        g = tl.sigmoid(z)
        s = g * (1.0 + z * (1.0 - g))
    elif KIND == "tanh":
        t = _tanh(z)
        s = 1.0 - t * t
    elif KIND == "sigmoid":
        g = tl.sigmoid(z)
        s = g * (1.0 - g)
    elif KIND == "leaky_relu":
        s = tl.where(z > 0, 1.0, 0.01)
    elif KIND == "elu":
        s = tl.where(z > 0, 1.0, tl.exp(tl.minimum(z, 0.0)))
    elif KIND == "softplus":
        s = tl.where(z > 20.0, 1.0, tl.sigmoid(z))
    elif KIND == "mish":
        g = _mish_gate(z)
        s = g + z * tl.sigmoid(z) * (1.0 - g * g)
    return s


@triton.jit
def activate_slots(z, kind, USED: tl.constexpr):
    """σ of each column's own kind: kind [R] counts in USED, the kinds of the call."""
    h = activate(z, tl.constexpr(USED[0]))
    for i in tl.static_range(1, len(USED)):
        h = tl.where((kind == i)[None, :], activate(z, tl.constexpr(USED[i])), h)
    return h


@triton.jit
def slope_slots(z, kind, USED: tl.constexpr):
    """σ' of each column's own kind."""
    s = slope(z, tl.constexpr(USED[0]))
    for i in tl.static_range(1, len(USED)):
        s = tl.where((kind == i)[None, :], slope(z, tl.constexpr(USED[i])), s)
    return s
