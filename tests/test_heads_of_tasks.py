"""Adapters whose task heads have different numbers of labels, on one model and in one batch."""

import copy

import pytest
import torch

import pefast
from tests.models import assert_as_it_was, assert_close, assert_refused, build, inputs, logits, snapshot, stir

LABELS = {"sentiment": 2, "topics": 5, "stars": True}


def with_tasks():
    """A BERT of three labels with three adapters, of two, five and its own three."""
    model = build("bert")
    for seed, (name, head) in enumerate(LABELS.items()):
        stir(pefast.attach(model, pefast.LoRA(rank=2), name, head=head), seed)
    return model


def alone(model, name, fed):
    pefast.activate(model, name)
    return logits(model, **fed)


def test_each_row_has_its_own_head_and_missing_labels_have_no_probability():
    model, fed = with_tasks(), inputs("bert", rows=4)
    names = ["topics", "sentiment", None, "stars"]
    with pefast.route(model, names):
        got = logits(model, **fed)
    assert got.shape == (4, 5)
    for row, name in enumerate(names):
        right = alone(model, name, {key: value[row : row + 1] for key, value in fed.items()})[0]
        assert_close(got[row, : len(right)], right)
        assert (got[row].softmax(0)[len(right) :] == 0).all()


def test_transformers_own_loss_counts_each_heads_labels():
    model, fed = with_tasks(), inputs("bert", rows=3)
    for name, count in {"topics": 5, "sentiment": 2, "stars": 3}.items():
        right = torch.nn.functional.cross_entropy(alone(model, name, fed), torch.tensor([0, 1, 1]))
        assert model.config.num_labels == model.num_labels == count
        assert_close(model(**fed, labels=torch.tensor([0, 1, 1])).loss, right)
    with pefast.route(model, ["topics", "sentiment", "stars"]):
        loss = model(**fed, labels=torch.tensor([4, 1, 2])).loss
    loss.backward()
    mean = sum(
        torch.nn.functional.cross_entropy(alone(model, name, fed)[row : row + 1], torch.tensor([label]))
        for row, (name, label) in enumerate({"topics": 4, "sentiment": 1, "stars": 2}.items())
    )
    assert_close(loss, mean / 3)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("own", [None, "single_label_classification"])
def test_each_head_has_the_loss_of_its_own_labels(own):
    model, fed = build("bert"), inputs("bert", rows=2)
    model.config.problem_type = own
    for seed, (name, head) in enumerate({"rating": 1, "sentiment": 2, "topics": 5}.items()):
        stir(pefast.attach(model, pefast.LoRA(rank=2), name, head=head), seed)
    kinds, scores = {"sentiment": torch.tensor([0, 1]), "topics": torch.tensor([4, 1])}, torch.randn(2)
    # what transformers learnt from one head's labels must not stay for the next; two rows of two labels
    # would be read as ratings without a word
    for name in ("rating", "sentiment", "topics", "rating", "topics"):
        got = alone(model, name, fed)
        if name == "rating":
            right, labels = torch.nn.functional.mse_loss(got[:, 0], scores), scores
        else:
            right, labels = torch.nn.functional.cross_entropy(got, kinds[name]), kinds[name]
        assert_close(model(**fed, labels=labels).loss, right)
    assert pefast.detach(model).config.problem_type == own


def test_detach_gives_the_models_own_labels_back():
    model = build("bert")
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    words, before = copy.deepcopy(model.config.id2label), snapshot(model)
    pefast.attach(model, pefast.LoRA(rank=2), "topics", head=5)
    assert model.config.num_labels == 5
    pefast.activate(model, None)
    assert model.config.id2label == words
    pefast.activate(model, "topics")
    pefast.detach(model)
    assert_as_it_was(model, before)
    assert model.config.id2label == words and model.num_labels == 3


@pytest.mark.parametrize("methods", [[pefast.LoRA(rank=2)], [pefast.LoRA(rank=2), pefast.Adapter(size=2)]])
def test_a_head_of_its_own_survives_save_and_load(methods, tmp_path):
    model, fed = stir(pefast.attach(build("bert"), methods, "topics", head=5)), inputs("bert")
    fresh = pefast.load(build("bert"), pefast.save(model, tmp_path / "topics"), "again")
    assert torch.equal(logits(fresh, **fed), logits(model, **fed))
    assert logits(fresh, **fed).shape == (3, 5)


@pytest.mark.parametrize(("family", "head"), [("bert", "5"), ("bert", -1), ("bert", 2.5), ("llama", 3)])
def test_a_head_that_cannot_be(family, head):
    model = build(family)
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, pefast.LoRA(rank=2), head=head), "head is", repr(head))
    assert_as_it_was(model, before)
