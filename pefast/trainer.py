"""transformers' Trainer for adapters: the order of rows, evaluation, and checkpoints that nothing can tear.

A checkpoint holds the adapter, the optimizer, the schedule and every random generator, and nothing of the
base model. It is written beside its place and renamed into it, so a run that was killed at any moment goes on
from the last whole one, and ends with the same bits as a run that was never stopped.
"""

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import pefast

from .checkpoint import refill
from .gauges import Gauges, norms, rates, trained_by_method
from .progress import Meter
from .report import fused_layers
from .sharded_trainer import ShardedTrainer

ADAPTER = "adapter"
STATE = "trainer_state.json"
PREFIX = "checkpoint-"


class RowsByLength(LengthGroupedSampler):
    """Rows of like length share a batch; the order is a function of seed and epoch, as resuming needs."""

    def __init__(self, batch: int, lengths: list[int], seed: int):
        super().__init__(batch, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch comes next."""
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins, also where a run is resumed in the middle of one."""

    def __init__(self, sampler: RowsByLength):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Sets the order of its rows."""
        self.sampler.set_epoch(int(state.epoch or 0))


def _look_follows(args, state) -> bool:
    """Whether an epoch ends with this step, and with a look at the rows to choose by.

    The look leaves a checkpoint. One before it would say that the epoch is over and know nothing of the look:
    a run that goes on from there would never make it.
    """
    ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
    return args.eval_strategy == "epoch" and ends


class Every(TrainerCallback):
    """A checkpoint every so many steps, beside those that the Trainer makes where it evaluates."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint."""
        if state.global_step % self.steps == 0 and not _look_follows(args, state):
            control.should_save = True


class _Stepped(TrainerCallback):
    """Notes when the optimizer is done with a step."""

    def __init__(self, trainer: "AdapterTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The end of the step's last part."""
        gauges = self.trainer.gauges
        gauges.add("optimizer", self.trainer._after_backward, gauges.mark())
        gauges.steps += 1


class Interrupt(TrainerCallback):
    """Ctrl-C once: the step ends, a checkpoint is written, training stops. Twice: at once."""

    def __init__(self):
        self.came = False
        self.before = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Listens from here on; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number, frame):
        if self.came:
            raise KeyboardInterrupt
        self.came = True

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and the end where the signal came."""
        if self.came:
            control.should_training_stop = True
            control.should_save = not _look_follows(args, state)

    def close(self) -> None:
        """Gives the signal back to whoever had it."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


class AdapterTrainer(ShardedTrainer):
    """The Trainer of one run; `judge(model)` gives the metrics of the rows to choose by."""

    def __init__(
        self,
        *args,
        meter: Meter,
        hits: Callable[[dict, dict], Tensor],
        judge: Callable[[nn.Module], dict[str, float]] | None = None,
        rates: dict[str, dict] | None = None,
        keep: int = 1,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.meter, self.hits, self.judge, self.rates, self.keep = meter, hits, judge, rates or {}, keep
        self._staging: str | None = None
        self.gauges = Gauges(self.args.device.type == "cuda")
        self._groups: dict[str, list[nn.Parameter]] = {}
        # what the next line of the log says beside the Trainer's own numbers
        self._told: dict[str, Tensor | float] = {}
        self.add_callback(_Stepped(self))

    def create_optimizer(self, model=None):
        """The Trainer's own optimizer, over pefast's groups: rates that a method asks for are honoured."""
        if self.optimizer is None:
            lr, decay = self.args.learning_rate, self.args.weight_decay
            groups = pefast.parameter_groups(self.model, lr, decay, **self.rates)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's own loss; in training its value and the share of hits go to the meter."""
        begin = self.gauges.mark()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            with torch.no_grad():
                self.meter.add(loss.detach(), self.hits(outputs, inputs))
                self.gauges.count(inputs)
            self._after_forward = self.gauges.mark()
            self.gauges.add("forward", begin, self._after_forward)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        """The Trainer's own next batches, timed."""
        with self.gauges.time("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's own step, timed; the log's line sees the gradients before they are clipped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._after_backward = self.gauges.mark()
        self.gauges.add("backward", self._after_forward, self._after_backward)
        step = self.state.global_step + 1
        logs = step == 1 or step % self.state.logging_steps == 0
        if logs and self.accelerator.sync_gradients and self.args.logging_strategy != "no":
            own = self.accelerator.unwrap_model(self.model)
            self._groups = self._groups or trained_by_method(own)
            fused, whole = fused_layers(own, inputs["input_ids"].numel())
            self._told = {f"learning_rate/{name}": rate for name, rate in rates(self.optimizer).items()}
            self._told |= {f"grad_norm/{name}": norm for name, norm in norms(self._groups).items()}
            self._told |= {"fused_share": fused / whole} if whole else {}
        return loss

    def log(self, logs, start_time=None):
        """The Trainer's own log; a line about training also has what the gauges show."""
        if "loss" in logs:
            told = {key: float(value) for key, value in self._told.items()}
            hits = self.meter.read()[1]
            told |= {} if math.isnan(hits) else {"accuracy": hits}
            logs |= told | {"tokens_per_second": self.gauges.tokens_per_second()}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        # the same order for any number of processes that share a step's rows
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = RowsByLength(batch, lengths, self.args.seed)
        self.add_callback(_Epochs(sampler))
        return sampler

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The task's own metrics of the rows to choose by."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.judge(self.model).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        step, root = self.state.global_step, Path(self.args.output_dir)
        staging, place = root / f".{PREFIX}{step}", root / f"{PREFIX}{step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            # every process has its own generator's state in there
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._note_best(root, staging / place.name)
                if not place.exists():
                    os.rename(staging / place.name, place)
        except (OSError, RuntimeError) as error:
            # torch.save says RuntimeError where the disk is full
            last = newest(root)
            left = f"{last.name} is whole, --resume goes on from it" if last else "there is none before it"
            raise OSError(
                f"training: the checkpoint of step {step} could not be written to {root} ({error}); {left}"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            self._prune(root)
        self.accelerator.wait_for_everyone()

    def _note_best(self, root: Path, part: Path) -> None:
        """The Trainer looks for its best checkpoint in the staging folder; it will be at its own place."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(root / f"{PREFIX}{self.state.best_global_step}")
            self.state.save_to_json(str(part / STATE))

    def _prune(self, root: Path) -> None:
        best = self.state.best_model_checkpoint
        for old in checkpoints(root)[: -self.keep]:
            if best is None or old.name != Path(best).name:
                shutil.rmtree(old)

    def _save(self, output_dir=None, state_dict=None):
        # the Trainer calls this in every process, and shards are with all of them
        if self.args.should_save or self.is_fsdp_enabled:
            pefast.save(self.accelerator.unwrap_model(self.model), Path(output_dir) / ADAPTER)

    def _load_best_model(self):
        refill(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint) / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        refill(
            self.accelerator.unwrap_model(self.model if model is None else model),
            Path(resume_from_checkpoint) / ADAPTER,
        )


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints of a folder, the oldest first."""
    found = [
        path
        for path in root.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit() and (path / STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def newest(root: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    found = checkpoints(root)
    return found[-1] if found else None
