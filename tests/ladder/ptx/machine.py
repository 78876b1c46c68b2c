"""Lanes, registers, branches and barriers: the part of the machine that knows no instruction.

Every thread of a batch of blocks is one lane of numpy arrays. All lanes walk together until a branch parts
them; then those at the lowest instruction go first, until they meet again. Registers are never changed in
place, so two names may share an array.
"""

import re

import numpy as np

from . import arithmetic, bitwise, control, tensor_cores, transfer, wgmma
from .bits import SIGNED, SIZES, TYPES, WORDS, PtxError
from .memory import SharedMemory
from .parse import Address, Kernel

OPERATIONS = {
    **arithmetic.OPERATIONS,
    **bitwise.OPERATIONS,
    **control.OPERATIONS,
    **transfer.OPERATIONS,
    **tensor_cores.OPERATIONS,
    **wgmma.OPERATIONS,
}
# lanes of numpy's arrays: wider ones cost time, narrower ones calls
MOST_LANES = 1024
# of so many steps apart one belongs to the blocks that are ahead
PATIENCE = 4


class Machine:
    """One batch of blocks of one launch."""

    def __init__(self, kernel: Kernel, grid, block, numbers, parameters, memory, shared_bytes, checks):
        """`numbers`: the blocks' places in the grid; `parameters`: bytes and address of each by name."""
        self.kernel, self.parameters, self.memory, self.checks = kernel, parameters, memory, checks
        self.threads, self.numbers = int(np.prod(block)), numbers
        self.lanes = self.threads * len(numbers)
        self.lane = np.arange(self.lanes)
        self.arrays, size = _lay_out(kernel.shared, shared_bytes)
        self.shared = SharedMemory(size, len(numbers), self.threads, _grain(kernel))
        self.special = _special(grid, block, numbers)
        self.registers = {}
        self.everyone, self.active = True, np.ones(self.lanes, bool)
        self.all_lanes = self.active
        self.copies, self.committed = [], np.zeros(self.lanes, np.int64)
        self.products = wgmma.Products(self)
        self.guards = [self._guard(instruction) for instruction in kernel.instructions]
        self.steps = [self._build(instruction) for instruction in kernel.instructions]

    def _build(self, instruction):
        build = OPERATIONS.get(instruction.parts[0])
        if build is None:
            raise PtxError(f"{self.kernel.name}: this machine has no instruction {instruction.opcode}")
        try:
            return build(self, instruction)
        except (PtxError, KeyError, StopIteration) as error:
            why = f": {error}" if isinstance(error, PtxError) else ""
            text = f"{self.kernel.name}: this machine cannot run {instruction.text!r}{why}"
            raise PtxError(text) from error

    def _guard(self, instruction):
        if not instruction.guard:
            return None
        predicate = self.source(instruction.guard, "pred")
        return (lambda: ~predicate()) if instruction.negated else predicate

    # operands

    def constant(self, value, type_):
        """One value on every lane."""
        return np.full(self.lanes, value, type_)

    def source(self, operand: str, kind: str):
        """A function that gives an operand's value on every lane, as numpy's type of `kind`."""
        type_, size = TYPES[kind], SIZES[kind]
        declared = self.kernel.kind_of(operand)
        if not declared:
            value = self._fixed(operand, kind)
            return lambda: value
        registers, word = self.registers, TYPES["pred"] if declared == "pred" else WORDS[SIZES[declared]]
        if operand not in registers:
            # what no instruction wrote is no number
            registers[operand] = self.constant(word(0) if word is np.bool_ else ~word(0), word)
        if operand in self.products.names:
            read = self.products.checked(operand)
        else:
            read = lambda: registers[operand]  # noqa: E731
        if type_ is word:
            return read
        if np.dtype(word).itemsize == size:
            return lambda: read().view(type_)
        return lambda: read().astype(WORDS[size]).view(type_)

    def sources(self, operands, kind: str) -> list:
        """The same of a vector."""
        return [self.source(operand, kind) for operand in operands]

    def predicate(self, operand: str):
        """A predicate that may come with a "!" before it."""
        read = self.source(operand.lstrip("!"), "pred")
        return (lambda: ~read()) if operand.startswith("!") else read

    def _fixed(self, operand, kind):
        type_, size = TYPES[kind], SIZES[kind]
        if operand in self.special:
            return self.special[operand].astype(WORDS[size]).view(type_)
        if operand in self.arrays:
            return self.constant(self.arrays[operand], type_)
        if operand in self.parameters:
            return self.constant(self.parameters[operand][1], type_)
        if kind == "pred":
            return self.constant(bool(int(operand, 0)), type_)
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
            word = np.uint32 if match[1] in "fF" else np.uint64
            bits = np.array([int(match[2], 16)], word)
            if np.dtype(word).itemsize == size:
                return self.constant(bits.view(type_)[0], type_)
            value = bits.view(np.float32 if word is np.uint32 else np.float64)
            return self.constant(value.astype(type_)[0], type_)
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"cannot read the operand {operand}") from None
        return self.constant(number & ((1 << 8 * size) - 1), WORDS[size]).view(type_)

    def sink(self, operand: str, kind: str):
        """A function that puts values of numpy's type of `kind` into a register, on the active lanes."""
        if operand == "_":
            return lambda value: None
        declared, size = self.kernel.kind_of(operand), SIZES[kind]
        if not declared:
            raise PtxError(f"{operand} is no register")
        registers, word = self.registers, np.bool_ if declared == "pred" else WORDS[SIZES[declared]]
        if operand not in registers:
            registers[operand] = self.constant(word(0) if word is np.bool_ else ~word(0), word)
        wider = np.dtype(word).itemsize > size
        narrow = SIGNED[size] if kind.startswith("s") else WORDS[size]
        wide = SIGNED[np.dtype(word).itemsize] if kind.startswith("s") else word
        watched = operand in self.products.names

        def store(value):
            if wider:
                value = value.view(narrow).astype(wide)
            if value.dtype != word:
                value = value.view(word)
            if watched:
                self.products.note_write(operand)
            registers[operand] = value if self.everyone else np.where(self.active, value, registers[operand])

        return store

    def address(self, operand: Address):
        """A function that gives the address on every lane, as int64."""
        if self.kernel.kind_of(operand.base):
            kind = f"u{8 * SIZES[self.kernel.kind_of(operand.base)]}"
            read = self.source(operand.base, kind)
            return lambda: read().astype(np.int64) + operand.offset
        value = self._fixed(operand.base, "s64") + operand.offset
        return lambda: value

    def warps(self, what: str) -> np.ndarray:
        """Which warps are active; none may be so in part."""
        active = self.active.reshape(-1, 32)
        whole = active.all(1)
        if not self.everyone and (active.any(1) != whole).any():
            raise PtxError(f"divergence: {what} in a part of a warp")
        return whole

    # walking

    def run(self) -> None:
        """Every block to its end."""
        self.at = np.zeros(self.lanes, np.int64)
        self.done, self.waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        left, at = self.checks.most_steps, 0
        with np.errstate(all="ignore"):
            while at is not None:
                at, left = self._together(at, left)
                if at is not None:
                    at, left = self._apart(left)

    def _together(self, at, left):
        """Walk while all lanes agree; returns an instruction at which they part, or None at the end."""
        steps, guards, full = self.steps, self.guards, self.all_lanes
        end = len(steps)
        try:
            while at < end:
                left -= 1
                if left < 0:
                    raise PtxError("no end in sight")
                self.everyone, self.active, guard = True, full, guards[at]
                if guard is not None:
                    active = guard()
                    count = np.count_nonzero(active)
                    if not count:
                        at += 1
                        continue
                    self.everyone, self.active = count == self.lanes, active
                outcome = steps[at]()
                if outcome is None:
                    at += 1
                elif not self.everyone:
                    self.at[:] = at
                    self._part(at, outcome, full)
                    return at, left
                elif outcome == control.BARRIER:
                    self.shared.barrier(full)
                    at += 1
                elif outcome == control.EXIT:
                    return None, left
                else:
                    at = outcome
        except PtxError as error:
            raise self._placed(error, at) from None
        return None, left

    def _apart(self, left):
        """Walk those at the lowest instruction until all agree again."""
        while True:
            running = ~(self.done | self.waiting)
            if not running.any():
                return None, left
            at = int(self.at[running].min())
            if at == self.at.max() and running.all():
                return at, left
            if left % PATIENCE == 0:
                # the lowest blocks may be waiting for others
                running, at = self._others(running, at)
            here = running & (self.at == at)
            if at >= len(self.steps):
                self.done |= here
                self._release()
                continue
            left -= 1
            guard = self.guards[at]
            self.active = here if guard is None else here & guard()
            self.everyone = bool(self.active.all())
            try:
                if left < 0:
                    raise PtxError("no end in sight")
                outcome = self.steps[at]() if self.active.any() else None
                self._part(at, outcome, here)
            except PtxError as error:
                raise self._placed(error, at) from None

    def _others(self, running, at):
        """The same without the blocks that are at `at`, where that leaves any."""
        place = np.where(running, self.at, len(self.steps)).reshape(-1, self.threads).min(1)
        others = running & np.repeat(place > at, self.threads)
        return (others, int(self.at[others].min())) if others.any() else (running, at)

    def _part(self, at, outcome, here):
        """Move the lanes `here` on, the active ones as the instruction at `at` says."""
        active = self.active
        self.at[here] = at + 1
        if outcome == control.BARRIER:
            whole, alive = active.reshape(-1, 32), ~self.done.reshape(-1, 32)
            if (whole.any(1) & (whole != alive).any(1)).any():
                raise PtxError("divergence: a barrier in a part of a warp")
            self.waiting |= active
            self._release()
        elif outcome == control.EXIT:
            self.done |= active
            self._release()
        elif outcome is not None:
            self.at[active] = outcome

    def _release(self):
        """Let every block go on whose living threads all wait."""
        shape = (-1, self.threads)
        late = ~(self.done | self.waiting).reshape(shape)
        ready = ~late.any(1) & self.waiting.reshape(shape).any(1)
        if ready.any():
            lanes = np.repeat(ready, self.threads)
            self.waiting &= ~lanes
            self.shared.barrier(lanes)

    def _placed(self, error, at):
        block = self.numbers[int(np.argmax(self.active)) // self.threads]
        where = f"{self.kernel.name}, block {block}: {self.kernel.instructions[at].text}"
        return PtxError(f"{error}\n  {where}")


def _lay_out(arrays, at_launch):
    """Where each shared array begins, and the bytes of all."""
    end, places = 0, {}
    for name, array in sorted(arrays.items(), key=lambda item: item[1].at_launch):
        places[name] = end = -(-end // array.align) * array.align
        end += at_launch if array.at_launch else array.bytes
    return places, max(end, at_launch)


def _special(grid, block, numbers):
    """The registers that say where a thread is."""
    thread = np.tile(np.arange(int(np.prod(block)), dtype=np.uint32), len(numbers))
    of_block = np.repeat(np.array(numbers, np.uint32), int(np.prod(block)), 0)
    found = {"%laneid": thread % 32, "%warpid": thread // 32}
    found["%tid.x"], found["%tid.y"] = thread % block[0], thread // block[0] % block[1]
    found["%tid.z"] = thread // (block[0] * block[1])
    for axis, letter in enumerate("xyz"):
        found[f"%ctaid.{letter}"] = of_block[:, axis]
        found[f"%ntid.{letter}"] = np.full_like(thread, block[axis])
        found[f"%nctaid.{letter}"] = np.full_like(thread, grid[axis])
    return {name: value.astype(np.uint32) for name, value in found.items()} | dict.fromkeys(
        ("%clock", "%clock64", "%globaltimer"), np.zeros_like(thread)
    )


def _grain(kernel):
    """Bytes of the smallest access to shared memory, which is how finely the books are kept."""
    return min(
        (transfer.access_bytes(i) for i in kernel.instructions if transfer.touches_shared(i)), default=16
    )
