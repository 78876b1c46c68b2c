"""Everything a caller can get wrong is one clear sentence, and the model is as it was, bit for bit."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, CLIPTextConfig, CLIPTextModel

import pefast
from pefast import checkpoint
from tests.models import assert_as_it_was, build, inputs, logits, snapshot, stir

LoRA, Adapter, Prompt = pefast.LoRA, pefast.Adapter, pefast.Prompt


def refused(action, *parts: str, error=ValueError) -> str:
    """Runs an action that must raise one sentence: who, what came, and each of `parts`."""
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert re.match(r"\w+: ", text), f"does not begin with who says it: {text}"
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text


ATTACH = {
    "target that is nowhere": (LoRA(targets="q_prj"), ["attach: ", "'q_prj'", "q_proj", "down_proj"]),
    "targets that are nowhere": (LoRA(targets=["qq", "vv"]), ["qq", "names look like"]),
    "no targets": (LoRA(targets=[]), ["names look like"]),
    "everything excluded": (LoRA(targets=["q_proj"], exclude=["q_proj"]), ["names look like"]),
    "a layer that is not there": (LoRA(targets=["q_proj"], layers=[7]), ["q_proj"]),
    "an expression that is none": (LoRA(targets="*q_proj"), ["*q_proj", "regular expression"]),
    "rank 0": (LoRA(rank=0), ["LoRA: rank is 0"]),
    "alpha of text": (LoRA(alpha="8"), ["LoRA: alpha is '8'"]),
    "alpha is not a number": (LoRA(alpha=float("nan")), ["alpha is nan"]),
    "a rank for no expression": (LoRA(ranks={"(q": 2}), ["'(q'", "regular expression"]),
    "rank below zero": (LoRA(rank=-4), ["rank is -4"]),
    "rank and a half": (LoRA(rank=1.5), ["rank is 1.5"]),
    "rank 0 for one layer": (LoRA(ranks={"k_proj": 0}), ["rank is 0"]),
    "dropout 1": (LoRA(dropout=1.0), ["LoRA: dropout is 1.0"]),
    "dropout below zero": (LoRA(dropout=-0.1), ["dropout is -0.1"]),
    "dropout is not a number": (LoRA(dropout=float("nan")), ["dropout is nan"]),
    "activation": (Adapter(activation="swish2"), ["Adapter: no activation 'swish2'", "relu", "gelu"]),
    "adapter's size": (Adapter(size=0), ["Adapter: size is 0"]),
    "adapter's reduction": (Adapter(reduction=0), ["reduction is 0"]),
    "adapter's dropout": (Adapter(dropout=1), ["Adapter: dropout is 1"]),
    "adapter around nothing": (Adapter(around=()), ["Adapter: "]),
    "adapter around something else": (Adapter(around="mlp"), ["mlp", "attention", "feedforward"]),
    "adapter where there is no cross-attention": (Adapter(around="cross"), ["cross"]),
    "adapter in a layer that is not there": (Adapter(layers=[9]), ["9"]),
    "no tokens": (Prompt(tokens=0), ["Prompt: tokens is 0"]),
    "half a token": (Prompt(tokens=0.5), ["tokens is 0.5"]),
    "prompt's start": (Prompt(init="zeros"), ["init is 'zeros'", "random", "text"]),
    "prompt's text": (Prompt(init="text"), ["no text"]),
    "prompt's place": (Prompt(place="end"), ["place is 'end'", "start", "after_first"]),
    "two prompts": ([Prompt(), Prompt()], ["one Prompt"]),
    "a good one and a bad one": ([LoRA(rank=2), Adapter(size=4), LoRA(targets=["no"])], ["no"]),
    "good ones and a bad one at last": ([Adapter(size=4), Prompt(), LoRA(ranks={"1.*up_proj": 0})], ["rank"]),
    "no method": ([], ["attach: ", "LoRA, Adapter, Prompt"]),
    "None": (None, ["attach: ", "NoneType"]),
    "a class": (LoRA, ["attach: ", "the class LoRA"]),
    "a name": ("lora", ["attach: ", "str"]),
}


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("case", list(ATTACH))
def test_attach(case, beside):
    method, parts = ATTACH[case]
    model = build("llama")
    if beside:
        stir(pefast.attach(model, [LoRA(rank=2), Adapter(size=3)], "other"))
    else:
        model.lm_head.weight.requires_grad_(False)
    right = logits(model, **inputs("llama"))
    before = snapshot(model)
    refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **inputs("llama")), right)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "other", None, 3])
def test_attach_under_a_name_that_cannot_be(name):
    model = pefast.attach(build("bert"), LoRA(rank=2), "other")
    before = snapshot(model)
    refused(lambda: pefast.attach(model, LoRA(rank=2), name), "attach: ", repr(name))
    assert_as_it_was(model, before)


def test_attach_where_a_method_does_not_know_the_model():
    model = build("t5")
    before = snapshot(model)
    refused(lambda: pefast.attach(model, Prompt()), "Prompt: encoder-decoder")
    assert_as_it_was(model, before)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    other = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50, max_position_embeddings=20))
    refused(lambda: pefast.attach(other, Adapter()), "Adapter: ", "'clip_text_model'", "bert", "llama")
    refused(
        lambda: pefast.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), Prompt()), "Prompt: ", "Sequential"
    )


def test_a_prompt_that_makes_the_input_too_long():
    model = pefast.attach(build("bert"), Prompt(tokens=5))
    fed = inputs("bert", length=44)
    refused(lambda: logits(model, **fed), "Prompt: 49 positions", "48")
    assert logits(model, **inputs("bert", length=43)).isfinite().all()


STATE = {
    "detach, nothing attached": (
        lambda m: pefast.detach(m),
        ["detach: nothing is attached", "pefast.attach"],
    ),
    "merge, nothing attached": (lambda m: pefast.merge(m), ["merge: nothing is attached"]),
    "activate, nothing attached": (lambda m: pefast.activate(m, None), ["activate: nothing is attached"]),
    "save, nothing attached": (lambda m: pefast.save(m, "unused"), ["save: nothing is attached"]),
}


@pytest.mark.parametrize("case", list(STATE))
def test_a_model_without_adapters(case):
    model, (action, parts) = build("bert"), STATE[case]
    before = snapshot(model)
    refused(lambda: action(model), *parts)
    assert_as_it_was(model, before)


def enter(context):
    with context:
        pass


NAMES = {
    "detach": (lambda m: pefast.detach(m, "x"), ["detach: no adapter is called 'x'", "one", "two"]),
    "activate": (lambda m: pefast.activate(m, "x"), ["activate: no adapter is called 'x'", "one", "two"]),
    "activate two": (lambda m: pefast.activate(m, ["one", "x"]), ["'x'"]),
    "route": (lambda m: enter(pefast.route(m, ["one", "x"])), ["route: no adapter is called 'x'"]),
    "route with a prompt": (lambda m: enter(pefast.route(m, ["one", "two"])), ["route: ", "two", "Prompt"]),
    "save": (lambda m: pefast.save(m, "unused", "x"), ["save: no adapter is called 'x'", "one", "two"]),
    "unmerge": (lambda m: pefast.unmerge(m), ["unmerge: the model is not merged"]),
    "merge a prompt": (lambda m: pefast.merge(m), ["merge: prompt cannot be added"]),
}


@pytest.mark.parametrize("case", list(NAMES))
def test_names_and_states_that_do_not_fit(case):
    action, parts = NAMES[case]
    model = pefast.attach(build("llama"), LoRA(rank=2), "one")
    stir(pefast.attach(model, Prompt(tokens=2), "two"))
    right = logits(model, **inputs("llama"))
    before = snapshot(model)
    refused(lambda: action(model), *parts)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **inputs("llama")), right)


@pytest.mark.parametrize("call", ["activate", "merge", "attach", "route"])
def test_a_merged_model_says_so(call):
    model = stir(pefast.attach(build("llama"), LoRA(rank=2)))
    pefast.merge(model)
    before = snapshot(model)
    actions = {
        "activate": lambda: pefast.activate(model, None),
        "merge": lambda: pefast.merge(model),
        "attach": lambda: pefast.attach(model, LoRA(rank=2), "other"),
        "route": lambda: enter(pefast.route(model, ["default"])),
    }
    refused(actions[call], f"{call}: the model is merged")
    assert_as_it_was(model, before)


def test_merge_with_nothing_active():
    model = pefast.activate(pefast.attach(build("llama"), LoRA(rank=2)), None)
    refused(lambda: pefast.merge(model), "merge: ", "active")


def test_it_must_be_clear_which_adapter_is_saved(tmp_path):
    model = pefast.attach(build("llama"), LoRA(rank=2), "one")
    pefast.attach(model, LoRA(rank=2), "two")
    for names in (["one", "two"], None):
        pefast.activate(model, names)
        refused(lambda: pefast.save(model, tmp_path / "a"), "save: ", "one", "two")
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path):
    model = pefast.attach(build("llama"), LoRA(rank=2))
    (tmp_path / "a").write_text("mine")
    refused(
        lambda: pefast.save(model, tmp_path / "a"), "save: ", "a file", error=(ValueError, FileExistsError)
    )
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
    "DoRA": ("lora", config(use_dora=True), ["use_dora"]),
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
    refused(lambda: pefast.load(model, folder), "load: ", *parts, error=(ValueError, FileNotFoundError))
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
    refused(lambda: pefast.load(model, saved / kind), "load: ", *parts)
    assert_as_it_was(model, before)


def test_a_folder_that_is_not_there(tmp_path):
    model = build("bert")
    refused(lambda: pefast.load(model, tmp_path / "no"), "load: ", "no", error=FileNotFoundError)


def test_load_under_a_name_that_is_taken(saved):
    model = pefast.load(build("bert"), saved / "lora")
    before = snapshot(model)
    refused(lambda: pefast.load(model, saved / "adapter"), "'default' is taken")
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
