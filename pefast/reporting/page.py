"""report.html: the facts of a run on one page that needs no network, no script and no other file."""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path

import jinja2

from .. import card
from ..gauges import PARTS
from ..trainer import ADAPTER
from ..training import Run, write_whole
from . import charts
from .facts import REPORT, collect, trained

PAGE = "report.html"
# signs that could turn the page's own text around, or hide, and say so instead
_HIDDEN = dict.fromkeys(
    (
        *(*range(9), 11, 12, *range(14, 32), *range(127, 160)),
        *(*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    ),
    "\N{REPLACEMENT CHARACTER}",
)
# rows of a confusion matrix that is still read as one
MATRIX = 24


def write(folder: Path, facts: Mapping[str, object]) -> list[Path]:
    """Writes report.json and report.html into a folder, each whole or not at all."""
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    # first the page: where it cannot be made, the older pair stays
    contents = {PAGE: page(facts), REPORT: text + "\n"}
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def finish(
    run: Run, folder: Path, answers, scores: Mapping[str, object], numbers: Mapping[str, object]
) -> Path:
    """Writes report and model card of a run that has just been stored; returns the page's path. See `collect`
    for the scores; `numbers` are those of metrics.json."""
    facts = collect(run, folder, answers, scores, trained(run, numbers))
    card.write(folder / ADAPTER, facts)
    return write(folder, facts)[0]


def page(facts: Mapping[str, object]) -> str:
    """The page as HTML; every text in it that is not the template's own is escaped."""
    source = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # autoescape: rows, labels and recipes come from anywhere
    loading = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: seen(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loading.filters |= {
        "count": count,
        "size": size,
        "score": score,
        "share": share,
        "milliseconds": milliseconds,
    }
    return loading.from_string(source).render(
        facts=facts,
        charts=drawn(facts),
        parts=parts(facts["trained"]),
        confused=confused(facts["findings"]),
        matrix=MATRIX,
    )


def drawn(facts: Mapping[str, object]) -> dict[str, list[dict]]:
    """The charts of a report: title, SVG and the names in its legend."""
    curves, found = facts["trained"].get("curves", {}), facts["findings"]
    titles = {
        "loss": "Loss of the training batches",
        "metric": f"{seen(facts['metric'])} of the rows to choose by",
        "learning_rate": "Learning rate",
        "grad_norm": "Norm of the gradients",
        "tokens_per_second": "Tokens per second",
    }
    shown = []
    for key, title in titles.items():
        series = _told_apart(curves.get(key, {}))
        # a point alone is no curve
        if max(map(len, series.values()), default=0) < 2:
            continue
        if key in ("loss", "tokens_per_second"):
            series = {"as logged": series[key], "mean of ten": smoothed(series[key])}
        shown.append({"title": title, "svg": charts.lines(series, "step", title), "names": list(series)})
    extra = []
    if found.get("points"):
        svg = charts.scatter(found["points"], "right", "answers")
        extra = [{"title": "Answers (up) and right numbers (across)", "svg": svg, "names": []}]
    elif found.get("tenths"):
        svg = charts.bars(found["tenths"], (0, 1), "ROUGE-L", "rows")
        extra = [{"title": "Rows by ROUGE-L with the right text", "svg": svg, "names": []}]
    return {"curves": shown, "findings": extra}


def _told_apart(series: Mapping[str, list]) -> dict[str, list]:
    """Series by names without the adapter's, which is one; as one where all of them are the same."""
    if len(series) > 1 and all(each == next(iter(series.values())) for each in series.values()):
        return {"all": next(iter(series.values()))}
    return {seen(name.rpartition("/")[2]): each for name, each in series.items()}


def smoothed(points: list[list[float]], width: int = 10) -> list[list[float]]:
    """Each point with the mean of the last `width` values; without values, none."""
    found = []
    for end in range(1, len(points) + 1):
        values = [value for _, value in points[max(0, end - width) : end] if value is not None]
        if values:
            found.append([points[end - 1][0], sum(values) / len(values)])
    return found


def parts(measured: Mapping[str, object]) -> list[dict[str, object]]:
    """Each part of a step: its name, milliseconds of a mean step, and share of the time."""
    step = measured.get("step", {})
    seconds, measured = step.get("seconds", {}), step.get("measured", 0)
    total = sum(seconds.values())
    if not measured or not total:
        return []
    return [
        {"name": name, "ms": 1e3 * seconds[name] / measured, "share": seconds[name] / total} for name in PARTS
    ]


def confused(found: Mapping[str, object]) -> list[dict[str, object]]:
    """The commonest confusions of a classification, for more labels than a matrix shows."""
    if len(found.get("labels", ())) <= MATRIX:
        return []
    pairs = [
        {"wanted": found["labels"][i], "said": found["labels"][j], "rows": number}
        for i, row in enumerate(found["counts"])
        for j, number in enumerate(row)
        if i != j and number
    ]
    return sorted(pairs, key=lambda pair: -pair["rows"])[:MATRIX]


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u2009")


def size(value: float | None) -> str:
    """Bytes in the unit that fits."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def score(value: object) -> str:
    """A metric with three digits behind the point; a word stays a word."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def share(value: float) -> str:
    """A part of one as a percentage."""
    return f"{100 * value:.2g}\u00a0%" if value < 0.1 else f"{100 * value:.1f}\u00a0%"


def milliseconds(value: float) -> str:
    """Three digits, and from a hundred on whole ones."""
    return f"{count(value) if value >= 100 else f'{value:.3g}'}\u00a0ms"


def seen(text: object) -> str:
    """A text without signs that nobody sees."""
    return str(text).translate(_HIDDEN)
