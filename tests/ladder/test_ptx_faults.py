"""Mistakes planted into compiled PTX: each is found, or shown to change nothing at all."""

import collections

import pytest
import torch
from delta_linear_check import FORMS, by_hand, taking
from prefix_attention_check import by_hand as attention_by_hand
from prefix_attention_check import make_inputs as attention_inputs
from ptx import PtxError, on_ptx
from ptx.faults import faults
from ptx_rung import FULL, rung

from pefast.ops import OPS
from pefast.testing import assert_no_worse

pytestmark = rung
linear, attention = (OPS[name].hands["triton"] for name in ("delta_linear", "prefix_attention"))
# places of one kind in one kernel that are tried, spread over the text
PLACES = 1000 if FULL else 2
# the sound result stands for the formula; a launch of either target, and the kernel that gets the faults
CASES = [
    ("sm80", "product"),
    ("sm80", "narrow"),
    ("sm80", "towards_keys"),
    ("sm90", "product"),
    ("sm90", "whole"),
    ("sm90", "towards_keys"),
]


def copied(arguments):
    """The arguments with storages of their own."""
    return [
        value.new_empty(0).set_(
            value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride()
        )
        if isinstance(value, torch.Tensor)
        else value
        for value in arguments
    ]


def sound(target, name):
    """The first launch of a kernel, its arguments before and after."""
    kept = []

    def execute(launch):
        if launch.name == name and not kept:
            kept.append((launch, copied(launch.arguments)))
            launch.run()
            kept.append(launch.arguments)
        elif not kept:
            launch.run()

    with on_ptx(target, execute):
        if name.startswith("towards"):
            attention_by_hand(attention, attention_inputs("no prefix", torch.bfloat16), "cpu", causal=True)
        else:
            with taking(linear, "whole" if name == "whole" else "split"):
                by_hand(linear, FORMS["dropped" if name == "narrow" else "lora"], several_steps(), "cpu")
    (launch, before), after = kept
    return launch, before, copied(after)


def several_steps():
    """Inputs of a product with four steps along K, more than its pipeline holds, and ragged edges.

    Rows begin at multiples of 16 numbers, without which the compiler copies nothing asynchronously.
    """
    m, k, n, r = 90, 208, 144, 16
    shapes = {"x": (m, k), "w": (n, k), "a": (r, k), "b": (n, r), "bias": (n,), "dy": (m, n)}
    return {name: (torch.randn(shape) / shape[-1] ** 0.5).bfloat16() for name, shape in shapes.items()}


def verdict(launch, before, after):
    """What becomes of a launch: "harmless", "missed", or the first word of what found the fault."""
    launch = launch._replace(arguments=copied(before))
    try:
        launch.run()
    except PtxError as error:
        return str(error).split(":")[0]
    pairs = [
        (got, wanted)
        for got, wanted in zip(launch.arguments, after, strict=True)
        if isinstance(got, torch.Tensor) and not torch.equal(got, wanted)
    ]
    try:
        for got, wanted in pairs:
            assert_no_worse("result", got, wanted, wanted.double())
    except AssertionError:
        return "numbers"
    return "missed" if pairs else "harmless"


def chosen(launch):
    """Some places of every kind of fault, or all."""
    by_kind = collections.defaultdict(list)
    for fault in faults(launch.text):
        by_kind[fault.name.split(",")[0]].append(fault)
    for places in by_kind.values():
        yield from places[:: -(-len(places) // PLACES)]


@pytest.fixture(scope="module")
def tally():
    """How often each verdict was given."""
    return collections.Counter()


@pytest.mark.parametrize(("target", "name"), CASES)
def test_a_fault_is_found_or_changes_nothing(tally, target, name):
    launch, before, after = sound(target, name)
    assert verdict(launch, before, after) == "harmless", "a false alarm on sound code"
    found = {
        fault.name: verdict(launch._replace(text=fault(launch.text)), before, after)
        for fault in chosen(launch)
    }
    print(f"\n{target} {name}:", *(f"\n    {fault}: {what}" for fault, what in found.items()))
    tally.update(found.values())
    missed = [fault for fault, what in found.items() if what == "missed"]
    matter = [fault for fault, what in found.items() if what != "harmless"]
    assert len(matter) >= 5 and 20 * len(missed) <= len(matter), f"missed: {missed} of {len(matter)}"


def test_at_least_19_of_20_are_found(tally):
    if not tally:
        pytest.skip("counts what the tests above it found, and none of them ran")
    matter = sum(count for what, count in tally.items() if what != "harmless")
    print(f"\n{dict(tally)}")
    assert 20 * tally["missed"] <= matter
    # the kinds of checks that the planted faults must have set off
    assert {"race", "waits", "numbers"} <= set(tally)
