"""Prompts that differ from row to row, with every cache and mask; by hand: tests/test_prompt_formula.py."""

import copy

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

import pefast
from pefast.model import parameters_of
from tests.models import (
    DECODERS,
    FAMILIES,
    Numbers,
    assert_close,
    assert_refused,
    build,
    inputs,
    logits,
    padded,
    step,
    stir,
    trained,
)

Prompt = pefast.Prompt
SET = {
    "three": Prompt(tokens=3),
    "one": Prompt(tokens=1, place="after_first"),
    "words": Prompt(init="template", text="5 7 6 8 {text} 9", tokenizer=Numbers()),
}
NAMES = ["three", None, "words", "one", "three", None]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def with_all(family: str, model=None):
    model = build(family) if model is None else model
    for seed, (name, method) in enumerate(SET.items()):
        stir(pefast.attach(model, method, name), seed)
    return model


def rows_of(fed: dict[str, Tensor], rows) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in fed.items()}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_computes_with_its_own_prompt_or_none(family, side):
    model, fed = with_all(family), padded(family, side)
    real = fed.get("attention_mask", torch.ones(6, 9)).bool() if family in ("llama", "gpt2") else slice(None)
    with pefast.route(model, NAMES):
        got = logits(model, **fed)
    base = logits(build(family), **fed)
    for row, name in enumerate(NAMES):
        pefast.activate(model, name)
        single = logits(model, **rows_of(fed, [row]))[0]
        keep = real[row] if isinstance(real, Tensor) else real
        assert_close(got[row][keep], single[keep])
        if name is None:
            assert_close(got[row][keep], base[row][keep])
        else:
            assert not torch.allclose(got[row][keep], base[row][keep], atol=1e-4)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_gradient_reaches_its_own_prompt_only(family, side):
    model, fed = with_all(family), padded(family, side)
    pefast.activate(model, list(SET))
    with pefast.route(model, NAMES):
        _, got = step(model, fed)
    for name in SET:
        pefast.activate(model, name)
        own = [row for row, each in enumerate(NAMES) if each == name]
        parameters = list(trained(model))
        _, right = step(model, rows_of(fed, own))
        for parameter in parameters:
            assert right[parameter].any()
            assert_close(got[parameter], right[parameter] * len(own) / len(NAMES))


def test_a_prompt_that_no_row_takes_gets_zero():
    model, fed = with_all("llama"), padded("llama", "none")
    pefast.activate(model, list(SET))
    with pefast.route(model, ["one", "three", "one", None, "one", "one"]):
        model(**fed).logits.square().mean().backward()
    assert model.model.prompts["words"].weights.grad is None
    assert model.model.prompts["one"].embeddings.grad.any()


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", DECODERS)
def test_rows_with_their_own_prompts_generate(family, cache):
    model, fed = with_all(family), padded(family, "left")
    fed.pop("decoder_input_ids", None)
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    more = {"cache_implementation": cache} if cache else {"use_cache": False}
    with pefast.route(model, NAMES):
        got = model.generate(**fed, **options, **more)
    for row, name in enumerate(NAMES):
        pefast.activate(model, name)
        right = model.generate(**rows_of(fed, [row]), **options)
        assert torch.equal(got.sequences[row : row + 1], right.sequences), name
        for one, other in zip(got.logits, right.logits, strict=True):
            assert_close(one[row : row + 1], other)


