"""Heads, Subnetwork and Importance: which entries they choose, what that costs, what is refused."""

import pytest
import torch

import pefast
from pefast.checkpoint import TENSORS
from pefast.methods.heads import attentions
from pefast.methods.replacing import own_tensors, shape_of, turned
from pefast.ops.partial_linear import mask as mask_of
from tests.cases import probe
from tests.models import (
    FAMILIES,
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

Heads, Subnetwork, Importance, LoRA = pefast.Heads, pefast.Subnetwork, pefast.Importance, pefast.LoRA
MANY = {
    "heads": Heads({0: [1], -1: [0, -1]}),
    "rows": Subnetwork(fraction=0.1, unit="row"),
    "columns": Subnetwork(fraction=0.1, unit="column", by="magnitude"),
    "tiles": Subnetwork(fraction=0.1, unit="tile", tile=(8, 4)),
    "elements": Subnetwork(fraction=0.1),
    "everywhere": Subnetwork(fraction=0.1, targets="all"),
    "importance": Importance(batches=[1], loss=probe, fraction=0.05, unit="element"),
}


def gradients_of_all(family):
    """The gradients of all the base model's own parameters, by path."""
    model = build(family).requires_grad_(True)
    step(model, inputs(family))
    loss = model(**inputs(family)).logits.float().square().mean()
    loss.backward()
    return {path: parameter.grad for path, parameter in own_tensors(model).items()}


@pytest.mark.parametrize("case", list(MANY))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_whole_one_at_the_chosen_entries(family, case):
    dense = gradients_of_all(family)
    model = build(family)
    plan = MANY[case].plan(model)
    pefast.attach(model, MANY[case], head=False)
    model(**inputs(family)).logits.float().square().mean().backward()
    got = pefast.model.parameters_of(model, "default")
    assert len(got) == len(plan)
    for (path, index), parameter in zip(plan.items(), got.values(), strict=True):
        whole = dense[path].t() if turned(model, path) else dense[path]
        chosen = mask_of(index, shape_of(model, path))
        assert parameter.numel() == int(chosen.sum())
        if index.kind == "tiles":
            by_tile = whole.unflatten(1, (-1, 4)).unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 1)
            right = by_tile[index.at]
        else:
            right = whole[chosen].view_as(parameter) if index.kind != "columns" else whole[:, index.at]
        assert_close(parameter.grad, right, 1e-4)


def test_one_percent_of_the_rows_cost_one_percent_of_state_and_file(tmp_path):
    # sizes that one percent divides
    import transformers

    sizes = {"hidden_size": 400, "intermediate_size": 800, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50))
    linears = sum(p.numel() for name, p in base.named_parameters() if "_proj" in name)
    model = pefast.attach(base, Subnetwork(fraction=0.01, unit="row"))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    state = [t for each in optimizer.state.values() for t in each.values() if t.dim()]
    assert sum(t.numel() for t in state) == 2 * linears // 100
    file = pefast.save(model, tmp_path / "rows") / TENSORS
    assert file.stat().st_size < 4 * linears / 100 + 5_000


def test_masters_are_fp32_beside_a_half_and_keep_small_steps():
    model = build("llama").bfloat16()
    pefast.attach(model, Subnetwork(fraction=0.1, unit="row"))
    values = trained(model)
    assert all(value.dtype == torch.float32 for value in values.values())
    right = logits(model, **inputs("llama"))
    with torch.no_grad():
        for _ in range(64):
            for value in values.values():
                value.mul_(1 + 2**-11)
    assert not torch.equal(logits(model, **inputs("llama")), right)


