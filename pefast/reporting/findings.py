"""What a run's answers show beyond the metrics: per class, per entity, per length, and the worst errors.

Everything comes back as what JSON holds. Texts are the data's own and nobody's to trust.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor

from ..tasks.rows import Row

WORST = 20  # errors that are shown
LONGEST = 1000  # letters of a text that are kept
POINTS = 400  # rows of a scatter plot


def findings(task: ModuleType, answers, rows: Sequence[Row], names: dict[str, str]) -> dict[str, object]:
    """What fits the task: {"kind": ..., its numbers, "errors": the worst first}.

    An error is {"texts": {role: text}, "wanted", "said", "note"}, of a tagged text also "words", each with
    the tag that it has and the one it got.
    """
    kind = getattr(task, "OVER", task).__name__.rpartition(".")[2]
    found = FINDERS[kind](task, answers, rows, names)
    return {"kind": kind, "rows": len(rows), **found}


def _classes(task: ModuleType, logits: Tensor, rows: Sequence[Row], names: dict[str, str]) -> dict:
    """The confusion matrix, counts[wanted][said], and precision, recall and F1 of each class."""
    shown, number = list(names.values()), {label: index for index, label in enumerate(names)}
    wanted = [number[str(row["label"])] for row in rows]
    shares, chosen = logits.float().softmax(-1).max(-1)
    said = chosen.tolist()
    counts = [[0] * len(shown) for _ in shown]
    for right, got in zip(wanted, said, strict=True):
        counts[right][got] += 1
    wrong = sorted(
        (i for i in range(len(rows)) if wanted[i] != said[i]), key=lambda i: (-shares[i].item(), i)
    )
    errors = [
        _error(rows[i], shown[wanted[i]], shown[said[i]], f"probability {shares[i].item():.2f}")
        for i in wrong[:WORST]
    ]
    return {
        "labels": shown,
        "counts": counts,
        "classes": [{"label": name, **_rates(counts, index)} for index, name in enumerate(shown)],
        "wrong": len(wrong),
        "errors": errors,
    }


def _rates(counts: list[list[int]], index: int) -> dict[str, float | int]:
    right, support = counts[index][index], sum(counts[index])
    said = sum(row[index] for row in counts)
    return {
        "precision": right / said if said else 0.0,
        "recall": right / support if support else 0.0,
        # 2pr / (p + r)
        "f1": 2 * right / (said + support) if said + support else 0.0,
        "rows": support,
    }


def _tags(task: ModuleType, said: list[list[int]], rows: Sequence[Row], names: dict[str, str]) -> dict:
    """Precision, recall and F1 of each kind of entity, or of each tag where tags are no BIO."""
    tags = list(names)
    guessed = [[tags[index] for index in row] for row in said]
    wanted = [[str(tag) for tag in row["label"]] for row in rows]
    if any(tag.startswith(("B-", "I-")) for tag in tags):
        from seqeval.metrics import classification_report

        report = classification_report(wanted, guessed, output_dict=True, zero_division=0)
        classes = [
            {
                "label": name,
                "precision": float(one["precision"]),
                "recall": float(one["recall"]),
                "f1": float(one["f1-score"]),
                "rows": int(one["support"]),
            }
            for name, one in report.items()
            if not name.endswith(" avg")
        ]
    else:
        pairs = Counter(
            pair for one, other in zip(wanted, guessed, strict=True) for pair in zip(one, other, strict=True)
        )
        counts = [[pairs[right, got] for got in tags] for right in tags]
        classes = [{"label": name, **_rates(counts, index)} for index, name in enumerate(tags)]
    misses = [
        sum(one != other for one, other in zip(*pair, strict=True))
        for pair in zip(wanted, guessed, strict=True)
    ]
    worst = sorted((i for i, count in enumerate(misses) if count), key=lambda i: (-misses[i], i))
    errors = []
    for i in worst[:WORST]:
        words = [
            list(map(_cut, map(str, three)))
            for three in zip(rows[i]["tokens"], wanted[i], guessed[i], strict=True)
        ]
        errors.append({"texts": {}, "words": words, "note": f"{misses[i]} of {len(words)} words"})
    return {"classes": classes, "wrong": len(worst), "errors": errors}


def _numbers(task: ModuleType, said: Tensor, rows: Sequence[Row], names: dict[str, str]) -> dict:
    """The right and the given number of some rows, in the labels' own unit."""
    got = [one["value"] for one in task.say(said, names)]
    wanted = [float(row["label"]) for row in rows]
    worst = sorted(range(len(rows)), key=lambda i: (-abs(got[i] - wanted[i]), i))
    errors = [
        _error(rows[i], f"{wanted[i]:g}", f"{got[i]:.4g}", f"off by {abs(got[i] - wanted[i]):.3g}")
        for i in worst[:WORST]
        if got[i] != wanted[i]
    ]
    step = max(1, -(-len(rows) // POINTS))
    return {"points": [list(pair) for pair in zip(wanted, got, strict=True)][::step], "errors": errors}


def _spans(task: ModuleType, said: list[str], rows: Sequence[Row], names: dict[str, str]) -> dict:
    """F1 and exact match by the number of words in the right answer."""
    scores = [task.metrics([one], [row], names) for one, row in zip(said, rows, strict=True)]
    lengths = [len(str(row["label"]).split()) for row in rows]
    groups = []
    for low, high in ((1, 1), (2, 2), (3, 4), (5, 8), (9, None)):
        inside = [i for i, count in enumerate(lengths) if count >= low and (high is None or count <= high)]
        if inside:
            name = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
            means = {key: sum(scores[i][key] for i in inside) / len(inside) for key in scores[0]}
            groups.append({"label": name, **means, "rows": len(inside)})
    worst = sorted((i for i in range(len(rows)) if scores[i]["f1"] < 1), key=lambda i: (scores[i]["f1"], i))
    errors = [_error(rows[i], rows[i]["label"], said[i], f"F1 {scores[i]['f1']:.2f}") for i in worst[:WORST]]
    return {"lengths": groups, "wrong": len(worst), "errors": errors}


def _texts(task: ModuleType, said: list, rows: Sequence[Row], names: dict[str, str]) -> dict:
    """How near the texts come to the right ones (ROUGE-L of each row, in tenths), and some of them."""
    from rouge_score.rouge_scorer import RougeScorer

    texts = [one if isinstance(one, str) else one.text for one in said]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    near = [
        scorer.score(str(row["label"]), text)["rougeL"].fmeasure
        for row, text in zip(rows, texts, strict=True)
    ]
    tenths = [0] * 10
    for value in near:
        tenths[min(int(10 * value), 9)] += 1
    order = sorted(range(len(rows)), key=lambda i: (near[i], i))

    def show(chosen: Sequence[int]) -> list[dict]:
        return [_error(rows[i], rows[i]["label"], texts[i], f"ROUGE-L {near[i]:.2f}") for i in chosen]

    middle = len(order) // 2
    return {
        "tenths": tenths,
        "examples": {"best": show(order[::-1][:3]), "middle": show(order[middle : middle + 3])},
        "errors": show([i for i in order[:WORST] if near[i] < 1]),
    }


def _error(row: Row, wanted: object, said: object, note: str) -> dict[str, object]:
    texts = {role: _cut(str(value)) for role, value in row.items() if role != "label"}
    return {"texts": texts, "wanted": _cut(str(wanted)), "said": _cut(str(said)), "note": note}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


Finder = Callable[[ModuleType, object, Sequence[Row], dict[str, str]], dict]
FINDERS: dict[str, Finder] = {
    "text_classification": _classes,
    "token_classification": _tags,
    "regression": _numbers,
    "question_answering": _spans,
    "causal_generation": _texts,
    "sequence_to_sequence": _texts,
}
