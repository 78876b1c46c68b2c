"""A task as a cloze question: the words around a text, and the words that answer for each label.

Paper: PET, Schick and Schütze 2021, arXiv:2001.07676.
"""

import string
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

TEXTS = ("text_a", "text_b")
MASK = "mask"


class Template:
    """Words around one text, or two, and the place of the answer: Template("{text_a} It was {mask}.").

    Raises ValueError for a template without {text_a}, without {mask} or with two, or with another slot.
    """

    def __init__(self, text: str):
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"Template: {text!r} cannot be read: {error}") from None
        # literal words and slots in turn; a slot is a name of TEXTS, or MASK
        self.parts: list[tuple[str, str | None]] = [(words, slot) for words, slot, _, _ in parts]
        self.text = text
        slots = [slot for _, slot in self.parts if slot is not None]
        if odd := [slot for slot in slots if slot not in (*TEXTS, MASK)]:
            raise ValueError(f"Template: {text!r} has a slot {{{odd[0]}}}; text_a, text_b and mask are known")
        if slots.count(MASK) != 1:
            raise ValueError(
                f"Template: {text!r} has {slots.count(MASK)} places for {{mask}}; one would be right"
            )
        for slot in TEXTS:
            if slots.count(slot) > 1 or (slot == TEXTS[0] and slot not in slots):
                raise ValueError(
                    f"Template: {text!r} has {slots.count(slot)} places for {{{slot}}}; one would be right"
                )
        self.texts = tuple(slot for slot in slots if slot != MASK)

    def before_mask(self) -> tuple[str, bool]:
        """The literal words right before the mask, and whether a space stands between."""
        words = next(words for words, slot in self.parts if slot == MASK)
        return words.rstrip(), words != words.rstrip()

    def behind_mask(self) -> list[str]:
        """Texts that stand behind the mask."""
        return list(self.texts[sum(slot != MASK for _, slot in self.parts[: self._mask_at()]) :])

    def _mask_at(self) -> int:
        return next(index for index, (_, slot) in enumerate(self.parts) if slot == MASK)

    def render(self, texts: Mapping[str, str], mask: str | None) -> tuple[str, dict[str, tuple[int, int]]]:
        """The whole text and where each slot is in it. Without a mask it ends before the mask's place."""
        whole, spans = "", {}
        for words, slot in self.parts:
            if slot == MASK and mask is None:
                whole += words.rstrip()
                spans[MASK] = (len(whole), len(whole))
                break
            whole += words
            if slot is not None:
                filled = mask if slot == MASK else texts[slot]
                spans[slot] = (len(whole), len(whole) + len(filled))
                whole += filled
        return whole, spans

    def encode(
        self,
        texts: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        mask: str | None,
        most: int | None,
    ) -> tuple[list[int], int]:
        """Token ids of at most `most`, cut at the end of the longest text, and where the answer begins.

        Raises ValueError where the template alone is longer.
        """
        whole, spans = self.render(texts, mask)
        encoded = tokenizer(
            whole, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
        )
        ids, at = encoded["input_ids"], encoded["offset_mapping"]
        if mask is None:
            # a closing [SEP] or </s> would stand before the answer
            real = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
            ids = ids[: real[-1] + 1] if real else ids
        kept = self._cut(list(range(len(ids))), at, spans, most)
        begin = spans[MASK][0]
        if mask is None:
            return [ids[index] for index in kept], len(kept)
        answer = next(
            index for index in kept if ids[index] == tokenizer.mask_token_id and at[index][1] > begin
        )
        return [ids[index] for index in kept], kept.index(answer)

    def _cut(
        self, kept: list[int], at: Sequence[tuple[int, int]], spans: dict, most: int | None
    ) -> list[int]:
        over = len(kept) - most if most is not None else 0
        inside = {
            slot: [index for index in kept if spans[slot][0] < at[index][1] <= spans[slot][1]]
            for slot in self.texts
            if slot in spans
        }
        if over > sum(map(len, inside.values())):
            words = len(kept) - sum(map(len, inside.values()))
            raise ValueError(
                f"Template: its own words are {words} tokens and there is room for {most};"
                " a shorter one would be right"
            )
        gone = set()
        for _ in range(max(over, 0)):
            gone.add(max(inside.values(), key=len).pop())
        return [index for index in kept if index not in gone]


class Verbalizer:
    """The words that stand for each label: Verbalizer({"bad": ["poor"], "good": ["great", "very good"]}).

    Labels keep their order. Raises ValueError for fewer than two labels, a label without words, a word that
    is empty or stands for two labels.
    """

    def __init__(self, words: Mapping[str, Sequence[str] | str]):
        self.words = {label: [each] if isinstance(each, str) else list(each) for label, each in words.items()}
        if len(self.words) < 2:
            raise ValueError(f"Verbalizer: {len(self.words)} labels came; two or more would be right")
        seen: dict[str, str] = {}
        for label, each in self.words.items():
            if not each:
                raise ValueError(f"Verbalizer: the label {label!r} has no words; one or more would be right")
            for word in each:
                if not isinstance(word, str) or not word.strip():
                    raise ValueError(
                        f"Verbalizer: the label {label!r} has the word {word!r}; text would be right"
                    )
                if word in seen:
                    raise ValueError(
                        f"Verbalizer: {word!r} stands for {seen[word]!r} and {label!r}; one would be right"
                    )
                seen[word] = label

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the logits."""
        return list(self.words)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[tuple[int, list[int]]]:
        """(number of the label, token ids) of every word, as it follows what stands before the mask.

        Raises ValueError for a word that the tokenizer does not know.
        """
        before, space = template.before_mask()
        # behind a text and a space a word begins as behind any letter and a space
        before = before or ("a" if space else "")
        found = []
        for number, each in enumerate(self.words.values()):
            for word in each:
                whole = before + (" " if space else "") + word
                encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
                ids = [
                    token
                    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                    if end > len(before)
                ]
                if not ids or (tokenizer.unk_token_id in ids and tokenizer.unk_token != word):
                    raise ValueError(
                        f"Verbalizer: the tokenizer cannot make {word!r}; a word it knows would be right"
                    )
                found.append((number, ids))
        return found
