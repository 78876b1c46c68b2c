"""Prefix: where its keys and values stand in each family, caches and checkpoints, and what it borrows."""

import contextlib

import pytest
import torch
import transformers

import pefast
from pefast.architectures import backbone
from pefast.layers import attention
from tests.models import (
    FAMILIES,
    Numbers,
    assert_as_it_was,
    assert_close,
    assert_refused,
    build,
    inputs,
    logits,
    snapshot,
    step,
    stir,
    trained,
)

Prefix, LoRA = pefast.Prefix, pefast.LoRA
every_family = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def with_prefixes(family: str, **lengths: int):
    """A model with a prefix of that many tokens for each name, all stirred, the last one active."""
    model = build(family)
    for seed, (name, tokens) in enumerate(lengths.items()):
        stir(pefast.attach(model, Prefix(tokens=tokens), name), seed)
    return model


def implementation(model) -> set[str]:
    """What computes attention in each part of a model."""
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")}


def put_before(linear, values):
    """From here on a projection's first tokens [V, G·D] are `values`, whatever it is given."""

    def hook(module, args, output):
        return torch.cat((values.expand(output.shape[0], -1, -1), output[:, values.shape[0] :]), 1)

    return linear.register_forward_hook(hook)


@pytest.mark.parametrize("kinds", [("encoder",), ("cross",), ("decoder", "cross"), None], ids=str)
def test_in_t5_it_is_tokens_before_the_first_whose_keys_and_values_are_its_own(kinds):
    model, plain, fed = build("t5"), build("t5"), inputs("t5")
    stir(pefast.attach(model, Prefix(tokens=3, attentions=kinds)))
    right = logits(model, **fed)
    tokens = backbone(model).prefixes["default"]
    ahead = {"encoder": kinds is None or "encoder" in kinds, "decoder": kinds is None or "decoder" in kinds}
    for path in tokens.sizes.pairs:
        for projection, part in zip("kv", tokens.of(path), strict=True):  # [G, V, D]
            linear = plain.get_submodule(f"{path}.{projection}")
            put_before(linear, part.detach().transpose(0, 1).flatten(1))
    encoder = {"input_ids": fed["input_ids"], "attention_mask": fed["attention_mask"]}
    if ahead["encoder"]:
        encoder = {key: torch.nn.functional.pad(value, (3, 0), value=1) for key, value in encoder.items()}
    with torch.no_grad():
        states = plain.encoder(**encoder).last_hidden_state[:, 3 if ahead["encoder"] else 0 :]
    mask, ids = fed["attention_mask"], fed["decoder_input_ids"]
    if kinds is None or "cross" in kinds:
        states = torch.nn.functional.pad(states, (0, 0, 3, 0))
        mask = torch.nn.functional.pad(mask, (3, 0), value=1)
    if ahead["decoder"]:
        ids = torch.nn.functional.pad(ids, (3, 0), value=1)
    got = logits(plain, encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=ids)
    assert_close(got[:, -5:], right)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_text_a_causal_model_starts_as_if_it_had_read_it(family):
    model, fed = build(family).train(), inputs(family, rows=2)
    before = snapshot(model)
    del fed["attention_mask"]
    model.eval()
    read = torch.cat((torch.tensor([[7, 9, 11, 7]]).expand(2, -1), fed["input_ids"]), 1)
    right = logits(model, input_ids=read)[:, 4:]
    stir(pefast.attach(model, LoRA(rank=2), "other"))
    pefast.attach(model, Prefix(tokens=4, init="text", text="7 9 11", tokenizer=Numbers()))
    assert_close(logits(model, **fed), right)
    pefast.detach(model.train())
    assert_as_it_was(model, before)


@every_family
def test_from_the_vocabulary_it_starts_with_keys_and_values_of_the_model(family):
    model = build(family)
    before = snapshot(model)
    drawn = [
        backbone(pefast.attach(model, Prefix(tokens=6, init=init), init)).prefixes[init].embeddings.detach()
        for init in ("vocabulary", "random")
    ]
    # as wide as the model's own, and another word for each token
    widths = [values.view(6, -1, 2, 8).std((0, 1, 3)) for values in drawn]
    assert (widths[0] < widths[1] / 2).all() or family == "t5"
    assert all(not torch.equal(*drawn[0][[i, i + 1]]) for i in range(5))
    assert_as_it_was(pefast.detach(model), before)


