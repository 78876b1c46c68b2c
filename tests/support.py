"""What each method can do, tried out: `python tests/support.py` writes docs/support.md.

Every cell is an attempt on tiny models of four families; a cell that is no "yes" has the refusal's own words
as a footnote.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import pefast  # noqa: E402
from pefast.methods import METHODS  # noqa: E402
from tests.cases import CASES  # noqa: E402
from tests.models import FAMILIES, build, inputs, logits, stir  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
HEAD = """# What each method can do

Each cell was tried on tiny models by `python tests/support.py`, which writes this page; a test keeps it true.
The promises that every method keeps on every family (detach gives the base model back bit for bit, saved and
loaded it computes the same bits, bf16 and autocast, gradient checkpointing, generate with its cache, padding
on either side, the same bits run to run) are `tests/test_methods.py`.

"""


def case_of(kind: str) -> list:
    """The plainest case of tests/cases.py that has this kind alone."""
    return next(methods for methods in CASES.values() if [method.kind for method in methods] == [kind])


def tried(attempt) -> str:
    """ "" where the attempt works, or the sentence that refuses it."""
    try:
        attempt()
    except ValueError as refusal:
        return str(refusal)
    return ""


def attached(kind: str, family: str):
    """A model with the method on it, moved from its start."""
    return stir(pefast.attach(build(family), case_of(kind)))


def merges(model, family: str) -> None:
    """Merging computes the same."""
    before = logits(model, **inputs(family))
    pefast.merge(model)
    torch.testing.assert_close(logits(model, **inputs(family)), before, rtol=1e-4, atol=1e-4)


def routes(model, family: str) -> None:
    """Rows of one batch take this adapter or the base model."""
    with pefast.route(model, ["default", None, "default"]):
        logits(model, **inputs(family))


def compiles(model, family: str) -> None:
    """One graph, forward."""
    torch.compiler.reset()
    before = logits(model, **inputs(family))
    got = torch.compile(model, fullgraph=True, backend="eager")(**inputs(family)).logits
    torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-4)


def folder_of(model) -> str:
    """The peft_type that its folder says."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        pefast.save(model, folder)
        found = json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"]
    return "pefast's" if found.startswith("PEFAST") else f"PEFT's {found}"


def lines() -> list[str]:
    """The table and its footnotes."""
    notes: dict[str, int] = {}

    def cell(why: str) -> str:
        return "yes" if not why else f"no [^{notes.setdefault(why, len(notes) + 1)}]"

    columns = ["method", *FAMILIES, "merge", "route", "one graph", "its folder"]
    table = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for kind, method in METHODS.items():
        cells = [f"`{method.__name__}`"]
        cells += [cell(tried(lambda f=family, k=kind: attached(k, f))) for family in FAMILIES]
        for attempt in (merges, routes, compiles):
            model = attached(kind, "bert")
            cells.append(cell(tried(lambda a=attempt, m=model: a(m, "bert"))))
        table.append(" | ".join([*cells, folder_of(attached(kind, "bert"))]))
    return [f"| {line} |" for line in table] + ["", *(f"[^{number}]: {why}" for why, number in notes.items())]


def page() -> str:
    """The whole page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HEAD + "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
