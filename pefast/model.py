"""A model and its adapters: attach, detach, activate, route, merge, unmerge. Saving is in checkpoint.py,
explain in report.py.

Everything happens in place and nothing is half done: every check comes before the first change.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from pefast.architectures import base_modules, heads
from pefast.layers.head_host import (
    HeadHost,
    add_head,
    drop_head,
    head_copy,
    last_linear,
    merge_head,
    unmerge_head,
)
from pefast.layers.hosts import DeltaHost, drop_deltas, merge_deltas, unmerge_deltas
from pefast.layers.recompute import recomputed
from pefast.layers.router import Router, one_of_each_beam
from pefast.methods import METHODS
from pefast.methods.places import hosts
from pefast.methods.replacing import refuse_overlap
from pefast.sharded import refuse_shards


class Attached:
    """What pefast keeps beside a model: its adapters' methods by name and key, and what trained before."""

    def __init__(self, model: nn.Module):
        self.router = Router()
        self.adapters: dict[str, dict[str, object]] = {}
        self.merged: tuple[str, ...] = ()
        self.on: tuple[str, ...] = ()  # adapters whose methods were told that they compute
        self.frozen: set[str] = set()  # adapters that compute and do not train
        self.own = tuple(name for name, _ in model.named_parameters())  # of the base model
        self.claims: dict[str, list] = {}  # by adapter: what its methods replace of the base model
        self.training: tuple[str, ...] = ()  # adapters whose parameters train
        self.labels: dict[str | None, int] = {}  # logits of each adapter's head; None: of the model's own
        self.words: tuple = ()  # the labels' names in the model's own config
        self.problem: str | None = None  # the kind of loss that the model's own config names
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def attached(model: nn.Module, who: str) -> Attached:
    """What pefast keeps beside the model. Raises ValueError, naming the caller, where nothing is attached."""
    state = getattr(model, "_pefast", None)
    if state is None:
        raise ValueError(
            f"{who}: nothing is attached to this {type(model).__name__}; pefast.attach comes first"
        )
    return state


def attach(model: nn.Module, method, name: str = "default", *, head: bool | int = True) -> nn.Module:
    """Puts a method, or several as one adapter called `name`, on a model in place, and activates it.

    Everything else is frozen, except that a task head (the classifier of a ...ForSequenceClassification and
    its kin) gets a trained copy that belongs to the adapter; `head=False` leaves it frozen, and a number
    gives the copy that many labels, drawn anew. Other adapters stay, switched off.

    Raises ValueError where a setting, a target or the name does not fit; the model is then as it was.
    """
    methods = list(method) if isinstance(method, Sequence) else [method]
    state = getattr(model, "_pefast", None)
    refuse_shards("attach", model)
    _check_attach(methods, name, state)
    if not isinstance(head, int) or head < 0 or (head is not True and head and not heads(model)):
        raise ValueError(
            f"attach: head is {head!r}; True, False, or for a model with a task head a number of labels"
            " would be right"
        )
    plans = [each.plan(model) for each in methods]
    keys = _keys(methods)
    claims = [(type(each).__name__, each.claims(plan)) for each, plan in zip(methods, plans, strict=True)]
    refuse_overlap("attach", model, claims)
    if state is None:
        state = model._pefast = Attached(model)
        model.requires_grad_(False)
    state.adapters[name], state.claims[name] = {}, claims
    try:
        # a method that starts from the weights starts from the base model's, whatever computes now
        with state.router.resting():
            for each, key, plan in zip(methods, keys, plans, strict=True):
                each.enter(model, name, key, plan, state.router)
                state.adapters[name][key] = each
    except ValueError:
        detach(model, name)
        raise
    if head and all(each.heads for each in methods):
        _add_heads(model, state, name, None if head is True else head)
    activate(model, name)
    return model


def _check_attach(methods: list, name: str, state: Attached | None) -> None:
    known = tuple(METHODS.values())
    if not methods or not all(isinstance(each, known) for each in methods):
        got = ", ".join(
            type(each).__name__ if not isinstance(each, type) else f"the class {each.__name__}"
            for each in methods
        )
        raise ValueError(
            f"attach: got {got or 'no method'};"
            f" one or more of {', '.join(c.__name__ for c in known)} would be right"
        )
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ValueError(
            f"attach: {name!r} cannot name an adapter; a word without dots and slashes would be right"
        )
    if state is not None and name in state.adapters:
        raise ValueError(
            f"attach: the name {name!r} is taken; detach it, or choose another than {sorted(state.adapters)}"
        )
    if state is not None:
        _settled(state, "attach")
    for each in methods:
        each.check()