def test_heads_of_grouped_queries():
    model = build("llama")  # four query heads, two of keys: heads 0 and 1 read the first
    width = WIDTH // 4
    runs = {number: list(range(number * width, (number + 1) * width)) for number in range(4)}

    def rows(plan, name):
        index = plan.get(f"model.layers.0.self_attn.{name}.weight")
        return None if index is None else index.at.tolist()

    one = Heads({0: [1]}).plan(model)
    assert rows(one, "q_proj") == runs[1] and rows(one, "o_proj") == runs[1]
    assert rows(one, "k_proj") == rows(one, "v_proj") == runs[0]
    assert {index.kind for path, index in one.items() if "o_proj" in path} == {"columns"}
    assert rows(Heads({0: [1]}, groups="all").plan(model), "k_proj") is None
    assert rows(Heads({0: [0, 1]}, groups="all").plan(model), "k_proj") == runs[0]
    assert rows(Heads({0: [3, 1]}).plan(model), "v_proj") == runs[0] + runs[1]
    none = Heads([-1], groups="none").plan(model)
    assert len(none) == 4 and rows(none, "q_proj") == runs[3]
    assert {path.split(".")[2] for path in Heads([0], layers=[-1]).plan(model)} == {"1"}


def test_heads_of_fused_biased_and_wide_attentions():
    fused = Heads({1: [2]}).plan(build("gpt2"))
    at = fused["transformer.h.1.attn.c_attn.weight"].at
    width = WIDTH // 4
    assert at.tolist() == [third * WIDTH + 2 * width + i for third in range(3) for i in range(width)]
    assert torch.equal(at, fused["transformer.h.1.attn.c_attn.bias"].at)
    bert = Heads({0: [0]}).plan(build("bert"))
    assert len(bert) == 7 and bert["bert.encoder.layer.0.attention.self.key.bias"].kind == "elements"
    t5 = build("t5")
    assert len(Heads([0]).plan(t5)) == 4 * 4
    cross = Heads({0: [1]}, kinds=("cross",)).plan(t5)
    assert len(cross) == 4 and all("decoder.block.0.layer.1" in path for path in cross)
    assert {each.heads for each in attentions(t5, ("attention", "cross"))} == {4}


def test_changing_one_head_changes_what_that_head_adds_and_nothing_else():
    """The head's output, before o mixes the heads, is another; those of the other heads are as they were."""
    model, fed = build("llama"), inputs("llama", rows=1)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model, **fed)
    stir(pefast.attach(model, Heads({0: [2]}, groups="none")), size=1.0)
    logits(model, **fed)
    moved = (seen[0] - seen[1]).abs().amax((0, 1)).view(4, -1).amax(1)
    assert moved[2] > 0.01 and not moved[[0, 1, 3]].any()


def test_a_mask_says_what_trains():
    model, fed = build("gpt2"), inputs("gpt2")
    stored = {path: parameter.shape for path, parameter in own_tensors(model).items()}
    generator = torch.Generator().manual_seed(0)
    name = "transformer.h.0.mlp.c_fc"
    mask = {
        f"{name}.weight": torch.rand(stored[f"{name}.weight"], generator=generator) < 0.1,
        f"{name}.bias": torch.arange(4 * WIDTH) < 3,
        "transformer.wte.weight": torch.zeros(96, WIDTH, dtype=torch.bool),
        "transformer.h.1.ln_1.weight": torch.ones(WIDTH, dtype=torch.bool),
    }
    mask["transformer.wte.weight"][5:9] = True
    plan = Subnetwork(mask=mask).plan(model)
    kinds = {path: index and index.kind for path, index in plan.items()}
    assert kinds == {
        "transformer.wte.weight": "rows",
        f"{name}.weight": "elements",
        f"{name}.bias": "elements",
        "transformer.h.1.ln_1.weight": None,
    }
    before = {path: parameter.detach().clone() for path, parameter in own_tensors(model).items()}
    stir(pefast.attach(model, Subnetwork(mask=mask)))
    right = logits(model, **fed)
    pefast.merge(model)
    assert_close(logits(model, **fed), right)
    for path, parameter in own_tensors(model).items():
        changed = mask.get(path, torch.zeros(stored[path], dtype=torch.bool))
        assert torch.equal(parameter[~changed], before[path][~changed]), path
        assert (parameter[changed] != before[path][changed]).all(), path


