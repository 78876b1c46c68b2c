"""a and b kept packed from call to call: the bits of calls that keep nothing, and every write seen."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

from pefast.native import C, kept_factors
from pefast.native import delta_linear as native
from pefast.ops.delta_linear import Segment, delta_linear

pytestmark = pytest.mark.skipif(
    not native._SEES, reason="needs AMX, and a torch that shows its tensors to csrc"
)


class Layer:
    """One LoRA beside a frozen weight, and a batch for it."""

    def __init__(self, rows=(37,), k=70, n=45, r=5, masters=torch.float32, dropout=0.0, scale=1.5):
        torch.manual_seed(3)
        self.x = torch.randn(*rows, k).bfloat16().requires_grad_()
        self.w = Parameter(torch.randn(n, k).bfloat16(), False)
        self.a, self.b = Parameter(torch.randn(r, k).to(masters)), Parameter(torch.randn(n, r).to(masters))
        self.dropout, self.scale = dropout, scale

    def forward(self):
        return delta_linear(self.x, self.w, Segment(self.a, self.b, self.scale, dropout=self.dropout), seed=5)

    def step(self) -> tuple:
        """y, dx, da and db of one batch."""
        return self.finish(self.forward())

    def finish(self, y) -> tuple:
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16()
        return (y.detach(), *torch.autograd.grad(y, (self.x, self.a, self.b), dy))

    def kept(self) -> tuple[bool, bool]:
        """Whether a and b are kept packed for y, and for dx."""
        kept = self.a.untyped_storage().pefast_kept
        return kept.for_y is not None, kept.for_dx is not None


def equal(got, wanted) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def anew(layer: Layer) -> tuple:
    """The same step where nothing is kept."""
    other = copy.copy(layer)
    other.a, other.b = (Parameter(t.detach().clone()) for t in (layer.a, layer.b))
    return other.step()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": (2, 3, 7), "dropout": 0.3},
        {"rows": (0,)},
        {"masters": torch.bfloat16, "r": 40},
        {"rows": (700,), "r": 64, "dropout": 0.3},
        {"rows": (70,), "k": 600, "n": 1100, "r": 17},
    ],
    ids=str,
)
def test_the_bits_of_calls_that_keep_nothing(options, threads):
    layer, before = Layer(**options), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        right = anew(layer)
        for _ in range(4):
            assert equal(layer.step(), right)
        assert layer.kept() == (True, True)
        with torch.no_grad():
            layer.a.mul_(-0.5)
            layer.b.add_(1)
        right = anew(layer)
        for _ in range(3):
            assert equal(layer.step(), right)
    finally:
        torch.set_num_threads(before)


def test_one_batch_a_step_keeps_nothing():
    layer = Layer()
    for _ in range(3):
        layer.step()
        with torch.no_grad():
            layer.a.add_(1)
    assert layer.kept() == (False, False) and native.kept_bytes(layer.a) == 0


def test_several_batches_a_step_keep_from_the_first_on():
    layer, seen = Layer(), []
    for _ in range(3):
        for _ in range(2):
            layer.step()
            seen.append(layer.kept())
        with torch.no_grad():
            layer.b.add_(1)
    assert seen[:2] == [(False, False), (True, False)]
    assert seen[4:] == [(True, True), (True, True)]


def test_who_only_computes_keeps_nothing_for_dx():
    layer = Layer()
    with torch.no_grad():
        right = layer.forward()
        assert torch.equal(layer.forward(), right) and torch.equal(layer.forward(), right)
    assert layer.kept() == (True, False)
    assert native.kept_bytes(layer.a) == 2 * C.one_lora_kept_size(5, 45, 70)


def another_b_in_the_same_memory(layer):
    """With a write that neither a version nor the mark shows."""
    layer.b.data[7, 3] = 9.0
    layer.b = Parameter(layer.b.data)


WRITES = {
    "another b in the same memory": another_b_in_the_same_memory,
    "a in place": lambda t: t.a.detach().add_(1),
    "b in place": lambda t: t.b.detach().add_(1),
    "one number of a": lambda t: t.a.detach()[2].__setitem__(3, 7.0),
    "a through .data": lambda t: t.a.data.add_(1),
    "b through .data": lambda t: t.b.data.mul_(2),
    # half of each number stays as it was
    "b to twos through .data": lambda t: t.b.data.fill_(2.0),
    "a of another memory": lambda t: setattr(t.a, "data", torch.ones(5, 70)),
    "b of another memory": lambda t: setattr(t.b, "data", torch.full((45, 5), 3.0)),
    "another b": lambda t: setattr(t, "b", Parameter(torch.full((45, 5), 3.0))),
    "another scale": lambda t: setattr(t, "scale", -0.5),
}


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_seen(name, batches):
    layer = Layer()
    layer.b.data.fill_(1.0)
    for _ in range(batches):
        before = layer.step()
    WRITES[name](layer)
    right = anew(layer)
    assert not torch.equal(right[0], before[0])
    for _ in range(3):
        assert equal(layer.step(), right)


def test_calls_that_cross():
    one = Layer()
    other = copy.copy(one)
    other.b, other.scale = Parameter(one.b.detach() + 1), -2.0
    right = anew(one), anew(other)
    for _ in range(3):
        ys = one.forward(), other.forward(), one.forward()
        assert equal(other.finish(ys[1]), right[1])
        assert equal(one.finish(ys[0]), right[0]) and equal(one.finish(ys[2]), right[0])


def test_a_graph_walked_again_and_a_write_in_between():
    layer = Layer()
    y = layer.forward()
    dy = torch.ones_like(y)
    for _ in range(3):
        torch.autograd.grad(y, (layer.x, layer.a, layer.b), dy, retain_graph=True)
    layer.a.data.add_(1)
    right = anew(layer)
    for _ in range(3):
        assert equal(layer.step(), right)


@pytest.mark.parametrize("written", ["a", "b"])
def test_a_backward_pass_of_copies_that_autograd_has_saved(written):
    layer = Layer()
    right = anew(layer)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = layer.forward()
        with torch.no_grad():
            getattr(layer, written).mul_(2)
        for _ in range(3):
            layer.step()
        assert layer.kept() == (True, True)
        assert equal(layer.finish(y), right)


def test_only_a_gradient_of_b_is_asked_for():
    layer = Layer()
    for _ in range(3):
        y = layer.forward()
        torch.autograd.grad(y, layer.b, torch.ones_like(y))
    assert equal(layer.step(), anew(layer))


def test_a_call_that_fails_leaves_nothing_kept():
    layer = Layer()
    layer.step()
    room = torch.zeros(C.one_lora_kept_size(5, 45, 70) - 1).bfloat16()
    y, h = torch.zeros(37, 45).bfloat16(), torch.zeros(37, 5).bfloat16()
    given = layer.x, layer.w, None, layer.a, layer.b, torch.zeros(9).bfloat16(), 0, None, y, h, 1.0, 0.0, 1
    with pytest.raises(ValueError, match="kept has no room for a and b; 5120 numbers of bf16"):
        C.one_lora_forward(*given, room, None)
    with pytest.raises(ValueError, match="a and b have two dimensions, here are 1"):
        C.one_lora_mark(layer.a.detach().flatten(), layer.b)
    assert layer.kept() == (False, False)


def parts_of_one(layer):
    """a in the same memory as other numbers."""
    whole = torch.zeros(6, 70)
    layer.a.data = whole[:5]


def inference(layer):
    with torch.inference_mode():
        layer.a = Parameter(torch.ones(5, 70))


@pytest.mark.parametrize("change", [parts_of_one, inference])
def test_what_is_not_kept(change):
    layer = Layer()
    change(layer)
    with torch.no_grad():
        for _ in range(3):
            layer.forward()
    assert kept_factors.of(layer.a, layer.b, 1.0) is None and native.kept_bytes(layer.a) == 0


def test_what_is_kept_leaves_with_a():
    layer = Layer()
    for _ in range(3):
        layer.step()
    kept = weakref.ref(layer.a.untyped_storage().pefast_kept.for_y)
    assert kept() is not None
    twin = copy.deepcopy(layer.a)
    assert native.kept_bytes(twin) == 0
    del layer
    gc.collect()
    assert kept() is None
