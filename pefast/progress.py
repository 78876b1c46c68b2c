"""What a person sees while a model learns: loss, accuracy and steps per second of the last steps."""

import math
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback

WINDOW = 40  # steps that a shown number is the mean of


class Meter:
    """The last steps' losses and hits; they stay tensors until somebody reads them, so that no step waits."""

    def __init__(self):
        self.losses: deque[Tensor] = deque(maxlen=WINDOW)
        self.hits: deque[Tensor] = deque(maxlen=WINDOW)

    def add(self, loss: Tensor, hits: Tensor) -> None:
        """One training step's numbers, each a tensor of one element."""
        self.losses.append(loss)
        self.hits.append(hits)

    def read(self) -> tuple[float, float]:
        """Mean loss and mean share of hits; NaN before the first step."""
        if not self.losses:
            return math.nan, math.nan
        return tuple(
            sum(value.item() for value in values) / len(values) for values in (self.losses, self.hits)
        )


class Watcher(TrainerCallback):
    """A live bar in a terminal; about ten lines anywhere else, such as a log file.

    Raises FloatingPointError when the loss is no longer a number: further steps would only spend time.
    """

    def __init__(self, console: Console | None = None):
        self.meter, self.console = Meter(), console or Console()
        self.times: deque[float] = deque(maxlen=WINDOW)
        self.bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Draws the empty bar."""
        self.times.append(time.perf_counter())
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.line = self.bar.add_task("training", total=state.max_steps, numbers="")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar; reads the meter only when the text is drawn anew."""
        self.times.append(time.perf_counter())
        drawn = state.global_step % 4 == 0 or state.global_step == state.max_steps
        if self.bar is not None:
            if drawn:
                self.bar.update(
                    self.line, completed=state.global_step, numbers=self._numbers(state.global_step)
                )
        elif state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            self.console.print(
                f"training {state.global_step}/{state.max_steps}  {self._numbers(state.global_step)}"
            )

    def close(self) -> None:
        """Leaves the bar on the screen as it is and gives the cursor back; also after an interrupted run."""
        if self.bar is not None:
            self.bar.stop()

    def _numbers(self, step: int) -> str:
        loss, accuracy = self.meter.read()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training: the loss is {loss} at step {step}; a smaller training.lr may help"
            )
        speed = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        # a loss that came without logits says nothing of hits
        hits = "" if math.isnan(accuracy) else f"accuracy {accuracy:.3f}  "
        return f"loss {loss:.3f}  {hits}{speed:.1f} steps/s"
