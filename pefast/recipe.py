"""A recipe: all that one training run needs, from a YAML file and flags, checked before work begins."""

import copy
import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

DTYPES = ("float32", "bfloat16", "float16")
# those of transformers' schedules that need nothing but the number of steps
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
_COUNTS = ("max_steps", "evaluate_every", "patience", "save_every")
# what a search may change; other keys would change the rows that judge
SEARCHED = ("model", "methods", "training", "data.columns", "data.train_rows")


@dataclass
class Source:
    """Where the rows come from and how they are split."""

    source: str  # a package that carries rows, or a .csv or .jsonl file
    test_source: str | None = (
        None  # a file of its own for the held-out rows; otherwise test_rows are split off
    )
    valid_source: str | None = None  # rows that choose between epochs and settings; otherwise valid_rows
    columns: dict | None = None  # the column of a role, where it is not the task's own: {text: review}
    derive: str | None = None  # rows made from others: questions, typed-pairs (of entities) or headlines
    where: dict | None = None  # only rows whose columns have these values
    names: dict | None = None  # the name to show for each label
    train_rows: int | None = None  # at most so many
    test_rows: int | None = None  # held out: 1000 of the source, or all of test_source
    valid_rows: int = 0
    seed: int = 0  # of the split, apart from the training's seed so that runs stay comparable
    stratified: bool = True  # split so that every part has a classification's labels in like shares
    streaming: bool = False  # read while training, for rows that do not fit in memory


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
    compute: str | None = None  # "bf16": fp32 products round their factors to bf16 where that is faster


@dataclass
class Search:
    """What `pefast select` tries, and how each trial is judged."""

    # dotted keys, each with a list of choices or a range {low: 1e-4, high: 1e-2, log: true}
    space: dict
    trials: int = 20
    folds: int = 0  # of the training rows; 0: data.valid_rows or data.valid_source judge
    seed: int = 0  # of what is tried; the training's own stays


class Range(typing.NamedTuple):
    """Numbers from low to high, both included; whole numbers where both are."""

    low: float
    high: float
    log: bool


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
    search: Search | None = None  # for `pefast select`; `pefast train` passes over it


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
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    return parse(text, path, changes, quick)


def parse(
    text: str, path: str | Path, changes: dict[str, object] | None = None, quick: bool = False
) -> Recipe:
    """The recipe of a YAML text; `path` is what errors name. See `read`."""
    try:
        content = yaml.safe_load(text)
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


