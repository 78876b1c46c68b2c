"""One run of a recipe: rows and model in, an adapter folder and its numbers out; the loop is Trainer's."""

import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

import pefast

from . import recipe as recipes
from . import tasks
from .progress import Meter, Watcher
from .recipe import Recipe, Training
from .tasks import carried, rows
from .tasks.rows import Row

ADAPTER, RECIPE, METRICS = "adapter", "recipe.yaml", "metrics.json"


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

    @property
    def names(self) -> dict[str, str]:
        """Label as the rows have it, and the name to show."""
        return self.recipe.data.names


class MeteredTrainer(Trainer):
    """transformers' Trainer that reports every step's loss and hits."""

    def __init__(self, *args, meter: Meter, hits: Callable[[Tensor, Tensor], Tensor], **kwargs):
        super().__init__(*args, **kwargs)
        self.meter, self.hits = meter, hits

    def create_optimizer(self, model=None):
        """The Trainer's own optimizer, over pefast's groups: rates that a method asks for are honoured."""
        if self.optimizer is None:
            groups = pefast.parameter_groups(self.model, self.args.learning_rate, self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's own loss; in training its value and the share of hits go to the meter."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.meter.add(loss.detach(), self.hits(outputs["logits"].detach(), inputs["labels"]))
        return (loss, outputs) if return_outputs else loss


def prepare(recipe: Recipe) -> Run:
    """Reads the rows, splits them, and loads the base model with a fresh head; nothing is attached yet."""
    _settle(recipe)
    task = tasks.find(recipe.task)
    train, valid, test = _rows(recipe, task)
    recipe.data.names = task.names(train + valid + test, recipe.data.names)
    return Run(recipe, task, *_model(recipe, task), train, valid, test)


def attach(run: Run) -> None:
    """Puts the recipe's methods on the model; without any, everything trains."""
    methods = recipes.methods(run.recipe)
    if methods:
        pefast.attach(run.model, methods)
    _accelerate(run, run.recipe.training.accelerate)


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
    parts = _rows(recipe, task) if with_rows else ([], [], [])
    run = Run(recipe, task, *_model(recipe, task), *parts)
    pefast.load(run.model, folder / ADAPTER)
    _accelerate(run, recipe.training.accelerate)
    return run


def fit(run: Run, watcher: Watcher) -> dict[str, float]:
    """Trains what is trainable; returns steps, seconds and the last steps' loss and accuracy."""
    wanted = run.recipe.training
    transformers.set_seed(wanted.seed)
    # the Trainer makes its folder even when it has nothing to write there
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeteredTrainer(
            run.model,
            _arguments(wanted, folder),
            data_collator=run.task.collator(run.tokenizer, run.model),
            train_dataset=run.task.encode(run.train, run.tokenizer, run.names, wanted.max_length),
            processing_class=run.tokenizer,
            callbacks=[watcher],
            meter=watcher.meter,
            hits=run.task.hits,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        try:
            trainer.train()
        finally:
            watcher.close()
    loss, accuracy = watcher.meter.read()
    seconds = time.perf_counter() - start
    return {"steps": trainer.state.global_step, "seconds": seconds, "loss": loss, "train_accuracy": accuracy}


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
    """Writes adapter, recipe and metrics to the recipe's output; each appears whole or not at all."""
    folder = Path(run.recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    pefast.save(run.model, folder / ADAPTER)
    _replace(folder / RECIPE, recipes.written(run.recipe))
    _replace(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    return folder


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
    pefast.accelerate(run.model, attention=on, dropout=on, loss=on, peft=on)


def _arguments(wanted: Training, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=wanted.epochs,
        max_steps=wanted.max_steps or -1,
        per_device_train_batch_size=wanted.batch,
        learning_rate=wanted.lr,
        warmup_steps=wanted.warmup,
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.clip,
        # rows of like length share a batch, so little of it is padding
        train_sampling_strategy="group_by_length",
        seed=wanted.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _settle(recipe: Recipe) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(recipe.training.seed)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)


def read_rows(recipe: Recipe, source: str | Path) -> list[Row]:
    """The rows of one source, as the recipe's task and columns want them."""
    task = tasks.find(recipe.task)
    given = recipe.data.columns or {}
    if unknown := sorted(set(given) - set(task.ROLES)):
        raise ValueError(
            f"data.columns: {recipe.task} has no {unknown[0]!r}; its roles are {', '.join(task.ROLES)}"
        )
    columns = {role: column for role, column in (task.ROLES | given).items() if column is not None}
    return rows.read(carried.resolve(str(source)), columns, recipe.data.where)


def _rows(recipe: Recipe, task: ModuleType) -> tuple[list[Row], list[Row], list[Row]]:
    """To train on, to choose by, and held out to the end."""
    data = recipe.data
    train, valid = read_rows(recipe, data.source), []
    if data.test_source is None:
        train, test = rows.split(train, data.test_rows, data.seed)
    else:
        test = read_rows(recipe, data.test_source)
        train = rows.without(train, test)
        random.Random(data.seed).shuffle(train)
    if data.valid_source is not None:
        valid = rows.without(read_rows(recipe, data.valid_source), test)
        train = rows.without(train, valid)
    elif data.valid_rows:
        train, valid = rows.split(train, data.valid_rows, data.seed)
    return train[: data.train_rows], valid, test


def _model(recipe: Recipe, task: ModuleType) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    folder = carried.resolve(recipe.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = task.model(folder, recipe.data.names, getattr(torch, recipe.training.dtype))
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def _replace(path: Path, content: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)
