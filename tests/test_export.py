"""Merged models in folders: transformers reads them in a process that cannot import pefast, and computes the
adapter model's logits."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pefast
from tests.cases import CASES
from tests.models import assert_as_it_was, assert_close, assert_refused, build, inputs, logits, snapshot, stir

# GPT-2 keeps weights turned, Llama and T5 tie tables of words
CHOSEN = {
    "bert": ("lora of ranks", "dora", "ia3", "heads"),
    "gpt2": ("lora", "layers and lora", "lora of words"),
    "llama": ("pissa", "lora of words"),
    "t5": ("lora", "ia3", "lora of words"),
}
PAIRS = [(family, case) for family, cases in CHOSEN.items() for case in cases]
# loads every folder with transformers alone, and writes what it computes for the inputs beside it
ALONE = """
import json, pathlib, sys
sys.modules["pefast"] = None
import transformers, safetensors.torch
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    fed = safetensors.torch.load_file(folder / "fed.safetensors")
    name, = json.loads((folder / "config.json").read_text())["architectures"]
    model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), (folder, loading)
    out = model.eval()(**fed)
    found = {key: out[key].detach() for key in ("logits", "start_logits", "end_logits") if key in out}
    found = {key: value.contiguous() for key, value in found.items()}
    safetensors.torch.save_file(found, folder / "out.safetensors")
"""


def heads_of_tasks():
    """Models with task heads, trained ones, of which one has more labels than the model."""
    for kind in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        config = build("bert").config
        torch.manual_seed(3)
        # a span has two ends
        config.num_labels = 2 if kind == "ForQuestionAnswering" else 3
        yield kind, getattr(transformers, f"Bert{kind}")(config).eval(), True
    yield "five labels", build("bert"), 5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name: what the adapter model computes, and what transformers alone does with the merged folder."""
    root, models = tmp_path_factory.mktemp("exported"), {}
    for family, case in PAIRS:
        models[f"{family} {case}"] = stir(pefast.attach(build(family), copy.deepcopy(CASES[case])))
    for name, model, head in heads_of_tasks():
        models[name] = stir(pefast.attach(model, pefast.LoRA(rank=2), head=head))
    found = {}
    for name, model in models.items():
        fed = inputs(model.config.model_type)
        with torch.no_grad():
            out = model(**fed)
        found[name] = {key: out[key] for key in ("logits", "start_logits", "end_logits") if key in out}
        before = snapshot(model)
        folder = pefast.export(model, root / name)
        assert_as_it_was(model, before)
        save_file(fed, folder / "fed.safetensors")
    done = subprocess.run([sys.executable, "-c", ALONE, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (out, load_file(root / name / "out.safetensors")) for name, out in found.items()}


def test_transformers_alone_computes_the_adapter_models_logits(exported):
    assert len(exported) == len(PAIRS) + 4
    for name, (right, got) in exported.items():
        assert got.keys() == right.keys(), name
        for key in right:
            assert got[key].shape == right[key].shape, name
            assert_close(got[key], right[key])
    assert exported["five labels"][1]["logits"].shape[-1] == 5


def test_the_merged_heads_are_the_adapters_own(tmp_path):
    model = stir(pefast.attach(build("bert"), pefast.LoRA(rank=2)))
    right = logits(model, **inputs("bert"))
    own = model.classifier.weight.clone()
    pefast.merge(model)
    assert not torch.equal(model.classifier.weight, own)
    assert_close(logits(model, **inputs("bert")), right)
    # transformers' own way of saving keeps the trained head as well
    model.save_pretrained(tmp_path / "again")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "again", config=config)
    assert_close(logits(again.eval(), **inputs("bert")), right)
    pefast.unmerge(model)
    assert torch.equal(model.classifier.weight, own)
    assert torch.equal(logits(model, **inputs("bert")), right)


def test_two_active_adapters_and_a_resting_one_that_cannot_merge(tmp_path):
    model = build("bert")
    for seed, (name, method) in enumerate(
        {"one": pefast.LoRA(rank=2), "two": pefast.IA3(), "rests": pefast.Prompt(tokens=2)}.items()
    ):
        stir(pefast.attach(model, method, name), seed)
    pefast.activate(model, ["one", "two"])
    right = logits(model, **inputs("bert"))
    folder = pefast.export(model, tmp_path / "out")
    assert_close(logits(type(build("bert")).from_pretrained(folder).eval(), **inputs("bert")), right)
    assert torch.equal(logits(model, **inputs("bert")), right)
    pefast.merge(model)
    again = pefast.export(model, tmp_path / "merged already")
    left, other = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert left.keys() == other.keys() and all(torch.equal(left[key], other[key]) for key in left)
    assert model._pefast.merged


def test_tied_words_part_where_a_delta_went_into_the_table(tmp_path):
    for case, tied in (("lora", True), ("lora of words", False)):
        model = stir(pefast.attach(build("llama"), copy.deepcopy(CASES[case])))
        folder = pefast.export(model, tmp_path / case)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_refusals_leave_nothing_behind(tmp_path):
    model = stir(pefast.attach(build("bert"), [pefast.LoRA(rank=2), pefast.Prompt(tokens=2)]))
    before = snapshot(model)
    assert_refused(lambda: pefast.export(model, tmp_path / "no"), "merge: prompt cannot be added")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert_refused(lambda: pefast.export(model, tmp_path / "full"), "not empty; a new folder")
    assert_as_it_was(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert_refused(lambda: pefast.export(build("bert"), tmp_path / "no"), "export: nothing is attached")
