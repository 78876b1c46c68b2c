"""Trained vectors among the input embeddings: put in where embeddings enter a stack, taken out where hidden
states leave it. Where they stand: prompt_place.py.

So logits, labels and spans keep the positions of the real tokens. Rows may have different prompts, or none,
as the router says. An encoder whose states a decoder reads keeps the prompt's states, and the decoder's mask
over them is widened. Formula: Lester et al. 2021, arXiv:2104.08691, section 2.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefast.layers.prompt_place import (
    Place,
    allowed,
    source,
    spans,
    target,
    widened_square,
    woven,
    woven_mask,
    woven_positions,
    woven_square,
)
from pefast.layers.router import Router

# models whose positions begin behind the padding's own row of the table
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")


class PromptTokens(nn.Module):
    """n trained vectors before the input; `halves` says which of their rows each stack takes."""

    def __init__(self, embeddings: Tensor, halves: dict[str, slice], first: int, last: int):
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)  # [V, D], or [2V, D] with an encoder and a decoder
        self.halves = halves
        self.first, self.last = first, last  # real tokens of the input that stand outside the prompt

    def sizes(self, stack: str) -> tuple[int, int]:
        """How many vectors stand before and behind the input of a stack."""
        rows = self.halves.get(stack, slice(0))
        return len(range(*rows.indices(self.embeddings.shape[0]))), 0

    def vectors(self, stack: str, table: nn.Module) -> Tensor:
        """Those vectors [V, D], in order."""
        return self.embeddings[self.halves.get(stack, slice(0))]


class PromptWords(nn.Module):
    """Words before and behind the input, each its own embedding times a trained weight."""

    def __init__(self, ids: list[int], word: list[int], lead: int, stack: str, first: int, last: int):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(max(word) + 1))  # [W]
        self.register_buffer("ids", torch.tensor(ids), persistent=False)  # [V]
        self.register_buffer("spread", F.one_hot(torch.tensor(word)), persistent=False)  # [V, W]
        self.lead, self.stack, self.first, self.last = lead, stack, first, last

    def sizes(self, stack: str) -> tuple[int, int]:
        """How many vectors stand before and behind the input of a stack."""
        return (self.lead, len(self.ids) - self.lead) if stack == self.stack else (0, 0)

    def vectors(self, stack: str, table: nn.Module) -> Tensor:
        """Those vectors [V, D], in order."""
        if stack != self.stack:
            return self.weights.new_zeros(0, table.weight.shape[1])
        # a sum and no index, so that the gradient is added in one order on every machine
        weight = (self.spread * self.weights).sum(1, keepdim=True)  # [V, 1]
        # the table is called and not read: FSDP gathers it for the call
        return weight * table(self.ids)


class PromptHooks:
    """The pair of hooks on a stack that puts the active adapters' prompts in and takes them out again."""

    def __init__(self, owner: nn.Module, module: nn.Module, stack: str, router: Router):
        self.owner = owner  # holds `prompts`
        self.stack = stack  # "only", or "encoder" and "decoder" of a model that has both
        self.router = router
        # the stack's parameters, in order, for calls by position
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.causal = causal(module)
        self.slot_end: Tensor | int | None = None  # where a caller said that the input ends
        self.out: Place | None = None  # what there is to take out

    def before(self, module: nn.Module, args: tuple, kwargs: dict):
        """Pre-hook: embeddings, mask, token types and positions with the prompt in them."""
        # a forward that failed did not come to `after`
        self.out, slot_end, self.slot_end = None, self.slot_end, None
        prompts = [
            (self.owner.prompts[name], i) for name, i in self.router.turns if name in self.owner.prompts
        ]
        if not prompts:
            return None
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.stack == "decoder":
            self._widen_cross(kwargs, prompts)
        if not self._most(prompts):
            return (), kwargs
        slot_end = kwargs.pop("slot_end", slot_end)
        ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
        table = module.get_input_embeddings()
        embeds = table(ids) if embeds is None else embeds  # [B, L, D]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        _check_mask(mask)
        if cache is not None and holds(cache):
            kwargs["inputs_embeds"] = embeds
            self._go_on(kwargs, prompts, mask, embeds, cache)
            return (), kwargs
        real = _real_tokens(mask, embeds)
        place = self._place(prompts, real, slot_end=slot_end)
        index = source(place, embeds.shape[1])
        _check_length(module, index.shape[1])
        if cache is not None:
            _make_room(cache, place.most, index.shape[1])
        kwargs["inputs_embeds"] = woven(self._vectors(prompts, table, embeds, place), embeds, index)
        self._insert(module, kwargs, place, index, mask, real)
        self.out = None if self.stack == "encoder" else place
        return (), kwargs

    def _insert(self, module, kwargs: dict, place: Place, index: Tensor, mask: Tensor | None, real: Tensor):
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = woven_square(mask, place, index)
        elif mask is not None or self.router.rows is not None:
            kwargs["attention_mask"] = woven_mask(real if mask is None else mask, place, index)
        if (types_ := kwargs.get("token_type_ids")) is not None:
            first = types_[:, :1].expand(-1, place.most)
            kwargs["token_type_ids"] = woven(first, types_.expand(index.shape[0], -1), index)
        positions = kwargs.get("position_ids")
        if positions is None and self.router.rows is not None and "position_ids" in self.names:
            # unused positions must not count, and the model would count them
            positions = _first_position(module) + torch.arange(real.shape[1], device=real.device)[None]
        if positions is not None:
            positions = positions.expand(index.shape[0], -1)
            kwargs["position_ids"] = woven_positions(positions, place, index)

    def _go_on(self, kwargs: dict, prompts: list, mask: Tensor | None, embeds: Tensor, cache) -> None:
        """The prompt is in the cache: the mask must cover it, positions count it."""
        lead, follow = self._sizes(prompts, embeds)
        positions = kwargs.get("position_ids")
        if positions is None and self.router.rows is not None and "position_ids" in self.names:
            seen = cache.get_seq_length() - self._most(prompts)
            positions = (seen + torch.arange(embeds.shape[1], device=embeds.device))[None]
        if positions is not None:
            kwargs["position_ids"] = positions + lead + follow
        if mask is None and self.router.rows is None:
            return
        if mask is None:
            seen = cache.get_seq_length() - self._most(prompts) + embeds.shape[1]
            mask = torch.ones(embeds.shape[0], int(seen), dtype=torch.long, device=embeds.device)
        if mask.dim() == 2:
            place = self._place(prompts, mask, cached=True)
            kwargs["attention_mask"] = woven_mask(mask, place, source(place, mask.shape[1]))
            return
        place = self._place(prompts, _real_tokens(mask, embeds, cached=True), cached=True)
        upto = None
        if cache.is_compileable:
            upto = cache.get_seq_length() + torch.arange(embeds.shape[1], device=embeds.device)
        index = source(place, mask.shape[-1])
        kwargs["attention_mask"] = widened_square(mask, place, index, upto)

    def _widen_cross(self, kwargs: dict, prompts: list) -> None:
        """A decoder's mask over encoder states that hold the encoder's prompt."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        most = self._most(prompts, "encoder")
        if states is None or not most or (mask is None and self.router.rows is None):
            return
        if mask is None:
            mask = states.new_ones(states.shape[0], states.shape[1] - most, dtype=torch.long)
        if mask.shape[1] != states.shape[1]:
            place = self._place(prompts, mask, "encoder")
            kwargs["encoder_attention_mask"] = woven_mask(mask, place, source(place, mask.shape[1]))

    def _most(self, prompts: list, stack: str | None = None) -> int:
        """V: the longest prompt of a routed batch, or all prompts, one behind the other."""
        sizes = [sum(prompt.sizes(stack or self.stack)) for prompt, _ in prompts]
        if not sizes:
            return 0
        return sum(sizes) if self.router.rows is None else max(sizes)

    def _sizes(self, prompts: list, like: Tensor, stack: str | None = None) -> tuple[Tensor, Tensor]:
        sizes = [prompt.sizes(stack or self.stack) for prompt, _ in prompts]
        return tuple(self._by_row(prompts, [each[i] for each in sizes], like, sum) for i in (0, 1))

    def _by_row(self, prompts: list, values: list[int], like: Tensor, together) -> Tensor:
        """One number for each row [B, 1]: its own prompt's, or what all active prompts make together."""
        count, rows = like.shape[0], self.router.rows
        if rows is None:
            return torch.full((count, 1), together(values), device=like.device)
        if len(rows) != count:
            raise ValueError(
                f"Prompt: route names {len(rows)} rows and the batch has {count}; a name a row is right"
            )
        found = torch.zeros(count, 1, dtype=torch.long, device=like.device)
        for (_, turn), value in zip(prompts, values, strict=True):
            found = found + value * (rows == turn)[:, None]
        return found

    def _place(
        self, prompts: list, real: Tensor, stack: str | None = None, cached: bool = False, slot_end=None
    ) -> Place:
        """The place of each row's prompt among its `real` tokens [B, L]."""
        lead, follow = self._sizes(prompts, real, stack)
        outside = {(prompt.first, prompt.last) for prompt, _ in prompts}
        if self.router.rows is None and len(outside) > 1:
            raise ValueError(
                "Prompt: active prompts stand at different places; one place for all would be right"
            )
        first = self._by_row(prompts, [prompt.first for prompt, _ in prompts], real, max)
        last = self._by_row(prompts, [prompt.last for prompt, _ in prompts], real, max)
        begin, end = spans(real, first, last, cached)
        if slot_end is not None:
            until = torch.as_tensor(slot_end, device=real.device).reshape(-1, 1)
            end = torch.maximum(begin, until - last)
        return Place(self._most(prompts, stack), lead, follow, begin, end, self.causal and stack != "encoder")

    def _vectors(self, prompts: list, table: nn.Module, embeds: Tensor, place: Place) -> Tensor:
        """What each row puts in [B, V, D]: before the input, behind it, and zeros that it does not use."""
        parts = [prompt.vectors(self.stack, table).to(embeds.dtype) for prompt, _ in prompts]  # [V, D] each
        count = embeds.shape[0]
        if self.router.rows is None:
            leads = [prompt.sizes(self.stack)[0] for prompt, _ in prompts]
            before = [part[:n] for part, n in zip(parts, leads, strict=True)]
            behind = [part[n:] for part, n in zip(parts, leads, strict=True)]
            return torch.cat(before + behind).expand(count, -1, -1)
        found = embeds.new_zeros(count, place.most, embeds.shape[2])
        for (_, turn), part in zip(prompts, parts, strict=True):
            part = F.pad(part, (0, 0, 0, place.most - part.shape[0]))
            # a choice and no index: each row's gradient is added to its own prompt in one order
            found = torch.where((self.router.rows == turn)[:, None, None], part, found)
        return found

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """Forward hook: hidden states of the real tokens alone."""
        if self.out is None:
            return output
        place, self.out = self.out, None
        if isinstance(output, tuple):
            return (self._take_out(output[0], place), *output[1:])
        output["last_hidden_state"] = self._take_out(output["last_hidden_state"], place)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                self._take_out(states, place) for states in output["hidden_states"]
            )
        return output

    def _take_out(self, states: Tensor, place: Place) -> Tensor:  # [B, V+L, D] -> [B, L, D]
        at = target(place, states.shape[1] - place.most)
        return states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))


