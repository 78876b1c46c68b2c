"""One run of a recipe: rows and model in, an adapter folder and its numbers out; the loop is Trainer's."""

import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

import pefast

from . import claim, sources, tasks
from . import recipe as recipes
from .gauges import held, trained_by_method
from .progress import Watcher
from .recipe import Recipe
from .sharded import is_sharded
from .tasks import carried
from .tasks.rows import Row
from .trainer import ADAPTER, AdapterTrainer, Every, Interrupt, newest

RECIPE, METRICS, CHECKPOINTS = "recipe.yaml", "metrics.json", "checkpoints"


@dataclass
class Run:
    """What a recipe becomes: the parts that training, scoring and predicting share."""

    recipe: Recipe
    task: ModuleType
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    train: list[Row]
    valid: list[Row]
    test: list[Row]
    stream: sources.Stream | None = None  # of which `train` holds the first rows only
    record: dict = field(default_factory=dict)  # what `fit` measured on the way: see `_record`

    @property
    def names(self) -> dict[str, str]:
        """Label as the rows have it, and the name to show."""
        return self.recipe.data.names


class Stopped(KeyboardInterrupt):
    """Somebody pressed Ctrl-C: a checkpoint was written, and the message says how to go on."""


def prepare(recipe: Recipe) -> Run:
    """Reads the rows, splits them, and loads the base model with a fresh head; nothing is attached yet."""
    _settle(recipe)
    task = tasks.find(recipe.task)
    train, valid, test = sources.parts(recipe)
    recipe.data.names = task.names(train + valid + test, recipe.data.names)
    run = Run(recipe, task, *_model(recipe, task), train, valid, test)
    if recipe.data.streaming:
        run.stream = sources.Stream(recipe, run.tokenizer, valid + test)
    return run


def attach(run: Run) -> None:
    """Puts the recipe's methods on the model; without any, everything trains."""
    methods = recipes.methods(run.recipe)
    for method in methods:
        if method.kind == "importance":
            method.batches = batches(run)
    if methods:
        pefast.attach(run.model, methods)
    if run.recipe.training.gradient_checkpointing:
        run.model.gradient_checkpointing_enable()
    _accelerate(run, run.recipe.training.accelerate)


def batches(run: Run, count: int = 16) -> Iterator[Mapping[str, Tensor]]:
    """At most so many batches of the training rows, drawn by the training's seed."""
    wanted = run.recipe.training
    size = min(wanted.batch, len(run.train))
    chosen = random.Random(wanted.seed).sample(run.train, min(count * size, len(run.train)))
    collate = run.task.collator(run.tokenizer, run.model)
    for start in range(0, len(chosen), size):
        some = run.task.encode(chosen[start : start + size], run.tokenizer, run.names, wanted.max_length)
        yield collate(list(some)).to(run.model.device)


