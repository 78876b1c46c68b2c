"""One run at a time in one folder, and never over an unfinished one by mistake.

Of the processes of one run, as torchrun starts them, the first holds the folder and writes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from . import recipe as recipes
from .recipe import Recipe
from .trainer import newest

try:
    import fcntl
except ImportError:
    # Windows has its own
    import msvcrt

    fcntl = None

LOCK, STARTED = ".lock", "recipe.yaml"
# what may change between the halves of a resumed run without changing its result
_FREE = {"output", "training.threads", "training.save_every", "training.tensorboard"}


def is_first() -> bool:
    """Whether this process is the only one of its run, or the one that writes."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def claim(recipe: Recipe, checkpoints: Path, resume: bool) -> Iterator[None]:
    """Holds the recipe's output folder for this process while the run lasts.

    Raises ValueError where that is a file, where another process runs there, where an unfinished run lies
    there and `resume` is not asked for, and where the recipe to resume with is not that of the run.
    """
    if not is_first():
        yield
        return
    folder = Path(recipe.output)
    if folder.is_file():
        raise ValueError(f"train: the output {folder} is a file; a folder, or a new name, would be right")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            _hold(lock)
        except OSError:
            raise ValueError(
                f"train: another run is at work in {folder}; a different output would be right"
            ) from None
        try:
            _check(recipe, checkpoints, resume)
            yield
        finally:
            # an open file cannot go on Windows
            with contextlib.suppress(PermissionError):
                (folder / LOCK).unlink(missing_ok=True)
            _leave(new)


def begin(recipe: Recipe, checkpoints: Path) -> None:
    """Writes down what this run began with, for the check that `claim` makes."""
    if not is_first():
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    if not (checkpoints / STARTED).exists():
        (checkpoints / STARTED).write_text(recipes.written(recipe), encoding="utf-8")


def _hold(lock: IO) -> None:
    """Locks an open file until it is closed. Raises OSError where another process holds it."""
    if fcntl is not None:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)


def _check(recipe: Recipe, checkpoints: Path, resume: bool) -> None:
    last = newest(checkpoints)
    if last is None:
        # a run that was killed before its first checkpoint begins again
        (checkpoints / STARTED).unlink(missing_ok=True)
        return
    if not resume:
        raise ValueError(
            f"train: {recipe.output} holds an unfinished run ({last.name}); --resume goes on with it,"
            f" and without the folder {checkpoints} it begins anew"
        )
    started = recipes.read(checkpoints / STARTED)
    for key, was, now in _differences(dataclasses.asdict(started), dataclasses.asdict(recipe)):
        raise ValueError(
            f"train: --resume with {key} = {now!r}, but the run began with {was!r};"
            " the same recipe would be right"
        )


def _differences(was: dict, now: dict, above: str = "") -> Iterator[tuple[str, object, object]]:
    for key, value in was.items():
        path = above + key
        if isinstance(value, dict) and isinstance(now[key], dict) and path in ("data", "training"):
            yield from _differences(value, now[key], path + ".")
        elif value != now[key] and path not in _FREE:
            yield path, value, now[key]


def _leave(new: list[Path]) -> None:
    """Takes folders away that were made here and stayed empty."""
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()
