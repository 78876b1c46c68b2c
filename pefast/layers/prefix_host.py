"""Keys and values before those of the sequence: what a prefix is, and where attentions find theirs.

    P   = as trained, or             [V, 2·A·G·D]   of A attentions: key, value of the first, the second ...
    P_a = tanh(E W1ᵀ + b1) W2ᵀ + b2  [V, 2·G·D]     of one attention, E [V, G·D], W1 [H, G·D], W2 [2·G·D, H]

The prefix stands in no cache: each attention puts its own before the keys that it is given. It computes that
part of P by itself, so that gradient checkpointing, of either kind, can do it again. Tokens behind a prefix
of V have their positions moved on by V. Paper: Li and Liang 2021, arXiv:2101.00190.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefast.layers import attention
from pefast.layers.router import Router

# inside the backbone: what is given position numbers, a table or a rotation, by family
POSITIONS = ("embeddings.position_embeddings", "wpe", "rotary_emb")


class Sizes(NamedTuple):
    """What the attentions of a model ask of a prefix."""

    pairs: dict[str, int]  # attention's path: which pair of key and value in P is its own
    count: int  # A
    heads: int  # G
    width: int  # D


class PrefixTokens(nn.Module):
    """One prefix of V tokens; with `hidden` it comes out of a small network that is dropped on saving."""

    def __init__(self, tokens: int, sizes: Sizes, hidden: int = 0, device=None, dtype=None):
        super().__init__()
        self.sizes, self.hidden = sizes, hidden
        wide, place = sizes.heads * sizes.width, {"device": device, "dtype": dtype}
        columns = wide if hidden else 2 * sizes.count * wide
        self.embeddings = nn.Parameter(torch.randn(tokens, columns, **place))
        if hidden:
            # bare parameters: a linear layer here would be a target of other methods
            self.w1, self.b1 = _linear(wide, hidden, place)
            used = sorted(set(sizes.pairs.values()))
            pairs = {str(pair): _linear(hidden, 2 * wide, place) for pair in used}
            self.w2 = nn.ParameterDict({pair: weight for pair, (weight, _) in pairs.items()})
            self.b2 = nn.ParameterDict({pair: bias for pair, (_, bias) in pairs.items()})

    @property
    def tokens(self) -> int:
        """V."""
        return self.embeddings.shape[0]

    def _part(self, pair: int) -> Tensor:  # [V, 2·G·D]
        if not self.hidden:
            wide = 2 * self.sizes.heads * self.sizes.width
            return self.embeddings[:, pair * wide : (pair + 1) * wide]
        # in its own dtype under autocast too: what is saved is then what was computed
        with torch.autocast(self.embeddings.device.type, enabled=False):
            h = torch.tanh(F.linear(self.embeddings, self.w1, self.b1))  # [V, H]
            return F.linear(h, self.w2[str(pair)], self.b2[str(pair)])

    def of(self, path: str) -> Tensor | None:  # [2, G, V, D]
        """Keys and values for the attention at this path; None where it has none."""
        pair = self.sizes.pairs.get(path)
        if pair is None:
            return None
        part = self._part(pair).view(self.tokens, 2, self.sizes.heads, self.sizes.width)
        return part.permute(1, 2, 0, 3)

    @torch.no_grad()
    def start_from(self, parts: dict[str, Tensor]) -> None:
        """Takes keys and values [2, G, V, D] of each attention, by its path, as where to start."""
        for path, part in parts.items():
            self.of(path).copy_(part)

    def flat(self) -> Tensor:  # [V, 2·A·G·D]
        """P as files have it. Pairs that no attention reads are zero where a network makes P."""
        if not self.hidden:
            return self.embeddings
        used, wide = set(self.sizes.pairs.values()), 2 * self.sizes.heads * self.sizes.width
        nothing = self.embeddings.new_zeros(self.tokens, wide)
        return torch.cat([self._part(i) if i in used else nothing for i in range(self.sizes.count)], 1)


def _linear(inner: int, outer: int, place: dict) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias as a new nn.Linear has them."""
    linear = nn.Linear(inner, outer, **place)
    return linear.weight, linear.bias


