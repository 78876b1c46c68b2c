"""delta_linear in Triton: refusals, the choice of the form, launches. Formula: pefast/ops/delta_linear.py.

    forms.py                    whole, split or library: what each costs, and the choice
    waist.py                    how segments lie side by side
    tuning.py, tiles.py         sizes of tiles
    delta_linear_products.py    the kernels of h, y and dx
    delta_linear_gradients.py   the kernels of dh, db, da and dg, and of dx, dz and db in one

Sums that several programs share are left in parts and added in a fixed order, never by atomics: same input,
same bits. Not yet run or timed on a GPU: tests/ladder says what was shown without one, and runs there too.
"""

import torch
from torch import Tensor

from . import delta_linear_gradients as gradients
from . import delta_linear_products as products
from . import forms, tiles, triton, tuning
from .launch import DTYPES, INTERPRETED, checked, through_the_registry, why_not_here
from .waist import EVERY, Layout, Part, Places, arrange, down, fill, inner_bias, place, up


def refuse(call) -> str:
    """Why these kernels cannot run this call, or ""."""
    if why := why_not_here(call.x if call.x is not None else call.w):
        return why
    if not call.segments:
        return "takes at least one segment, none came"
    tensors = [call.w, call.bias, call.gain, call.ids]
    for s in call.segments:
        if s.dropout and call.seed is None:
            return "needs a seed for its dropout"
        tensors += s.a, s.b, s.c, s.d, s.h
    device = call.w.device if call.x is None else call.x.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return f"needs every tensor on {device}, one is on {tensor.device}"
        if tensor is not None and tensor is not call.ids and tensor.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, one tensor is {tensor.dtype}"
    return ""


def decline(call) -> str:
    """Why another hand is faster here, or ""."""
    if INTERPRETED:
        return "triton's interpreter is for tests, a thousand times slower"
    # a compiler traces this choice and cannot ask the driver
    name = "" if torch.compiler.is_compiling() else torch.cuda.get_device_name(call.x.device)
    parts, rates = _parts(call), forms.rates_of(name)
    s = _shape(call.x, call.w, parts)
    ours = forms.seconds(forms.forward(_form(forms.forward, s, parts, rates), s), rates)
    theirs = forms.library_only(s, rates)
    if theirs <= ours:
        return f"{1e6 * ours:.0f} µs predicted, {1e6 * theirs:.0f} by the vendor's products"
    return ""


def forward(call) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """y [M, N]; then (h, z) of all segments side by side, and (u, None) where the gain trains.

    h has no scale in it; z is what an activation was given, None where there is none. All in x's dtype.
    """
    run = torch.ops.pefast.delta_linear_triton if through_the_registry(call.x) else _forward
    keep_u = call.gain is not None and call.gain.requires_grad
    y, h, z, u = run(*_flat(call), keep_u)
    pairs = [(h, z if z.numel() else None)]
    return y, [*pairs, (u, None)] if keep_u else pairs


def backward(call, saved, dy: Tensor, needs):
    """dx, dw, dbias, dgain and (da, db, dc, dd, dh) of each segment; None for what is not needed."""
    run = torch.ops.pefast.delta_linear_triton_backward if through_the_registry(dy) else _backward
    (h, z), u = saved[0], saved[-1][0] if needs.gain else None
    # what is asked for, five flags a segment
    wanted = [flag for five in needs.segments for flag in five]
    dx, dz, da, db, dg = run(dy, *_flat(call), h, z, u, needs.x, wanted)
    places = place(tuple(p.outline() for p in _parts(call)))
    deltas = [
        _of_segment(s, places, i, dz, da, db, need)
        for i, (s, need) in enumerate(zip(call.segments, needs.segments, strict=True))
    ]
    dw = dbias = None
    if needs.w:
        du = dy if call.gain is None else dy * call.gain.to(dy.dtype)
        dw = torch.mm(du.t(), call.x)
    if needs.bias:
        dbias = dy.sum(0).to(call.bias.dtype)
    dgain = dg.to(call.gain.dtype) if needs.gain else None
    return dx if needs.x else None, dw, dbias, dgain, deltas


