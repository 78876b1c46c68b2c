"""What a run measures of itself while it trains: seconds for each part of a step, tokens, gradients' norms.

Nothing here waits for a GPU: parts are timed by events in its own queue, and numbers stay tensors until they
are read.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .model import parameters_of

# data: the next batches; backward has the gradients' exchange between processes; optimizer has the clipping
PARTS = ("data", "forward", "backward", "optimizer")
Mark = float | torch.cuda.Event


class Gauges:
    """The sums of one process."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._open: deque[tuple[str, Mark, Mark]] = deque()
        self._tokens: list[Tensor] = []
        self._read_at = 0.0

    def mark(self) -> Mark:
        """This moment, in the GPU's queue where there is one."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, part: str, begin: Mark, end: Mark) -> None:
        """What was between two marks counts as `part`."""
        self._open.append((part, begin, end))
        while self._open and (isinstance(self._open[0][2], float) or self._open[0][2].query()):
            self._close(*self._open.popleft())

    def _close(self, part: str, begin: Mark, end: Mark) -> None:
        # elapsed_time is in milliseconds
        taken = end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
        self.seconds[part] += taken

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """What happens inside counts as `part`, by the processor's clock."""
        begin = time.perf_counter()
        yield
        self.add(part, begin, time.perf_counter())

    def count(self, batch: dict[str, Tensor]) -> None:
        """A batch's tokens; padding is none."""
        mask = batch.get("attention_mask")
        self._tokens.append(torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum())

    def tokens_per_second(self) -> float:
        """Since the last call, in the time of the four parts alone: looks and checkpoints do not count."""
        tokens, self._tokens = sum(each.item() for each in self._tokens), []
        now = sum(self.finish().values())
        since, self._read_at = now - self._read_at, now
        return tokens / since if since else 0.0

    def finish(self) -> dict[str, float]:
        """Seconds of each part so far; waits for a GPU's last events."""
        if self.on_gpu and self._open:
            torch.cuda.synchronize()
        while self._open:
            self._close(*self._open.popleft())
        return dict(self.seconds)


def trained_by_method(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What trains, by adapter and method ("default/lora", "default/head"); "base" is all that is neither."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    state = getattr(model, "_pefast", None)
    for name in state.router.active if state is not None else ():
        for place, parameter in parameters_of(model, name).items():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found.setdefault(f"{name}/{place.split('/', 1)[0]}", []).append(parameter)
    rest = [each for each in model.parameters() if each.requires_grad and id(each) not in seen]
    return found | ({"base": rest} if rest else {})


def norms(groups: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """The norm of each group's gradient; a group without one is left out."""
    found = {}
    for name, parameters in groups.items():
        gradients = [each.grad for each in parameters if each.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            # the parts of a gradient that is spread over processes are put together
            found[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return found


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each group by its name; groups of one name and rate stand once."""
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = group.get("name", "base")
        at, count = name, 1
        while found.get(at, group["lr"]) != group["lr"]:
            count += 1
            at = f"{name}_{count}"
        found[at] = group["lr"]
    return found


def held(
    groups: dict[str, list[nn.Parameter]], optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, int | None]]:
    """What each group of parameters holds: their number, and bytes of values, gradients and the optimizer's
    state, which is None without an optimizer."""
    found = {}
    for name, parameters in groups.items():
        own = sum(each.nbytes for each in parameters)
        sizes = {"parameters": sum(each.numel() for each in parameters), "bytes": own, "gradients": own}
        states = [] if optimizer is None else [optimizer.state[each] for each in parameters]
        state = sum(value.nbytes for one in states for value in one.values() if isinstance(value, Tensor))
        found[name] = sizes | {"state": None if optimizer is None else state}
    return found