def causal(module: nn.Module) -> bool:
    """Whether a token of this stack sees only those before it."""
    found = (part.is_causal for part in module.modules() if hasattr(part, "is_causal"))
    return bool(next(found, False))


def holds(cache) -> bool:
    """Whether a cache has tokens already, and so the prompt."""
    seen = cache.get_seq_length()
    if isinstance(seen, Tensor) and torch.compiler.is_compiling():
        # generate compiles no forward but those after the first
        return True
    return bool(seen > 0)


def _check_mask(mask) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        came = f"has {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise ValueError(
            f"Prompt: the attention mask {came}; [batch, length] or [batch, 1, queries, keys] would be right"
        )


def _real_tokens(mask: Tensor | None, embeds: Tensor, cached: bool = False) -> Tensor:
    """Which tokens are no padding [B, L], or [B, S] of a cache, from any mask."""
    count, length = embeds.shape[:2]
    if mask is None:
        return torch.ones(count, length, dtype=torch.long, device=embeds.device)
    if mask.dim() == 2:
        return mask
    sight = allowed(mask)[:, 0]
    real = sight[:, -1] if cached else sight.any(1)[:, :length]
    return real.expand(count, -1).long()


def _first_position(module: nn.Module) -> int:
    if module.config.model_type in _BEHIND_PADDING:
        return module.config.pad_token_id + 1
    return 0


