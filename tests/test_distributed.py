"""The same recipe on two processes: the numbers of one, written once; a killed one ends the run."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pefast import recipe, trainer, training
from pefast.progress import Watcher
from tests import tiny_run

SETTINGS = {"training.threads": 1, "training.max_steps": 4, "training.save_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows and a recipe."""
    return tiny_run.write(tmp_path_factory.mktemp("distributed"))


def start(folder, output, *words, processes=2):
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
        "pefast.cli",
    ]
    command = [sys.executable, "-m", *run, "train", str(folder / "recipe.yaml"), *flags, *words]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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


def test_a_killed_process_ends_the_run_and_it_is_resumed_to_the_same_bits(folder):
    longer = ("--set", "training.max_steps=60")
    finished(start(folder, "whole", *longer))
    process = start(folder, "killed", *longer)
    place = folder / "killed" / training.CHECKPOINTS
    while process.poll() is None and trainer.newest(place) is None:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "SIGKILL" in said
    assert trainer.newest(place) is not None and not (folder / "killed" / "adapter").exists()
    # another recipe would be another run
    refused = start(folder, "killed", "--resume", processes=1)
    assert "the run began with 60" in refused.communicate(timeout=120)[0] and refused.returncode != 0
    finished(start(folder, "killed", "--resume", *longer))
    whole, resumed = values(folder, "whole"), values(folder, "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
