"""What Heads, Subnetwork and Importance refuse: one sentence, and the model is as it was."""

import pytest
import torch

import pefast
from pefast.checkpoint import TENSORS
from pefast.ops import Index
from tests.cases import probe
from tests.models import assert_as_it_was, assert_refused, build, inputs, snapshot

Heads, Subnetwork, Importance = pefast.Heads, pefast.Subnetwork, pefast.Importance

LLAMA = "model.layers.0.self_attn.q_proj.weight"
REFUSED = {
    "no heads": (Heads(), ["Heads: no head is chosen"]),
    "a head that is not there": (Heads({0: [4]}), ["no head 4", "has 4", "-4 to 3"]),
    "a layer that is not there": (Heads({2: [0]}), ["Heads: there is no layer 2"]),
    "half a head": (Heads({0: [0.5]}), ["heads has 0.5"]),
    "layers twice": (Heads({0: [0]}, layers=[1]), ["names its layers already"]),
    "groups": (Heads([0], groups="some"), ["groups is 'some'", "any, all or none"]),
    "no cross-attention": (Heads([0], kinds=["cross"]), ["has no cross"]),
    "mask and fraction": (Subnetwork(), ["a mask or a fraction"]),
    "fraction 0": (Subnetwork(fraction=0), ["fraction is 0"]),
    "fraction 2": (Subnetwork(fraction=2), ["fraction is 2"]),
    "unit": (Subnetwork(fraction=0.1, unit="block"), ["unit is 'block'", "head, tile"]),
    "by": (Subnetwork(fraction=0.1, by="luck"), ["by is 'luck'"]),
    "tiles that do not divide": (Subnetwork(fraction=0.1, unit="tile", tile=20), ["tiles of 20x20"]),
    "tile 0": (Subnetwork(fraction=0.1, unit="tile", tile=0), ["tile is 0"]),
    "a mask of the wrong shape": (
        Subnetwork(mask={LLAMA: torch.ones(3, 3, dtype=torch.bool)}),
        [LLAMA, "[3, 3]", "[32, 32] would be right"],
    ),
    "a mask of numbers": (Subnetwork(mask={LLAMA: torch.ones(32, 32)}), ["torch.float32", "torch.bool"]),
    "a mask of nothing": (
        Subnetwork(mask={LLAMA: torch.zeros(32, 32, dtype=torch.bool)}),
        ["False everywhere"],
    ),
    "a mask for nobody": (Subnetwork(mask={"q.weight": torch.ones(2) > 0}), ["names q.weight"]),
    "indices that fall": (
        Subnetwork(mask={LLAMA: Index("rows", torch.tensor([3, 1]))}),
        ["not rising numbers of its 32 rows"],
    ),
    "no line": (Importance(batches=[1], loss=probe), ["one of threshold, fraction and budget"]),
    "two lines": (Importance(batches=[1], fraction=0.1, budget=3), ["one of threshold"]),
    "nothing to score on": (Importance(fraction=0.1), ["batches, or scores"]),
    "measure": (Importance(batches=[1], fraction=0.1, measure="luck"), ["measure is 'luck'"]),
    "no batch": (Importance(batches=[], fraction=0.1), ["no batch came"]),
    "no loss": (Importance(batches=[inputs("llama")], fraction=0.1), ["gave no loss"]),
    "a batch without names": (Importance(batches=[3], fraction=0.1), ["a batch is a int"]),
    "a loss of many": (
        Importance(batches=[1], loss=lambda m, b: torch.ones(2), fraction=0.1),
        ["one finite number"],
    ),
    "too high a line": (Importance(batches=[1], loss=probe, threshold=9.0), ["no row scores above 9"]),
    "too small a budget": (Importance(batches=[1], loss=probe, budget=3), ["a budget of 3"]),
    "heads and layers": ([Heads({0: [1]}), pefast.Layers(first=1)], ["Heads and Layers both train"]),
    "heads twice": ([Heads({0: [1]}), Heads([1])], ["Heads and Heads both train"]),
    "rows and columns": (
        [Subnetwork(fraction=0.1, unit="row"), Subnetwork(fraction=0.1, unit="column")],
        ["Subnetwork and Subnetwork both train entries of"],
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_in_one_sentence_and_nothing_is_changed(case):
    method, parts = REFUSED[case]
    model = build("llama")
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)


def test_a_folder_whose_indices_cannot_be_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = pefast.save(pefast.attach(build("llama"), Heads({0: [1]})), tmp_path / "heads")
    tensors = load_file(folder / TENSORS)
    key = f"{LLAMA}.indices"
    model = build("llama")
    before = snapshot(model)
    for wrong, said in (
        (tensors | {key: tensors[key] + 100}, "not rising numbers"),
        (tensors | {key: tensors[key].flip(0)}, "not rising numbers"),
        (tensors | {key: tensors[key][:-1]}, "in the file and"),
        ({name: value for name, value in tensors.items() if name != key}, "no tensor"),
        ({name: value for name, value in tensors.items() if "o_proj" not in name}, "no tensor"),
    ):
        save_file(wrong, folder / TENSORS)
        assert_refused(lambda: pefast.load(model, folder), "load: ", said)
        assert_as_it_was(model, before)