def changed(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    """Another recipe with `changes` (dotted keys) laid over. Raises ValueError as `read` does."""
    content = dataclasses.asdict(recipe)
    for dotted, value in changes.items():
        _change(content, dotted, value)
    made = _build(Recipe, content, "recipe")
    _check(made)
    return made


def differences(was: Recipe, now: Recipe) -> Iterator[tuple[str, object, object]]:
    """(dotted key, old value, new value) wherever two recipes differ."""
    before, after = dataclasses.asdict(was), dataclasses.asdict(now)
    for name in before:
        if all(isinstance(each[name], dict) for each in (before, after)):
            keys = {**before[name], **after[name]}
            pairs = [(f"{name}.{key}", before[name].get(key), after[name].get(key)) for key in keys]
        else:
            pairs = [(name, before[name], after[name])]
        yield from (pair for pair in pairs if pair[1] != pair[2])


def axes(search: Search) -> dict[str, Range | list]:
    """What each key of a search may become, the keys of whole sections first.

    Raises ValueError for a key that no search may change, no choice, or a range that is none.
    """
    if not search.space:
        raise ValueError("search.space: no key came; {training.lr: {low: 1e-4, high: 1e-2}} would be right")
    return {
        key: _axis(key, search.space[key]) for key in sorted(search.space, key=lambda key: key.count("."))
    }


def label(choice: object) -> object:
    """A choice as a table takes it: numbers and words as they are, the rest as one line of YAML."""
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    return yaml.safe_dump(choice, default_flow_style=True, sort_keys=False, width=1_000_000).strip()


def _axis(key: str, given: object) -> Range | list:
    where = f"search.space.{key}"
    if not any(key == known or key.startswith(known + ".") for known in SEARCHED):
        raise ValueError(f"{where}: a search changes {', '.join(SEARCHED)} and what is below them")
    if isinstance(given, list) and given:
        return given
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        raise ValueError(
            f"{where}: {given!r} came; a list of choices or {{low: 1e-4, high: 1e-2, log: true}} is wanted"
        )
    low, high = (_value(float, given[end], f"{where}.{end}") for end in ("low", "high"))
    log = _value(bool, given.get("log", False), f"{where}.log")
    if not low < high or (log and low <= 0):
        above = " and above 0" if log else ""
        raise ValueError(
            f"{where}: from {low:g} to {high:g} came; a low end below the high one{above} is right"
        )
    whole = all(isinstance(given[end], int) for end in ("low", "high"))
    return Range(int(low), int(high), log) if whole else Range(low, high, log)


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
        if isinstance(content, list):
            content = content[_place(content, section, dotted)]
        else:
            content = content.setdefault(section, {})
        if not isinstance(content, dict | list):
            raise ValueError(f"--set: {section!r} in {dotted!r} has no keys below it")
    # a copy: a later change may go below it
    content[_place(content, key, dotted) if isinstance(content, list) else key] = copy.deepcopy(value)


def _place(entries: list, key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(entries):
        raise ValueError(
            f"--set: {key!r} in {dotted!r} is no place in a list of {len(entries)}, counted from 0"
        )
    return int(key)


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
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in choices:
        return None
    if dataclasses.is_dataclass(choices[0]):
        return _build(choices[0], value, where)
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
    if recipe.training.compute not in (None, "bf16"):
        raise ValueError(
            f"training.compute: {recipe.training.compute!r} came; bf16, or nothing, would be right"
        )
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
    if recipe.search is not None:
        _check_search(recipe)
    if recipe.data.streaming:
        _check_streaming(recipe)
    if recipe.training.patience and not (recipe.data.valid_rows or recipe.data.valid_source):
        raise ValueError(
            "training.patience: there are no rows to choose by; data.valid_rows=200 holds some out"
        )


def _check_streaming(recipe: Recipe) -> None:
    data, said = recipe.data, None
    if recipe.training.max_steps is None:
        said = "a stream has no end; training.max_steps=1000 says when to stop"
    elif data.test_source is None or data.valid_rows:
        said = "nothing is split off a stream; data.test_source and data.valid_source name files of their own"
    elif recipe.training.evaluate_every is None and data.valid_source is not None:
        said = (
            "a stream has no epochs; training.evaluate_every=100 says when to look at the rows to choose by"
        )
    elif recipe.search is not None and recipe.search.folds:
        said = "a stream has no folds; search.folds=0 and data.valid_source would be right"
    if said:
        raise ValueError(f"data.streaming: {said}")


def _check_search(recipe: Recipe) -> None:
    search = recipe.search
    if search.trials < 1 or search.folds < 0 or search.folds == 1:
        raise ValueError(
            f"search: {search.trials} trials and {search.folds} folds came; at least one trial,"
            " and 0 folds or from 2 on, would be right"
        )
    if not search.folds and not (recipe.data.valid_rows or recipe.data.valid_source):
        raise ValueError(
            "search: there are no rows to judge by; data.valid_rows=200 holds some out, search.folds=3 takes"
            " turns with the training rows"
        )
    bare = dataclasses.replace(recipe, search=None)
    for key, axis in axes(search).items():
        # what is below a method is checked against the methods, which know their settings
        if key.startswith("methods."):
            continue
        for value in axis[:2] if isinstance(axis, Range) else axis:
            try:
                changed(bare, {key: value})
            except ValueError as error:
                raise ValueError(f"search.space.{key}: {error}") from None
