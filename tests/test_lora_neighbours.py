"""DoRA, (IA)³, LoRA+ and their kin: the numbers and the files of Hugging Face PEFT."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import pefast
from pefast.layers import hosts
from pefast.layers.gain import Directed, multiplied
from pefast.model import parameters_of
from pefast.native import delta_linear_fp32 as fp32
from pefast.testing import assert_no_worse
from tests.models import (
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

# PEFT warns that it flips fan_in_fan_out for Conv1D, and that it does not know pefast's own config keys
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 9, "target_modules": "all-linear", **settings})


# what PEFT makes, and the same as pefast's method
CASES = {
    "dora, bert": ("bert", lora(use_dora=True, task_type="SEQ_CLS"), pefast.LoRA(4, 9, dora=True)),
    "dora, llama": ("llama", lora(use_dora=True, use_rslora=True), pefast.LoRA(4, 9, dora=True, rslora=True)),
    "dora, gpt2": ("gpt2", lora(use_dora=True, rank_pattern={"c_fc": 2}), pefast.LoRA(4, 9, dora=True)),
    "dora, t5": ("t5", lora(use_dora=True), pefast.LoRA(4, 9, dora=True)),
    # a bias of keys has no gradient but rounding
    "bias, bert": (
        "bert",
        lora(lora_bias=True, target_modules=["query", "dense"]),
        pefast.LoRA(4, 9, bias=True),
    ),
    "bias, gpt2": ("gpt2", lora(lora_bias=True), pefast.LoRA(4, 9, bias=True)),
    "pissa, bert": (
        "bert",
        lora(init_lora_weights="pissa", task_type="SEQ_CLS", target_modules=["query", "dense"]),
        pefast.LoRA(4, 9, init="pissa"),
    ),
    "pissa, gpt2": ("gpt2", lora(init_lora_weights="pissa"), pefast.LoRA(4, 9, init="pissa")),
    "olora, llama": ("llama", lora(init_lora_weights="olora"), pefast.LoRA(4, 9, init="olora", rslora=True)),
    "olora, t5": ("t5", lora(init_lora_weights="olora"), pefast.LoRA(4, 9, init="olora")),
    "gaussian, llama": ("llama", lora(init_lora_weights="gaussian"), pefast.LoRA(4, 9)),
    "embedding, bert": (
        "bert",
        lora(target_modules=["word_embeddings", "query"]),
        pefast.LoRA(4, 9, targets=["word_embeddings", "query"]),
    ),
    "embedding, llama": (
        "llama",
        lora(target_modules=["embed_tokens"], init_lora_weights=True),
        pefast.LoRA(4, 9, targets=["embed_tokens"]),
    ),
    "ia3, bert": ("bert", peft.IA3Config(task_type="SEQ_CLS"), pefast.IA3()),
    "ia3, llama": ("llama", peft.IA3Config(), pefast.IA3()),
    "ia3, gpt2": ("gpt2", peft.IA3Config(), pefast.IA3()),
    "ia3, t5": ("t5", peft.IA3Config(), pefast.IA3()),
    "ia3, named": (
        "llama",
        peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
        pefast.IA3(targets=["q_proj", "up_proj"], feedforward=["up_proj"]),
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def by_peft(case: str):
    """PEFT's model of the case, moved away from its start, in eval mode."""
    family, config, _ = CASES[case]
    return family, stir(peft.get_peft_model(build(family), copy.deepcopy(config)).eval())


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@every_case
def test_files_and_numbers_are_those_of_peft(case, tmp_path):
    family, theirs = by_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    fed, right = inputs(family), logits(theirs, **inputs(family))
    assert not torch.allclose(right, logits(build(family), **fed), atol=1e-3)

    ours = pefast.load(build(family), tmp_path / "peft")
    assert_close(logits(ours, **fed), right, 2e-5)
    pefast.save(ours, tmp_path / "pefast")
    mine, peers = tensors(tmp_path / "pefast"), tensors(tmp_path / "peft")
    # PEFT writes the base model's own table beside a LoRA of it
    assert sorted(mine) == sorted(key for key in peers if not key.endswith(".base_layer.weight"))
    for key, value in mine.items():
        assert torch.equal(value, peers[key]), key
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "pefast").eval()
    assert_close(logits(again, **fed), right, 2e-5)


@every_case
def test_gradients_are_those_of_peft(case, tmp_path):
    family, theirs = by_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    ours, fed = pefast.load(build(family), tmp_path / "peft"), inputs(family)
    right = {
        name.replace(".default", "").replace(".modules_to_save", "").removesuffix(".weight"): gradient
        for name, gradient in step(theirs, fed)[1].items()
    }
    names = {id(parameter): name for name, parameter in trained(ours).items()}
    _, got = step(ours, fed)
    found = parameters_of(ours, "default")
    assert len(found) == len(right)
    for key, parameter in found.items():
        kind, key = key.split("/")
        key = (f"base_model.model.{key}" if kind == "head" else key).removesuffix(".weight")
        assert_close(got[names[id(parameter)]].flatten(), right[key].flatten(), 1e-4)


