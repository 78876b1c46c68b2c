"""Prompts against their formula, computed here by hand: rows that differ, T5, templates, caches, masks."""

import copy

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

import pefast
from pefast.architectures import backbone
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


def batch(family: str, side: str) -> dict[str, Tensor]:
    """Six rows; on the side that is asked for, two of them are padded."""
    fed = inputs(family, rows=6)
    fed["attention_mask"][1, -3:] = 1
    if side == "none":
        return {key: value for key, value in fed.items() if key != "attention_mask"}
    for row, count in ((1, 4), (2, 2)):
        cut = slice(None, count) if side == "left" else slice(-count, None)
        fed["input_ids"][row, cut] = fed["attention_mask"][row, cut] = 0
    return fed


def rows_of(fed: dict[str, Tensor], rows) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in fed.items()}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_computes_with_its_own_prompt_or_none(family, side):
    model, fed = with_all(family), batch(family, side)
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
    model, fed = with_all(family), batch(family, side)
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
    model, fed = with_all("llama"), batch("llama", "none")
    pefast.activate(model, list(SET))
    with pefast.route(model, ["one", "three", "one", None, "one", "one"]):
        model(**fed).logits.square().mean().backward()
    assert model.model.prompts["words"].weights.grad is None
    assert model.model.prompts["one"].embeddings.grad.any()


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", DECODERS)
def test_rows_with_their_own_prompts_generate(family, cache):
    model, fed = with_all(family), batch(family, "left")
    fed.pop("decoder_input_ids", None)
    options = GREEDY | ({"cache_implementation": cache} if cache else {"use_cache": False})
    with pefast.route(model, NAMES):
        got = model.generate(**fed, **options)
    for row, name in enumerate(NAMES):
        pefast.activate(model, name)
        right = model.generate(**rows_of(fed, [row]), **GREEDY)
        assert torch.equal(got[row : row + 1], right), name


@pytest.mark.parametrize("name", list(SET))
@pytest.mark.parametrize("family", DECODERS)
def test_a_static_cache_and_beams_change_nothing(family, name):
    model, fed = with_all(family), batch(family, "left")
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
    model, fed = with_all("llama"), batch("llama", "none")
    with pefast.route(model, NAMES[:3]):
        assert_refused(lambda: logits(model, **fed), "Prompt: ", "3 rows", "6")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mask_of_four_dimensions_is_the_mask_of_two(family, attention):
    model, fed = with_all(family), batch(family, "left")
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


def by_hand(
    model, lead: Tensor, ids: Tensor, follow: Tensor, first: int = 0, last: int = 0, **more
) -> Tensor:
    """Hidden states [L + V, D] of one row with vectors before and behind its input; no pefast in `model`."""
    tokens = model.get_input_embeddings()(ids[None])[0]
    end = len(ids) - last
    row = torch.cat((tokens[:first], lead, tokens[first:end], follow, tokens[end:]))
    return backbone(model)(inputs_embeds=row[None], **more)[0][0]


