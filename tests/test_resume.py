"""A run killed at any moment ends with the same bits; Ctrl-C, a full disk or a second run lose nothing."""

import functools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from pefast import recipe, trainer, training
from pefast.claim import claim
from pefast.progress import Watcher
from tests import tiny_run

SETTINGS = {"training.save_every": 4, "training.epochs": 2, "training.threads": 1, "data.valid_rows": 24}
# dropout on every segment: its seeds come from the generator that a checkpoint keeps
METHODS = [
    {"method": "lora", "rank": 4, "dropout": 0.1},
    {"method": "adapter", "size": 4},
    {"method": "prompt"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows and a recipe."""
    return tiny_run.write(tmp_path_factory.mktemp("resume"))


def settled(folder, output, **changes):
    """The recipe with its output and a few changes."""
    laid_over = SETTINGS | {"methods": METHODS, "output": str(folder / output)} | changes
    return recipe.read(folder / "recipe.yaml", laid_over)


class Telling(Watcher):
    """Tells another process which step is being taken."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        self.step.value = state.global_step + 1


def run(folder, output, resume, before=None, changes=None, step=None):
    """One run to its end, as `pefast train` does it."""
    torch.set_num_threads(1)
    if before is not None:
        before()
    wanted = settled(folder, output, **(changes or {}))
    with claim(wanted, Path(wanted.output) / training.CHECKPOINTS, resume):
        ready = training.prepare(wanted)
        training.attach(ready)
        training.store(ready, training.fit(ready, Watcher() if step is None else Telling(step), resume))


def bits(folder, output):
    """Every file of the adapter."""
    root = folder / output / "adapter"
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def spawn():
    """Processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pefast.training", "peft", "tests.test_resume"])
    return context.Process


@pytest.fixture(scope="module")
def step():
    """The step that a run is at: a number without a lock, which a killed process would keep."""
    return multiprocessing.get_context("forkserver").Value("i", 0, lock=False)


@pytest.fixture(scope="module")
def whole(folder, spawn, step):
    """Steps and bits of the run that nobody stops."""
    finish(spawn(target=run, args=(folder, "whole", False), kwargs={"step": step}))
    return step.value, bits(folder, "whole")


def finish(process):
    """Waits for a process that must end well."""
    process.start()
    process.join(120)
    assert process.exitcode == 0


def die_at_look(number):
    """The process dies as it begins to look at the rows to choose by for the so-manieth time."""
    look, looks = trainer.AdapterTrainer.evaluate, []

    def evaluate(self, *args, **kwargs):
        looks.append(self.state.global_step)
        if len(looks) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return look(self, *args, **kwargs)

    trainer.AdapterTrainer.evaluate = evaluate


def stop_before_look(number):
    """Ctrl-C comes in the last step of an epoch."""
    end, steps = trainer.Interrupt.on_step_end, []

    def on_step_end(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        self.came = self.came or (state.epoch == number and len(steps) > 1)
        end(self, args, state, control, **kwargs)

    trainer.Interrupt.on_step_end = on_step_end


def first_look_is_best(end=None):
    """Each look finds less than the one before it; then what `end` does."""
    look = trainer.AdapterTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        judge, step = self.judge, self.state.global_step
        self.judge = lambda model: {name: value - step for name, value in judge(model).items()}
        try:
            return look(self, *args, **kwargs)
        finally:
            self.judge = judge

    trainer.AdapterTrainer.evaluate = evaluate
    if end is not None:
        end()


@pytest.fixture(scope="module")
def whole_of_the_first(folder, spawn):
    """Bits of the run that nobody stops and that goes back to its first look."""
    finish(spawn(target=run, args=(folder, "whole, first", False), kwargs={"before": first_look_is_best}))
    return bits(folder, "whole, first")


@pytest.mark.parametrize("best", ["first", "last"])
@pytest.mark.parametrize("end", [die_at_look, stop_before_look])
@pytest.mark.parametrize("number", [1, 2])
def test_ended_at_a_look_it_ends_with_the_same_bits(
    folder, spawn, whole, whole_of_the_first, end, number, best
):
    # an epoch's last step is one of those that leave a checkpoint, too: it must not be there before the look
    assert whole[0] % (2 * SETTINGS["training.save_every"]) == 0
    assert whole[1] != whole_of_the_first
    output = f"{end.__name__} {number} {best}"
    before, after = functools.partial(end, number), None
    if best == "first":
        before, after = functools.partial(first_look_is_best, before), first_look_is_best
    process = spawn(target=run, args=(folder, output, True), kwargs={"before": before})
    process.start()
    process.join(120)
    assert process.exitcode not in (0, None) and not (folder / output / "adapter").exists()
    finish(spawn(target=run, args=(folder, output, True), kwargs={"before": after}))
    assert bits(folder, output) == (whole_of_the_first if best == "first" else whole[1])


def test_killed_at_ten_moments_it_ends_with_the_same_bits(folder, spawn, step, whole):
    steps, expected = whole
    pick, killed, output, begun = random.Random(3), 0, "killed 0", []
    while killed < 10:
        checkpoints = folder / output / training.CHECKPOINTS
        begun.append(trainer.newest(checkpoints) if checkpoints.exists() else None)
        # a step, not a time: a busy machine is as far as an idle one when it is killed
        step.value, last = 0, pick.randint(0, steps)
        process = spawn(target=run, args=(folder, output, True), kwargs={"step": step})
        process.start()
        while process.is_alive() and step.value < last:
            time.sleep(0.001)
        process.join(pick.uniform(0, 0.1))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if (folder / output / "adapter").exists():
            assert bits(folder, output) == expected
            output = f"killed {killed}"
    assert len({path for path in begun if path is not None}) >= 2, "hardly a run was killed in its middle"
    if not (folder / output / "adapter").exists():
        finish(spawn(target=run, args=(folder, output, True)))
    assert bits(folder, output) == expected
    assert not (folder / output / training.CHECKPOINTS).exists()


def die_at_rename(step):
    """Kills this process as it puts that step's checkpoint in place."""

    def rename(source, target, real=os.rename):
        if Path(target).name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.rename = rename


def at_12():
    die_at_rename(12)


def test_killed_while_it_saves_the_checkpoint_before_is_whole(folder, spawn, whole):
    process = spawn(target=run, args=(folder, "torn", False, at_12))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    root = folder / "torn" / training.CHECKPOINTS
    assert trainer.newest(root).name == "checkpoint-8" and (root / ".checkpoint-12").exists()
    finish(spawn(target=run, args=(folder, "torn", True)))
    assert bits(folder, "torn") == whole[1]


def test_a_checkpoint_holds_nothing_of_the_base_model(folder, monkeypatch):
    sizes = []

    def prune(self, root):
        last = trainer.newest(root)
        sizes.append(sum(file.stat().st_size for file in last.rglob("*") if file.suffix == ".safetensors"))

    monkeypatch.setattr(trainer.AdapterTrainer, "_prune", prune)
    run(folder, "small", False, changes={"training.max_steps": 4})
    assert 0 < sizes[0] < (folder / "model" / "model.safetensors").stat().st_size / 2


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(folder, whole):
    class Press(Watcher):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGINT)

    wanted = settled(folder, "pressed")
    ready = training.prepare(wanted)
    training.attach(ready)
    with pytest.raises(training.Stopped, match="stopped at step 6; --resume goes on"):
        training.fit(ready, Press())
    assert trainer.newest(folder / "pressed" / training.CHECKPOINTS).name == "checkpoint-6"
    run(folder, "pressed", True)
    assert bits(folder, "pressed") == whole[1]


def test_without_resume_an_unfinished_run_is_kept(folder):
    checkpoint = folder / "kept" / training.CHECKPOINTS / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / trainer.STATE).write_text("{}")
    with pytest.raises(ValueError, match="holds an unfinished run"):
        run(folder, "kept", False)
    assert checkpoint.exists()
    (checkpoint.parent / "recipe.yaml").write_text(recipe.written(settled(folder, "kept")))
    with pytest.raises(ValueError, match=r"--resume with training\.lr = 0\.5"):
        run(folder, "kept", True, changes={"training.lr": 0.5})


