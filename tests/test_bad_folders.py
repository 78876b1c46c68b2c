"""A folder that is damaged, or for another model, is one clear sentence and the model stays as it was; a save
that is interrupted leaves the old folder as it was."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

import pefast
from pefast import checkpoint
from tests.models import assert_as_it_was, assert_refused, build, inputs, logits, snapshot, stir

LoRA, Adapter, Prompt = pefast.LoRA, pefast.Adapter, pefast.Prompt


def test_it_must_be_clear_which_adapter_is_saved(tmp_path):
    model = pefast.attach(build("llama"), LoRA(rank=2), "one")
    pefast.attach(model, LoRA(rank=2), "two")
    for names in (["one", "two"], None):
        pefast.activate(model, names)
        assert_refused(lambda: pefast.save(model, tmp_path / "a"), "save: ", "one", "two")
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path):
    model = pefast.attach(build("llama"), LoRA(rank=2))
    (tmp_path / "a").write_text("mine")
    assert_refused(lambda: pefast.save(model, tmp_path / "a"), "save: ", "is a file")
    assert (tmp_path / "a").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that save wrote: a LoRA, an adapter, a prompt, and a hybrid with its head."""
    root = tmp_path_factory.mktemp("saved")
    kinds = {"lora": [LoRA(rank=4)], "adapter": [Adapter(size=4)], "prompt": [Prompt(tokens=3)]}
    kinds["hybrid"] = [LoRA(rank=4), Adapter(size=4)]
    for kind, methods in kinds.items():
        pefast.save(stir(pefast.attach(build("bert"), methods)), root / kind)
    return root


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **new):
    content = {**json.loads(path.read_text()), **new}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


KEY = "base_model.model.bert.encoder.layer.1.output.dense.lora_A.weight"
TENSORS, CONFIG = checkpoint.TENSORS, checkpoint.CONFIG


def put(value):
    def change(tensors):
        tensors[KEY].view(-1)[17] = value

    return change


def cut(size):
    return lambda folder: os.truncate(folder / TENSORS, size)


def tensors(change):
    return lambda folder: edit_tensors(folder / TENSORS, change)


def config(**new):
    return lambda folder: edit_json(folder / CONFIG, **new)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def narrower(values):
    values[KEY] = values[KEY][:, :9].contiguous()


FOLDERS = {
    "NaN": ("lora", tensors(put(float("nan"))), [KEY, "NaN"]),
    "infinity": ("lora", tensors(put(float("inf"))), [KEY, "infinite"]),
    "NaN in the head": (
        "lora",
        tensors(lambda t: t["base_model.model.classifier.bias"].fill_(torch.nan)),
        ["NaN"],
    ),
    "cut in the tensors": ("lora", cut(3000), [TENSORS, "damaged or cut off"]),
    "cut in the head": ("lora", cut(40), [TENSORS, "damaged or cut off"]),
    "empty": ("lora", cut(0), [TENSORS, "damaged or cut off"]),
    "text": ("lora", write(TENSORS, "version https://git-lfs.github.com/spec/v1"), [TENSORS, "damaged"]),
    "no tensors": ("lora", remove(TENSORS), [TENSORS, "missing"]),
    "no config": ("lora", remove(CONFIG), [CONFIG]),
    "config cut off": ("lora", write(CONFIG, '{"r": 4, '), [CONFIG, "not JSON"]),
    "config is a list": ("lora", write(CONFIG, "[1]"), [CONFIG]),
    "config is not text": ("lora", lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), [CONFIG]),
    "config without a rank": ("lora", config(r=...), [CONFIG, "r"]),
    "another rank": ("lora", config(r=8), ["lora_A.weight", "[4, 32]", "[8, 32]"]),
    "rank 0": ("lora", config(r=0), ["rank is 0"]),
    "rank of text": ("lora", config(r="four"), ["rank is 'four'"]),
    "dropout 1": ("lora", config(lora_dropout=1.0), ["dropout is 1.0"]),
    "dropout of text": ("lora", config(lora_dropout="0.1"), ["dropout is '0.1'"]),
    "another shape": ("lora", tensors(narrower), [KEY, "[4, 9]", "[4, 56]"]),
    "a tensor less": ("lora", tensors(lambda t: t.pop(KEY)), [KEY]),
    "a tensor more": ("lora", tensors(lambda t: t.update(stray=torch.ones(1))), ["stray"]),
    "no tensor at all": ("lora", tensors(lambda t: t.clear()), ["load: "]),
    "another method": ("lora", config(peft_type="VERA"), ["VERA", "LORA", "PROMPT_TUNING"]),
    "no method": ("lora", config(peft_type=...), ["LORA"]),
    "DoRA without its lengths": ("lora", config(use_dora=True), ["lora_magnitude_vector"]),
    "QA-LoRA": ("lora", config(use_qalora=True), ["use_qalora"]),
    "biases": ("lora", config(bias="all"), ["bias"]),
    "an activation": ("adapter", config(activation="swish2"), ["no activation 'swish2'"]),
    "an adapter's size": ("adapter", config(size=5), ["[4, 32]", "[5, 32]"]),
    "a prompt's length": (
        "prompt",
        config(num_virtual_tokens=4),
        ["prompt_embeddings", "[3, 32]", "[4, 32]"],
    ),
    "a prompt without length": ("prompt", config(num_virtual_tokens=...), [CONFIG, "num_virtual_tokens"]),
    "a part of a hybrid is lost": ("hybrid", lambda folder: shutil.rmtree(folder / "adapter"), ["adapter"]),
    "a hybrid's part is cut": (
        "hybrid",
        lambda folder: os.truncate(folder / "lora" / TENSORS, 99),
        ["cut off"],
    ),
    "a hybrid's head is lost": ("hybrid", remove("head.safetensors"), ["head.safetensors"]),
    "a manifest without methods": ("hybrid", write("pefast.json", "{}"), ["pefast.json", "methods"]),
    "a manifest that leads away": (
        "hybrid",
        write("pefast.json", '{"methods": ["../lora"], "head": false}'),
        ["pefast.json", "../lora"],
    ),
}


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("case", list(FOLDERS))
def test_a_folder_that_is_not_right(case, beside, saved, tmp_path):
    kind, damage, parts = FOLDERS[case]
    folder = tmp_path / "adapter"
    shutil.copytree(saved / kind, folder)
    damage(folder)
    model = build("bert")
    if beside:
        stir(pefast.attach(model, [LoRA(rank=2), Adapter(size=3)], "other"))
    right = logits(model, **inputs("bert"))
    before = snapshot(model)
    assert_refused(
        lambda: pefast.load(model, folder), "load: ", *parts, error=(ValueError, FileNotFoundError)
    )
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **inputs("bert")), right)
    pefast.load(model, saved / kind)


