"""Tasks that no carried package has, derived from others: questions about named entities, pairs of them, and
headlines beside their own or another article.

They show that a task runs and learns. They are easier than what people annotate, and are never to be compared
with published numbers.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

QUESTIONS = {
    "PER": "Which person is mentioned?",
    "LOC": "Which place is mentioned?",
    "ORG": "Which organisation is mentioned?",
}


class Entity(NamedTuple):
    """A run of words with one kind."""

    kind: str
    begin: int
    end: int


def entities(tags: list[str]) -> list[Entity]:
    """The entities of BIO tags; an I- that follows nothing of its kind begins one."""
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        mark, kind = tag.split("-", 1)
        if mark == "I" and found and found[-1].end == place and found[-1].kind == kind:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            found.append(Entity(kind, place, place + 1))
    return found


def questions(record: dict) -> Iterator[dict]:
    """A question for each kind of which a sentence names exactly one: question, context, answer."""
    words, named = record["tokens"], entities(record["tags"])
    for kind, question in QUESTIONS.items():
        of_kind = [entity for entity in named if entity.kind == kind]
        if len(of_kind) == 1:
            answer = " ".join(words[of_kind[0].begin : of_kind[0].end])
            yield {"question": question, "context": " ".join(words), "answer": answer}


def typed_pairs(record: dict) -> Iterator[dict]:
    """The first two entities of a sentence, with their kinds as the label: text, head, tail, label."""
    words, named = record["tokens"], entities(record["tags"])
    if len(named) >= 2:
        head, tail = (" ".join(words[entity.begin : entity.end]) for entity in named[:2])
        if head not in tail and tail not in head:
            label = "-".join(entity.kind for entity in named[:2])
            yield {"text": " ".join(words), "head": head, "tail": tail, "label": label}


def headlines(records: Iterable[dict]) -> Iterator[dict]:
    """A headline beside an article of the same folder, its own or not: headline, body, label.

    Of every two articles both have their own headline, or each has the other's; so no headline and no article
    comes twice, and either label says nothing of another row.
    """
    for _, alike in itertools.groupby(records, lambda record: record["label"]):
        alike = list(alike)
        for number in range(0, len(alike) - 1, 2):
            one, other = alike[number : number + 2]
            own = number % 4 == 0
            label = "own" if own else "another's"
            yield {"headline": (one if own else other)["headline"], "body": one["body"], "label": label}
            yield {"headline": (other if own else one)["headline"], "body": other["body"], "label": label}


def _of_each(derive: Callable[[dict], Iterator[dict]]) -> Callable[[Iterable[dict]], Iterator[dict]]:
    return lambda records: itertools.chain.from_iterable(map(derive, records))


class Derived(NamedTuple):
    """How records of another kind are made, and the column that these need."""

    make: Callable[[Iterable[dict]], Iterator[dict]]
    needs: str


DERIVED = {
    "questions": Derived(_of_each(questions), "tags"),
    "typed-pairs": Derived(_of_each(typed_pairs), "tags"),
    "headlines": Derived(headlines, "headline"),
}
