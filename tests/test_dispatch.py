"""The choice of a back end: by name or by itself, with a reason for every other one, and quick."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import pefast
from pefast import dispatch
from pefast.dispatch import Operation
from pefast.ops import OPS
from pefast.ops.delta_linear import Call, Segment
from tests.models import build


def hand(refuse: str = "", decline: str | None = None):
    """A hand that refuses and declines with these words; None: it has no decline."""
    made = SimpleNamespace(refuse=lambda call: refuse)
    if decline is not None:
        made.decline = lambda call: decline
    return made


def table(**hands) -> Operation:
    return Operation("op", hands)


def test_the_first_that_takes_the_call_computes():
    assert table(a=hand(), b=hand()).pick(None) == "a"
    assert table(a=hand("needs a GPU"), b=hand()).pick(None) == "b"
    assert table(a=hand(decline="slower here"), b=hand("no"), c=hand()).pick(None) == "c"
    assert table(a=hand(decline=""), b=hand()).pick(None) == "a"


def test_a_hand_that_declines_runs_when_it_is_named():
    operation = table(a=hand(decline="slower here"), b=hand())
    assert operation.pick(None, "a") == "a"
    with pefast.backend("a"):
        assert operation.pick(None) == "a"
    assert operation.pick(None) == "b"


def test_a_named_hand_that_refuses_raises_with_its_reason():
    operation = table(a=hand("needs a GPU, x is on cpu"), b=hand())
    with pytest.raises(ValueError, match=r"op: back end 'a' cannot .*: needs a GPU, x is on cpu"):
        operation.pick(None, "a")
    with pefast.backend("a"), pytest.raises(ValueError, match="needs a GPU"):
        operation.pick(None)


def test_a_name_that_is_not_there_says_which_are():
    with pytest.raises(ValueError, match=r"no back end 'cuda', there are a, b"):
        table(a=hand(), b=hand()).pick(None, "cuda")


def test_every_hand_gives_its_reason():
    operation = table(a=hand("needs a GPU"), b=hand(decline="slower here"), c=hand())
    assert operation.reasons(None) == {"a": "needs a GPU", "b": "slower here", "c": ""}
    assert operation.why_not("b", None) == ""
    with pytest.raises(ValueError, match="no back end takes"):
        table(a=hand("one"), b=hand("two")).pick(None)


def test_the_innermost_context_counts_and_each_ends():
    operation = table(a=hand(), b=hand(), c=hand())
    with pefast.backend("b"):
        with pefast.backend("c"):
            assert operation.pick(None) == "c"
            assert operation.pick(None, "a") == "a"
        with pefast.backend(None):
            assert operation.pick(None) == "a"
        with pytest.raises(KeyError), pefast.backend("c"):
            raise KeyError("the caller's own")
        assert operation.pick(None) == "b"
    assert operation.pick(None) == "a" and dispatch.forced() is None


def test_a_context_reaches_other_threads():
    x, a, b = torch.randn(4, 8), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    seen = []
    with pefast.backend("eager"):
        y = pefast.ops.delta_linear(x, torch.randn(6, 8), Segment(a, b))
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
    y.sum().backward()
    assert seen == ["eager"] and a.grad.any()


@pytest.mark.parametrize("name", list(OPS))
def test_the_table_of_each_operation(name):
    operation = OPS[name]
    assert operation.name == name and operation.backends == tuple(operation.hands)
    hands = {"eager", "native", "triton"}
    assert "eager" in operation.backends and set(operation.backends) <= hands
    assert name not in ("dropout", "delta_linear") or set(operation.backends) == hands
    for module in operation.hands.values():
        # a hand may compute a gradient alone, and leave the rest to the eager one
        computes = ("forward", "chosen_gradient") if name == "partial_linear" else ("forward",)
        assert callable(module.refuse) and any(callable(getattr(module, part, None)) for part in computes)


def example() -> Call:
    segment = Segment(torch.randn(8, 64), torch.randn(32, 8))
    return Call(torch.randn(16, 64), torch.randn(32, 64), None, None, None, None, (segment,))


def test_the_choice_is_quick():
    operation, call = OPS["delta_linear"], example()

    def once():
        begin = time.thread_time()
        for _ in range(2000):
            operation.pick(call)
        return (time.thread_time() - begin) / 2000

    # 3 µs is the budget; twice that, of this thread's own time, because the machine may be slow or busy
    assert min(once() for _ in range(10)) < 6e-6


def test_the_layer_says_who_computes():
    layer = pefast.FusedLoRALinear(64, 48, rank=4, dropout=0.1)
    with pefast.backend("eager"):
        assert "LoRA: eager" in pefast.explain(layer)
    line = pefast.explain(layer)
    assert "not triton: " in line and "(the layer)" in line


def test_explain_puts_layers_that_say_the_same_in_one_line():
    model = build("llama")
    assert "no layer computes through pefast" in pefast.explain(model)
    pefast.attach(model, [pefast.LoRA(rank=4, targets=["q_proj", "v_proj"]), pefast.Adapter(size=4)])
    lines = pefast.explain(model).splitlines()
    assert any(line.startswith("4 layers, model.layers.0.self_attn.q_proj ... ") for line in lines)
    assert any("adapter of default" in line for line in lines)
    pefast.activate(model, None)
    assert "no active adapter" in pefast.explain(model)
    pefast.detach(model)
    pefast.merge(pefast.attach(model, pefast.LoRA(rank=4)))
    assert "default merged into its weight" in pefast.explain(model)


def test_explain_counts_a_serial_adapter():
    model = pefast.attach(build("bert"), pefast.Adapter(size=4, parallel=False))
    assert "after the frozen layer" in pefast.explain(model)