def wide_bert():
    quiet = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "vocab_size": 96}
    return BertForSequenceClassification(BertConfig(hidden_size=48, **quiet, num_labels=3))


def deep_bert():
    model = build("bert")
    del model.bert.encoder.layer[1]
    return model


def two_labels():
    model = build("bert")
    model.classifier = torch.nn.Linear(32, 2)
    return model


MODELS = {
    "another family": (lambda: build("llama"), "lora", ["LlamaForCausalLM"]),
    "another family, adapter": (lambda: build("gpt2"), "adapter", ["GPT2LMHeadModel"]),
    "another width": (wide_bert, "lora", ["lora_A.weight", "[4, 32]", "[4, 48]"]),
    "another width, prompt": (wide_bert, "prompt", ["prompt_embeddings", "[3, 32]", "[3, 48]"]),
    "fewer layers": (deep_bert, "lora", ["bert.encoder.layer.1."]),
    "other labels": (two_labels, "lora", ["classifier", "[3, 32]", "[2, 32]"]),
    "no head": (lambda: build("bert").bert, "lora", ["BertModel"]),
}


@pytest.mark.parametrize("case", list(MODELS))
def test_a_model_that_the_folder_is_not_for(case, saved):
    make, kind, parts = MODELS[case]
    model = make()
    before = snapshot(model)
    assert_refused(lambda: pefast.load(model, saved / kind), "load: ", *parts)
    assert_as_it_was(model, before)


def test_a_folder_that_is_not_there(tmp_path):
    model = build("bert")
    assert_refused(lambda: pefast.load(model, tmp_path / "no"), "load: ", "no", error=FileNotFoundError)


def test_load_under_a_name_that_is_taken(saved):
    model = pefast.load(build("bert"), saved / "lora")
    before = snapshot(model)
    assert_refused(lambda: pefast.load(model, saved / "adapter"), "'default' is taken")
    assert_as_it_was(model, before)


def listing(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def breaks(real, at: int):
    """The function, except that its call number `at` finds the disk full."""
    calls = iter(range(at + 1))

    def broken(*args, **kwargs):
        if next(calls, None) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    return broken


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize(
    ("what", "at"), [("save_file", 0), ("save_file", 2), ("rename", 0), ("rename", 1), ("rename", 2)]
)
def test_an_interrupted_save_leaves_what_was_there(what, at, there, tmp_path, monkeypatch):
    model = stir(pefast.attach(build("bert"), [LoRA(rank=2), Adapter(size=3)]))
    folder = tmp_path / "adapter"
    if there:
        pefast.save(stir(pefast.attach(build("bert"), LoRA(rank=3))), folder)
        (folder / "notes.txt").write_text("mine")
    elif what == "rename" and at:
        pytest.skip("a new folder takes one rename")
    before = listing(tmp_path)
    place = (checkpoint, "save_file") if what == "save_file" else (os, "rename")
    with monkeypatch.context() as patch:
        patch.setattr(*place, breaks(getattr(*place), at))
        with pytest.raises(OSError, match="No space left"):
            pefast.save(model, folder)
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if there else [])
    pefast.save(model, folder)
    assert torch.equal(
        logits(pefast.load(build("bert"), folder), **inputs("bert")), logits(model, **inputs("bert"))
    )


def test_saving_again_keeps_what_is_not_its_own(tmp_path):
    one, two = (stir(pefast.attach(build("bert"), methods)) for methods in ([LoRA(), Adapter()], [LoRA()]))
    pefast.save(one, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    pefast.save(two, tmp_path / "run" / "checkpoint-5")
    pefast.save(two, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CONFIG, TENSORS, "notes.txt", "checkpoint-5"}
    assert set(listing(tmp_path / "run" / "checkpoint-5")) == {CONFIG, TENSORS}