@every_family
@pytest.mark.parametrize("was", ["sdpa", "eager"])
def test_attention_is_borrowed_while_a_prefix_is_active(family, was):
    model, fed = build(family), inputs(family)
    model.set_attn_implementation(was)
    right = logits(model, **fed)
    stir(pefast.attach(model, Prefix(tokens=3)))
    assert implementation(model) == {attention.NAME}
    got = logits(model, **fed)
    pefast.activate(model, None)
    assert implementation(model) == {was} and torch.equal(logits(model, **fed), right)
    with pefast.route(model, ["default"] * 3):
        assert implementation(model) == {attention.NAME}
        assert_close(logits(model, **fed), got)
    assert implementation(model) == {was}
    pefast.activate(model, "default")
    pefast.detach(model)
    assert implementation(model) == {was} and torch.equal(logits(model, **fed), right)


def test_attention_that_is_accelerated_stays_so():
    model = build("bert")
    pefast.attach(model, Prefix(tokens=3))
    pefast.accelerate(model)
    assert implementation(pefast.detach(model)) == {attention.NAME}
    pefast.attach(model, Prefix(tokens=3))
    pefast.accelerate(model, attention=False)
    assert implementation(model) == {attention.NAME}
    assert implementation(pefast.detach(model)) == {"sdpa"}


def test_attention_that_was_changed_under_a_prefix_says_so():
    model = pefast.attach(build("llama"), Prefix(tokens=3))
    model.set_attn_implementation("sdpa")
    assert_refused(lambda: logits(model, **inputs("llama")), "Prefix: ", "activate", error=RuntimeError)


@every_family
def test_the_op_is_given_the_prefix_and_no_copy_of_the_keys(family, monkeypatch):
    model, seen = with_prefixes(family, one=3), []

    def spy(query, key, value, *rest):
        seen.append((key.shape[2], rest[0].shape))
        return real(query, key, value, *rest)

    real = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", spy)
    logits(model, **inputs(family))
    # T5's scores have a bias, which is sdpa's
    heads = {"llama": 2}.get(family, 4)
    assert seen == [] if family == "t5" else [(9, (heads, 3, 8))] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("cache", ["static", "dynamic", None])
