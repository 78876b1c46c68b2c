"""The same recipe on two processes, each with the whole model or with its shards (FSDP2): the numbers of one,
written once; a killed one ends the run.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import pefast
from pefast import recipe, sharded_trainer, trainer, training
from pefast.progress import Watcher
from tests import models, tiny_run

SETTINGS = {"training.threads": 1, "training.max_steps": 4, "training.save_every": 2}
# what `accelerate launch --use_fsdp --fsdp_version 2 ...` sets; the embeddings of a BERT stay with its root,
# which accelerate 1.15 would otherwise shard twice
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows and a recipe."""
    return tiny_run.write(tmp_path_factory.mktemp("distributed"))


def start(folder, output, *words, processes=2, program="pefast.cli", settings=None):
    """`pefast train` under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {**SETTINGS, "training.batch": 4, "output": folder / output}
    flags = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    run = [
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
        "-m",
        program,
    ]
    command = [sys.executable, "-m", *run, "train", str(folder / "recipe.yaml"), *flags, *words]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command,
        env=os.environ | quiet | (settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    """What it printed; it must end well."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def values(folder, output):
    """Every tensor of the adapter that a run wrote."""
    root = folder / output / "adapter"
    return {
        f"{path.relative_to(root)} {name}": tensor
        for path in root.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def start_sharded(folder, output, *words):
    """The same with FSDP2."""
    return start(folder, output, *words, program="tests.sharded_cli", settings=FSDP)


@pytest.fixture(scope="module")
def both(folder):
    """What two processes print and write."""
    return finished(start(folder, "both")), values(folder, "both")


def alone(folder, output, batch):
    """The adapter of one process."""
    torch.set_num_threads(1)
    changes = SETTINGS | {"training.batch": batch, "output": str(folder / output)}
    run = training.prepare(recipe.read(folder / "recipe.yaml", changes))
    training.attach(run)
    training.fit(run, Watcher())
    training.store(run, {})
    return values(folder, output)


def test_two_processes_learn_what_one_learns(folder, both):
    one, other = alone(folder, "one", batch=8), alone(folder, "other", batch=4)
    assert one.keys() == both[1].keys()
    apart = {name: (both[1][name] - tensor).abs().max().item() for name, tensor in one.items()}
    # AdamW makes of a gradient's rounding a step of its own size; other rows make other steps
    assert max(apart.values()) < 2e-3
    assert max((both[1][name] - tensor).abs().max().item() for name, tensor in other.items()) > 1e-2


def test_only_the_first_process_speaks_and_writes(folder, both):
    assert both[0].count("rows to learn from") == 1 and both[0].count("saved to") == 1
    assert not (folder / "both" / training.CHECKPOINTS).exists()


@pytest.mark.parametrize("begin", [start, start_sharded], ids=["whole", "sharded"])
def test_a_killed_process_ends_the_run_and_it_is_resumed_to_the_same_bits(folder, begin):
    longer = ("--set", f"training.max_steps={60 if begin is start else 6}")
    name = begin.__name__
    finished(begin(folder, f"{name} unhurt", *longer))
    process = begin(folder, name, *longer)
    place = folder / name / training.CHECKPOINTS
    while process.poll() is None and trainer.newest(place) is None:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "SIGKILL" in said
    assert trainer.newest(place) is not None and not (folder / name / "adapter").exists()
    if begin is start:
        # another recipe would be another run
        refused = begin(folder, name, "--resume", processes=1)
        assert "the run began with 60" in refused.communicate(timeout=120)[0] and refused.returncode != 0
    finished(begin(folder, name, "--resume", *longer))
    unhurt, resumed = values(folder, f"{name} unhurt"), values(folder, name)
    assert unhurt.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in unhurt.items())


def test_two_processes_with_shards_learn_what_one_learns(folder):
    said = finished(start_sharded(folder, "sharded"))
    assert said.count("saved to") == 1 and not (folder / "sharded" / training.CHECKPOINTS).exists()
    one, both = alone(folder, "one for shards", batch=8), values(folder, "sharded")
    assert one.keys() == both.keys()
    # 5e-7 was seen
    assert max((both[name] - tensor).abs().max().item() for name, tensor in one.items()) < 2e-5
    # what they wrote is whole: one process reads it and answers
    assert training.score(training.restore(folder / "sharded"))[1]["accuracy"] > 0


def test_shards_that_accelerate_would_not_make_are_refused(folder):
    process = start(folder, "refused", processes=1, settings=FSDP)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "accelerate shards a model over GPUs alone" in said
    model = pefast.attach(models.build("bert").to(torch.bfloat16), pefast.LoRA(rank=4))
    models.assert_refused(lambda: sharded_trainer.check(model), "in one dtype", "bfloat16 and float32")
    model = pefast.attach(models.build("llama"), pefast.Subnetwork(fraction=0.1, targets="all"))
    models.assert_refused(lambda: sharded_trainer.check(model), "also the output layer")
    sharded_trainer.check(pefast.attach(models.build("llama"), pefast.LoRA(rank=4)))
