"""Adapters under torch's fully_shard (FSDP2) on two processes: gradients, files, packs as those of one."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.fsdp import fully_shard

import pefast
from pefast import sharded
from pefast.native import packs
from tests import cases, models

BLOCKS = ("BertLayer", "LlamaDecoderLayer")
# a table that a prompt reads from outside, entries in a weight's place, and what is computed when it is saved
TRIED = {
    "bert": (
        "hybrid with prefix",
        "prompt template",
        "layers",
        "heads",
        "dora",
        "prefix of a network",
        "ia3",
    ),
    "llama": ("lora of words", "subnetwork of elements", "pissa"),
}


def shard(model):
    """As accelerate does it: blocks, then the tables, tied ones together, then the rest."""
    for block in [module for module in model.modules() if type(module).__name__.endswith(BLOCKS)]:
        fully_shard(block)
    table, words = model.get_input_embeddings(), model.get_output_embeddings()
    fully_shard([table] if words is None else [table, words], reshard_after_forward=False)
    fully_shard(model)


def built(family, case):
    """A model with its adapter, in numbers that are nowhere zero."""
    torch.manual_seed(0)
    return models.stir(pefast.attach(models.build(family), copy.deepcopy(cases.CASES[case]))).train()


def loss_of(model, fed, rows):
    """A loss that is a mean over rows."""
    return model(**{key: value[rows] for key, value in fed.items()}).logits.float().square().mean()


def apart(got, right):
    """The largest difference, of the largest value."""
    return float((got - right).abs().max() / right.abs().max().clamp(min=1e-12))


def compare(rank, family, case, folder):
    """Gradients of both halves of a batch by two processes beside those of one; then what is saved."""
    fed = models.inputs(family, rows=4)
    alone, model = built(family, case), built(family, case)
    (sum(loss_of(alone, fed, rows) for rows in (slice(2), slice(2, 4))) / 2).backward()
    right = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    shard(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, fed, slice(2 * rank, 2 * rank + 2)).backward()
    got = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == right.keys()
    worst = max(apart(got[name], value) for name, value in right.items())
    assert worst < 1e-5, f"{family}, {case}: gradients differ by {worst:.2g}"

    place = folder / f"{family} {case}"
    pefast.save(model, place)
    assert all(sharded.is_shard(p) for p in model.parameters()), "saving left whole tensors"
    distributed.barrier()
    fresh = models.build(family)
    pefast.load(fresh, place, trainable=False)
    got, right = models.logits(fresh.eval(), **fed), models.logits(alone.eval(), **fed)
    assert torch.equal(got, right), f"{family}, {case}: what was saved computes something else"

    pefast.checkpoint.refill(model, place)
    assert apart(models.logits(model.eval(), **fed), right) < 1e-5
    for refused in (pefast.attach, pefast.merge, pefast.detach):
        models.assert_refused(
            lambda refused=refused: refused(model, *[pefast.Bias()] * (refused is pefast.attach)),
            "spread over",
        )


def compare_packs(rank):
    """bf16 on AMX: the memory of a gathered weight comes and goes, what was packed of it goes with it."""
    torch.manual_seed(0)
    model = pefast.attach(models.build("llama").to(torch.bfloat16), pefast.LoRA(rank=4)).train()
    fed, kept = models.inputs("llama", rows=4), []
    real = packs.packed

    def counted(w, *args):
        found = real(w, *args)
        kept.append(sum(len(forms) for _, forms in w.untyped_storage().pefast_packs.values()))
        return found

    packs.packed = counted
    shard(model)
    for _ in range(4):
        loss_of(model, fed, slice(2 * rank, 2 * rank + 2)).backward()
    # one for the product and one for its gradient, and at most a pair of an address within this memory
    assert all(number <= 4 for number in kept), kept


def work(rank, store, folder):
    """One of two processes, from its start to its end."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for family, names in TRIED.items():
        for case in names:
            compare(rank, family, case, folder)
    compare_packs(rank)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_shards_compute_what_one_computes(tmp_path):
    # raises what a process raised
    multiprocessing.spawn(work, (tmp_path / "store", tmp_path), nprocs=2)
    written = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert written == {f"{family} {case}" for family, names in TRIED.items() for case in names}


def test_a_pack_does_not_outlive_the_memory_it_was_made_of():
    weight = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    store, made = weight.untyped_storage(), []

    def make():
        made.append(weight.data_ptr())
        return weight.detach().clone(), 0

    taken = []
    for _ in range(6):
        packs.packed(weight, "plain", make)
        assert len(store.pefast_packs) <= 2
        size = store.nbytes()
        store.resize_(0)
        # another takes the place, so that the next lies elsewhere
        taken.append(torch.empty(64, 64))
        store.resize_(size)
    assert len(made) > 1, "the memory came back to where it was"
