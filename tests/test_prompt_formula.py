"""Prompts against their formula, computed here by hand: templates, T5, labels and spans."""

import copy

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import pefast
from pefast.architectures import backbone
from tests.models import Numbers, assert_close, assert_refused, build, inputs, logits, padded, stir

Prompt = pefast.Prompt
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


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
    plain, fed = build("t5"), padded("t5", "right")
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
    plain, fed = copy.deepcopy(model), padded("bert", side)
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
