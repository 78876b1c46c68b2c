"""Prefix tuning of Hugging Face PEFT and of pefast: folders, logits, gradients and generation agree."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pefast
from tests.models import LAYERS, assert_close, build, inputs, logits, step, stir, trained
from tests.test_interop import assert_same_tensors, tensors, train

# PEFT warns of pefast's own config keys, and transformers of what PEFT asks
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
every_family = pytest.mark.parametrize("family", list(TASKS))
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def with_peft(model, task: str, hidden: int | None = None):
    """PEFT's prefix of four tokens on a model; with `hidden` from its network."""
    config = peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=4, prefix_projection=bool(hidden), encoder_hidden_size=hidden
    )
    return peft.get_peft_model(model, config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of PEFT after some training, and its model in eval mode, for each family."""
    found = {}
    for family, task in TASKS.items():
        torch.manual_seed(0)
        theirs = train(with_peft(build(family), task), family)
        folder = tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        found[family] = folder, theirs
    return found


@pytest.mark.parametrize("hidden", [None, 6], ids=["plain", "network"])
@every_family
def test_a_prefix_of_peft_comes_and_goes(family, hidden, tmp_path):
    theirs = train(with_peft(build(family), TASKS[family], hidden), family)
    theirs.save_pretrained(tmp_path / "peft")
    fed = inputs(family)
    right = logits(theirs, **fed)
    assert not torch.allclose(right, logits(build(family), **fed), atol=1e-4)

    ours = pefast.load(build(family), tmp_path / "peft")
    assert_close(logits(ours, **fed), right)
    # PyTorch's own attention is given the same numbers
    with pefast.backend("eager"):
        assert_close(logits(ours, **fed), right, 1e-6)
    pefast.save(ours, tmp_path / "pefast")
    assert_same_tensors(tensors(tmp_path / "pefast"), tensors(tmp_path / "peft"))
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "pefast").eval()
    assert_close(logits(again, **fed), right)


@pytest.mark.parametrize("hidden", [False, 6], ids=["plain", "network"])
@every_family
def test_a_prefix_of_pefast_goes_to_peft(family, hidden, tmp_path):
    attentions = ("decoder",) if family == "t5" else None
    method = pefast.Prefix(tokens=3, reparameterize=hidden, attentions=attentions)
    ours = stir(pefast.attach(build(family), method))
    folder, fed = pefast.save(ours, tmp_path / "prefix"), inputs(family)
    own = {key for key in load_file(folder / "adapter_model.safetensors") if "classifier" not in key}
    assert own == {"prompt_embeddings"}
    assert (folder / "resume.safetensors").exists() == bool(hidden)
    theirs = peft.PeftModel.from_pretrained(build(family), folder).eval()
    assert_close(logits(theirs, **fed), logits(ours, **fed))


@every_family
def test_the_config_has_what_peft_writes(family, folders, tmp_path):
    folder, _ = folders[family]
    pefast.save(pefast.load(build(family), folder), tmp_path / "pefast")
    one, other = (
        json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "pefast")
    )
    same = "peft_type task_type num_virtual_tokens token_dim num_transformer_submodules num_attention_heads"
    same += " num_layers prefix_projection inference_mode"
    assert {key: other[key] for key in same.split()} == {key: one[key] for key in same.split()}


@every_family
def test_gradients_are_those_of_peft(family, folders):
    folder, trained_by_peft = folders[family]
    theirs = with_peft(build(family), TASKS[family])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(dict(trained_by_peft.named_parameters())[name])
    ours, fed = pefast.load(build(family), folder), inputs(family)
    loss, got = step(ours, fed)
    right_loss, right = step(theirs.eval(), fed)
    assert_close(loss, right_loss)
    name = next(name for name in got if "prefixes" in name)
    assert_close(got[name], right["prompt_encoder.default.embedding.weight"])
    if family == "bert":
        assert_close(
            next(value for name, value in got.items() if name.endswith("copies.default.weight")),
            right["base_model.classifier.modules_to_save.default.weight"],
        )


@pytest.mark.parametrize("side", ["left", "right", "none"])
@every_family
def test_with_padding_and_given_positions(family, side, folders):
    folder, theirs = folders[family]
    ours, fed = pefast.load(build(family), folder), inputs(family)
    if side == "left":
        fed |= {key: fed[key].flip(1) for key in ("input_ids", "attention_mask")}
    if side == "none":
        fed["attention_mask"] = None
    assert_close(logits(ours, **fed), logits(theirs, **fed))
    if family in ("gpt2", "llama"):
        fed["position_ids"] = torch.arange(2, 11).expand(3, -1)
        assert_close(logits(ours, **fed), logits(theirs, **fed))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generation_is_that_of_peft(family, beams, folders):
    folder, theirs = folders[family]
    ours, fed = pefast.load(build(family), folder), inputs(family)
    fed = {key: fed[key].flip(1) for key in ("input_ids", "attention_mask")}
    options = {**GREEDY, "num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
    got, right = (model.generate(**fed, **options) for model in (ours, theirs))
    assert torch.equal(got.sequences, right.sequences)
    for mine, other in zip(got.logits, right.logits, strict=True):
        assert_close(mine, other)


def test_positions_of_a_roberta_are_those_of_peft(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = transformers.RobertaConfig(**sizes, vocab_size=50, max_position_embeddings=24, num_labels=2)
    base = transformers.RobertaForSequenceClassification(config).eval()
    base.roberta.embeddings.position_embeddings.weight.data.normal_(0, 1)
    state = base.state_dict()
    theirs = with_peft(base, "SEQ_CLS").eval()
    theirs.save_pretrained(tmp_path)
    fresh = transformers.RobertaForSequenceClassification(config).eval()
    fresh.load_state_dict({key.replace("base_layer.", ""): value for key, value in state.items()})
    ids = torch.randint(5, 50, (2, 9))
    ids[0, -3:] = config.pad_token_id
    fed = {"input_ids": ids, "attention_mask": (ids != config.pad_token_id).long()}
    right = logits(theirs, **fed)
    assert_close(logits(pefast.load(fresh, tmp_path), **fed), right)


def test_a_t5_of_peft_trains_half_of_its_prefix(folders):
    # PEFT gives a block four entries of which it has two, so the upper half of the blocks reads the lower's
    folder, _ = folders["t5"]
    ours = pefast.load(build("t5"), folder)
    _, gradients = step(ours, inputs("t5"))
    (gradient,) = gradients.values()
    pairs = gradient.view(4, LAYERS, 2, -1)
    assert pairs[:, 0].any() and not pairs[:, 1].any()


def test_the_prefix_of_a_hybrid_is_a_folder_of_peft(tmp_path):
    methods = [pefast.LoRA(rank=2), pefast.Adapter(size=4), pefast.Prefix(tokens=3, reparameterize=True)]
    ours = stir(pefast.attach(build("llama"), methods))
    folder = pefast.save(ours, tmp_path / "hybrid")
    theirs = peft.PeftModel.from_pretrained(build("llama"), folder / "prefix").eval()
    alone = pefast.load(build("llama"), folder / "prefix")
    fed = inputs("llama")
    assert_close(logits(alone, **fed), logits(theirs, **fed))
    # the network came with the second file, and trains on
    names = {name.rsplit("default.", 1)[-1] for name in trained(alone)}
    assert names == {
        "embeddings",
        "w1",
        "b1",
        *(f"{part}.{i}" for part in ("w2", "b2") for i in range(LAYERS)),
    }
    again = pefast.load(build("llama"), folder)
    assert torch.equal(logits(again, **fed), logits(ours, **fed))
