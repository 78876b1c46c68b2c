"""Adapters give the hidden states and gradients of the library `adapters` 1.3.0, number for number.

The library needs transformers 4.57; tests/fixtures/make_adapters_fixture.py ran it and wrote its numbers.
"""

import pytest
import torch
from safetensors.torch import load_file

import pefast
from pefast.methods.places import hosts
from tests.fixtures import make_adapters_fixture as fixture
from tests.models import assert_close

# the library's configurations as settings of pefast
KINDS = {
    "par_bn": {"parallel": True, "reads": "stream", "scale": 4.0, "around": "feedforward"},
    "seq_bn": {"parallel": False, "reads": "stream", "around": "feedforward"},
    "double_seq_bn": {"parallel": False, "activation": "silu"},
}
CHANGES = {
    "bert seq_bn with norms": {"norm": "both"},
    "llama par_bn with norms": {"norm": "both", "around": ["attention", "feedforward"]},
}


def by_pefast(case: str, **other) -> dict[str, torch.Tensor]:
    """The case as pefast computes it, under the fixture's names."""
    family, kind, _ = fixture.CASES[case]
    settings = {**KINDS[kind], **CHANGES.get(case, {}), **other}
    model = pefast.attach(fixture.base_model(family), pefast.Adapter(size=fixture.SIZE, **settings))
    deltas = [delta for _, host in hosts(model) for delta in host.deltas["default"].values()]
    named = {
        f"{number}.{part}": parameter
        for number, delta in enumerate(deltas)
        for part, parameter in delta.named_parameters()
    }
    for name, parameter in named.items():
        fixture.fill(name, parameter)
    return fixture.run(model, fixture.inputs(family), named)


@pytest.mark.parametrize("case", list(fixture.CASES))
def test_states_and_gradients_are_those_of_the_library(case):
    assert_close(fixture.flat(by_pefast(case)), load_file(fixture.FILE)[case], 1e-5)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("bert par_bn", {"scale": 4.01}),
        ("gpt2 par_bn", {"reads": "sublayer"}),
        ("bert seq_bn", {"reads": "sublayer"}),
        ("llama seq_bn", {"activation": "gelu"}),
        ("bert seq_bn with norms", {"norm": "in"}),
    ],
)
def test_another_setting_is_seen(case, fault):
    right, got = load_file(fixture.FILE)[case], by_pefast(case, **fault)
    if "norm" in fault:
        got |= {
            f"{number}.norm_out.{part}": torch.zeros(8) for number in (0, 1) for part in ("weight", "bias")
        }
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(fixture.flat(got), right, 1e-4)


def test_no_weight_is_in_the_file():
    assert sum(each.numel() for each in load_file(fixture.FILE).values()) < 3000
    assert fixture.FILE.stat().st_size < 14_000
