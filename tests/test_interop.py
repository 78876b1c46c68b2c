"""Hugging Face PEFT and pefast read each other's folders, and compute and train the same."""

import copy
import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import pefast
from pefast.layers.hosts import DeltaHost
from pefast.model import parameters_of
from tests.models import assert_close, build, inputs, logits, step, stir, trained

# PEFT warns that it flips fan_in_fan_out for Conv1D, and that it does not know pefast's own config keys
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

CHECKPOINTS = {
    "bert with head": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "bert, all linear": ("bert", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "bert, no task": ("bert", {"target_modules": ["dense"]}),
    "llama": ("llama", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "gpt2, Conv1D": ("gpt2", {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_proj"]}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]}),
    "rsLoRA": ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"q_proj": 5, "0.self_attn.k_proj": 11},
        },
    ),
    "more than twenty targets": ("llama", {"task_type": "CAUSAL_LM", "target_modules": r".*layers.*_proj"}),
}
every_checkpoint = pytest.mark.parametrize("case", list(CHECKPOINTS))


def with_peft(case: str, **more):
    """PEFT's model of that case after three steps of training, in eval mode."""
    family, settings = CHECKPOINTS[case]
    model = peft.get_peft_model(
        build(family), peft.LoraConfig(**{"r": 4, "lora_alpha": 9, **settings, **more})
    )
    return family, train(model, family)


def train(model: nn.Module, family: str) -> nn.Module:
    """A few steps that move every parameter that trains."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02)
    for _ in range(3):
        _, gradients = step(model, inputs(family))
        for name, parameter in trained(model).items():
            parameter.grad = gradients[name]
        optimizer.step()
    return model.eval()


def tensors(folder) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert sorted(one) == sorted(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@every_checkpoint
def test_a_lora_of_peft_comes_and_goes(case, tmp_path):
    family, theirs = with_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    fed, right = inputs(family), logits(theirs, **inputs(family))
    assert not torch.allclose(right, logits(build(family), **fed), atol=1e-4)

    ours = pefast.load(build(family), tmp_path / "peft")
    assert_close(logits(ours, **fed), right)

    pefast.save(ours, tmp_path / "pefast")
    assert_same_tensors(tensors(tmp_path / "pefast"), tensors(tmp_path / "peft"))
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "pefast").eval()
    assert_close(logits(again, **fed), right)

    again.save_pretrained(tmp_path / "peft again")
    assert_same_tensors(tensors(tmp_path / "peft again"), tensors(tmp_path / "peft"))


@every_checkpoint
def test_gradients_are_those_of_peft(case, tmp_path):
    family, theirs = with_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    ours, fed = pefast.load(build(family), tmp_path / "peft"), inputs(family)
    right = {name.replace(".default", ""): gradient for name, gradient in step(theirs, fed)[1].items()}
    names = {id(parameter): name for name, parameter in trained(ours).items()}
    _, got = step(ours, fed)
    found = 0
    for key, parameter in parameters_of(ours, "default").items():
        kind, key = key.split("/")
        # PEFT keeps a trained head beside the frozen one
        path, own = key.rsplit(".", 1)
        key = f"base_model.model.{path}.modules_to_save.{own}" if kind == "head" else key
        assert_close(got[names[id(parameter)]], right[key])
        found += 1
    assert found == len(right)


BIASES = [
    ("bert with head", "all"),
    ("bert with head", "lora_only"),
    ("bert, all linear", "all"),
    ("gpt2, Conv1D", "all"),
    ("gpt2, Conv1D", "lora_only"),
]


@pytest.mark.parametrize(("case", "bias"), BIASES)
def test_a_lora_of_peft_with_the_model_s_biases(case, bias, tmp_path):
    family, theirs = with_peft(case, bias=bias)
    theirs.save_pretrained(tmp_path / "peft")
    fed, right = inputs(family), logits(theirs, **inputs(family))
    ours = pefast.load(build(family), tmp_path / "peft")
    assert_close(logits(ours, **fed), right)
    again = pefast.load(build(family), pefast.save(ours, tmp_path / "pefast"))
    assert torch.equal(logits(again, **fed), logits(ours, **fed))

    # every bias of theirs trains, and counts
    own = {key: value for key, value in parameters_of(ours, "default").items() if key.startswith("layers/")}
    names = {
        re.sub(r"base_model\.model\.|\.base_layer", "", name)
        for name in trained(theirs)
        if not re.search(r"lora_|modules_to_save|original_module", name)
    }
    assert {key.removeprefix("layers/") for key in own} == names
    for parameter in own.values():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape))
    assert not torch.allclose(logits(ours, **fed), right, atol=1e-4)


def test_a_lora_of_pefast_goes_to_peft(tmp_path):
    methods = {
        "bert": pefast.LoRA(rank=3, alpha=5, ranks={"query": 2}, alphas={"value": 7}),
        "gpt2": pefast.LoRA(rank=3, rslora=True, targets=["attn.c_attn"], layers=[1]),
        "llama": pefast.LoRA(rank=4, targets=r".*mlp.*", exclude=["up_proj"], ranks={"gate_proj": 2}),
        "t5": pefast.LoRA(rank=4, alpha=2, targets=["SelfAttention.q", "wi"], dropout=0.1),
    }
    for family, method in methods.items():
        ours = stir(pefast.attach(build(family), method))
        folder, fed = pefast.save(ours, tmp_path / family), inputs(family)
        theirs = peft.PeftModel.from_pretrained(build(family), folder).eval()
        assert_close(logits(theirs, **fed), logits(ours, **fed))
        theirs.save_pretrained(tmp_path / f"{family} again")
        assert_same_tensors(tensors(tmp_path / f"{family} again"), tensors(folder))


def test_a_merged_model_is_that_of_peft(tmp_path):
    family, theirs = with_peft("gpt2, Conv1D")
    theirs.save_pretrained(tmp_path / "peft")
    ours = pefast.merge(pefast.load(build(family), tmp_path / "peft"))
    merged = theirs.merge_and_unload()
    for name, value in merged.state_dict().items():
        assert_close(ours.state_dict()[name], value, 1e-6)


@pytest.mark.parametrize("case", ["bert, all linear", "llama"])
def test_a_lora_on_a_bf16_model_computes_as_in_peft(case, tmp_path):
    family, theirs = with_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    fed, right = inputs(family), logits(theirs, **inputs(family))
    narrow = peft.PeftModel.from_pretrained(build(family).bfloat16(), tmp_path / "peft").eval()
    ours = pefast.load(build(family).bfloat16(), tmp_path / "peft")
    kinds = {parameter.dtype for parameter in trained(ours).values()}
    assert torch.float32 in kinds
    # both round to bf16 at other places: no farther from fp32 than twice PEFT
    mine, peers = (logits(model, **fed).float() - right for model in (ours, narrow))
    assert mine.abs().max() <= 2 * peers.abs().max() + 2**-8 * right.abs().max()


TARGETS = {
    "all-linear": ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
    "ALL-linear": ({"target_modules": "ALL-linear"}, {"targets": "ALL-linear"}),
    "names": ({"target_modules": ["{0}", "{1}"]}, {"targets": ["{0}", "{1}"]}),
    "longer names": ({"target_modules": ["{longer}"]}, {"targets": ["{longer}"]}),
    "expression": ({"target_modules": r".*\.{0}"}, {"targets": r".*\.{0}"}),
    "expression of one block": ({"target_modules": r".*\.1\..*{1}"}, {"targets": r".*\.1\..*{1}"}),
    "one layer": ({"target_modules": ["{0}"], "layers_to_transform": 0}, {"targets": ["{0}"], "layers": [0]}),
    "layers": ({"target_modules": ["{1}"], "layers_to_transform": [1]}, {"targets": ["{1}"], "layers": [1]}),
    "exclude names": (
        {"target_modules": "all-linear", "exclude_modules": ["{0}"]},
        {"exclude": ["{0}"]},
    ),
    "exclude expression": (
        {"target_modules": ["{0}", "{1}"], "exclude_modules": r".*\.0\..*"},
        {"targets": ["{0}", "{1}"], "exclude": r".*\.0\..*"},
    ),
}
NAMES = {
    "bert": ("query", "dense", "attention.output.dense"),
    "llama": ("q_proj", "gate_proj", "mlp.down_proj"),
    "gpt2": ("c_attn", "c_proj", "mlp.c_proj"),
    "t5": ("q", "wo", "SelfAttention.o"),
    "llama classifier": ("q_proj", "gate_proj", "mlp.down_proj"),
}


def named(settings, names):
    """The settings with a family's own names in the places of {0}, {1} and {longer}."""
    if isinstance(settings, dict):
        return {key: named(value, names) for key, value in settings.items()}
    if isinstance(settings, list):
        return [named(value, names) for value in settings]
    if isinstance(settings, str):
        return settings.replace("{0}", names[0]).replace("{1}", names[1]).replace("{longer}", names[2])
    return settings


def model_of(family: str):
    """The family's tiny model; "llama classifier" is one with a head `score`."""
    if family != "llama classifier":
        return build(family), {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    return transformers.LlamaForSequenceClassification(build("llama").config), "SEQ_CLS"


@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize("case", list(TARGETS))
def test_targets_mean_what_they_mean_in_peft(family, case):
    theirs, ours = (named(settings, NAMES[family]) for settings in TARGETS[case])
    base, task = model_of(family)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, task_type=task, **theirs))
    right = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    pefast.attach(base, pefast.LoRA(rank=2, **ours))
    assert {name for name, module in base.named_modules() if isinstance(module, DeltaHost)} == right


