"""Several adapters in one folder: each whole, what they share stored once."""

import json

import pytest
import torch
from safetensors.torch import load_file

import pefast
from pefast.checkpoint import MANIFEST, TENSORS
from tests.models import assert_as_it_was, build, inputs, logits, snapshot, stir


def tasks(family="bert", **settings):
    """A model with two adapters that share a prefix and one that has a LoRA beside it."""
    model = pefast.attach(build(family), pefast.Prefix(tokens=3, **settings), "films")
    pefast.attach(model, pefast.Prefix(share="films"), "topics")
    pefast.attach(model, [pefast.LoRA(rank=2), pefast.Prefix(share="films")], "spam")
    pefast.attach(model, pefast.Adapter(size=4), "alone")
    return stir(model)


def said(model, names, fed):
    """The logits of each adapter."""
    return {name: logits(pefast.activate(model, name), **fed) for name in names}


@pytest.mark.parametrize("settings", [{}, {"reparameterize": 4}], ids=["plain", "network"])
def test_they_come_back_and_share_again(tmp_path, settings):
    names, fed = ["films", "topics", "spam", "alone"], inputs("bert")
    model = tasks(**settings)
    right = said(model, names, fed)
    folder = pefast.save(model, tmp_path / "all", name=names)
    fresh = pefast.load(build("bert"), folder)
    got = said(fresh, names, fed)
    for name in names:
        assert torch.equal(got[name], right[name]), name
    prefixes = {id(p) for n, p in fresh.named_parameters() if "prefixes" in n}
    assert len(prefixes) == len({id(p) for n, p in model.named_parameters() if "prefixes" in n})


def test_what_they_share_is_stored_once(tmp_path):
    folder = pefast.save(tasks(), tmp_path / "all", name=["films", "topics", "spam"])
    holders = [path for path in folder.rglob(TENSORS) if "prompt_embeddings" in load_file(path)]
    assert holders == [folder / "films" / TENSORS]
    # an adapter that is saved alone is whole
    assert "prompt_embeddings" in load_file(pefast.save(tasks(), tmp_path / "one", name="topics") / TENSORS)


def test_the_same_adapters_are_the_same_bytes(tmp_path):
    model, names = tasks(), ["films", "spam", "alone"]
    folders = [pefast.save(model, tmp_path / str(i), name=names) for i in range(4)]
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert all(one == files[0] for one in files)


def test_a_folder_of_several_is_replaced_whole(tmp_path):
    model = tasks()
    pefast.save(model, tmp_path / "all", name=["films", "topics"])
    (tmp_path / "all" / "notes.txt").write_text("mine")
    pefast.save(model, tmp_path / "all", name=["alone"])
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"alone", MANIFEST, "notes.txt"}


def test_bad_names_and_folders_change_nothing(tmp_path):
    model = tasks()
    with pytest.raises(ValueError, match="names \\['gone'\\] came; one or more of"):
        pefast.save(model, tmp_path / "x", name=["gone"])
    with pytest.raises(ValueError, match=r"names \[\] came"):
        pefast.save(model, tmp_path / "x", name=[])
    assert not (tmp_path / "x").exists()

    folder = pefast.save(model, tmp_path / "all", name=["films", "topics"])
    fresh = build("bert")
    before = snapshot(fresh)
    (folder / "films" / TENSORS).rename(folder / "films" / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is missing"):
        pefast.load(fresh, folder)
    assert_as_it_was(fresh, before)
    (folder / MANIFEST).write_text(json.dumps({"adapters": ["topics"]}))
    with pytest.raises(FileNotFoundError, match="shares with the adapter 'films', which is not beside it"):
        pefast.load(fresh, folder)
    assert_as_it_was(fresh, before)
    (folder / MANIFEST).write_text(json.dumps({"adapters": ["../films"]}))
    with pytest.raises(ValueError, match="names of folders beside it are right"):
        pefast.load(fresh, folder)