@every_case
def test_a_method_of_pefast_goes_to_peft(case, tmp_path):
    family, _, method = CASES[case]
    ours = stir(pefast.attach(build(family), method))
    folder, fed = pefast.save(ours, tmp_path / "pefast"), inputs(family)
    theirs = peft.PeftModel.from_pretrained(build(family), folder).eval()
    assert_close(logits(theirs, **fed), logits(ours, **fed), 2e-5)


@every_case
def test_merged_weights_are_those_of_peft(case, tmp_path):
    family, theirs = by_peft(case)
    theirs.save_pretrained(tmp_path / "peft")
    ours = pefast.load(build(family), tmp_path / "peft")
    if CASES[case][2].kind == "lora" and CASES[case][2].bias:
        assert_refused(lambda: pefast.merge(ours), "merge: lora cannot be added to a weight")
        return
    pefast.merge(ours)
    for name, value in theirs.merge_and_unload().state_dict().items():
        # the output embedding that shares a table keeps it here, and is changed with it in PEFT
        shared = case == "embedding, llama" and name == "lm_head.weight"
        if not shared and ".modules_to_save" not in name and not name.startswith("classifier"):
            assert_close(ours.state_dict()[name], value, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_norm_without_the_product_is_the_norm(dtype):
    weight = torch.randn(40, 24, dtype=torch.float64).to(dtype)
    delta = Directed(5, weight, scale=1.7, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    with torch.no_grad():
        delta.b.normal_()
    dense = (weight.double() + delta.delta_weight().double()).norm(dim=1)
    relative = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}[dtype]
    assert_close(delta.norm(weight).double(), dense, relative)
    # a weight that somebody wrote to has other lengths
    weight.mul_(2)
    dense = (weight.double() + delta.delta_weight().double()).norm(dim=1)
    assert_close(delta.norm(weight).double(), dense, relative)


def test_a_row_that_the_update_cancels_has_a_norm_near_zero_and_no_nan():
    weight = torch.randn(6, 4)
    delta = Directed(4, weight, scale=1.0)
    with torch.no_grad():
        delta.a.copy_(torch.eye(4))
        delta.b.copy_(-weight)
    assert delta.norm(weight).isfinite().all() and delta.gain(weight).isfinite().all()


def test_lora_and_factors_on_one_layer_are_one_formula():
    """(x wᵀ + LoRA + bias) ⊙ l, also merged."""
    linear = torch.nn.Linear(12, 10)
    model, x = torch.nn.Sequential(linear), torch.randn(3, 5, 12)
    w, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    pefast.attach(model, [pefast.LoRA(rank=3, dora=True), pefast.LoRA(rank=2), pefast.IA3(targets=["0"])])
    stir(model)
    dora, low, factors = (linear.deltas["default"][key] for key in ("lora", "lora_2", "ia3"))
    with torch.no_grad():
        own = w + dora.delta_weight()
        g = dora.m / own.norm(dim=1)
        right = ((x @ (own + low.delta_weight()).t()) * g + bias) * factors.l
        assert_close(model(x), right)
        assert_close(pefast.merge(model)(x), right)
    pefast.unmerge(model)
    assert torch.equal(linear.weight, w) and torch.equal(linear.bias, bias)


def test_rows_of_one_batch_differ_in_their_factors():
    model, fed = build("bert"), inputs("bert", rows=4)
    methods = {"dora": pefast.LoRA(4, dora=True), "ia3": pefast.IA3(), "lora": pefast.LoRA(2)}
    for seed, (name, method) in enumerate(methods.items()):
        stir(pefast.attach(model, method, name), seed)
    names = ["ia3", "dora", None, "lora"]
    with pefast.route(model, names):
        got = logits(model, **fed)
    for row, name in enumerate(names):
        pefast.activate(model, name)
        assert_close(got[row], logits(model, **fed)[row])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_at_the_weights_own_directions_and_as_the_base_model(init, dtype):
    model = build("llama").to(dtype)
    fed, right = inputs("llama"), logits(build("llama").to(dtype), **inputs("llama"))
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    pefast.attach(model, pefast.LoRA(rank=5, alpha=11, init=init))
    assert_close(logits(model, **fed), right, 1e-6 if dtype == torch.float32 else 2e-2)
    linear = model.model.layers[0].mlp.up_proj
    assert torch.equal(linear.weight, weight)
    delta = linear.deltas["default"]["lora"]
    got = (delta.scale * delta.b @ delta.a).detach()
    if init == "pissa":
        u, s, v_t = torch.linalg.svd(weight.float(), full_matrices=False)
        assert_close(got, (u[:, :5] * s[:5]) @ v_t[:5], 1e-4)
    else:
        q, r = torch.linalg.qr(weight.float())
        assert_close(got, delta.scale * q[:, :5] @ r[:5], 1e-4)


def test_a_start_is_averaged_and_routed_with_what_was_learnt():
    model, fed = build("bert"), inputs("bert", rows=2)
    for seed, (name, init) in enumerate({"one": "pissa", "two": "zero"}.items()):
        stir(pefast.attach(model, pefast.LoRA(rank=3, init=init), name), seed)
    with pefast.route(model, ["one", "two"]):
        got = logits(model, **fed)
    for row, name in enumerate(("one", "two")):
        pefast.activate(model, name)
        assert_close(got[row], logits(model, **fed)[row])
    pefast.activate(model, "one")
    right = logits(model, **fed)
    pefast.average(model, {"one": 1.0})
    assert_close(logits(model, **fed), right, 1e-4)


def test_words_of_a_routed_batch_have_their_own_tables():
    model, fed = build("llama"), inputs("llama", rows=3)
    for seed, name in enumerate(("one", "two")):
        stir(pefast.attach(model, pefast.LoRA(rank=3, targets=["embed_tokens"]), name), seed)
    names = ["two", None, "one"]
    with pefast.route(model, names):
        got = logits(model, **fed)
    for row, name in enumerate(names):
        pefast.activate(model, name)
        assert_close(got[row], logits(model, **fed)[row])
    pefast.activate(model, "two")
    right, table = logits(model, **fed), model.lm_head.weight
    pefast.merge(model)
    assert_close(logits(model, **fed), right)
    assert model.lm_head.weight is table and model.model.embed_tokens.weight is not table
    pefast.detach(model)
    assert model.model.embed_tokens.weight is table
    assert torch.equal(logits(model, **fed), logits(build("llama"), **fed))


def test_starts_and_tables_that_cannot_be():
    for method, part in (
        (pefast.LoRA(bias=True, dora=True), "bias=True"),
        (pefast.LoRA(init="random"), "init is 'random'"),
        (pefast.LoRA(init="pissa", dora=True), "not known together"),
        (pefast.LoRA(rank=33, init="pissa"), "no more than 32"),
        (pefast.LoRA(targets=["embed_tokens"], dora=True), "table of embeddings"),
    ):
        model = build("llama")
        before = snapshot(model)
        assert_refused(lambda model=model, method=method: pefast.attach(model, method), "LoRA: ", part)
        assert_as_it_was(model, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 7, 24), (2, 150, 24), (0, 24)], ids=str)
