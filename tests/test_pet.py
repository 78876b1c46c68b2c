"""Templates and verbalisers: what a model puts in the template's place, against a computation by hand."""

import functools

import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional as F

import pefast
from pefast.tasks.pet import NOTHING, Pet
from pefast.tasks.pet_template import Template, Verbalizer
from tests.models import Numbers, assert_close, assert_refused, stir, trained

WORDS = "great good awful poor it was the film a plot of very so . , : sport news n / topic about and".split()
TEXTS = ["the film was so so .", "a great plot", "awful , awful , very poor film", "news"]
PATTERN = "{text_a} It was {mask}."
LABELS = {"bad": ["awful", "poor"], "good": ["great", "very good", "good"]}
# weights large enough that a prompt moves the answer
SIZES = {
    "initializer_range": 0.3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}


@functools.cache
def pieces():
    """Token 0 is a word of the verbaliser, as it may be."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*WORDS, *special, "##ly", "##s"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer()
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, **dict(zip(names, special, strict=True))
    )


@functools.cache
def bytes_of():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    model.train_from_iterator([" ".join([*WORDS, "very good", "It was great"])] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<s>")


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, vocab_size=len(pieces()), max_position_embeddings=24)
    return transformers.BertForMaskedLM(config).eval(), pieces()


def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, vocab_size=310, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval(), bytes_of()


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=310, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval(), bytes_of()


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}
every_model = pytest.mark.parametrize("name", list(MODELS))


def by_hand(model, tokenizer, text: str, word: str) -> torch.Tensor:
    """log p of one word in the place of PATTERN's mask, as a person would write it."""
    if tokenizer.mask_token:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = f"{text} It was {' '.join(['[MASK]'] * len(ids))}."
        row = torch.tensor(tokenizer(whole)["input_ids"])
        at = (row == tokenizer.mask_token_id).nonzero()[-len(ids) :, 0]
        return model(input_ids=row[None]).logits[0, at].log_softmax(-1)[range(len(ids)), ids].sum()
    start = tokenizer(f"{text} It was")["input_ids"]
    whole = torch.tensor(tokenizer(f"{text} It was {word}")["input_ids"])
    assert whole[: len(start)].tolist() == start
    found = model(input_ids=whole[None]).logits[0].log_softmax(-1)
    places = range(len(start) - 1, len(whole) - 1)
    return found[places, whole[len(start) :]].sum()


@every_model
def test_logits_are_the_mean_probability_of_each_labels_words(name):
    model, tokenizer = MODELS[name]()
    pet = Pet(model, tokenizer, PATTERN, LABELS)
    right = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([by_hand(model, tokenizer, text, word).exp() for word in words]).mean()
                    for words in LABELS.values()
                ]
            ).log()
            for text in TEXTS
        ]
    )
    assert_close(pet.logits(TEXTS), right)
    # in batches of another make-up, and back in order
    assert_close(pet.predict(TEXTS, batch=2), right)
    assert not pet.predict(TEXTS).requires_grad and not pet.training


def test_words_have_several_tokens_and_token_zero():
    model, tokenizer = bert()
    pet = Pet(model, tokenizer, PATTERN, LABELS)
    assert pet.words == [[2], [3], [0], [11, 1], [1]]
    words = Pet(*llama(), PATTERN, LABELS).words
    assert any(len(word) > 1 for word in words)
    # as they follow a space, not as they begin a text
    assert bytes_of().decode(words[0]) == " awful"


@every_model
def test_calibration_takes_the_words_prior_away(name):
    model, tokenizer = MODELS[name]()
    pet = Pet(model, tokenizer, PATTERN, {"bad": ["awful"], "good": ["very good"]})
    plain = pet.predict(TEXTS)
    shares = [
        torch.stack([by_hand(model, tokenizer, text, word).exp() for text in NOTHING]).mean()
        for word in ("awful", "very good")
    ]
    assert_close(pet.calibrate(), torch.stack(shares).log())
    assert_close(pet.predict(TEXTS), plain - torch.stack(shares).log())
    # over rows without labels: their own average says nothing any more
    pet.calibrate(TEXTS)
    assert_close(pet.predict(TEXTS).exp().mean(0), torch.ones(2))


