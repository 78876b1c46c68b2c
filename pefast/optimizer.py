"""What an optimizer is given: the parameters that train, in groups with the learning rate and decay of each
method.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from pefast.model import parameters_of


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0, **methods: dict) -> list[dict]:
    """Groups for any torch optimizer: everything that trains, once, in a fixed order.

        torch.optim.AdamW(pefast.parameter_groups(model, lr=1e-4, lora={"lr": 1e-3}, head={"lr": 1e-2}))

    A method's own options go by its kind ("lora", "adapter", "prompt" ...), or by its key where an adapter
    has several of a kind ("lora_2"); "head" is the task head, "base" what trains and belongs to no adapter.
    Any option of the optimizer can stand there. Factors that a method asks for, as LoRA+ does for b, are on
    top of its learning rate. Vectors, which biases, norms and gains are, do not decay.

    Raises ValueError for a name that nothing which trains has, and where nothing trains.
    """
    groups: dict[tuple, dict] = {}
    seen: set[int] = set()
    known: set[str] = set()
    for key, factor, parameter in _trained(model):
        kind = key.rsplit("_", 1)[0] if key.rsplit("_", 1)[-1].isdigit() else key
        known |= {key, kind}
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        decays = parameter.dim() > 1
        if (key, factor, decays) not in groups:
            options = {
                "lr": lr,
                "weight_decay": weight_decay,
                **methods.get(kind, {}),
                **methods.get(key, {}),
            }
            options["lr"] *= factor
            options["weight_decay"] *= decays
            groups[key, factor, decays] = {"params": [], "name": key, **options}
        groups[key, factor, decays]["params"].append(parameter)
    if not groups:
        raise ValueError(
            f"parameter_groups: nothing of this {type(model).__name__} trains; attach or activate comes first"
        )
    if odd := set(methods) - known:
        raise ValueError(
            f"parameter_groups: nothing that trains is called {sorted(odd)[0]!r}; there are {sorted(known)}"
        )
    return list(groups.values())


def _trained(model: nn.Module) -> Iterator[tuple[str, float, Tensor]]:
    """(key, factor on the learning rate, parameter) of everything that trains."""
    found = set()
    state = getattr(model, "_pefast", None)
    for name in state.router.active if state is not None else ():
        rates: dict[str, float] = {}
        for key, method in state.adapters[name].items():
            rates |= {f"{key}/{own}": factor for own, factor in method.rates(model, name, key).items()}
        for place, parameter in parameters_of(model, name).items():
            if parameter.requires_grad:
                found.add(id(parameter))
                yield place.split("/", 1)[0], rates.get(place, 1.0), parameter
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in found:
            yield "base", 1.0, parameter