def test_a_random_subnetwork_follows_its_seed_and_the_largest_are_the_largest():
    model = build("llama")
    first, again = (Subnetwork(fraction=0.1, seed=3).plan(model) for _ in range(2))
    other = Subnetwork(fraction=0.1, seed=4).plan(model)
    assert all(torch.equal(first[path].at, again[path].at) for path in first)
    assert any(not torch.equal(first[path].at, other[path].at) for path in first)
    for path, index in Subnetwork(fraction=0.1, by="magnitude").plan(model).items():
        w = own_tensors(model)[path].detach().abs().view(-1)
        rest = torch.ones(len(w), dtype=torch.bool)
        rest[index.at] = False
        assert w[index.at].min() >= w[rest].max()


def means(family, measure, seeds):
    """The mean over batches of a measure of the whole gradients, by path."""
    found = {}
    for seed in seeds:
        model = build(family).requires_grad_(True)
        probe(model, seed).backward()
        for path, parameter in own_tensors(model).items():
            found[path] = found.get(path, 0) + measure(parameter.grad.double()) / len(seeds)
    return found


@pytest.mark.parametrize("unit", ["tensor", "row", "column", "tile", "element"])
@pytest.mark.parametrize("measure", ["absolute", "square", "signed", "norm"])
def test_scores_are_what_the_formula_says(measure, unit):
    # a layer norm makes the sum over a signed gradient zero, so that one is tried on a model without
    family = "llama" if measure == "signed" else "gpt2"
    formula = {"absolute": torch.abs, "signed": lambda g: g}.get(measure, torch.square)
    right = means(family, formula, (1, 2, 3))
    model = build(family)
    scores = pefast.score(model, [1, 2, 3], probe, unit=unit, measure=measure, tile=8, keep=1.0)
    begin = 0
    for path, (index, numbers) in scores.sources.items():
        whole = right[path].t() if turned(model, path) else right[path]
        if unit == "tile":
            by_unit = (
                whole.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).transpose(1, 2).flatten(2).flatten(0, 1)
            )
        else:
            by_unit = {"tensor": whole.reshape(1, -1), "row": whole, "column": whole.t()}.get(
                unit, whole.reshape(-1, 1)
            )
        value = by_unit.sum(1).sqrt() if measure == "norm" else by_unit.mean(1)
        got = scores.values[begin : begin + len(numbers)]
        order = numbers.sort().indices if index is not None else slice(None)
        assert_close(got[order], value, 1e-4)
        begin += len(numbers)
    assert begin == len(scores.values)