def test_a_pair_of_texts_and_a_mask_between_them():
    model, tokenizer = bert()
    pet = Pet(model, tokenizer, "{text_a}: {mask}, {text_b}", {"yes": "good", "no": "poor"})
    row = tokenizer("the film: [MASK], a plot", return_tensors="pt")["input_ids"]
    at = row[0].tolist().index(tokenizer.mask_token_id)
    right = model(input_ids=row).logits[0, at].log_softmax(-1)[[1, 3]]
    assert_close(pet.logits([("the film", "a plot")])[0], right)


@every_model
def test_a_long_text_is_cut_and_the_template_is_not(name):
    model, tokenizer = MODELS[name]()
    pet = Pet(model, tokenizer, "so: {text_a} It was {mask}.", LABELS, max_length=20)
    (row,) = pet.encode(["the film was a plot of news , " * 9])
    more = max(map(len, pet.words)) - 1
    assert len(row["input_ids"]) == 20 - more
    text = tokenizer.decode(row["input_ids"])
    end = "it was [MASK]. [SEP]" if name == "bert" else "It was"
    assert text.replace(" .", ".").endswith(end) and "so" in text[:9] and "the film" in text
    model_length = Pet(model, tokenizer, PATTERN, LABELS).encode(["film " * 99])[0]
    assert len(model_length["input_ids"]) == model.config.max_position_embeddings - more
    assert pet.predict(["film " * 99]).isfinite().all()


def test_a_prompt_leaves_less_room():
    model, tokenizer = llama()
    pefast.attach(model, pefast.Prompt(tokens=5))
    pet = Pet(model, tokenizer, PATTERN, {"bad": "poor", "good": "great"})
    room = len(pet.encode(["film " * 99])[0]["input_ids"])
    assert room == 64 - 5 - (max(map(len, pet.words)) - 1)


WORDS_AROUND = pefast.Prompt(init="template", text="5 7 {text} 9", tokenizer=Numbers())


@pytest.mark.parametrize(
    "method",
    [
        pefast.Prompt(tokens=4),
        WORDS_AROUND,
        [pefast.LoRA(rank=4), pefast.Prompt(tokens=2, place="after_first")],
    ],
    ids=["prompt", "template", "with lora"],
)
@every_model
def test_it_trains_with_any_method(name, method):
    model, tokenizer = MODELS[name]()
    stir(pefast.attach(model, method))
    pet = Pet(model, tokenizer, PATTERN, LABELS)
    labels = torch.tensor([0, 1, 0, 1])
    # three weights have further to go than vectors
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.3 if method is WORDS_AROUND else 0.05)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(pet.logits(TEXTS), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.any() for parameter in trained(model).values())
    assert losses[-1] < 0.9 * losses[0]
    # a batch is its rows, each alone: padding changes nothing
    alone = torch.cat([pet.logits([text]) for text in TEXTS])
    assert_close(pet.logits(TEXTS), alone)


def test_words_of_a_prompt_behind_the_input_stand_before_the_answer():
    model, tokenizer = llama()
    plain = llama()[0]
    pefast.attach(model, pefast.Prompt(init="template", text="5 7 {text} 9", tokenizer=Numbers()))
    pet = Pet(model, tokenizer, PATTERN, {"bad": ["awful"], "good": ["very good"]})
    start = [5, 7, *tokenizer("news It was")["input_ids"], 9]
    for score, word in zip(pet.logits(["news"])[0], pet.words, strict=True):
        whole = torch.tensor([start + word])
        found = plain(input_ids=whole).logits[0].log_softmax(-1)
        assert_close(score, found[range(len(start) - 1, whole.shape[1] - 1), word].sum())


