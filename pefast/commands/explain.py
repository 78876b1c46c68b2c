"""`pefast explain`: which hand computes each layer."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import console, in_words


def explain(
    target: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A trained folder, or a recipe file.")],
) -> None:
    """Say which hand computes each layer, and why the others do not."""
    with in_words():
        import pefast

        from .. import recipe as recipes
        from .. import training

        if target.is_dir():
            run = training.restore(target, with_rows=False)
        else:
            run = training.prepare(recipes.read(target))
            training.attach(run)
        console.print(str(pefast.explain(run.model)), markup=False, soft_wrap=True)