def _of_segment(s, places: Places, i: int, dz: Tensor, da: Tensor, db: Tensor, need):
    """The five gradients of one segment, out of those of all slots."""
    first, one = places.first[i], places.one[i]
    own = slice(first, first + s.b.shape[1])
    # copies: a view would keep the whole waist's gradient alive, and a parameter's gradient is dense
    return (
        da[own].to(s.a.dtype, copy=True) if need[0] else None,
        db[own].t().to(s.b.dtype, memory_format=torch.contiguous_format, copy=True) if need[1] else None,
        dz[:, own].sum(0, dtype=torch.float32).to(s.c.dtype) if need[2] else None,
        db[one].to(s.d.dtype, copy=True) if need[3] else None,
        dz[:, own].to(s.h.dtype, copy=True).reshape(s.h.shape) if need[4] else None,
    )


def _parts(call) -> list[Part]:
    return [
        Part(s.a, s.b, s.c, s.d, s.h, s.scale, s.activation if s.h is None else "identity", s.dropout,
             EVERY if s.adapter is None else s.adapter)
        for s in call.segments
    ]  # fmt: skip


def _layout(parts, w: Tensor) -> Layout:
    return arrange(tuple(p.outline() for p in parts), tiles.MOST_SLOTS[w.dtype], w.device)


def _shape(x: Tensor, w: Tensor, parts) -> forms.Shape:
    rank, drops = sum(p.b.shape[1] for p in parts), any(p.rate for p in parts)
    return forms.Shape(x.shape[0], *w.shape, rank, drops, x.element_size())


def _form(direction, s: forms.Shape, parts, rates: forms.Rates) -> str:
    # one tile makes one waist: no slots from elsewhere, one mask at most and none on the way there
    drops = s.dropout and (direction is forms.forward or len(parts) > 1)
    whole = not drops and all(p.h is None and p.d is None for p in parts)
    whole = whole and tuning.serves("whole" if direction is forms.forward else "back", 8 * s.size, s.r)
    return forms.choose(direction, s, rates, whole)


def _rates(x: Tensor) -> forms.Rates:
    return forms.rates_of(torch.cuda.get_device_name(x.device) if x.is_cuda else "")


def _flat(call) -> tuple:
    """The call as an operator of the registry takes it: tensors in one list, settings in others."""
    parts = _parts(call)
    tensors = [t for p in parts for t in p[:5]]
    settings = zip(*(p[5:] for p in parts), strict=True)
    x = call.w.new_empty((0, call.w.shape[1])) if call.x is None else call.x
    return x, call.w, call.bias, call.gain, call.ids, call.seed, tensors, *(list(s) for s in settings)


def _unflat(tensors, *settings) -> list[Part]:
    five = [tensors[at : at + 5] for at in range(0, len(tensors), 5)]
    return [Part(*t, *s) for t, s in zip(five, zip(*settings, strict=True), strict=True)]


def _forward(x, w, bias, gain, ids, seed, tensors, scales, activations, rates, adapters, keep_u):
    """y [M, N], h [M, R], z [M, R] or empty, u [M, N] or empty."""
    parts = _unflat(tensors, scales, activations, rates, adapters)
    layout = _layout(parts, w)
    (m, _), n, r = x.shape, w.shape[0], layout.total
    h, y = x.new_empty((m, r)), x.new_empty((m, n))
    z = x.new_empty((m, r) if layout.kinds != ("identity",) else 0)
    u = x.new_empty((m, n) if keep_u else 0)
    if not m:
        return y, h, z, u
    a = down(parts, layout, x.dtype) if layout.computed else None
    b, c = up(parts, layout, x.dtype), inner_bias(parts, layout, x.device)
    ids = None if layout.adapter is None else ids
    form = _form(forms.forward, _shape(x, w, parts), parts, _rates(x))
    kept = (z if z.numel() else None, u if keep_u else None)
    with torch.cuda.device_of(x):
        if form == "whole":
            _launch_whole(x, w, a, b, c, ids, gain, bias, h, *kept, y, layout)
            return y, h, z, u
        if layout.computed:
            _launch_waist(x, a, c, ids, h, kept[0], layout, seed)
        fill(h, parts, layout, ids)
        beside = form == "library"
        if beside:
            torch.mm(x, w.t(), out=y)
        _launch_product(x, w, None, h, b, layout.scale, gain, bias, kept[1], y, layout, seed, False, beside)
    return y, h, z, u