def _add_heads(model: nn.Module, state: Attached, name: str, labels: int | None) -> None:
    spread = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for path in heads(model):
        part = model.get_submodule(path)
        own = head_copy(part, labels, spread)
        if not state.labels:
            state.labels[None] = part.get_submodule(last_linear(part)).out_features
            state.words = (model.config.id2label, model.config.label2id)
            state.problem = getattr(model.config, "problem_type", None)
        state.labels[name] = own.get_submodule(last_linear(own)).out_features
        add_head(part, state.router, name, own)


def _tell_labels(model: nn.Module, state: Attached, names: Sequence[str | None]) -> None:
    """Tells transformers' losses how many logits will come, as many as the widest of these heads gives, and
    to see by the labels which loss that is."""
    if not state.labels:
        return
    own = state.labels[None]
    count = max([state.labels[each] for each in names if each in state.labels] or [own])
    if getattr(model, "num_labels", count) != count:
        model.num_labels = count
    if model.config.num_labels != count:
        if count == own:
            model.config.id2label, model.config.label2id = state.words
        else:
            model.config.num_labels = count
    # what transformers guessed for one head, by its labels, would stay for the next
    model.config.problem_type = state.problem if count == own else None


def _keys(methods: list) -> list[str]:
    """lora, adapter, lora_2 ...: the kind, numbered from the second of a kind."""
    keys: list[str] = []
    for each in methods:
        count = sum(key.split("_")[0] == each.kind for key in keys)
        keys.append(f"{each.kind}_{count + 1}" if count else each.kind)
    return keys


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one adapter, or with None all of them, off the model in place.

    Without any it is the base model again, bit for bit.

    Raises ValueError for a name that is not attached, or inside a route.
    """
    state = attached(model, "detach")
    refuse_shards("detach", model)
    if name is not None:
        _known(state, (name,), "detach")
    _unrouted(state, "detach")
    if state.merged:
        unmerge(model)
    gone = list(state.adapters) if name is None else [name]
    _switch(model, state, tuple(each for each in state.on if each not in gone))
    for each in gone:
        state.frozen.discard(each)
        state.claims.pop(each, None)
        state.labels.pop(each, None)
        for key, method in state.adapters.pop(each).items():
            method.leave(model, each, key)
        for module in list(model.modules()):
            if isinstance(module, DeltaHost):
                drop_deltas(module, each)
            elif isinstance(module, HeadHost):
                drop_head(module, each)
    if state.adapters:
        activate(model, tuple(n for n in state.router.active if n in state.adapters))
    else:
        _tell_labels(model, state, ())
        del model._pefast
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in state.trained)
    return model


def activate(model: nn.Module, name: str | Sequence[str] | None) -> nn.Module:
    """These adapters compute and train, all others rest; None is the base model. In place.

    Raises ValueError for a name that is not attached, while the model is merged, or inside a route.
    """
    state = attached(model, "activate")
    # a name that comes twice counts once
    names = () if name is None else (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    _known(state, names, "activate")
    _settled(state, "activate")
    together = [(f"{each!r}'s {label}", plan) for each in names for label, plan in state.claims[each]]
    refuse_overlap("activate", model, together)
    state.router.activate(names)
    _switch(model, state, names)
    # of several active adapters the last one's head answers
    _tell_labels(model, state, [each for each in names if each in state.labels][-1:])
    trains = [each for each in names if each not in state.frozen]
    # those that train come last: adapters may share a parameter
    gone = [each for each in state.training if each not in trains and each in state.adapters]
    state.training = tuple(trains)
    for each in (*gone, *trains):
        for parameter in parameters_of(model, each).values():
            parameter.requires_grad_(each in trains)
    return model


def _switch(model: nn.Module, state: Attached, names: tuple[str, ...]) -> None:
    """Tells the methods of each adapter that begins or ceases to compute; those that cease come first."""
    before, state.on = state.on, names
    for group, on in (
        ([n for n in before if n not in names], False),
        ([n for n in names if n not in before], True),
    ):
        for each in group:
            for key, method in state.adapters[each].items():
                method.switch(model, each, key, on)


def parameters_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every parameter of one adapter, by method key and file name; its heads' under `head`."""
    state = attached(model, "parameters_of")
    found = {}
    for key, method in state.adapters[name].items():
        found |= {
            f"{key}/{file_name}": tensor for file_name, tensor in method.parameters(model, name, key).items()
        }
    return found | {f"head/{path}": tensor for path, tensor in head_tensors(model, name).items()}