def test_two_runs_do_not_share_a_folder(folder):
    wanted = settled(folder, "shared")
    place = Path(wanted.output) / training.CHECKPOINTS
    with (
        claim(wanted, place, False),
        pytest.raises(ValueError, match="another run is at work"),
        claim(wanted, place, False),
    ):
        pass
    assert not (folder / "shared").exists()


def test_a_full_disk_leaves_the_checkpoint_before(folder, monkeypatch):
    real = torch.save

    def full(value, place, *args, **kwargs):
        if "checkpoint-8" in str(place):
            raise RuntimeError("PytorchStreamWriter failed writing file")
        real(value, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"step 8 could not be written .* checkpoint-4 is whole, --resume goes on"
    ):
        run(folder, "full", False)
    assert not list((folder / "full").rglob(".checkpoint*"))


def test_the_best_look_is_what_is_kept(folder, monkeypatch):
    looks = iter([0.5, 0.9, 0.4, 0.3])
    monkeypatch.setattr(training, "score", lambda run, rows=None: (None, {"accuracy": next(looks)}))
    wanted = settled(folder, "best", **{"training.evaluate_every": 5, "training.patience": 2})
    ready = training.prepare(wanted)
    training.attach(ready)
    kept = {}

    class Look(Watcher):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            kept[state.global_step] = values

    fitted = training.fit(ready, Look())
    assert fitted["steps"] == 20 and fitted["best_step"] == 10
    for name, parameter in ready.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, kept[10][name])
            assert not torch.equal(kept[20][name], kept[10][name])