def restore(folder: str | Path, with_rows: bool = True) -> Run:
    """A trained run: a fresh base model with the folder's adapter on it, and its rows if they are wanted.

    Raises FileNotFoundError where the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file() or not (folder / ADAPTER).is_dir():
        raise FileNotFoundError(
            f"{folder} holds no trained run; `pefast train` writes {RECIPE} and {ADAPTER}/ into its output"
        )
    recipe = recipes.read(folder / RECIPE)
    _settle(recipe)
    task = tasks.find(recipe.task)
    parts = sources.parts(recipe) if with_rows else ([], [], [])
    run = Run(recipe, task, *_model(recipe, task), *parts)
    pefast.load(run.model, folder / ADAPTER)
    _accelerate(run, recipe.training.accelerate)
    return run


def fit(run: Run, watcher: Watcher, resume: bool = False) -> dict[str, float]:
    """Trains what is trainable; returns steps, seconds and the last steps' loss and accuracy.

    With rows to choose by, the run ends with the values of its best look at them. Checkpoints are in the
    output's checkpoints/ until `store`; with `resume` the last whole one is where the run goes on.
    Raises Stopped after Ctrl-C, and OSError where a checkpoint cannot be written.
    """
    wanted, folder = run.recipe.training, Path(run.recipe.output) / CHECKPOINTS
    transformers.set_seed(wanted.seed)
    interrupt = Interrupt()
    claim.begin(run.recipe, folder)
    trainer = _trainer(run, watcher, folder, interrupt)
    start = time.perf_counter()
    try:
        begin = newest(folder) if resume else None
        trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    finally:
        watcher.close()
        interrupt.close()
        # without a checkpoint there is nothing to go on from
        if claim.is_first() and newest(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
    if interrupt.came:
        raise Stopped(f"training: stopped at step {trainer.state.global_step}; --resume goes on from there")
    run.record = _record(trainer)
    loss, accuracy = watcher.meter.read()
    seconds = time.perf_counter() - start
    fitted = {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "loss": loss,
        "train_accuracy": accuracy,
    }
    return fitted | ({"best_step": trainer.state.best_global_step} if run.valid else {})


def _record(trainer: AdapterTrainer) -> dict[str, object]:
    """The log of the whole run, and what this process measured: a resumed one only its own steps."""
    on_gpu = torch.cuda.is_available()
    return {
        "log": trainer.state.log_history,
        "seconds": trainer.gauges.finish(),
        "measured_steps": trainer.gauges.steps,
        "held": held(trained_by_method(trainer.accelerator.unwrap_model(trainer.model)), trainer.optimizer),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else _peak(),
    }


def _peak() -> int | None:
    """The most bytes that this process has held since it began; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    # a Mac counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _trainer(run: Run, watcher: Watcher, folder: Path, interrupt: Interrupt) -> AdapterTrainer:
    wanted = run.recipe.training
    callbacks = [watcher, interrupt]
    if wanted.save_every:
        callbacks.append(Every(wanted.save_every))
    if wanted.patience:
        callbacks.append(transformers.EarlyStoppingCallback(wanted.patience))
    trainer = AdapterTrainer(
        run.model,
        _arguments(run, folder),
        data_collator=run.task.collator(run.tokenizer, run.model),
        train_dataset=run.stream or run.task.encode(run.train, run.tokenizer, run.names, wanted.max_length),
        # the Trainer wants to see rows; `judge` is what looks at them
        eval_dataset=run.valid or None,
        processing_class=run.tokenizer,
        callbacks=callbacks,
        meter=watcher.meter,
        hits=run.task.hits,
        judge=lambda model: score(run, run.valid)[1],
        rates=wanted.rates or {},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def score(run: Run, rows: Sequence[Row] | None = None) -> tuple[object, dict[str, float]]:
    """Answers to the held-out rows, or to others, in the task's own form, and the task's metrics."""
    rows = run.test if rows is None else rows
    answers = predict(run, rows)
    return answers, run.task.metrics(answers, rows, run.names)


def predict(run: Run, rows: Sequence[Row]):
    """Answers to any rows, in their order and in the task's own form (logits [n, C] for a classification)."""
    return run.task.predict(run.model, run.tokenizer, rows, run.recipe.training.max_length)


def say(run: Run, rows: Sequence[Row]) -> list[dict[str, object]]:
    """Answers to any rows, one dictionary each, for people and for JSON."""
    return run.task.say(predict(run, rows), run.names)


def store(run: Run, metrics: dict[str, float]) -> Path:
    """Writes adapter, recipe and metrics to the recipe's output; each appears whole or not at all.

    The run's checkpoints go: what they were for is done. Of several processes the first writes.
    """
    folder = Path(run.recipe.output)
    # shards are with all processes
    if claim.is_first() or is_sharded(run.model):
        pefast.save(run.model, folder / ADAPTER)
    if not claim.is_first():
        return folder
    write_whole(folder / RECIPE, recipes.written(run.recipe))
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return folder


def baseline(run: Run) -> dict[str, object] | None:
    """What can be said of the held-out rows without a model: its metrics, and "what" it is in words; None
    where the base model itself is what is to be beaten."""
    known = run.task.baseline(run.train, run.test, run.names)
    if known is None:
        return None
    what, answers = known
    return {"what": what} | run.task.metrics(answers, run.test, run.names)


def trainable(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def paired_steps(run: Run, pairs: int = 8) -> dict[str, float]:
    """Milliseconds of one training step, forward and backward: pefast's choice of hands, and plain PyTorch.

    Both see the same batch and take turns, so that a change in the machine's speed meets both; medians.
    """
    wanted = run.recipe.training
    chosen = random.Random(0).sample(run.train, min(wanted.batch, len(run.train)))
    encoded = run.task.encode(chosen, run.tokenizer, run.names, wanted.max_length)
    batch = run.task.collator(run.tokenizer, run.model)(encoded).to(run.model.device)
    run.model.train()
    times = {"automatic": [], "plain": []}
    for turn in range(pairs + 2):
        for name, seconds in times.items():
            taken = _step(run, batch, plain=name == "plain")
            # the first two turns fill caches
            if turn >= 2:
                seconds.append(taken)
    _accelerate(run, wanted.accelerate)
    run.model.zero_grad()
    run.model.eval()
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def _step(run: Run, batch: dict[str, Tensor], plain: bool) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    # plain also means torch's own dropout: pefast's in plain PyTorch would be a slow rival
    _accelerate(run, run.recipe.training.accelerate and not plain)
    run.model.zero_grad()
    with pefast.backend("eager") if plain else contextlib.nullcontext():
        wait()
        start = time.perf_counter()
        run.model(**batch).loss.backward()
        wait()
        return time.perf_counter() - start


def _accelerate(run: Run, on: bool) -> None:
    compute = run.recipe.training.compute if on else None
    pefast.accelerate(run.model, attention=on, dropout=on, loss=on, peft=on, compute=compute)


def _arguments(run: Run, folder: Path) -> TrainingArguments:
    wanted = run.recipe.training
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    looks = "no" if not run.valid else "steps" if wanted.evaluate_every else "epoch"
    if wanted.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent / "tensorboard")
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=wanted.epochs,
        max_steps=wanted.max_steps or -1,
        per_device_train_batch_size=wanted.batch,
        gradient_accumulation_steps=wanted.accumulate,
        learning_rate=wanted.lr,
        lr_scheduler_type=wanted.schedule,
        warmup_steps=wanted.warmup,
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.clip,
        seed=wanted.seed,
        eval_strategy=looks,
        eval_steps=wanted.evaluate_every,
        # the best look is gone back to, so each look leaves a checkpoint
        save_strategy=looks,
        save_steps=wanted.evaluate_every or 500,
        load_best_model_at_end=bool(run.valid),
        metric_for_best_model=run.task.METRIC if run.valid else None,
        greater_is_better=True,
        logging_strategy="steps",
        logging_first_step=True,
        logging_steps=_logging_steps(run),
        report_to="tensorboard" if wanted.tensorboard else "none",
        disable_tqdm=True,
        # the collator gives what the model takes; a forward that pefast wraps has no names to choose by
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # said, so that processes of torchrun find each other without a GPU too
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if several and not torch.cuda.is_available() else None,
    )


def _logging_steps(run: Run) -> int:
    """Steps between two lines of the log: two hundred lines or more; for TensorBoard at most ten steps."""
    wanted = run.recipe.training
    steps = wanted.max_steps or wanted.epochs * len(run.train) / (wanted.batch * wanted.accumulate)
    apart = int(steps) // 200 or 1
    return min(apart, 10) if wanted.tensorboard else apart


def _settle(recipe: Recipe) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(recipe.training.seed)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)


def _model(recipe: Recipe, task: ModuleType) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    folder = carried.resolve(recipe.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = task.model(folder, recipe.data.names, getattr(torch, recipe.training.dtype))
    sources.check_length(recipe, model)
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def write_whole(path: Path, content: str) -> None:
    """Writes a text file that appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)