def _backward(
    dy, x, w, bias, gain, ids, seed, tensors, scales, activations, rates, adapters, h, z, u, need_x, wanted
):
    """dx [M, K], dz [M, R], and in fp32 da [computed, K], db [R, N], dg [N]; empty where it is not needed."""
    parts = _unflat(tensors, scales, activations, rates, adapters)
    layout = _layout(parts, w)
    m, k = dy.shape[0], w.shape[1]
    ids = None if layout.adapter is None else ids
    through = need_x and layout.computed > 0
    wants_a = any(wanted[0::5])
    below = through or wants_a or any(wanted[2::5]) or any(wanted[4::5])
    wants_up = any(wanted[1::5]) or any(wanted[3::5])
    dx = dy.new_empty((m, k) if need_x else 0)
    dz = dy.new_empty((m, layout.total) if below else 0)
    da = torch.zeros((layout.computed, k) if wants_a else 0, device=dy.device)
    db = torch.zeros((layout.total, dy.shape[1]) if wants_up else 0, device=dy.device)
    dg = torch.zeros(0 if u is None else dy.shape[1], device=dy.device)
    if not m:
        return dx, dz, da, db, dg
    form = _form(forms.backward, _shape(dy, w, parts), parts, _rates(dy))
    b = up(parts, layout, dy.dtype)
    a = down(parts, layout, dy.dtype) if layout.computed else None
    with torch.cuda.device_of(dy):
        whole = form == "whole" and through
        if whole:
            parts_of_b = _launch_back(dy, w, a, b, gain, ids, h, z, dz, dx, layout, seed, wants_up)
        elif below or wants_up:
            parts_of_h, parts_of_b = _launch_narrow(dy, b, gain, h, layout, below, wants_up)
            if below:
                _launch_finish(parts_of_h, z, ids, dz, layout)
        if wants_up:
            db = parts_of_b.sum(0)
        if need_x and not whole:
            _into_x(dy, w, gain, dz, a, dx, layout, seed, form == "library")
        if wants_a:
            da = _launch_down(x, dz, layout, seed)
        if u is not None:
            dg = _launch_column_sums(dy, u)
    return dx, dz, da, db, dg


def _into_x(dy, w, gain, dz, a, dx, layout, seed, beside):
    """dx = Σ mask ⊙ (dz a)/(1-p) + du w."""
    if beside or not layout.computed:
        torch.mm(dy if gain is None else dy * gain.to(dy.dtype), w, out=dx)
    if layout.computed:
        _launch_product(dy, w.t(), gain, dz, a.t(), None, None, None, None, dx, layout, seed, True, beside)


def _launch_waist(x, a, c, ids, h, z, layout, seed):
    (m, k), r = x.shape, layout.total
    block = tiles.waist(x, layout.width, layout.drops)
    products.waist[(layout.tiles * triton.cdiv(m, block["BLOCK_M"]),)](
        x, a, c, ids, layout.adapter, layout.kind, layout.tile, layout.keep, h, z, m, k, r, layout.tiles,
        *x.stride(), *a.stride(), _number(seed), USED=layout.kinds, EVERY=EVERY, DROPOUT=layout.drops,
        **_numbers(x, a, h), BLOCK_R=layout.width, **block,
    )  # fmt: skip