@pytest.mark.parametrize("name", list(SET))
@pytest.mark.parametrize("family", DECODERS)
def test_a_static_cache_and_beams_change_nothing(family, name):
    model, fed = with_all(family), padded(family, "left")
    fed.pop("decoder_input_ids", None)
    pefast.activate(model, name)
    options = {"output_logits": True, "return_dict_in_generate": True}
    right = model.generate(**fed, **GREEDY, **options)
    got = model.generate(**fed, **GREEDY, **options, cache_implementation="static")
    assert torch.equal(got.sequences, right.sequences)
    for one, other in zip(got.logits, right.logits, strict=True):
        assert_close(one, other)
    beams = [
        model.generate(**fed, **GREEDY, num_beams=3, **more)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(beams[0], beams[1]) and torch.equal(beams[0], beams[2])


def test_a_route_of_another_length_says_so():
    model, fed = with_all("llama"), padded("llama", "none")
    with pefast.route(model, NAMES[:3]):
        assert_refused(lambda: logits(model, **fed), "Prompt: ", "3 rows", "6")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_four_dimensions_is_the_mask_of_two(family, attention):
    model, fed = with_all(family), padded(family, "left")
    model.set_attn_implementation(attention)
    embeds = model.get_input_embeddings()(fed["input_ids"])
    square = create_causal_mask(
        config=model.config, inputs_embeds=embeds, attention_mask=fed["attention_mask"], past_key_values=None
    )
    assert square.dim() == 4
    real = fed["attention_mask"].bool()
    with pefast.route(model, NAMES):
        right = logits(model, **fed)
        assert_close(logits(model, input_ids=fed["input_ids"], attention_mask=square)[real], right[real])


def test_a_mask_of_two_packed_texts_keeps_them_apart():
    model, fed = with_all("llama"), inputs("llama", rows=1, length=9)
    pefast.activate(model, "three")
    square = torch.ones(9, 9, dtype=torch.bool).tril()
    square[5:, :5] = False
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    got = logits(model, input_ids=fed["input_ids"], attention_mask=square[None, None], position_ids=places)
    assert_close(got[:, :5], logits(model, input_ids=fed["input_ids"][:, :5]))
    second = logits(model, input_ids=fed["input_ids"][:, 5:])
    # their positions begin again, so the second text stands as near to the prompt as the first
    assert_close(got[:, 5:], second)


@pytest.mark.parametrize("name", list(SET))
def test_left_padded_gpt2_is_unpadded_gpt2(name):
    model, fed = with_all("gpt2"), inputs("gpt2", rows=1)
    pefast.activate(model, name)
    wide = {key: F.pad(value, (4, 0)) for key, value in fed.items()}
    wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_close(logits(model, **wide)[:, 4:], logits(model, **fed))


def test_roberta_counts_its_positions_from_behind_the_padding():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    torch.manual_seed(1)
    config = transformers.RobertaConfig(**sizes, vocab_size=96, max_position_embeddings=30, pad_token_id=1)
    base = transformers.RobertaForTokenClassification(config).eval()
    model, fed = with_all("", copy.deepcopy(base)), padded("bert", "none")
    with pefast.route(model, NAMES):
        got = logits(model, **fed)
    for row, name in enumerate(NAMES):
        pefast.activate(model, name)
        assert_close(got[row], logits(model, **rows_of(fed, [row]))[0])
    assert_close(got[1], logits(base, **fed)[1])


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_a_routed_batch_changes_nothing(family, reentrant):
    model, fed = with_all(family).train(), padded(family, "left")
    pefast.activate(model, list(SET))
    with pefast.route(model, NAMES):
        _, right = step(model, fed)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(**fed).logits.float().square().mean().backward()
    for name, parameter in trained(model).items():
        assert_close(parameter.grad, right[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_routed_batch_compiles_in_one_graph(family):
    torch.compiler.reset()
    model, fed = with_all(family).train(), padded(family, "right")
    pefast.activate(model, list(SET))
    with pefast.route(model, NAMES):
        loss, gradients = step(model, fed)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(**fed).logits.float().square().mean()
        found = torch.autograd.grad(got, list(trained(model).values()))
    assert_close(got.detach(), loss)
    for gradient, right in zip(found, gradients.values(), strict=True):
        assert_close(gradient, right)


def test_a_prompt_from_the_vocabulary():
    model = pefast.attach(build("llama"), Prompt(tokens=7, init="vocabulary"))
    vectors = parameters_of(model, "default")["prompt/prompt_embeddings"]
    found = (vectors[:, None] == model.get_input_embeddings().weight).all(2)
    assert found.any(1).all() and len(set(found.float().argmax(1).tolist())) > 2


def test_a_static_cache_without_room_says_so():
    model, fed = pefast.attach(build("llama"), Prompt(tokens=3)), inputs("llama", rows=1)
    cache = transformers.StaticCache(config=model.config, max_cache_len=10)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    assert_refused(lambda: logits(model, **fed, past_key_values=cache), "Prompt: 12 positions", "10")


def test_active_prompts_at_two_places_say_so():
    model = with_all("llama")
    pefast.activate(model, ["three", "one"])
    assert_refused(lambda: logits(model, **inputs("llama")), "Prompt: ", "one place for all")


@pytest.mark.slow
def test_a_static_cache_decodes_in_one_compiled_graph():
    torch.compiler.reset()
    model, fed = with_all("llama"), padded("llama", "left")
    compiled = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    # transformers compiles on GPUs only, unless it is told
    compiled._compile_all_devices = True
    with pefast.route(model, NAMES):
        right = model.generate(**fed, **GREEDY)
        got = model.generate(**fed, **GREEDY, cache_implementation="static", compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(got, right)