@pytest.mark.parametrize("place", ["start", "after_first", "inside"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_template_is_each_words_embedding_times_its_weight(family, place):
    text = "5 7 6 {text} 9 4"
    model, plain, fed = build(family), build(family), inputs(family)
    pefast.attach(model, Prompt(init="template", text=text, tokenizer=Numbers(), place=place))
    part = backbone(model).prompts["default"]
    assert torch.equal(part.weights, torch.ones(5))
    stir(model)
    table = plain.get_input_embeddings().weight.detach()
    weights = part.weights.detach().clone().requires_grad_()
    words = table[[5, 7, 6, 9, 4]] * weights[:, None]
    first, last = int(place != "start"), int(place == "inside")
    states, total = backbone(model)(**fed)[0], 0.0
    for row, length in enumerate(fed["attention_mask"].sum(1).tolist()):
        right = by_hand(plain, words[:3], fed["input_ids"][row, :length], words[3:], first, last)
        end = length - last
        keep = [*range(first), *range(first + 3, end + 3), *range(end + 5, length + 5)]
        if family != "bert":
            # what stands before the answer predicts it
            keep[end - 1] = end + 4
        assert_close(states[row, :length], right[keep])
        total = total + right[keep].square().sum()
    total.backward()
    (found,) = torch.autograd.grad((states.square() * fed["attention_mask"][..., None]).sum(), [part.weights])
    assert_close(found, weights.grad)


def tokenizer():
    """Words of letters in pieces of at most three, as a fast tokenizer of transformers."""
    pieces = {"[PAD]": 0, "[UNK]": 1, "tell": 2, "##me": 3, "the": 4, "mood": 5, "##y": 6, ":": 7, "so": 8}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def test_the_pieces_of_one_word_share_its_weight(tmp_path):
    model = build("llama")
    pefast.attach(model, Prompt(init="template", text="tellme the moody: {text} so :", tokenizer=tokenizer()))
    part = model.model.prompts["default"]
    assert part.ids.tolist() == [2, 3, 4, 5, 6, 7, 8, 7] and part.lead == 6
    assert part.spread.argmax(1).tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert len(part.weights) == 5
    # what is loaded asks for no tokenizer, and two models may share the settings
    fresh = pefast.load(build("llama"), pefast.save(stir(model), tmp_path / "words"))
    assert torch.equal(fresh.model.prompts["default"].weights, part.weights)
    assert torch.equal(logits(fresh, **inputs("llama")), logits(model, **inputs("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_words_behind_the_input_stand_before_the_answer(family):
    method = Prompt(init="template", text="5 7 {text} 9 4", tokenizer=Numbers())
    model, plain, fed = pefast.attach(build(family), method), build(family), inputs(family, rows=1)
    ids = fed["input_ids"][0]
    labels = torch.cat((torch.full((6,), -100), ids[6:]))[None]
    whole = torch.cat((torch.tensor([5, 7]), ids[:6], torch.tensor([9, 4]), ids[6:]))[None]
    right = logits(plain, input_ids=whole)[0, [2, 3, 4, 5, 6, 9, 10, 11, 12]][None]
    out = model(**fed, labels=labels)
    assert_close(out.logits, right)
    assert_close(out.loss.detach(), F.cross_entropy(right[0, 5:8], ids[6:]))
    assert_close(model(input_ids=ids[None], slot_end=torch.tensor([6])).logits, right)
    # a forward without labels, and generate: the answer comes behind the whole input
    whole = torch.cat((torch.tensor([5, 7]), ids, torch.tensor([9, 4])))[None]
    assert_close(logits(model, **fed)[:, -1], logits(plain, input_ids=whole)[:, -1])
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        new = model.generate(**fed, **GREEDY, **more)[:, 9:]
        assert torch.equal(new, plain.generate(whole, **GREEDY)[:, 13:])


@pytest.mark.parametrize("stacks", ["encoder", "decoder", "both"])
def test_t5_with_prompts_in_its_stacks(stacks):
    model = stir(pefast.attach(build("t5"), Prompt(tokens=3, stacks=stacks)))
    plain, fed = build("t5"), batch("t5", "right")
    prompt = model.prompts["default"].embeddings
    assert prompt.shape == (6, 32)
    embeds = {key: plain.shared(fed[key]) for key in ("input_ids", "decoder_input_ids")}
    mask, count = fed["attention_mask"], len(fed["input_ids"])
    if stacks != "decoder":
        embeds["input_ids"] = torch.cat((prompt[:3].expand(count, -1, -1), embeds["input_ids"]), 1)
        mask = torch.cat((mask.new_ones(count, 3), mask), 1)
    if stacks != "encoder":
        embeds["decoder_input_ids"] = torch.cat(
            (prompt[3:].expand(count, -1, -1), embeds["decoder_input_ids"]), 1
        )
    right = plain(
        inputs_embeds=embeds["input_ids"],
        decoder_inputs_embeds=embeds["decoder_input_ids"],
        attention_mask=mask,
    ).logits
    got = model(**fed).logits
    assert_close(got, right[:, -5:])
    (found,) = torch.autograd.grad(got.square().sum(), [prompt])
    halves = [half.any().item() for half in (found[:3], found[3:])]
    assert halves == [stacks != "decoder", stacks != "encoder"]


def test_t5_has_its_words_around_the_encoders_input():
    method = Prompt(init="template", text="5 7 {text} 9", tokenizer=Numbers(), place="inside")
    model, plain, fed = pefast.attach(build("t5"), method), build("t5"), inputs("t5", rows=1)
    ids = fed["input_ids"][0]
    whole = torch.cat((ids[:1], torch.tensor([5, 7]), ids[1:-1], torch.tensor([9]), ids[-1:]))[None]
    right = logits(plain, input_ids=whole, decoder_input_ids=fed["decoder_input_ids"])
    assert_close(logits(model, **fed), right)


def test_an_encoder_alone_gives_the_states_of_its_tokens():
    model, fed = transformers.T5EncoderModel(build("t5").config).eval(), inputs("t5")
    plain = copy.deepcopy(model)
    stir(pefast.attach(model, Prompt(tokens=2)))
    vectors, fed = model.prompts["default"].embeddings, {"input_ids": fed["input_ids"]}
    both = torch.cat((vectors.expand(3, -1, -1), plain.get_input_embeddings()(fed["input_ids"])), 1)
    assert_close(model(**fed).last_hidden_state, plain(inputs_embeds=both).last_hidden_state[:, 2:])


def test_other_models_with_two_stacks_are_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    model = transformers.BartModel(transformers.BartConfig(**sizes, **heads, pad_token_id=0))
    assert_refused(lambda: pefast.attach(model, Prompt()), "Prompt: BartModel", "t5, mt5")


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_and_spans_stay_with_their_tokens(head, side):
    torch.manual_seed(1)
    config = build("bert").config
    config.num_labels = 2
    model = getattr(transformers, f"BertFor{head}")(config).eval()
    plain, fed = copy.deepcopy(model), batch("bert", side)
    pefast.attach(model, Prompt(tokens=3), "default", head=False)
    prompt = model.bert.prompts["default"].embeddings.detach()
    if head == "TokenClassification":
        labels = torch.where(fed["attention_mask"].bool(), fed["input_ids"] % 2, -100)
        asked = {"labels": labels}
    else:
        asked = {
            "start_positions": torch.tensor([0, 4, 4, 8, 2, 3]),
            "end_positions": torch.tensor([1, 4, 5, 8, 8, 3]),
        }
    out = model(**fed, **asked)
    scores = []
    for ids, mask in zip(fed["input_ids"], fed["attention_mask"].bool(), strict=True):
        # positions are those that the whole row, with its padding, has
        places = torch.cat((torch.arange(3) + mask.long().argmax(), torch.arange(9)[mask] + 3))[None]
        states = by_hand(plain, prompt, ids[mask], prompt[:0], position_ids=places)
        whole = torch.full((9, 2), torch.nan)
        whole[mask] = (plain.classifier if head == "TokenClassification" else plain.qa_outputs)(states[3:])
        scores.append(whole)
    right = torch.stack(scores)
    real = fed["attention_mask"].bool()
    if head == "TokenClassification":
        assert_close(out.logits[real], right[real])
        assert_close(out.loss.detach(), F.cross_entropy(right[real], labels[real]).detach())
    else:
        got = torch.stack((out.start_logits, out.end_logits), -1)
        assert_close(got[real], right[real])
        losses = [F.cross_entropy(got[..., i], asked[key]) for i, key in enumerate(asked)]
        assert_close(out.loss.detach(), (sum(losses) / 2).detach())


@pytest.mark.parametrize("name", list(SET))
def test_left_padded_gpt2_is_unpadded_gpt2(name):
    model, fed = with_all("gpt2"), inputs("gpt2", rows=1)
    pefast.activate(model, name)
    padded = {key: F.pad(value, (4, 0)) for key, value in fed.items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_close(logits(model, **padded)[:, 4:], logits(model, **fed))


def test_roberta_counts_its_positions_from_behind_the_padding():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    torch.manual_seed(1)
    config = transformers.RobertaConfig(**sizes, vocab_size=96, max_position_embeddings=30, pad_token_id=1)
    base = transformers.RobertaForTokenClassification(config).eval()
    model, fed = with_all("", copy.deepcopy(base)), batch("bert", "none")
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
    model, fed = with_all(family).train(), batch(family, "left")
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
    model, fed = with_all(family).train(), batch(family, "right")
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
