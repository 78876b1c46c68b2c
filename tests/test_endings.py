"""What may happen to a run from outside: the disk is full, or a system has other locks than this one."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

from pefast import claim, recipe, trainer, training
from pefast.progress import Watcher
from tests import tiny_run

SETTINGS = {"training.save_every": 4, "training.max_steps": 10, "training.threads": 1, "data.train_rows": 80}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class Fill(Watcher):
    """Leaves no room on a disk once a step is done."""

    def __init__(self, file, step):
        super().__init__()
        self.file, self.step = file, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with self.file.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        return


def begun(folder, output):
    """A run of the tiny recipe that is ready to train."""
    torch.set_num_threads(1)
    run = training.prepare(recipe.read(folder / "recipe.yaml", SETTINGS | {"output": str(output)}))
    training.attach(run)
    return run


def trained(run):
    """What the run's model has learned."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_a_run_whose_disk_is_full_goes_on_when_there_is_room(tmp_path, small_disk):
    folder = tiny_run.write(tmp_path)
    whole = begun(folder, tmp_path / "whole")
    training.fit(whole, Watcher())
    stuck, filler = begun(folder, small_disk / "run"), small_disk / "filler"
    with pytest.raises(OSError, match=r"checkpoint of step 8 .* checkpoint-4 is whole, --resume goes on"):
        training.fit(stuck, Fill(filler, 6))
    place = small_disk / "run" / training.CHECKPOINTS
    assert [path.name for path in trainer.checkpoints(place)] == ["checkpoint-4"]
    assert not list(place.glob(".checkpoint*")), "half a checkpoint was left"
    filler.unlink()
    resumed = begun(folder, small_disk / "run")
    training.fit(resumed, Watcher(), resume=True)
    expected = trained(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained(resumed).items())


def test_an_adapter_that_finds_no_room_leaves_the_one_before(tmp_path, small_disk):
    run = begun(tiny_run.write(tmp_path), small_disk / "run")
    training.store(run, {"accuracy": 0.5})
    before = {path: path.read_bytes() for path in (small_disk / "run").rglob("*") if path.is_file()}
    Fill(small_disk / "filler", 0).on_step_end(None, types.SimpleNamespace(global_step=0), None)
    with pytest.raises((OSError, RuntimeError), match=r"could not be written|No space"):
        training.store(run, {"accuracy": 0.9})
    after = {path: path.read_bytes() for path in (small_disk / "run").rglob("*") if path.is_file()}
    assert after == before


def test_ctrl_c_ends_a_run_with_a_sentence_and_the_same_command_goes_on(tmp_path):
    folder = tiny_run.write(tmp_path)
    flags = ["--set", "training.max_steps=400", "--set", "training.threads=1"]
    command = [sys.executable, "-m", "pefast.cli", "train", str(folder / "recipe.yaml"), *flags]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    while "training " not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    run.send_signal(signal.SIGINT)
    said += run.communicate(timeout=120)[0]
    assert run.returncode == 130 and "Traceback" not in said, said
    assert re.search(r"stopped at step \d+; --resume goes on from there", said), said
    refused = recipe.read(folder / "recipe.yaml", {"training.max_steps": 400, "training.threads": 1})
    with (
        pytest.raises(ValueError, match="--resume goes on with it"),
        claim.claim(refused, folder / "out" / training.CHECKPOINTS, False),
    ):
        pass
    assert trainer.newest(folder / "out" / training.CHECKPOINTS) is not None


def test_an_output_that_is_a_file_is_said(tmp_path):
    (tmp_path / "taken").write_text("a letter")
    wanted = recipe.read(tiny_run.write(tmp_path) / "recipe.yaml", {"output": str(tmp_path / "taken")})
    with pytest.raises(ValueError, match="taken is a file"), claim.claim(wanted, tmp_path / "none", False):
        pass
    assert (tmp_path / "taken").read_text() == "a letter"


def test_without_the_locks_of_unix_windows_own_is_asked(tmp_path, monkeypatch):
    asked = []

    def locking(number, mode, count):
        asked.append((mode, count))
        if len(asked) > 1:
            raise PermissionError("held")

    monkeypatch.setattr(claim, "fcntl", None)
    monkeypatch.setattr(claim, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    wanted = recipe.read(tiny_run.write(tmp_path) / "recipe.yaml")
    place = tmp_path / "out" / training.CHECKPOINTS
    with (
        claim.claim(wanted, place, False),
        pytest.raises(ValueError, match="another run is at work"),
        claim.claim(wanted, place, False),
    ):
        pass
    assert asked == [(2, 1), (2, 1)]