def test_the_output_embedding_is_a_target_only_by_its_name():
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    right = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    ours = pefast.attach(build("llama"), pefast.LoRA(rank=2, targets=["lm_head", "q_proj"]))
    assert {name for name, module in ours.named_modules() if isinstance(module, DeltaHost)} == right


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")],
)
def test_a_prompt_of_peft_comes_and_goes(family, task, tmp_path):
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)
    theirs = train(peft.get_peft_model(build(family), config), family)
    theirs.save_pretrained(tmp_path / "peft")
    fed = inputs(family)
    # PEFT leaves the prompt's own positions in the logits
    skip = 4 if task == "CAUSAL_LM" else 0
    right = logits(theirs, **fed)[:, skip:] if skip else logits(theirs, **fed)

    ours = pefast.load(build(family), tmp_path / "peft")
    assert_close(logits(ours, **fed), right)
    pefast.save(ours, tmp_path / "pefast")
    assert_same_tensors(tensors(tmp_path / "pefast"), tensors(tmp_path / "peft"))
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "pefast").eval()
    assert_close(logits(again, **fed)[:, skip:] if skip else logits(again, **fed), right)


def test_the_config_has_what_peft_writes(tmp_path):
    family, theirs = with_peft("patterns", lora_dropout=0.25)
    theirs.save_pretrained(tmp_path / "peft")
    pefast.save(pefast.load(build(family), tmp_path / "peft"), tmp_path / "pefast")
    one, other = (
        json.loads((tmp_path / kind / "adapter_config.json").read_text()) for kind in ("peft", "pefast")
    )
    same = "peft_type task_type r lora_alpha lora_dropout use_rslora bias fan_in_fan_out".split()
    same += "rank_pattern alpha_pattern inference_mode init_lora_weights".split()
    assert {key: other[key] for key in same} == {key: one[key] for key in same}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_folders_of_a_hybrid_are_pefts_where_peft_has_the_method(family, tmp_path):
    methods = [pefast.LoRA(rank=2), pefast.Adapter(size=4), pefast.Prompt(tokens=3)]
    ours = stir(pefast.attach(build(family), methods))
    folder = pefast.save(ours, tmp_path / "hybrid")
    for key in ("lora", "prompt"):
        theirs = peft.PeftModel.from_pretrained(build(family), folder / key)
        wanted = {
            re.sub("^(lora|prompt)/", "", name): value
            for name, value in parameters_of(ours, "default").items()
            if name.startswith(key)
        }
        assert_same_tensors(
            peft.get_peft_model_state_dict(theirs), {k: v.detach() for k, v in wanted.items()}
        )
