"""The whole of pefast on one tiny model, in a few seconds: a first look whether anything works at all."""

import torch

import pefast
from tests.models import assert_as_it_was, build, inputs, logits, snapshot, trained


def test_attach_train_save_load_merge_detach(tmp_path):
    model, fed = build("bert"), inputs("bert")
    before, base = snapshot(model), logits(model, **fed)

    pefast.attach(model, [pefast.LoRA(rank=4), pefast.Adapter(size=4)])
    torch.testing.assert_close(logits(model, **fed), base)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**fed, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    pefast.save(model, tmp_path / "adapter")
    again = pefast.load(build("bert"), tmp_path / "adapter")
    assert torch.equal(logits(again, **fed), logits(model, **fed))
    assert "layers" in pefast.explain(model)

    pefast.detach(model)
    assert_as_it_was(model, before)


def test_merge_and_unmerge():
    model, fed = build("llama"), inputs("llama")
    pefast.attach(model, pefast.LoRA(rank=4))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_(std=0.1)
    right = logits(model, **fed)
    torch.testing.assert_close(logits(pefast.merge(model), **fed), right)
    assert torch.equal(logits(pefast.unmerge(model), **fed), right)
