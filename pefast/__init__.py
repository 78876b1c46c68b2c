"""pefast: parameter-efficient fine-tuning that costs what the frozen model costs.

Public names are loaded on first touch, so `import pefast` is quick and imports neither torch nor triton.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name: the file that holds it
_HOMES = {
    "FusedLoRALinear": "layers",
    "LoRA": "methods",
    "IA3": "methods",
    "Adapter": "methods",
    "Prompt": "methods",
    "Prefix": "methods",
    "Full": "methods",
    "Layers": "methods",
    "Bias": "methods",
    "Heads": "methods",
    "Subnetwork": "methods",
    "Importance": "methods",
    "score": "methods",
    "learn_gates": "methods",
    "accelerate": "acceleration",
    "attach": "model",
    "detach": "model",
    "merge": "model",
    "unmerge": "model",
    "export": "exporting",
    "activate": "model",
    "average": "averaging",
    "route": "model",
    "save": "folders",
    "load": "folders",
    "explain": "report",
    "parameter_groups": "optimizer",
    "backend": "dispatch",
}
_ROOMS = ("ops", "layers", "methods", "formats", "kernels", "native", "tasks", "testing")

__all__ = [
    "IA3",
    "Adapter",
    "Bias",
    "Full",
    "FusedLoRALinear",
    "Heads",
    "Importance",
    "Layers",
    "LoRA",
    "Prefix",
    "Prompt",
    "Subnetwork",
    "__version__",
    "accelerate",
    "activate",
    "attach",
    "average",
    "backend",
    "detach",
    "explain",
    "export",
    "learn_gates",
    "load",
    "merge",
    "ops",
    "parameter_groups",
    "route",
    "save",
    "score",
    "unmerge",
]

if TYPE_CHECKING:
    from pefast import ops
    from pefast.acceleration import accelerate
    from pefast.averaging import average
    from pefast.dispatch import backend
    from pefast.exporting import export
    from pefast.folders import load, save
    from pefast.layers import FusedLoRALinear
    from pefast.methods import (
        IA3,
        Adapter,
        Bias,
        Full,
        Heads,
        Importance,
        Layers,
        LoRA,
        Prefix,
        Prompt,
        Subnetwork,
        learn_gates,
        score,
    )
    from pefast.model import activate, attach, detach, merge, route, unmerge
    from pefast.optimizer import parameter_groups
    from pefast.report import explain


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"pefast.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"pefast.{name}")
    else:
        raise AttributeError(f"pefast has no name {name!r}; public names are {', '.join(sorted(_HOMES))}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES, *_ROOMS})