def _make_room(cache, most: int, length: int) -> None:
    """A cache of fixed length grows by the prompt before its memory is taken."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        room = getattr(layer, "max_cache_len", None)
        if room is None:
            continue
        if layer.is_sliding:
            raise ValueError(
                "Prompt: a static cache with a sliding window came; a dynamic cache would be right"
            )
        if not layer.is_initialized:
            layer.max_cache_len = room + most
        elif length > room:
            raise ValueError(f"Prompt: {length} positions with the prompt, the static cache has {room}")


def _check_length(module: nn.Module, length: int) -> None:
    """A table of positions ends: say so before an index error does."""
    table = getattr(getattr(module, "embeddings", None), "position_embeddings", None) or getattr(
        module, "wpe", None
    )
    if isinstance(table, nn.Embedding) and length > table.num_embeddings:
        raise ValueError(f"Prompt: {length} positions with the prompt, the model has {table.num_embeddings}")


def add_prompt(owner: nn.Module, stacks: dict[str, nn.Module], router: Router) -> None:
    """Gives the stacks of a model their hooks, once; `owner.prompts` then holds a module for each adapter."""
    if hasattr(owner, "prompts"):
        return
    owner.prompts, owner.prompt_hooks, owner.prompt_handles = nn.ModuleDict(), [], []
    for stack, module in stacks.items():
        hooks = PromptHooks(owner, module, stack, router)
        owner.prompt_hooks.append(hooks)
        owner.prompt_handles += [
            # first of all: a prefix's hook on the same stack counts the prompt among the tokens
            module.register_forward_pre_hook(hooks.before, with_kwargs=True, prepend=True),
            module.register_forward_hook(hooks.after, with_kwargs=True),
        ]


def drop_prompt(owner: nn.Module, name: str) -> None:
    """Takes an adapter's prompt away; with the last one the hooks go."""
    if name in owner.prompts:
        del owner.prompts[name]
    if not owner.prompts:
        for handle in owner.prompt_handles:
            handle.remove()
        del owner.prompts, owner.prompt_hooks, owner.prompt_handles


def positions_left(body: nn.Module) -> int | None:
    """How many tokens a model can read beside its active prompts; None where no number is known."""
    most = getattr(body.config, "max_position_embeddings", None)
    if most is None or not hasattr(body, "prompts"):
        return most and most - _first_position(body)
    hooks = body.prompt_hooks[0]
    prompts = [(body.prompts[name], i) for name, i in hooks.router.turns if name in body.prompts]
    return most - _first_position(body) - hooks._most(prompts)
