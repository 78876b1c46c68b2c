"""The doors of the machine: plain PTX, and Triton's launches."""

import atexit
import contextlib
import functools
import tempfile
from typing import NamedTuple

import numpy as np
import torch

from .bits import SIZES, TYPES, PtxError
from .machine import MOST_LANES, Machine
from .memory import GlobalMemory
from .parse import Kernel, parse


class Checks(NamedTuple):
    """What a launch is held to."""

    most_steps: int = 10**7  # instructions of a batch of blocks
    fences: bool = True  # what wgmma reads must have been fenced


class Launch(NamedTuple):
    """One launch that Triton makes inside on_ptx."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    text: str  # the PTX
    arguments: list  # tensors and numbers, without those that were compiled in
    reaches: tuple = ()  # tensors that it finds by other ways

    def run(self) -> None:
        """Execute it; tensors are changed in place."""
        import triton

        (kernel,) = parse(self.text).values()
        # triton 3.6 fences nothing between what cp.async brings and wgmma reads, 3.7 does
        checks = Checks(fences=not triton.__version__.startswith("3.6."))
        run_kernel(
            kernel, self.grid, (self.threads,), self.arguments, self.shared_bytes, checks, 0, self.reaches
        )


def run_ptx(text, entry, grid, block, arguments, shared_bytes=0, checks=None, blocks_at_once=0) -> None:
    """Execute one kernel of a module of PTX on CPU tensors, which it changes in place.

    entry: the kernel's name, mangled as it is in the text, or a part of it that only one kernel has.
    grid, block: up to three numbers. shared_bytes: of `extern __shared__`, as given with a launch.
    blocks_at_once: how many run side by side; all of them where blocks wait for each other.
    arguments: in the kernel's order, CPU tensors, contiguous numpy arrays, numbers, None for a null pointer;
    for a structure its bytes; for one that holds pointers its bytes and the tensors whose data_ptr() is in
    them. Raises PtxError with the instruction and the block for whatever ptx/__init__.py lists.

        run_ptx(nvcc_ptx, "scale_rows", grid=(4,), block=(128,), arguments=[x, y, m, n, 0.5])
    """
    kernels = parse(text)
    names = [name for name in kernels if name == entry] or [name for name in kernels if entry in name]
    if len(names) != 1:
        raise PtxError(
            f"run_ptx: {entry!r} fits {len(names)} kernels of {sorted(kernels)}; one would be right"
        )
    run_kernel(kernels[names[0]], grid, block, arguments, shared_bytes, checks or Checks(), blocks_at_once)


def run_kernel(kernel: Kernel, grid, block, arguments, shared_bytes, checks, at_once=0, reaches=()) -> None:
    """The same for a kernel that has been parsed."""
    grid, block = (tuple(sizes) + (1,) * (3 - len(sizes)) for sizes in (grid, block))
    threads = int(np.prod(block))
    if threads % 32 or not threads:
        raise PtxError(f"{kernel.name}: blocks of {threads} threads; a multiple of 32 would be right")
    if len(arguments) > len(kernel.parameters):
        raise PtxError(f"{kernel.name}: {len(arguments)} arguments came, it takes {len(kernel.parameters)}")
    # Triton's last parameters, for scratch, are not launched with
    arguments = [*arguments, *[None] * (len(kernel.parameters) - len(arguments))]
    memory = GlobalMemory()
    for tensor in reaches:
        _placed(memory, tensor)
    given = zip(kernel.parameters, arguments, strict=True)
    bytes_ = {parameter.name: _parameter_bytes(memory, parameter, value) for parameter, value in given}
    # parameters lie in memory too, for a kernel may take their addresses
    parameters = {
        name: (value, _placed(memory, np.frombuffer(value, np.uint8).copy()))
        for name, value in bytes_.items()
    }
    memory.open()
    numbers = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    each = at_once or max(1, MOST_LANES // threads)
    for begin in range(0, len(numbers), each):
        batch = numbers[begin : begin + each]
        Machine(kernel, grid, block, batch, parameters, memory, shared_bytes, checks).run()
    memory.close()


def _parameter_bytes(memory, parameter, value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        for tensor in value[1]:
            _placed(memory, tensor)
        return value[0]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return np.uint64(_placed(memory, value)).tobytes()
    type_ = TYPES[parameter.kind]
    if np.dtype(type_).kind == "f":
        return np.array([value or 0.0], type_).tobytes()
    if isinstance(value, float):
        raise PtxError(f"{parameter.name}: is {parameter.kind}, {value} came")
    number = int(value or 0) & ((1 << 8 * SIZES[parameter.kind]) - 1)
    return number.to_bytes(SIZES[parameter.kind], "little")


def _placed(memory, value) -> int:
    """The address of a tensor's first element, which may be touched from now on."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    if tensor.device.type != "cpu":
        raise PtxError(f"launch: takes CPU tensors, one is on {tensor.device}")
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    size, elements = tensor.element_size(), np.zeros(storage.size, bool)
    if tensor.numel():
        first = np.full((), tensor.storage_offset(), np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            first = first[..., None] + np.arange(length) * stride
        for byte in range(size):
            elements[first.ravel() * size + byte] = True
    return memory.place(storage, elements) + tensor.storage_offset() * size


@functools.cache
def _compiled() -> str:
    """The folder where this process keeps what it compiled."""
    folder = tempfile.TemporaryDirectory(prefix="ptx-")
    atexit.register(folder.cleanup)
    return folder.name


@contextlib.contextmanager
def on_ptx(target: str, execute=Launch.run, reaches=()):
    """Inside, Triton's launches on CPU tensors compile for `target` ("sm80" or "sm90") and execute their PTX.

    They compile as they would on that GPU: divisibility by 16, numbers equal to 1, dtypes. Yields the list of
    what was launched. execute: what to do with each. reaches: tensors that kernels find without being given
    them, by distances or tables of addresses. Triton's own cache is neither read nor written, for no machine
    code is made here.
    """
    import triton
    from compile_gate import TARGETS, Gpu
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched, run, make_cubin, active = [], JITFunction.run, CUDABackend.make_cubin, driver._active

    def launch(self, *args, grid, warmup, **settings):
        # kernels are kept by device number, and device 0 was another target a moment ago
        self.device_caches.clear()
        compiled = run(self, *args, grid=grid, warmup=True, **settings)
        named, types = {**dict(zip(self.arg_names, args, strict=False)), **settings}, compiled.src.signature
        values = [named[name] for name in self.arg_names if types.get(name, "constexpr") != "constexpr"]
        sizes = tuple(grid(named) if callable(grid) else grid)
        threads, shared_bytes = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        one = Launch(
            self.__name__,
            sizes + (1,) * (3 - len(sizes)),
            threads,
            shared_bytes,
            compiled.asm["ptx"],
            values,
            tuple(reaches),
        )
        launched.append(one)
        execute(one)
        return compiled

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = _compiled()
        driver.set_active(Gpu(TARGETS[target]))
        JITFunction.run = launch
        # ptxas would take a third of the time, and nothing here reads its code
        CUDABackend.make_cubin = lambda *ignored: b""
        try:
            yield launched
        finally:
            JITFunction.run, CUDABackend.make_cubin, driver._active = run, make_cubin, active
