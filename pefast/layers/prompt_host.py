"""Trained vectors before the first token: inserted where embeddings enter the backbone, taken out where
hidden states leave it.

So logits, labels and spans keep the positions of the real tokens. A row that is padded on the left gets its
prompt between the padding and its first token. Formula: Lester et al. 2021, arXiv:2104.08691, section 2.
"""

import inspect

import torch
from torch import Tensor, nn

from pefast.layers.router import Router


class PromptTokens(nn.Module):
    """n trained vectors [V, D]."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)


class PromptHooks:
    """The pair of hooks on a backbone that puts the active adapters' prompts in and takes them out again."""

    def __init__(self, router: Router, names: list[str], first: int):
        self.router = router
        self.names = names  # the backbone's parameters, in order, for calls by position
        self.first = first  # how many real tokens stand before the prompt
        self.out: tuple[int, Tensor | None] | None = (
            None  # V and, per row, where the prompt begins; None: nothing to take out
        )

    def before(self, module: nn.Module, args: tuple, kwargs: dict):
        """Pre-hook: embeddings, mask, token types and positions with the prompt in them."""
        # a forward that failed did not come to `after`
        self.out = None
        prompts = [module.prompts[name].embeddings for name, _ in self.router.turns if name in module.prompts]
        if not prompts:
            return None
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds  # [B, L, D]
        prompt = torch.cat(prompts).to(embeds.dtype).expand(embeds.shape[0], -1, -1)  # [B, V, D]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"Prompt: the attention mask has {mask.dim()} dimensions; [batch, length] would be right,"
                " as without a static cache"
            )
        begin = self._begin(mask, embeds)
        v, seen = prompt.shape[1], 0 if cache is None else cache.get_seq_length()
        positions = kwargs.get("position_ids")
        if seen:
            # the prompt is in the cache: the mask must cover it, positions count it
            kwargs["inputs_embeds"] = embeds
            kwargs["attention_mask"] = (
                None if mask is None else _insert(mask, torch.ones_like(mask[:, :1]).expand(-1, v), begin)
            )
            kwargs["position_ids"] = None if positions is None else positions + v
            return (), kwargs
        _check_length(module, embeds.shape[1] + v)
        kwargs["inputs_embeds"] = _insert(embeds, prompt, begin)
        if mask is not None:
            kwargs["attention_mask"] = _insert(mask, mask.new_ones(()).expand(mask.shape[0], v), begin)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = _insert(types, types[:, :1].expand(-1, v), begin)
        if positions is not None:
            kwargs["position_ids"] = _insert_positions(positions.expand(embeds.shape[0], -1), v, begin)
        self.out = (v, begin if mask is not None else None)
        return (), kwargs

    def _begin(self, mask: Tensor | None, embeds: Tensor) -> Tensor:
        """Where each row's prompt begins [B]: after its left padding, and after `first` real tokens."""
        if mask is None:
            return torch.full((embeds.shape[0],), self.first, device=embeds.device)
        return (mask.cumsum(1) == 0).sum(1) + self.first

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """Forward hook: hidden states of the real tokens alone."""
        if self.out is None:
            return output
        (v, begin), self.out = self.out, None
        if isinstance(output, tuple):
            return (self._take_out(output[0], v, begin), *output[1:])
        output["last_hidden_state"] = self._take_out(output["last_hidden_state"], v, begin)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                self._take_out(states, v, begin) for states in output["hidden_states"]
            )
        return output

    def _take_out(self, states: Tensor, v: int, begin: Tensor | None) -> Tensor:  # [B, V+L, D] -> [B, L, D]
        if begin is None:
            head, tail = states[:, : self.first], states[:, self.first + v :]
            return torch.cat((head, tail), 1) if self.first else tail
        at = torch.arange(states.shape[1] - v, device=states.device).expand(states.shape[0], -1)
        at = at + v * (at >= begin[:, None])
        return states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))


def _insert(tokens: Tensor, prompt: Tensor, begin: Tensor) -> Tensor:
    """tokens [B, L, ...] with prompt [B, V, ...] before position begin[b] of each row: [B, V+L, ...]."""
    length, v = tokens.shape[1], prompt.shape[1]
    at = torch.arange(length + v, device=tokens.device).expand(tokens.shape[0], -1)
    offset = at - begin[:, None]
    at = torch.where(offset < 0, v + at, torch.where(offset < v, offset, at))
    both = torch.cat((prompt, tokens), 1)
    return both.gather(1, at if both.dim() == 2 else at[:, :, None].expand(-1, -1, both.shape[2]))


def _insert_positions(positions: Tensor, v: int, begin: Tensor) -> Tensor:  # [B, L] -> [B, V+L]
    """The prompt takes the positions of the tokens behind it, and they move on by V."""
    length = positions.shape[1]
    last = positions.gather(1, (begin - 1).clamp(0, length - 1)[:, None]) + 1
    here = positions.gather(1, begin.clamp(max=length - 1)[:, None])
    start = torch.where(begin[:, None] < length, here, last)
    behind = torch.arange(length, device=positions.device) >= begin[:, None]
    return _insert(positions + v * behind, start + torch.arange(v, device=positions.device), begin)


def _check_length(module: nn.Module, length: int) -> None:
    """A table of positions ends: say so before an index error does."""
    table = getattr(getattr(module, "embeddings", None), "position_embeddings", None) or getattr(
        module, "wpe", None
    )
    if isinstance(table, nn.Embedding) and length > table.num_embeddings:
        raise ValueError(f"Prompt: {length} positions with the prompt, the model has {table.num_embeddings}")


def add_prompt(body: nn.Module, router: Router, name: str, prompt: PromptTokens, first: int) -> None:
    """Gives a backbone a prompt for this adapter, and its hooks with the first one."""
    if not hasattr(body, "prompts"):
        body.prompts = nn.ModuleDict()
        names = list(inspect.signature(type(body).forward).parameters)[1:]
        hooks = PromptHooks(router, names, first)
        body.prompt_hooks = (
            hooks,
            body.register_forward_pre_hook(hooks.before, with_kwargs=True),
            body.register_forward_hook(hooks.after, with_kwargs=True),
        )
    elif body.prompt_hooks[0].first != first:
        raise ValueError("Prompt: the model has a prompt at another place; one place for all would be right")
    body.prompts[name] = prompt


def drop_prompt(body: nn.Module, name: str) -> None:
    """Takes an adapter's prompt away; with the last one the hooks go."""
    del body.prompts[name]
    if not body.prompts:
        for handle in body.prompt_hooks[1:]:
            handle.remove()
        del body.prompts, body.prompt_hooks