def _launch_product(x, w, inner, h, b, scale, gain, bias, u, y, layout, seed, back, beside):
    """y = Σ s·h bᵀ + x wᵀ, with the masks of the way back where `back`; y holds x wᵀ where `beside`."""
    (m, k), n = x.shape, w.shape[0]
    count, table = (layout.tiles, layout.tile) if back else (layout.plain_tiles, layout.plain_tile)
    block = tiles.product(x, n, layout.width, count > 1)
    if beside:
        # what the library made lies beside the sum: 128 rows of both spill on sm_100, 64 in fp32 everywhere
        block["BLOCK_M"] = min(32 if x.dtype == torch.float32 else 64, block["BLOCK_M"])
    products.product[(triton.cdiv(m, block["BLOCK_M"]) * triton.cdiv(n, block["BLOCK_N"]),)](
        x, w, inner, h, b, scale, table, layout.keep, gain, bias, u, y, m, n, k, layout.total, count,
        *x.stride(), *w.stride(), *b.stride(), _number(seed), BESIDE=beside, SEVERAL=count > 1,
        DROPOUT=back and layout.drops, **_numbers(x, w, b, h, y), BLOCK_R=layout.width, **block,
    )  # fmt: skip


def _launch_whole(x, w, a, b, c, ids, gain, bias, h, z, u, y, layout):
    (m, k), n = x.shape, w.shape[0]
    block = tiles.whole(x, n, layout.width)
    products.whole[(triton.cdiv(m, block["BLOCK_M"]) * triton.cdiv(n, block["BLOCK_N"]),)](
        x, w, a, b, c, ids, layout.adapter, layout.kind, layout.scale, gain, bias, h, z, u, y, m, n, k,
        layout.total, *x.stride(), *w.stride(), *a.stride(), *b.stride(), USED=layout.kinds, EVERY=EVERY,
        **_numbers(x, w, a, b, y), BLOCK_R=max(16, triton.next_power_of_2(layout.total)), **block,
    )  # fmt: skip


def _launch_back(dy, w, a, b, gain, ids, h, z, dz, dx, layout, seed, up_too):
    """dz and dx; the parts of db [strips, R, N]."""
    (m, n), k, r = dy.shape, w.shape[1], layout.total
    block = tiles.back(dy, k, layout.width, layout.drops)
    columns = triton.cdiv(k, block["BLOCK_K"])
    # a strip of several tiles leaves fewer parts of db; 512 programs are waves enough for a large GPU
    strips, rows = tiles.strips(m, columns, block["BLOCK_M"], 512)
    share = triton.cdiv(triton.cdiv(n, columns), block["BLOCK_U"]) * block["BLOCK_U"]
    db = torch.empty((strips, r, n) if up_too else 0, device=dy.device)
    gradients.back[(strips * columns,)](
        dy, w, a, b, gain, ids, layout.adapter, layout.kind, layout.scale, layout.tile, layout.keep, h, z, dz,
        dx, db, m, n, k, r, rows, strips, share, *dy.stride(), *w.stride(), *a.stride(), *b.stride(),
        _number(seed), USED=layout.kinds, EVERY=EVERY, UP=up_too, DROPOUT=layout.drops,
        **_numbers(dy, w, a, b, h, dx), BLOCK_R=max(16, triton.next_power_of_2(r)), **block,
    )  # fmt: skip
    return db


def _launch_narrow(dy, b, gain, h, layout, down_too, up_too):
    """The parts of dh [columns, M, R] and of db [strips, R, N]."""
    (m, n), r = dy.shape, layout.total
    block = tiles.narrow(dy, layout.width)
    columns = triton.cdiv(n, block["BLOCK_N"])
    strips, rows = tiles.strips(m, columns, block["BLOCK_M"], 128)
    dh = torch.empty((columns, m, r) if down_too else 0, device=dy.device)
    db = torch.empty((strips, r, n) if up_too else 0, device=dy.device)
    gradients.narrow[(layout.plain_tiles * columns * strips,)](
        dy, b, gain, h, layout.scale, dh, db, m, n, r, rows, layout.plain_tiles, *dy.stride(), *b.stride(),
        DOWN=down_too, UP=up_too, **_numbers(dy, b, h), BLOCK_R=layout.width, **block,
    )  # fmt: skip
    return dh, db