def test_generation_with_every_cache(family, cache):
    model, fed = with_prefixes(family, one=3), inputs(family)
    fed = {key: fed[key].flip(1) for key in ("input_ids", "attention_mask")}
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    options |= {**GREEDY, "output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    got = model.generate(**fed, **options)
    # the same without generate: the whole sequence at once, the prefix before it
    start = fed["input_ids"].shape[1] if family != "t5" else 1
    if family == "t5":
        whole = {**fed, "decoder_input_ids": got.sequences}
    else:
        mask = torch.cat((fed["attention_mask"], torch.ones(3, 6, dtype=torch.long)), 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        whole = {"input_ids": got.sequences, "attention_mask": mask, "position_ids": places}
    right = logits(model, **whole)[:, start - 1 : -1]
    assert_close(torch.stack(got.logits, 1), right)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("hidden", [False, 4], ids=["plain", "network"])
@every_family
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing(family, hidden, reentrant):
    model = stir(pefast.attach(build(family), Prefix(tokens=3, reparameterize=hidden))).train()
    one, other = inputs(family), inputs(family, length=6)
    right = [step(model, fed)[1] for fed in (one, other)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    # two forwards before one backward: what is done again is what each of them did
    sum(model(**fed).logits.square().mean() for fed in (one, other)).backward()
    for name, parameter in trained(model).items():
        assert_close(parameter.grad, right[0][name] + right[1][name])


def test_inputs_may_be_as_long_as_without_a_prefix_that_has_no_position():
    for family in ("bert", "gpt2"):
        model = pefast.attach(build(family), Prefix(tokens=5, positions="none"))
        assert logits(model, **inputs(family, length=48)).isfinite().all()
        pefast.detach(model)
        pefast.attach(model, Prefix(tokens=5))
        assert_refused(lambda: logits(model, **inputs(family, length=44)), "Prefix: 49 positions", "48")  # noqa: B023
        assert logits(model, **inputs(family, length=43)).isfinite().all()


REFUSED = {
    "no tokens": ("llama", Prefix(tokens=0), ["Prefix: tokens is 0"]),
    "half a token": ("llama", Prefix(tokens=0.5), ["tokens is 0.5"]),
    "a network of size -1": ("llama", Prefix(reparameterize=-1), ["reparameterize is -1"]),
    "positions": ("llama", Prefix(positions="moved"), ["'moved'", "shifted", "none"]),
    "start": ("llama", Prefix(init="zero"), ["init is 'zero'", "random", "text"]),
    "words and a network": (
        "llama",
        Prefix(init="vocabulary", reparameterize=True),
        ["'vocabulary'", "network"],
    ),
    "text that is none": ("llama", Prefix(init="text"), ["no text"]),
    "text and a network": ("llama", Prefix(init="text", text="5", reparameterize=4), ["network"]),
    "kind of attention": ("t5", Prefix(attentions="self"), ["'self'", "encoder, decoder, cross"]),
    "no kind of attention": ("t5", Prefix(attentions=()), ["encoder, decoder, cross"]),
    "attention that is not there": ("bert", Prefix(attentions=["cross"]), ["'cross'", "it has encoder"]),
    "longer than BERT's positions": ("bert", Prefix(tokens=48), ["tokens is 48", "48 positions"]),
    "longer than GPT-2's positions": ("gpt2", Prefix(tokens=60), ["tokens is 60", "48 positions"]),
    "sharing with nobody": ("bert", Prefix(share="other"), ["share is 'other'"]),
    "two of them": ("bert", [Prefix(tokens=2), Prefix(tokens=2)], ["one Prefix for each adapter"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_one_sentence_and_nothing_changes(case):
    family, method, parts = REFUSED[case]
    model = build(family)
    before, was = snapshot(model), implementation(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)
    assert implementation(model) == was


def test_models_that_it_does_not_know():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert_refused(
        lambda: pefast.attach(model, Prefix()), "flash_attention_2", "set_attn_implementation('sdpa')"
    )
    assert implementation(model) == {"flash_attention_2"}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, vocab_size=50))
    assert_refused(lambda: pefast.attach(clip, Prefix()), "Prefix: ", "'clip_text_model'", "bert")
    capped = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**sizes, num_key_value_heads=4, head_dim=8, vocab_size=50)
    )
    assert_refused(lambda: pefast.attach(capped, Prefix()), "Prefix: Gemma2ForCausalLM", "caps the scores")
    model = pefast.attach(build("llama"), Prefix(tokens=2), "one")
    before = snapshot(model)
    assert_refused(
        lambda: pefast.attach(model, Prefix(positions="none"), "two"), "one for all would be right"
    )
    assert_as_it_was(model, before)


def test_a_file_of_another_size_is_refused(tmp_path):
    folder = pefast.save(stir(pefast.attach(build("gpt2"), Prefix(tokens=3))), tmp_path / "prefix")
    model = build("llama")
    before = snapshot(model)
    assert_refused(
        lambda: pefast.load(model, folder), "does not fit", "prompt_embeddings", "[3, 128]", "[3, 64]"
    )
    assert_as_it_was(model, before)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "hidden"), [("bert", 4), ("gpt2", 0), ("llama", 0), ("t5", 0)])
def test_it_compiles_in_one_graph_routed_or_not(family, hidden):
    torch.compiler.reset()
    model, fed = pefast.attach(build(family), Prefix(tokens=3, reparameterize=hidden)), inputs(family)
    stir(pefast.attach(model, Prefix(tokens=2), "other"))
    stir(pefast.activate(model, "default")).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (None, ["default", None, "other"]):
        with pefast.route(model, names) if names else contextlib.nullcontext():
            _, right = step(model, fed)
            found = torch.autograd.grad(
                compiled(**fed).logits.square().mean(), [trained(model)[name] for name in right]
            )
        for gradient, each in zip(found, right.values(), strict=True):
            assert_close(gradient, each)


def test_explain_says_what_is_before_the_keys():
    model = pefast.attach(build("llama"), [LoRA(rank=2), Prefix(tokens=3)])
    assert "attention through pefast, behind a prefix of 3 tokens: " in pefast.explain(model)
    with pefast.backend("eager"):
        assert "a prefix of 3 tokens: eager" in pefast.explain(model)
    assert "prefix" not in pefast.explain(pefast.activate(model, None))
    # T5's scores have a bias
    assert "a prefix of 2 tokens: sdpa" in pefast.explain(pefast.attach(build("t5"), Prefix(tokens=2)))
