"""One LoRA beside a frozen layer, for tests of native hands by themselves: calls, results, the formula."""

import torch

from pefast.ops.delta_linear import Call, Needs, Segment, reference

ALL = Needs(True, False, False, False, ((True, True, False, False, False),))


def make(shape, dtype, dropout, bias, apart, conv1d, masters, scale=1.5) -> tuple:
    """A call and a gradient of its result; rows of x and dy have `apart` numbers between them."""
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(m * 7 + k * 3 + n + r)

    def normal(*size, kind=dtype, by=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * by).to(kind)

    w = normal(k, n, by=k**-0.5).t() if conv1d else normal(n, k, by=k**-0.5)
    w = torch.nn.Parameter(w, requires_grad=False)
    a, b = normal(r, k, kind=masters, by=k**-0.5), normal(n, r, kind=masters, by=r**-0.5)
    seed = torch.tensor([123456789012345])
    segment = Segment(a, b, scale, dropout=dropout)
    x, dy = normal(m, k + apart)[:, :k], normal(m, n + apart)[:, :n]
    return Call(x, w, normal(n) if bias else None, None, None, seed, (segment,)), dy


def results(hand, call, dy) -> dict:
    """What a hand gives, forward and backward."""
    y, saved = hand.forward(call)
    dx, _, _, _, [(da, db, *_)] = hand.backward(call, saved, dy, ALL)
    return {"y": y, "h": saved[0][0], "dx": dx, "da": da, "db": db}


def formula(call, dy, dtype) -> dict:
    """The same by the reference in any dtype."""
    s = call.segments[0]
    x, w, a, b = (t.detach().to(dtype).requires_grad_() for t in (call.x, call.w, s.a, s.b))
    bias = None if call.bias is None else call.bias.to(dtype)
    y = reference(x, w, (s._replace(a=a, b=b),), bias, seed=call.seed)
    # the waist is what a delta with b = 1 would add
    eye = torch.eye(len(a), dtype=dtype)
    h = reference(
        x, torch.zeros(len(a), x.shape[1], dtype=dtype), (s._replace(a=a, b=eye, scale=1.0),), seed=call.seed
    )
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.to(dtype))
    return {"y": y.detach(), "h": h.detach(), "dx": dx, "da": da, "db": db}


def assert_same_bits(run) -> None:
    """run() gives the same bits again, and with 1, 2, 3 and 5 threads."""
    first = run()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run()
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, f"{different} differ with {threads} threads"


def assert_only_what_is_asked_for(hand, call, dy, whole: dict) -> None:
    """Each gradient alone, and none, is what all together are."""
    _, saved = hand.forward(call)
    for x, a, b in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        needs = Needs(x, False, False, False, ((a, b, False, False, False),))
        dx, _, _, _, [(da, db, *_)] = hand.backward(call, saved, dy, needs)
        for name, asked, got in (("dx", x, dx), ("da", a, da), ("db", b, db)):
            assert torch.equal(got, whole[name]) if asked else got is None, name


FAULTS = ("scale", "rank", "column", "element", "mask")


def planted(run, call, dy, fault: str) -> dict:
    """Results with a fault in them; the call has 8 ranks, 128 columns and dropout."""
    s = call.segments[0]
    wrong = {
        "scale": s._replace(scale=s.scale * 1.02),
        "rank": s._replace(b=s.b * (torch.arange(8) < 7)),
        "column": s._replace(a=s.a * (torch.arange(128) < 127)),
    }.get(fault, s)
    got = run(call._replace(segments=(wrong,), seed=call.seed + (fault == "mask")), dy)
    if fault == "element":
        got["dx"][5, 7] += 1
    return got
