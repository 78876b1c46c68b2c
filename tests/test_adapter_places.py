"""Where bottleneck adapters stand: blocks, single layers, any module by its name, in models of any family."""

import pytest
import torch
import transformers

import pefast
from pefast.methods.places import hosts
from tests.models import (
    INNER,
    WIDTH,
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

Adapter = pefast.Adapter


def sizes(model) -> dict[str, int]:
    """The width of each bottleneck, by the path of its host."""
    return {path: host.deltas["default"]["adapter"].a.shape[0] for path, host in hosts(model)}


def clip():
    """A model of a family whose blocks are not known."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.CLIPTextConfig(**sizes, vocab_size=96, max_position_embeddings=20)
    return transformers.CLIPTextModel(config).eval()


def test_layers_and_sizes_are_chosen_block_by_block():
    model = pefast.attach(build("llama"), Adapter(size=5, sizes={1: 3}, around="feedforward"))
    assert sizes(model) == {"model.layers.0.mlp.down_proj": 5, "model.layers.1.mlp.down_proj": 3}
    model = pefast.attach(build("bert"), Adapter(reduction=4, layers=[1]))
    assert set(sizes(model).values()) == {WIDTH // 4}
    assert all(".layer.1." in path for path in sizes(model)) and len(sizes(model)) == 2
    model = pefast.attach(build("t5"), Adapter(size=2, around=["cross", "attention"]))
    assert len(sizes(model)) == 6


def test_an_unknown_family_says_how_to_name_modules_and_then_takes_the_names(tmp_path):
    text = assert_refused(lambda: pefast.attach(clip(), Adapter()), "'clip_text_model'", "modules=", "llama")
    named = text.rsplit("such as ", 1)[1].split(", ")
    assert "mlp" in named and "self_attn" in named
    torch.manual_seed(0)
    model, ids = clip(), torch.randint(3, 90, (2, 7))
    base = model(input_ids=ids).last_hidden_state
    stir(
        pefast.attach(
            model, [Adapter(size=4, modules=["mlp"]), Adapter(size=3, modules=["fc1"], parallel=False)]
        )
    )
    got = model(input_ids=ids).last_hidden_state
    assert not torch.allclose(got, base, atol=1e-3)
    got.square().mean().backward()
    assert all(parameter.grad.any() for parameter in trained(model).values())
    torch.manual_seed(0)
    fresh = pefast.load(clip(), pefast.save(model, tmp_path / "clip"))
    assert torch.equal(fresh(input_ids=ids).last_hidden_state, got)
    pefast.detach(model)
    assert torch.equal(model(input_ids=ids).last_hidden_state, base)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "serial"])
def test_around_a_module_is_the_formula(parallel):
    """y + scale · (σ(x aᵀ + c) bᵀ + d), with x what the module reads, or y."""
    model, fed = build("llama"), inputs("llama")
    method = Adapter(size=4, modules=["layers.0.mlp", "layers.0.mlp.up_proj"], parallel=parallel, scale=1.5)
    stir(pefast.attach(model, method))
    seen = {}
    for path in ("model.layers.0.mlp", "model.layers.0.mlp.up_proj"):
        host = model.get_submodule(path)
        host.register_forward_hook(lambda m, args, y, path=path: seen.update({path: (args[0], y, m)}))
    logits(model, **fed)
    bare = build("llama")
    for path, (x, y, host) in seen.items():
        delta = host.deltas["default"]["adapter"]
        own = bare.get_submodule(path)
        if path.endswith("mlp"):
            # what the module gives with the adapter inside it
            inner = seen["model.layers.0.mlp.up_proj"][1]
            own = lambda x, mlp=own, inner=inner: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * inner)  # noqa: E731
        with torch.no_grad():
            frozen = own(x)
            read = x if parallel else frozen
            h = torch.relu(read @ delta.a.t() + delta.c)
            assert_close(y, frozen + 1.5 * (h @ delta.b.t() + delta.d))
    widths = {path: tuple(host.deltas["default"]["adapter"].a.shape) for path, host in hosts(model)}
    assert widths["model.layers.0.mlp.up_proj"] == (4, WIDTH if parallel else INNER)


def test_a_module_that_several_rows_share_gives_each_its_own():
    model, fed = build("bert"), inputs("bert", rows=3)
    for seed, (name, parallel) in enumerate({"one": True, "two": False}.items()):
        method = Adapter(size=3, modules=["attention", "intermediate.dense"], parallel=parallel, norm="both")
        stir(pefast.attach(model, method, name), seed)
    names = ["two", "one", None]
    pefast.activate(model, ["one", "two"])
    with pefast.route(model, names):
        got, (_, gradients) = logits(model, **fed), step(model, fed)
    for row, name in enumerate(names):
        pefast.activate(model, name)
        assert_close(got[row], logits(model, **fed)[row])
        if name:
            _, right = step(model, {key: value[row : row + 1] for key, value in fed.items()})
            for parameter, gradient in right.items():
                assert_close(gradients[parameter], gradient / 3, 1e-4)


REFUSED = {
    "no such module": (Adapter(modules=["mlpp"]), ["Adapter: ", "'mlpp'", "names look like", "mlp"]),
    "an expression that is none": (Adapter(modules="(mlp"), ["'(mlp'", "regular expression"]),
    "reads": (Adapter(reads="residual"), ["reads is 'residual'", "stream"]),
    "the stream of a module": (Adapter(reads="stream", modules=["mlp"]), ["modules=", "reads='sublayer'"]),
    "norm": (Adapter(norm="before"), ["norm is 'before'", "'in'", "'both'"]),
    "a size of one block": (Adapter(sizes={0: 0}), ["size is 0"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused(case):
    method, parts = REFUSED[case]
    model = build("llama")
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)


def test_the_stream_of_a_family_with_norms_behind_its_sublayers_is_not_guessed():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=96)
    model = transformers.Gemma2ForCausalLM(config)
    assert_refused(
        lambda: pefast.attach(model, Adapter(reads="stream")), "Gemma2ForCausalLM", "reads='sublayer'"
    )
    pefast.attach(model, Adapter(size=2))