def test_head_scores_are_means_over_the_heads_entries():
    right = means("llama", torch.abs, (1,))
    model = build("llama")
    scores = pefast.score(model, [1], probe, unit="head")
    assert len(scores.values) == 2 * 4
    for number, value in enumerate(scores.values):
        plan = Heads({number // 4: [number % 4]}).plan(model)
        chosen = [right[path][mask_of(index, shape_of(model, path))] for path, index in plan.items()]
        assert_close(value.view(1), torch.cat(chosen).mean().view(1), 1e-4)
    best = int(scores.values.argmax())
    plan = scores.choose(budget=int(scores.sizes[best]))
    assert plan.keys() == Heads({best // 4: [best % 4]}).plan(model).keys()


def test_elements_kept_from_batch_to_batch_are_nearly_the_best():
    """Exact with one batch; with several, what is kept misses little of what an exact sum would choose."""
    model = build("llama")
    for seeds, keep, least in (((1,), 0.4, 1.0), ((1, 2, 3, 4), 0.3, 0.9)):
        exact = pefast.score(model, seeds, probe, unit="element", keep=1.0).choose(fraction=0.02)
        kept = pefast.score(model, seeds, probe, unit="element", keep=keep).choose(fraction=0.02)
        both = [
            (mask_of(exact[p], shape_of(model, p)) & mask_of(kept[p], shape_of(model, p))).sum()
            for p in exact.keys() & kept.keys()
        ]
        assert sum(both) >= least * sum(len(index.at) for index in exact.values())


def test_scoring_leaves_the_model_as_it_is_and_one_gradient_lives_at_a_time():
    model = build("llama").train()
    pefast.attach(model, LoRA(rank=2), "other")
    pefast.attach(model, LoRA(rank=2), "mine")
    model(**inputs("llama")).logits.sum().backward()
    before = snapshot(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    alive = []

    def watched(model, seed):
        loss = probe(model, seed)
        for parameter in own_tensors(model).values():
            # called before the scoring's own hook frees it
            parameter.requires_grad and parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in own_tensors(model).values()))
            )
        return loss

    scores = pefast.score(model, [1, 2], watched, unit="element")
    assert_as_it_was(model, before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert alive and max(alive) <= 1
    assert len(scores.values) <= 0.1 * scores.entries + len(scores.sources)


def test_choosing_by_threshold_fraction_and_budget():
    model = build("llama")
    scores = pefast.score(model, [1], probe, unit="row")
    count = lambda plan: sum(  # noqa: E731
        int(mask_of(index, shape_of(model, path)).sum()) for path, index in plan.items()
    )
    assert scores.entries == 2 * (2 * WIDTH**2 + WIDTH**2 + 3 * INNER * WIDTH)
    assert 0.09 * scores.entries < count(scores.choose(fraction=0.1)) <= 0.1 * scores.entries
    assert 500 - INNER < count(scores.choose(budget=500)) <= 500
    line = scores.threshold(0.1)
    by_line, by_share = scores.choose(threshold=line), scores.choose(fraction=0.1)
    assert by_line.keys() == by_share.keys()
    assert all(torch.equal(by_line[path].at, by_share[path].at) for path in by_line)
    assert count(scores.choose(fraction=1.0)) == scores.entries
    assert count(scores.choose(threshold=scores.threshold(1.0))) == scores.entries


def test_importance_takes_scores_or_the_models_own_loss():
    model, fed = build("llama"), inputs("llama")
    batch = {**fed, "labels": fed["input_ids"]}
    scores = pefast.score(model, [batch], unit="row")
    plans = [
        Importance(scores=scores, fraction=0.1).plan(model),
        Importance(batches=iter([batch]), fraction=0.1).plan(model),
        Importance(batches=[batch], loss=lambda m, b: m(**b).loss, fraction=0.1).plan(model),
    ]
    for plan in plans[1:]:
        assert all(torch.equal(plan[path].at, plans[0][path].at) for path in plans[0])
    masked = Subnetwork(mask=scores.choose(fraction=0.1)).plan(model)
    assert masked.keys() == plans[0].keys()


def test_two_adapters_with_other_entries_of_one_weight_compute_together():
    model, fed = build("bert"), inputs("bert")
    for name, heads, seed in (("a", [0], 3), ("b", [2, 3], 4), ("c", [3], 5)):
        stir(pefast.attach(model, Heads({0: heads}), name, head=False), seed)
    pefast.activate(model, ["a", "b"])
    got, right = step(model, fed), logits(model, **fed)
    assert len(got[1]) == 14
    pefast.merge(model)
    assert_close(logits(model, **fed), right)
    pefast.unmerge(model)
    assert_refused(
        lambda: pefast.activate(model, ["a", "b", "c"]), "activate: ", "'b''s Heads", "'c''s Heads"
    )
    assert torch.equal(logits(model, **fed), right)


def test_explain_says_what_trains_and_who_computes():
    model = pefast.attach(build("llama"), [Heads({0: [1]}), LoRA(rank=2, targets=["down_proj"])], "a")
    said = pefast.explain(model)
    assert (
        "3 layers, model.layers.0.self_attn.q_proj ... model.layers.0.self_attn.v_proj: rows of weight"
        in said
    )
    assert "model.layers.0.self_attn.o_proj: columns of weight of an adapter: eager (not native: " in said
    pefast.activate(model, None)
    assert "its own tensors, no active adapter" in pefast.explain(model)
    full = pefast.explain(pefast.attach(build("bert"), pefast.Full()))
    assert "all of weight and all of bias of an adapter" in full
