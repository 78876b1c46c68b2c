"""Tasks that no carried package has, derived from named entities: questions about them, and pairs of them.

They show that a task runs and learns. They are easier than what people annotate, and are never to be compared
with published numbers.
"""

from collections.abc import Callable, Iterator
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


DERIVED: dict[str, Callable[[dict], Iterator[dict]]] = {"questions": questions, "typed-pairs": typed_pairs}
