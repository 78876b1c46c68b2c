"""A recipe: all that one training run needs, from a YAML file and flags, checked before work begins."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

DTYPES = ("float32", "bfloat16", "float16")
# those of transformers' schedules that need nothing but the number of steps
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
_COUNTS = ("max_steps", "evaluate_every", "patience", "save_every")


@dataclass
class Source:
    """Where the rows come from and how they are split."""

    source: str  # a package that carries rows, or a .csv or .jsonl file
    test_source: str | None = (
        None  # a file of its own for the held-out rows; otherwise test_rows are split off
    )
    valid_source: str | None = None  # rows that choose between epochs and settings; otherwise valid_rows
    columns: dict | None = None  # the column of a role, where it is not the task's own: {text: review}
    derive: str | None = None  # questions or typed-pairs, made from rows with named entities
    where: dict | None = None  # only rows whose columns have these values
    names: dict | None = None  # the name to show for each label
    train_rows: int | None = None  # at most so many
    test_rows: int | None = None  # held out: 1000 of the source, or all of test_source
    valid_rows: int = 0
    seed: int = 0  # of the split, apart from the training's seed so that runs stay comparable


@dataclass
class Training:
    """The loop."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 32
    lr: float = 1e-3
    warmup: float = 0.06  # share of the steps; from 1 on, their number
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    schedule: str = "linear"  # of the learning rate after the warm-up, by transformers' names
    accumulate: int = 1  # batches to one step
    rates: dict | None = None  # an optimizer's options for one method: {lora: {lr: 1e-3}, head: {lr: 1e-2}}
    evaluate_every: int | None = (
        None  # steps between looks at the rows to choose by; once an epoch if left out
    )
    patience: int | None = None  # stop after so many looks without a better metric
    save_every: int | None = None  # steps between checkpoints
    gradient_checkpointing: bool = False
    tensorboard: bool = False  # curves in <output>/tensorboard
    max_length: int = 128
    seed: int = 0
    dtype: str = "float32"
    threads: int | None = None  # torch's own choice
    accelerate: bool = True  # dropout and attention of the base model run on pefast's kernels too


@dataclass
class Recipe:
    """One run."""

    model: str  # a package that carries a model, or a folder
    data: Source
    output: str
    task: str = "text-classification"
    methods: list[dict] = field(default_factory=list)  # each: method, and that method's settings
    training: Training = field(default_factory=Training)
    quick: dict = field(default_factory=dict)  # dotted keys that a short run lays over the others


def read(path: str | Path, changes: dict[str, object] | None = None, quick: bool = False) -> Recipe:
    """The recipe of a YAML file with `changes` (dotted keys, such as "training.lr") laid over it, after what
    the recipe itself lays over for a `quick` run.

    Raises FileNotFoundError, or ValueError in one sentence for YAML that does not parse, an unknown key, a
    missing key or a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe: {path} is no file; recipes/ has some to start from")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(
            f"recipe: {path}{line} is not YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {path} holds no keys; known keys are {_keys(Recipe)}")
    short = content.pop("quick", None) or {}
    for dotted, value in {**(short if quick else {}), **(changes or {})}.items():
        _change(content, dotted, value)
    recipe = _build(Recipe, content, "recipe")
    _check(recipe)
    return recipe


def written(recipe: Recipe) -> str:
    """The recipe as YAML that `read` takes back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def change(text: str) -> tuple[str, object]:
    """`training.lr=0.01` as key and value. Raises ValueError without an equals sign."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set: {text!r} has no '='; write for instance training.lr=0.01")
    return key.strip(), yaml.safe_load(value)


def methods(recipe: Recipe) -> list:
    """The method objects of a recipe.

    Raises ValueError for an unknown method or setting, naming the known ones.
    """
    # the methods import torch, and reading a recipe must stay quick
    from .methods import METHODS as known

    made = []
    for settings in recipe.methods:
        settings = dict(settings)
        name = settings.pop("method", None)
        if name not in known:
            raise ValueError(f"methods: {name!r} is not known; known methods are {', '.join(known)}")
        unknown = [key for key in settings if key not in {f.name for f in dataclasses.fields(known[name])}]
        if unknown:
            raise ValueError(f"methods: {name} has no {unknown[0]!r}; known keys are {_keys(known[name])}")
        made.append(known[name](**settings))
    return made


def _keys(cls) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _change(content: dict, dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set: {section!r} in {dotted!r} has no keys below it")
    content[key] = value


def _build(cls, content: object, where: str):
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {content!r} came; keys are wanted, known ones are {_keys(cls)}")
    unknown = [key for key in content if key not in {f.name for f in dataclasses.fields(cls)}]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not known; known keys are {_keys(cls)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for entry in dataclasses.fields(cls):
        if entry.name in content:
            values[entry.name] = _value(hints[entry.name], content[entry.name], f"{where}.{entry.name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {entry.name!r} is missing; known keys are {_keys(cls)}")
    return cls(**values)


def _value(kind, value: object, where: str):
    """`value` as `kind`; a number may be written as text, since YAML reads 1e-3 as a string."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in choices:
        return None
    kind = typing.get_origin(choices[0]) or choices[0]
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and (kind is float or number.is_integer()):
            return kind(number)
    elif isinstance(value, kind):
        return value
    wanted = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "keys and values",
        list: "a list",
    }[kind]
    raise ValueError(f"{where}: {value!r} came; {wanted} is wanted")


def _check(recipe: Recipe) -> None:
    if recipe.data.names is not None:
        for word in (word for pair in recipe.data.names.items() for word in pair if isinstance(word, bool)):
            raise ValueError(
                f"data.names: YAML reads yes, no, on and off without quotes as {word}; quote them"
            )
        # YAML reads 0 and 1 as numbers, a CSV file as text
        recipe.data.names = {str(key): str(value) for key, value in recipe.data.names.items()}
    wrong = [entry for entry in recipe.methods if not isinstance(entry, dict)]
    if wrong:
        raise ValueError(f"recipe.methods: {wrong[0]!r} came; each entry is `method: name` and its settings")
    for method, options in (recipe.training.rates or {}).items():
        if not isinstance(options, dict):
            raise ValueError(
                f"training.rates.{method}: {options!r} came; options such as {{lr: 1e-3}} are wanted"
            )
        for key, value in options.items():
            options[key] = _value(float, value, f"training.rates.{method}.{key}")
    if recipe.training.dtype not in DTYPES:
        raise ValueError(f"training.dtype: {recipe.training.dtype!r} came; it is one of {', '.join(DTYPES)}")
    for name in ("epochs", "batch", "lr", "max_length", "accumulate", *_COUNTS):
        value = getattr(recipe.training, name)
        if value is not None and not value > 0:
            raise ValueError(f"training.{name}: {value} came; it should be above 0")
    for name in ("warmup", "weight_decay", "clip"):
        if getattr(recipe.training, name) < 0:
            raise ValueError(
                f"training.{name}: {getattr(recipe.training, name)} came; it should be 0 or more"
            )
    if recipe.training.schedule not in SCHEDULES:
        raise ValueError(
            f"training.schedule: {recipe.training.schedule!r} came; it is one of {', '.join(SCHEDULES)}"
        )
    if recipe.training.patience and not (recipe.data.valid_rows or recipe.data.valid_source):
        raise ValueError(
            "training.patience: there are no rows to choose by; data.valid_rows=200 holds some out"
        )
