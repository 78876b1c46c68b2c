"""Where the vectors of a prompt stand among a row's tokens, as one index in each direction.

    row of the batch     [ padding | first tokens |        input        | rest, padding ]   L
    with its prompt [ unused | padding | first tokens | lead | input | follow | rest, padding ]   V + L

V is the longest prompt of the batch. Where a row has a shorter one, or none, the unused positions are masked.
They stand at the left in a causal model, so that a row's tokens and what is generated behind them stay
neighbours, and at the right elsewhere, so that a pooler finds the first position where it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """The prompt of each row; tensors are [B, 1]."""

    most: int  # V
    lead: Tensor  # vectors before the input
    follow: Tensor  # vectors behind it
    begin: Tensor  # the token before which the first of them stands
    end: Tensor  # the token before which the second of them stands
    causal: bool  # unused positions are at the left

    @property
    def shift(self) -> Tensor | int:
        """Unused positions before a row's own [B, 1]."""
        return self.unused if self.causal else 0

    @property
    def unused(self) -> Tensor:
        """Positions of V that a row does not use [B, 1]."""
        return self.most - self.lead - self.follow


def spans(mask: Tensor, first: Tensor, last: Tensor, cached: bool = False) -> tuple[Tensor, Tensor]:
    """Where the input of each row begins and ends [B, 1]: its real tokens without the first `first` and the
    last `last` of them; `mask` is [B, L], `first` and `last` are [B, 1].

    Where a cache holds part of the row, the input ends before the first padding behind it.
    """
    real, length = mask != 0, mask.shape[1]
    come = real.cumsum(1) > 0
    begin = ((~come).sum(1, keepdim=True) + first).clamp(max=length)
    if cached:
        until = (real | ~come).cumprod(1).sum(1, keepdim=True)
    else:
        until = (real * torch.arange(1, length + 1, device=mask.device)).amax(1, keepdim=True)
    return begin, torch.maximum(until - last, begin)


def source(place: Place, length: int) -> Tensor:
    """For every position of a row with its prompt, where it comes from in (vectors [V], tokens [L])."""
    at = torch.arange(length + place.most, device=place.lead.device) - place.shift  # [B, V+L]
    token, both = at + place.most, place.lead + place.follow
    # an unused position takes a vector that the row does not use
    found = torch.where(at < length + both, token - both, at - length)
    found = torch.where(at < place.end + both, at - place.end, found)
    found = torch.where(at < place.end + place.lead, token - place.lead, found)
    found = torch.where(at < place.begin + place.lead, at - place.begin, found)
    # below zero too
    return torch.where(at < place.begin, token, found)


def target(place: Place, length: int) -> Tensor:
    """For every token of a row its position beside the prompt [B, L].

    In a causal model what stands before the first word of the answer predicts it: the state of the input's
    last token is that of the last vector behind it.
    """
    at = torch.arange(length, device=place.lead.device)
    behind = at >= place.end - int(place.causal)
    return at + place.shift + place.lead * (at >= place.begin) + place.follow * behind


def used(place: Place) -> Tensor:
    """Which of V vectors each row has [B, V]."""
    return torch.arange(place.most, device=place.lead.device) < place.lead + place.follow


def woven(vectors: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    """vectors [B, V, ...] and tokens [B, L, ...] in the order of `index` [B, V+L]."""
    both = torch.cat((vectors, tokens), 1)
    return both.gather(1, index if both.dim() == 2 else index[:, :, None].expand(-1, -1, both.shape[2]))


def woven_mask(mask: Tensor, place: Place, index: Tensor) -> Tensor:
    """A mask [B, L] with ones for the vectors that a row uses: [B, V+L]."""
    return woven(used(place).to(mask.dtype), mask, index)


def woven_positions(given: Tensor, place: Place, index: Tensor) -> Tensor:  # [B, L] -> [B, V+L]
    """The vectors take the positions of the tokens that they stand before, and these move on."""
    length = given.shape[1]
    at = torch.arange(length, device=given.device)
    here = given.gather(1, place.begin.clamp(max=length - 1))
    past = given.gather(1, (place.begin - 1).clamp(0, length - 1)) + 1
    start = torch.where(place.begin < length, here, past)
    vector = torch.arange(place.most, device=given.device)
    vector = start + vector + (place.end - place.begin) * (vector >= place.lead)
    moved = given + place.lead * (at >= place.begin) + place.follow * (at >= place.end)
    return woven(vector.where(used(place), 0), moved, index)


def allowed(mask: Tensor) -> Tensor:
    """A mask of four dimensions as booleans: what sdpa takes is one, what eager takes is 0 or very low."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def like(mask: Tensor, sight: Tensor) -> Tensor:
    """Booleans in the form that `mask` has."""
    if mask.dtype == torch.bool:
        return sight
    return torch.zeros_like(sight, dtype=mask.dtype).masked_fill(~sight, torch.finfo(mask.dtype).min)


def woven_square(mask: Tensor, place: Place, index: Tensor) -> Tensor:
    """A mask of four dimensions [B, 1, L, S >= L] with the prompt in rows and columns: [B, 1, V+L, V+S].

    A token sees the vectors of its row and a vector sees the real tokens; in a causal model, those before
    it. Columns from L on belong to a cache that is longer than the input and stay at the end.
    """
    (length, width), (rows, tall), most = mask.shape[-2:], index.shape, place.most
    old = allowed(mask).expand(rows, 1, -1, -1)[:, 0]  # [B, L, S]
    spare = torch.arange(length, width, device=mask.device).expand(rows, -1) + most
    columns = torch.cat((index, spare), 1)  # [B, V+S]
    seen = torch.cat((used(place), old.any(1)), 1).gather(1, columns)  # [B, V+S]
    at = torch.arange(most + width, device=mask.device)
    seen = (
        seen[:, None, :] & (at <= at[:tall, None]) if place.causal else seen[:, None, :].expand(-1, tall, -1)
    )
    # between two tokens it stays as it was
    old = old.gather(1, (index - most).clamp(min=0)[:, :, None].expand(-1, -1, width))
    old = old.gather(2, (columns - most).clamp(min=0)[:, None, :].expand(-1, tall, -1))
    vector = (index < most)[:, :, None] | (columns < most)[:, None, :]
    return like(mask, torch.where(vector, seen, old)[:, None])


def widened_square(mask: Tensor, place: Place, index: Tensor, upto: Tensor | None) -> Tensor:
    """A mask [B, 1, Q, S] over cached and new tokens with the cached prompt in its columns: [B, 1, Q, V+S].

    `upto` [Q] are the last columns that the queries may see in a cache of fixed length, which has the room
    for the prompt in its S columns already.
    """
    old = allowed(mask).expand(index.shape[0], 1, -1, -1)[:, 0]  # [B, Q, S]
    both = torch.cat((used(place)[:, None].expand(-1, old.shape[1], -1), old), 2)
    new = both.gather(2, index[:, None].expand(-1, old.shape[1], -1))
    if upto is not None:
        new = new[..., : old.shape[2]]
        new = new & (torch.arange(new.shape[2], device=mask.device) <= upto[:, None])
    return like(mask, new[:, None])
