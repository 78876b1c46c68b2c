"""The promises of tests/test_methods.py on a device: the same functions, models and rows that live there.

On the CPU a few pairs, which shows that the moving is right; on a GPU every method on every family.
"""

import inspect

import pytest
import torch

import pefast
from tests import models, test_methods
from tests.cases import CASES, DROPPING, pairs
from tests.gpu.conftest import WHY

# those whose tensors come from build() and inputs() alone
PROMISES = (
    "test_it_starts_as_the_base_model_or_says_so",
    "test_only_what_it_names_trains",
    "test_merged_computes_the_same_or_says_that_it_cannot",
    "test_detach_gives_the_base_model_back",
    "test_it_survives_save_and_load",
    "test_its_state_dict_goes_to_another_model_with_the_same_methods",
    "test_a_deep_copy_stands_alone",
)
FEW = [("cpu", "llama", "lora"), ("cpu", "bert", "hybrid")]


def places(table=CASES, few=FEW, families=models.FAMILIES, cases=None):
    """(device, family, case): few on the CPU, all on a GPU, or one that says why not."""
    marks = [pytest.mark.gpu]
    if not torch.cuda.is_available():
        marks.append(pytest.mark.skip(reason=WHY))
        return [*few, pytest.param("cuda", "llama", "lora", marks=marks)]
    found = pairs(families, cases or tuple(table), table)
    return [*few, *(pytest.param("cuda", *pair.values, marks=[*marks, *pair.marks]) for pair in found)]


def stir(model, seed=3, size=0.1):
    """tests/models.py's, whose numbers are drawn on the CPU, for a model that lives elsewhere."""
    device = next(model.parameters()).device
    return models.stir(model.cpu(), seed, size).to(device)


@pytest.fixture
def there(monkeypatch):
    """Moves what test_methods builds."""

    def move(device):
        monkeypatch.setattr(test_methods, "build", lambda family: models.build(family).to(device))
        monkeypatch.setattr(test_methods, "inputs", lambda *a, **k: _to(models.inputs(*a, **k), device))
        monkeypatch.setattr(test_methods, "stir", stir)

    return move


def _to(fed, device):
    return {name: value.to(device) for name, value in fed.items()}


@pytest.mark.parametrize(("device", "family", "case"), places())
@pytest.mark.parametrize("promise", PROMISES)
def test_promise(device, family, case, promise, there, request):
    there(device)
    run = getattr(test_methods, promise)
    wanted = set(inspect.signature(run).parameters) - {"family", "case"}
    run(family=family, case=case, **{name: request.getfixturevalue(name) for name in wanted})
    # the functions named above do assert; this one, that they computed where they should
    assert next(test_methods.build(family).parameters()).device.type == device


@pytest.mark.parametrize(("device", "family", "case"), places(DROPPING, FEW[:1]))
def test_dropout_follows_the_seed(device, family, case, there):
    there(device)
    test_methods.test_dropout_is_for_training_and_follows_the_seed(family, case)
    assert next(test_methods.build(family).parameters()).device.type == device


@pytest.mark.parametrize(("device", "family", "case"), places(DROPPING))
def test_a_training_step_is_the_cpus(device, family, case):
    """The loss and every gradient, dropout included: the masks are the same bits."""
    found = {}
    for where in ("cpu", device):
        model = stir(pefast.attach(models.build(family), DROPPING.get(case, CASES[case]))).train().to(where)
        torch.manual_seed(4)
        loss, gradients = models.step(model, _to(models.inputs(family), where))
        found[where] = {"loss": loss.cpu()} | {name: g.cpu() for name, g in gradients.items()}
    for name, right in found["cpu"].items():
        models.assert_close(found[device][name], right, 1e-4)


@pytest.mark.parametrize(
    ("device", "family", "case"), places(few=FEW[:1], families=models.DECODERS, cases=("lora",))
)
def test_a_step_of_decoding_and_routed_rows(device, family, case):
    """generate() with its cache, and two adapters in one batch, give the CPU's tokens and logits."""
    found = {}
    for where in ("cpu", device):
        model = pefast.attach(models.build(family), CASES[case], "one")
        model = stir(pefast.attach(model, CASES[case], "two")).to(where)
        fed = _to(models.inputs(family), where)
        with pefast.route(model, ["one", "two", "one"]), torch.no_grad():
            routed = model(**fed).logits.cpu()
        prompt = {name: fed[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=5, min_new_tokens=5).cpu()
        found[where] = routed, tokens
    models.assert_close(found[device][0], found["cpu"][0], 1e-4)
    assert torch.equal(found[device][1], found["cpu"][1])