def _launch_finish(dh, z, ids, dz, layout):
    m, r = dz.shape
    gradients.finish[(triton.cdiv(m, 32), layout.plain_tiles)](
        dh, layout.scale, z, ids, layout.adapter, layout.kind, dz, m, r, dh.shape[0],
        USED=layout.kinds, EVERY=EVERY, BLOCK_M=32, BLOCK_R=layout.width,
    )  # fmt: skip


def _launch_down(x, dz, layout, seed):
    """da [computed, K]."""
    m, k = x.shape
    block = tiles.down(x, layout.width)
    columns = triton.cdiv(k, block["BLOCK_K"])
    # about 256 programs keep a large GPU busy
    strips, rows = tiles.strips(m, columns * layout.tiles, block["BLOCK_M"], 256)
    da = torch.empty((strips, layout.computed, k), device=x.device)
    gradients.down[(layout.tiles * columns * strips,)](
        x, dz, layout.tile, layout.keep, da, m, k, layout.total, layout.computed, rows, layout.tiles,
        *x.stride(), _number(seed), DROPOUT=layout.drops, **_numbers(x, dz), BLOCK_R=layout.width, **block,
    )  # fmt: skip
    return da.sum(0)


def _launch_column_sums(dy, u):
    """Σ_m dy ⊙ u [N]."""
    m, n = dy.shape
    columns = triton.cdiv(n, 256)
    strips, rows = tiles.strips(m, columns, 16, 256)
    dg = torch.empty((strips, n), device=dy.device)
    gradients.column_sums[(columns * strips,)](dy, u, dg, m, n, rows, *dy.stride(), BLOCK_M=16, BLOCK_N=256)
    return dg.sum(0)


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _numbers(x: Tensor, *others: Tensor) -> dict:
    """How products of fp32 are rounded, and whether a tile of at most 256 rows or columns leaves 31 bits."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    wide = any(stride >= 2**22 for t in (x, *others) for stride in t.stride())
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDE": wide}


_CALL = (
    "Tensor x, Tensor w, Tensor? bias, Tensor? gain, Tensor? ids, Tensor? seed, Tensor?[] tensors,"
    " float[] scales, str[] activations, float[] rates, int[] adapters"
)
_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(f"delta_linear_triton({_CALL}, bool keep_u) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"delta_linear_triton_backward(Tensor dy, {_CALL}, Tensor h, Tensor? z, Tensor? u, bool need_x,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("delta_linear_triton", checked(_forward), _device)
    _LIBRARY.impl("delta_linear_triton_backward", checked(_backward), _device)


@torch.library.register_fake("pefast::delta_linear_triton", lib=_LIBRARY)
def _(x, w, bias, gain, ids, seed, tensors, scales, activations, rates, adapters, keep_u):
    parts = _unflat(tensors, scales, activations, rates, adapters)
    m, n, r = x.shape[0], w.shape[0], place(tuple(p.outline() for p in parts)).total
    bent = any(activation != "identity" for activation in activations)
    sizes = ((m, n), (m, r), (m, r) if bent else 0, (m, n) if keep_u else 0)
    return tuple(x.new_empty(size) for size in sizes)


@torch.library.register_fake("pefast::delta_linear_triton_backward", lib=_LIBRARY)
def _(
    dy, x, w, bias, gain, ids, seed, tensors, scales, activations, rates, adapters, h, z, u, need_x, wanted
):
    parts = _unflat(tensors, scales, activations, rates, adapters)
    places = place(tuple(p.outline() for p in parts))
    (m, n), k = dy.shape, w.shape[1]
    a, b, c, d, given = (any(wanted[i::5]) for i in range(5))
    below = a or c or given or (need_x and places.computed > 0)
    wide = ((places.computed, k) if a else 0, (places.total, n) if b or d else 0, 0 if u is None else n)
    return (
        dy.new_empty((m, k) if need_x else 0),
        dy.new_empty((m, places.total) if below else 0),
        *(dy.new_empty(size, dtype=torch.float32) for size in wide),
    )