def test_factors_on_halves_are_rounded_once(shape, bias):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    g = torch.rand(24, generator=generator).requires_grad_()
    b = torch.randn(24, generator=generator).requires_grad_() if bias else None
    got = multiplied(y, [(g, None)], None, b)
    right = (y * g if b is None else y * g + b).bfloat16()
    assert torch.equal(got, right)
    dy, asked = torch.randn(shape, generator=generator).bfloat16(), [y, g] + ([b] if bias else [])
    for one, other in zip(
        torch.autograd.grad(got, asked, dy), torch.autograd.grad(right, asked, dy), strict=True
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2 if one is not y else 0, atol=1e-2)


@pytest.mark.slow
def test_all_of_them_compile_in_one_graph():
    torch.compiler.reset()
    methods = [
        pefast.LoRA(rank=3, dora=True),
        pefast.LoRA(rank=2, init="pissa"),
        pefast.LoRA(rank=2, targets=["word_embeddings"]),
        pefast.IA3(),
        pefast.Adapter(size=3, parallel=False, reads="stream", norm="both"),
        pefast.Adapter(size=2, modules=["attention"]),
    ]
    model, fed = stir(pefast.attach(build("bert"), methods)), inputs("bert")
    loss, gradients = step(model, fed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**fed).logits.float().square().mean()
    assert_close(got.detach(), loss)
    for found, right in zip(
        torch.autograd.grad(got, list(trained(model).values())), gradients.values(), strict=True
    ):
        assert_close(found, right, 1e-4)


@pytest.mark.skipif(not fp32.HERE, reason="needs AMX")
def test_ia3s_gain_is_inside_an_fp32_product(monkeypatch):
    """Of many rows alone; it stands behind the bias, which brings a part of its gradient."""
    model = pefast.attach(build("bert"), pefast.IA3())
    layer = model.bert.encoder.layer[0].attention.self.key
    (gain,) = (delta.l for delta in layer.deltas["default"].values())
    generator = torch.Generator().manual_seed(4)
    gain.data = torch.rand(gain.shape, generator=generator) + 0.5
    x, dy = torch.randn(300, 32, generator=generator), torch.randn(300, 32, generator=generator)

    def results(function, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    def formula(x, gain):
        return (x @ layer.weight.to(x.dtype).t() + layer.bias.to(x.dtype)) * gain

    near, exact = results(formula, x, gain), results(formula, x.double(), gain.double())
    monkeypatch.setattr(hosts, "multiplied", None)
    x.requires_grad_()
    y = layer(x)
    got = y.detach(), *torch.autograd.grad(y, (x, gain), dy)
    for name, *three in zip(("y", "dx", "dgain"), got, near, exact, strict=True):
        assert_no_worse(name, *three)
    with pytest.raises(TypeError):
        layer(x[:200])
