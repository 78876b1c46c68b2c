"""The decoding step of csrc/cuda on a GPU, where there is one and the kernels were built."""

import pytest
import torch
from cuda_steps import DTYPES, STEPS, check, make

from pefast.native import delta_linear_cuda as hand
from pefast.ops import delta_linear

HERE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="no GPU"),
    pytest.mark.skipif(HERE and hand.library()[0] is None, reason=hand.library()[1] or "built"),
]


def moved(call):
    """The same call on the GPU."""
    tensors = [None if t is None else t.cuda() for t in call[:5]]
    segments = tuple(s._replace(a=s.a.cuda(), b=s.b.cuda()) for s in call.segments)
    return call._replace(**dict(zip(call._fields, tensors, strict=False)), segments=segments)


def step(call, processors=None):
    """One step through the operation's table."""
    c = moved(call)
    with torch.no_grad():
        return delta_linear(c.x, c.w, c.segments, c.bias, c.gain, c.ids, backend="native").cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_as_the_formula_says(name, dtype):
    check(step, make(name, dtype))
    check(step, make(name, dtype, torch.float32))


@pytest.mark.parametrize("name", ["each its own", "long"])
def test_a_thousand_launches_give_the_same_bits(name):
    # blocks hand the waist to each other through memory: what one launch in a hundred gets wrong shows here
    call = moved(make(name, torch.bfloat16))
    with torch.no_grad():
        first = hand.forward(call)[0]
        assert all(torch.equal(hand.forward(call)[0], first) for _ in range(1000))


def test_in_a_graph():
    call = moved(make("each its own", torch.bfloat16))
    with torch.no_grad():
        right = hand.forward(call)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hand.forward(call)[0]
        for _ in range(3):
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, right)
