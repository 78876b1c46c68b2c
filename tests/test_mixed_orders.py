"""Methods mixed in orders that no single method's tests have: attached beside an active one, in either order,
and trained by a backward that comes after the switch.
"""

import pytest
import torch

import pefast
from pefast.model import parameters_of
from tests.models import FAMILIES, assert_close, build, inputs, logits, stir

LoRA, Prompt, Prefix = pefast.LoRA, pefast.Prompt, pefast.Prefix
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_what_starts_from_the_weights_starts_from_the_base_models(settings, tmp_path):
    model, fed = build("llama"), inputs("llama")
    right = logits(model, **fed)
    stir(pefast.attach(model, pefast.Full(), "full"))
    pefast.attach(model, LoRA(rank=4, **settings), "lora")
    assert_close(logits(model, **fed), right)
    folder = pefast.save(stir(model), tmp_path / "lora", "lora")
    assert_close(logits(pefast.load(build("llama"), folder), **fed), logits(model, **fed))


@every_family
def test_prefix_and_prompt_compute_the_same_in_either_order(family):
    prefix, prompt = Prefix(tokens=3), Prompt(tokens=2)
    values, fed = {}, inputs(family)
    found = []
    for methods in ([prompt, prefix], [prefix, prompt]):
        model = stir(pefast.attach(build(family), methods))
        values = values or {key: value.clone() for key, value in parameters_of(model, "default").items()}
        with torch.no_grad():
            for key, parameter in parameters_of(model, "default").items():
                parameter.copy_(values[key])
        found.append(logits(model, **fed))
    assert_close(found[1], found[0], 1e-6)