class Ahead(NamedTuple):
    """What stands before the keys and values of one attention."""

    k: Tensor  # [G, P, D] or [B, G, P, D]
    v: Tensor  # as k
    see: Tensor | None  # [B, 1, 1, P]  bool, True: attend; None: every row sees all


class PrefixHost:
    """What a backbone with prefixes keeps: the prefixes by adapter name, and what it changed for them."""

    def __init__(self, router: Router, positions: str):
        self.router, self.positions = router, positions
        self.prefixes = nn.ModuleDict()
        # prefixes that an adapter before has too, as the save_pretrained of transformers asks for them
        self.prefixes._tied_weights_keys = {}
        self.handles: list = []
        self.active: tuple[str, ...] = ()
        # [config, its attention before]: changed while an adapter with a prefix is active
        self.lent: list[list] = []

    def __setstate__(self, state: dict) -> None:
        # a model that another process pickled has the name in its config
        attention.register()
        self.__dict__.update(state)

    def turns(self) -> list[tuple[PrefixTokens, int | None]]:
        """The prefixes that compute now, with their number in a route; one that adapters share comes once."""
        found: list[tuple[PrefixTokens, int | None]] = []
        for name, index in self.router.turns:
            if name in self.prefixes:
                tokens = self.prefixes[name]
                if index is not None or all(tokens is not other for other, _ in found):
                    found.append((tokens, index))
        if found and any(config._attn_implementation != attention.NAME for config, _ in self.lent):
            raise RuntimeError(
                "Prefix: the model's attention was changed while a prefix is active; activate(model, None)"
                " before set_attn_implementation, and the adapter again behind it, would be right"
            )
        return found

    def rows(self, batch: int) -> Tensor:  # [batch]
        """The route of each row. Raises ValueError where they are not as many as the batch has."""
        rows = self.router.rows
        if len(rows) != batch:
            raise ValueError(
                f"Prefix: route names {len(rows)} rows and the batch has {batch}; a name for each row, or"
                " each beam, would be right"
            )
        return rows

    def longest(self) -> int:
        """P: how many keys stand before those of the sequence."""
        lengths = [tokens.tokens for tokens, _ in self.turns()]
        return (sum if self.router.rows is None else max)(lengths) if lengths else 0

    def shift(self, batch: int) -> int | Tensor:
        """How far positions move on: for all rows, or for each [batch, 1]."""
        turns = self.turns()
        if not turns or self.router.rows is None:
            return sum(tokens.tokens for tokens, _ in turns)
        return self.per_row(turns, self.rows(batch))[1][:, None]

    def per_row(self, turns, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each row which of turns it takes, len(turns) for none, and the length of its prefix."""
        where = {index: i for i, (_, index) in enumerate(turns)}
        none = len(turns)
        # the last entry answers row -1, the base model
        chosen = [where.get(index, none) for index in range(len(self.router.turns))] + [none]
        chosen = torch.tensor(chosen, device=rows.device)[rows]
        lengths = torch.tensor([tokens.tokens for tokens, _ in turns] + [0], device=rows.device)
        return chosen, lengths[chosen]


class PrefixSlot:
    """What one attention looks at for its prefix."""

    def __init__(self, host: PrefixHost, path: str, first: nn.Module | None):
        self.host, self.path = host, path
        self.first = first  # the attention that has the table of relative positions; None: without such

    def ahead(self, key: Tensor, value: Tensor) -> Ahead | None:
        """What stands before keys and values [B, G, S, D]; None where no prefix is active."""
        turns = [turn for turn in self.host.turns() if self.path in turn[0].sizes.pairs]
        if not turns:
            return None
        # a model may be spread over devices
        parts = [tokens.of(self.path).to(key.device) for tokens, _ in turns]  # [2, G, V, D] each
        if self.host.router.rows is None:
            both = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
            return Ahead(both[0], both[1], None)
        p = self.host.longest()
        # shorter prefixes stand at the right, so that each ends where its row begins
        parts = [F.pad(part, (0, 0, p - part.shape[2], 0)) for part in parts]
        table = torch.stack([*parts, torch.zeros_like(parts[0])])  # [n+1, 2, G, P, D]
        chosen, lengths = self.host.per_row(turns, self.host.rows(key.shape[0]).to(key.device))
        # a lookup: every row's gradient comes to its own prefix alone, added in the order of the rows
        both = F.embedding(chosen, table.flatten(1)).view(-1, *table.shape[1:])
        sees_all = {index: tokens.tokens == p for tokens, index in turns}
        # one compiled graph is for every route, and asks nothing of its names
        if not torch.compiler.is_compiling() and all(sees_all.get(i) for i in self.host.router.ids):
            return Ahead(both[:, 0], both[:, 1], None)
        see = torch.arange(p, device=lengths.device) >= p - lengths[:, None]
        return Ahead(both[:, 0], both[:, 1], see[:, None, None])

    def bias(self, like: Tensor, p: int, buckets: Tensor | None) -> Tensor:  # [1 or B, H, L, P]
        """The relative position bias of the prefix's keys; zero where the attention knows no positions."""
        if self.first is None or buckets is None:
            return like.new_zeros(1, like.shape[1], like.shape[2], p)
        bias = self.first.relative_attention_bias(buckets).movedim(-1, -3).to(like.dtype)
        return bias if bias.dim() == 4 else bias[None]


class MovePositions:
    """Pre-hook of a table of positions or a rotation: tokens behind a prefix stand V further on."""

    def __init__(self, host: PrefixHost):
        self.host = host

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        named = "position_ids" in kwargs
        ids = kwargs["position_ids"] if named else args[-1]
        batch = ids.shape[0]
        if batch == 1 and self.host.router.rows is not None:
            # one row of positions for the whole batch, which a rotation is shown
            batch = self.host.router.rows.shape[0] if isinstance(module, nn.Embedding) else args[0].shape[0]
        shift = self.host.shift(batch)
        if isinstance(shift, int) and not shift:
            return None
        moved = ids + shift
        if isinstance(module, nn.Embedding):
            if module.padding_idx is not None:
                moved = torch.where(ids == module.padding_idx, ids, moved)
            _check_room(module, moved)
        return (args, {**kwargs, "position_ids": moved}) if named else ((*args[:-1], moved), kwargs)


def _check_room(table: nn.Embedding, ids: Tensor) -> None:
    """A table of positions ends: say so before an index error does."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    # asking a GPU would cost a wait in every call; its own index error is what comes there
    if ids.is_cpu and (last := int(ids.max())) >= table.num_embeddings:
        raise ValueError(
            f"Prefix: {last + 1} positions with the prefix, the model has {table.num_embeddings}; a shorter"
            " input would be right"
        )


class RelativePositions:
    """Pre-hook of a stack with relative positions: where the prefix's keys stand, seen from each query, is
    computed once and goes to its attentions as `prefix_buckets` [L, P].

    Where rows of an encoder are padded on the left it is [B, L, P]: their prefix ends at their first token.
    """

    def __init__(self, host: PrefixHost, first: nn.Module):
        self.host, self.first = host, first

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict):
        p = self.host.longest()
        if not p:
            return None
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = kwargs.get("past_key_values") if self.first.is_decoder else None
        begin = 0 if cache is None else cache.get_seq_length()
        if not self.first.is_decoder:
            begin = -_left_padding(kwargs.get("attention_mask"))
        # [L, 1] or [B, L, 1]
        queries = torch.arange(tokens.shape[1], device=tokens.device)[:, None] + begin + p
        buckets = self.first._relative_position_bucket(
            torch.arange(p, device=tokens.device) - queries,
            bidirectional=not self.first.is_decoder,
            num_buckets=self.first.relative_attention_num_buckets,
            max_distance=self.first.relative_attention_max_distance,
        )
        return args, {**kwargs, "prefix_buckets": buckets}


def _left_padding(mask: Tensor | None) -> int | Tensor:
    """How many padding tokens stand before the first real one: 0, or for each row [B, 1, 1]."""
    if mask is None or mask.dim() != 2 or (not torch.compiler.is_compiling() and bool(mask[:, 0].all())):
        return 0
    return (mask.cumsum(1) == 0).sum(1)[:, None, None]


def add_prefix(model: nn.Module, body: nn.Module, host: PrefixHost, name: str, tokens: PrefixTokens) -> None:
    """Gives a backbone a prefix for this adapter; the first one brings hooks and slots."""
    if not hasattr(body, "prefix_host"):
        body.prefix_host, body.prefixes = host, host.prefixes
        if host.positions == "shifted":
            for path in POSITIONS:
                table = _part(body, path)
                if table is not None:
                    hook = MovePositions(host)
                    host.handles.append(table.register_forward_pre_hook(hook, with_kwargs=True))
            for stack, first in relative_stacks(body):
                hook = RelativePositions(host, first)
                host.handles.append(stack.register_forward_pre_hook(hook, with_kwargs=True))
    # a cross-attention is in a stack with relative positions, and has none
    firsts = {
        id(module): first
        for stack, first in relative_stacks(body)
        for module in stack.modules()
        if getattr(module, "is_decoder", False) == getattr(module, "is_causal", False)
    }
    for path in tokens.sizes.pairs:
        module = model.get_submodule(path)
        if not hasattr(module, "prefix_slot"):
            module.prefix_slot = PrefixSlot(host, path, firsts.get(id(module)))
    if any(tokens is other for other in host.prefixes.values()):
        host.prefixes._tied_weights_keys[rf"{re.escape(name)}\."] = name
    host.prefixes[name] = tokens


def drop_prefix(body: nn.Module, name: str) -> None:
    """Takes an adapter's prefix away; with the last one hooks and slots go."""
    host = body.prefix_host
    del host.prefixes[name]
    host.prefixes._tied_weights_keys.pop(rf"{re.escape(name)}\.", None)
    needed = {path for tokens in host.prefixes.values() for path in tokens.sizes.pairs}
    for module in body.modules():
        if hasattr(module, "prefix_slot") and module.prefix_slot.path not in needed:
            del module.prefix_slot
    if not host.prefixes:
        for handle in host.handles:
            handle.remove()
        del body.prefixes, body.prefix_host


def switch_prefix(model: nn.Module, body: nn.Module, name: str, on: bool) -> None:
    """While an adapter with a prefix is active the model's attention is pefast's, whatever it was before."""
    host = body.prefix_host
    if on and not host.active:
        host.lent = attention.lend(model)
    host.active = (*host.active, name) if on else tuple(each for each in host.active if each != name)
    if not host.active:
        attention.give_back(host.lent)
        host.lent = []


def relative_stacks(body: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Stacks of blocks with relative positions, each with the attention that has their table."""
    found = []
    for module in body.modules():
        blocks = getattr(module, "block", None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            found += [
                (module, each)
                for each in blocks[0].modules()
                if isinstance(getattr(each, "relative_attention_bias", None), nn.Embedding)
            ]
    return found


def positions_left(body: nn.Module) -> int | None:
    """How many positions a backbone's table has for tokens; None where there is no table."""
    for path in POSITIONS:
        table = _part(body, path)
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def _part(body: nn.Module, path: str) -> nn.Module | None:
    """The submodule at that path, or None."""
    for step in path.split("."):
        body = getattr(body, step, None)
        if not isinstance(body, nn.Module):
            return None
    return body
