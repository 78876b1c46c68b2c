"""parameter_groups: everything that trains, once, with the options of its method."""

import torch
import transformers

import pefast
from tests.models import assert_refused, build, inputs, step, trained


def hybrid(family: str = "bert"):
    methods = [pefast.LoRA(rank=2, plus=16), pefast.LoRA(rank=3, dora=True), pefast.Adapter(size=3)]
    return pefast.attach(build(family), methods)


def options(groups, name: str) -> set[tuple[float, float]]:
    return {(group["lr"], group["weight_decay"]) for group in groups if group["name"] == name}


def test_each_method_has_its_own_options():
    model = hybrid()
    own = {"lora": {"lr": 0.1}, "lora_2": {"lr": 0.2, "weight_decay": 0.0}, "head": {"weight_decay": 0.5}}
    groups = pefast.parameter_groups(model, 0.01, 0.3, **own)
    # LoRA+: b's rate is 16 times that of a
    assert options(groups, "lora") == {(0.1, 0.3), (1.6, 0.3)}
    assert options(groups, "lora_2") == {(0.2, 0.0)}
    assert options(groups, "adapter") == {(0.01, 0.3), (0.01, 0.0)}
    assert options(groups, "head") == {(0.01, 0.5), (0.01, 0.0)}

    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, trained(model).values()))
    for group in groups:
        assert all(parameter.dim() > 1 for parameter in group["params"]) or not group["weight_decay"]


def test_the_factor_is_for_every_b_and_nothing_else():
    model = pefast.attach(build("llama"), pefast.LoRA(rank=2, plus=4.0))
    (slow, fast) = pefast.parameter_groups(model, 1.0)
    assert (slow["lr"], fast["lr"]) == (1.0, 4.0)
    names = {id(parameter): name for name, parameter in trained(model).items()}
    assert {names[id(parameter)].rsplit(".", 1)[1] for parameter in fast["params"]} == {"b"}
    assert len(fast["params"]) == len(slow["params"])


def test_a_step_moves_each_parameter_at_its_own_rate():
    model = hybrid()
    groups = pefast.parameter_groups(model, 0.0, lora={"lr": 0.5}, lora_2={"lr": 0.25})
    before = {name: value.detach().clone() for name, value in trained(model).items()}
    _, gradients = step(model, inputs("bert"))
    for name, parameter in trained(model).items():
        parameter.grad = gradients[name]
    torch.optim.SGD(groups).step()
    for name, parameter in trained(model).items():
        key = next((key for key in ("lora", "lora_2") if f".{key}." in name), "others")
        rate = {"lora": 8.0 if name.endswith(".b") else 0.5, "lora_2": 0.25, "others": 0.0}[key]
        torch.testing.assert_close(parameter.detach(), before[name] - rate * gradients[name])


def test_only_what_computes_is_in_it():
    model = hybrid()
    pefast.attach(model, pefast.LoRA(rank=2), "other")
    groups = pefast.parameter_groups(model, 1.0)
    assert {group["name"] for group in groups} == {"lora", "head"}
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    groups = pefast.parameter_groups(model, 1.0, base={"lr": 0.1})
    assert options(groups, "base") == {(0.1, 0.0)}


def test_a_model_without_methods_is_a_base():
    model = build("gpt2")
    groups = pefast.parameter_groups(model, 1.0, 0.1)
    assert options(groups, "base") == {(1.0, 0.1), (1.0, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(trained(model))


def test_the_trainer_takes_them(tmp_path):
    model = hybrid()
    optimizer = torch.optim.AdamW(pefast.parameter_groups(model, 1e-3, lora={"lr": 1e-2}))
    fed = {key: value[:2] for key, value in inputs("bert").items()}
    rows = [{key: value[i] for key, value in fed.items()} | {"labels": i} for i in range(2)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True)
    before = {name: value.detach().clone() for name, value in trained(model).items()}
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert not any(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_what_cannot_be():
    model = hybrid()
    assert_refused(lambda: pefast.parameter_groups(model, 1.0, lroa={"lr": 1}), "'lroa'", "adapter", "lora_2")
    pefast.activate(model, None)
    assert_refused(lambda: pefast.parameter_groups(model, 1.0), "nothing of this", "trains")
    for plus in (0, -1, "fast"):
        assert_refused(lambda plus=plus: pefast.attach(build("bert"), pefast.LoRA(plus=plus)), "plus is")