def test_the_trainer_trains_it(tmp_path):
    model, tokenizer = llama()
    pefast.attach(model, pefast.LoRA(rank=4))
    pet = Pet(model, tokenizer, PATTERN, LABELS)
    rows = [{"text": text, "labels": label} for text, label in zip(TEXTS, ["bad", "good"] * 2, strict=True)]
    before = F.cross_entropy(pet.predict(TEXTS), torch.tensor([0, 1, 0, 1]))
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=0.02,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(pet, arguments, data_collator=pet.collate, train_dataset=rows).train()
    assert F.cross_entropy(pet.predict(TEXTS), torch.tensor([0, 1, 0, 1])) < 0.9 * before


def test_a_model_that_fails_keeps_no_hook():
    model, tokenizer = llama()
    pet, count = Pet(model, tokenizer, PATTERN, LABELS), len(model.model._forward_hooks)
    broken = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pet.logits(TEXTS)
    broken.remove()
    assert len(model.model._forward_hooks) == count
    # and the model itself has its logits of every token
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 310)


TEMPLATES = {
    "no mask": ("{text_a} It was", ["0 places for {mask}"]),
    "two masks": ("{text_a} {mask} {mask}", ["2 places for {mask}"]),
    "no text": ("It was {mask}", ["0 places for {text_a}"]),
    "one text twice": ("{text_a} {text_a} {mask}", ["2 places for {text_a}"]),
    "another slot": ("{text_a} {label} {mask}", ["{label}", "text_a, text_b and mask"]),
    "an open brace": ("{text_a} {mask", ["cannot be read"]),
}


@pytest.mark.parametrize("case", list(TEMPLATES))
def test_templates_that_cannot_be(case):
    text, parts = TEMPLATES[case]
    assert_refused(lambda: Template(text), "Template: ", *parts)


VERBALIZERS = {
    "a label without words": ({"a": ["x"], "b": []}, ["'b' has no words"]),
    "one label": ({"a": ["x"]}, ["1 labels"]),
    "an empty word": ({"a": ["x"], "b": [" "]}, ["'b' has the word ' '"]),
    "no text": ({"a": ["x"], "b": [3]}, ["the word 3"]),
    "one word for two": ({"a": ["x"], "b": ["x"]}, ["'x' stands for 'a' and 'b'"]),
}


@pytest.mark.parametrize("case", list(VERBALIZERS))
def test_verbalizers_that_cannot_be(case):
    words, parts = VERBALIZERS[case]
    assert_refused(lambda: Verbalizer(words), "Verbalizer: ", *parts)


PETS = {
    "a word that is unknown": (bert, PATTERN, {"a": "great", "b": "zebra"}, ["Verbalizer: ", "'zebra'"]),
    "a text behind the mask": (llama, "{text_a} {mask} {text_b}", LABELS, ["Pet: {text_b}", "causal"]),
}


@pytest.mark.parametrize("case", list(PETS))
def test_pets_that_cannot_be(case):
    make, template, words, parts = PETS[case]
    assert_refused(lambda: Pet(*make(), template, words), *parts)


def test_other_bad_input():
    model, tokenizer = bert()
    other = transformers.BertForSequenceClassification(model.config)
    assert_refused(
        lambda: Pet(other, tokenizer, PATTERN, LABELS), "Pet: BertForSequenceClassification", "MaskedLM"
    )
    assert_refused(lambda: Pet(model, bytes_of(), PATTERN, LABELS), "Pet: ", "no mask token")
    pet = Pet(model, tokenizer, PATTERN, LABELS)
    assert_refused(lambda: pet.logits([("a", "b")]), "Pet: a row has 2 texts and the template 1")
    assert_refused(lambda: pet.collate([{"text": "news", "labels": "ugly"}]), "Pet: ", "'ugly'", "bad, good")
    tight = Pet(model, tokenizer, "so " * 20 + PATTERN, LABELS, max_length=12)
    assert_refused(lambda: tight.encode(["news"]), "Template: ", "room for 11")
