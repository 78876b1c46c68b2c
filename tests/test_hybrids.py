"""Several methods under one name: one pass, one folder of PEFT's folders, one call to load."""

import json

import peft
import pytest
import torch

import pefast
from pefast.methods import METHODS
from pefast.methods.places import hosts
from pefast.ops.delta_linear import OP
from tests.cases import probe
from tests.models import assert_close, build, inputs, logits, stir

# PEFT warns that it flips fan_in_fan_out for Conv1D, and that it does not know pefast's own config keys
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

METHODS_OF_PEFT = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


def everything() -> list:
    """LoRA, DoRA, (IA)³, adapters of both kinds, prompt and prefix."""
    return [
        pefast.LoRA(rank=4),
        pefast.Adapter(size=6),
        pefast.Prompt(tokens=3),
        pefast.Prefix(tokens=2),
        pefast.Adapter(size=3, parallel=False),
        pefast.IA3(),
        pefast.LoRA(rank=2, dora=True, targets=["query", "v_proj", "c_attn"]),
    ]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_folder_for_each_method_and_one_call_to_load_them(family, tmp_path):
    model, fed = stir(pefast.attach(build(family), everything(), "all")), inputs(family)
    folder = pefast.save(model, tmp_path / "all")
    keys = ["lora", "adapter", "prompt", "prefix", "adapter_2", "ia3", "lora_2"]
    assert json.loads((folder / "pefast.json").read_text())["methods"] == keys
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(keys)
    fresh = pefast.load(build(family), folder, "again")
    assert torch.equal(logits(fresh, **fed), logits(model, **fed))
    assert not torch.allclose(logits(model, **fed), logits(build(family), **fed), atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("key", ["lora", "ia3", "prefix", "lora_2"])
def test_each_of_peft_s_folders_is_a_checkpoint_of_peft(family, key, tmp_path):
    model = stir(pefast.attach(build(family), everything(), "all", head=False))
    folder = pefast.save(model, tmp_path / "all") / key
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == METHODS_OF_PEFT[key.split("_")[0]]
    theirs = peft.PeftModel.from_pretrained(build(family), folder).eval()
    # the same part alone, through pefast
    ours, fed = pefast.load(build(family), folder), inputs(family)
    assert_close(logits(theirs, **fed), logits(ours, **fed), 2e-5)


def test_a_linear_with_many_methods_is_one_call(monkeypatch):
    model, fed = stir(pefast.attach(build("llama"), everything(), "all")), inputs("llama")
    calls = []
    pick = OP.pick

    def counted(call, *rest):
        calls.append(len(call.segments))
        return pick(call, *rest)

    monkeypatch.setattr(OP, "pick", counted)
    logits(model, **fed)
    riding = [
        sum(delta.rides for delta in host.deltas["all"].values())
        for _, host in hosts(model)
        if any(delta.rides for delta in host.deltas["all"].values())
    ]
    assert sorted(calls) == sorted(riding)
    assert max(calls) == 2 and len(calls) == 7 * 2

    said = pefast.explain(model)
    assert "lora of all + adapter of all + adapter_2 of all" in said
    assert "lora of all + lora_2 of all" in said or "lora of all + ia3 of all + lora_2 of all" in said


def test_every_kind_of_method_stands_beside_a_lora():
    fed = inputs("bert")
    beside = {
        "layers": pefast.Layers(last=1),
        "heads": pefast.Heads({0: [0]}),
        "subnetwork": pefast.Subnetwork(fraction=0.1),
        "importance": pefast.Importance(batches=[1], loss=probe, fraction=0.1),
    }
    for kind, method in METHODS.items():
        one = beside.get(kind) or method()
        model = stir(pefast.attach(build("bert"), [pefast.LoRA(rank=2), one]))
        lora = stir(pefast.attach(build("bert"), pefast.LoRA(rank=2)))
        assert logits(model, **fed).isfinite().all(), kind
        assert not torch.allclose(logits(model, **fed), logits(lora, **fed), atol=1e-5), kind