def head_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameters of the adapter's head copies, by their path in the base model."""
    found = {}
    for path, part in base_modules(model):
        if isinstance(part, HeadHost) and name in part.copies:
            found |= {f"{path}.{own}": tensor for own, tensor in part.copies[name].named_parameters()}
    return found


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside this context row i of a batch computes with adapter names[i]; None is the base model.

    Raises ValueError for a name that is not attached, for adapters with a method that is one for the whole
    batch, or while the model is merged. Heads may differ in their number of labels: a row's missing logits
    are -inf. In a beam search a row's name comes once for each of its beams, side by side. A backward may
    come after the context, under gradient checkpointing too.
    """
    state = attached(model, "route")
    used = tuple(dict.fromkeys(each for each in names if each is not None))
    _known(state, used, "route")
    if state.merged:
        raise ValueError("route: the model is merged; unmerge it first")
    for each in used:
        for method in state.adapters[each].values():
            if not method.routes:
                raise ValueError(
                    f"route: adapter {each!r} has a {type(method).__name__}, which is one for all rows;"
                    " activate takes such adapters"
                )
    ids = tuple(-1 if each is None else used.index(each) for each in names)
    with _routed(model, state, used, ids), recomputed(model, lambda: _routed(model, state, used, ids)):
        _tell_labels(model, state, names)
        try:
            yield model
        finally:
            _tell_labels(model, state, [n for n in state.router.active if n in state.labels][-1:])


@contextlib.contextmanager
def _routed(model: nn.Module, state: Attached, used: tuple[str, ...], ids: tuple[int, ...]) -> Iterator[None]:
    """Inside this context rows compute by these ids; then what computed before does again."""
    router = state.router
    if router.ids is ids:
        yield
        return
    before, on = (router.turns, router.ids, router.rows), state.on
    _switch(model, state, used)
    router.route(used, ids, next(model.parameters()).device)
    twofold = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    beams = one_of_each_beam(model.get_encoder(), router) if twofold else contextlib.nullcontext()
    try:
        with beams:
            yield
    finally:
        router.turns, router.ids, router.rows = before
        _switch(model, state, on)


def merge(model: nn.Module) -> nn.Module:
    """Adds the active adapters' deltas to the frozen weights, in place, so that they cost nothing; of their
    task heads the last one takes the place of the model's.

    The weights as they were are kept beside the merged ones, for `unmerge`. Raises ValueError where an active
    method cannot merge. `export` writes such a model for transformers alone.
    """
    state = attached(model, "merge")
    refuse_shards("merge", model)
    names = state.router.active
    if state.merged:
        raise ValueError("merge: the model is merged already")
    _unrouted(state, "merge")
    if not names:
        raise ValueError(f"merge: no adapter is active; activate one of {sorted(state.adapters)}")
    if odd := {
        method.kind for name in names for method in state.adapters[name].values() if not method.merges
    }:
        can = ", ".join(method.__name__ for method in METHODS.values() if method.merges)
        raise ValueError(
            f"merge: {', '.join(sorted(odd))} cannot be added to a weight; {can} can, save keeps the others"
        )
    state.merged = names
    # what replaces a weight comes before what is added to it
    for name in names:
        for key, method in state.adapters[name].items():
            method.merge(model, name, key)
    for _, host in hosts(model):
        merge_deltas(host, names)
    for head, owners in _heads_of(model, names):
        merge_head(head, owners[-1])
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Gives the frozen weights back as they were, bit for bit. Raises ValueError where nothing is merged."""
    state = attached(model, "unmerge")
    if not state.merged:
        raise ValueError("unmerge: the model is not merged")
    for head, _ in _heads_of(model, state.merged):
        unmerge_head(head)
    for _, host in hosts(model):
        unmerge_deltas(host)
    for name in reversed(state.merged):
        for key, method in state.adapters[name].items():
            method.unmerge(model, name, key)
    state.merged = ()
    return model


def _heads_of(model: nn.Module, names: Sequence[str]) -> list[tuple[HeadHost, list[str]]]:
    """The task heads of which some of these adapters have copies, and which."""
    found = [part for _, part in base_modules(model) if isinstance(part, HeadHost)]
    owned = [(head, [name for name in names if name in head.copies]) for head in found]
    return [(head, owners) for head, owners in owned if owners]


def _settled(state: Attached, who: str) -> None:
    if state.merged:
        raise ValueError(f"{who}: the model is merged; unmerge it first")
    _unrouted(state, who)


def _unrouted(state: Attached, who: str) -> None:
    if state.router.ids is not None:
        raise ValueError(f"{who}: rows are routed; behind the `with` of route would be right")


def _known(state: Attached, names: Sequence[str], who: str) -> None:
    if odd := [each for each in names if each not in state.adapters]:
        raise ValueError(f"{who}: no adapter is called {odd[0]!r}; there are {sorted(state.adapters)}")
