"""delta_linear for the few rows of a decoding step on a GPU, by csrc/cuda: every row's LoRAs in one launch.

The kernels are a shared library of their own, `_cuda*.so` beside the extension, opened by ctypes when the
first tensor on a GPU comes. It knows neither Python nor torch, so one build serves every release of both, the
extension loads without it, and the tests run the launcher below on the same source built for a CPU.
Inference only. Formula: pefast/ops/delta_linear.py.
"""

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from pefast.native import through_the_registry

# csrc/cuda/delta_linear_decode.h says the same
ROWS, DELTAS, EVERY_ROW = 16, 32, -2
_CALL, _DELTA = struct.Struct("18q"), struct.Struct("8qd")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_GRADIENTS = "computes no gradients, and one is asked for"
# where tensors must be; the tests open a library that was built for a CPU
_device = "cuda"
# zeros that blocks count in, by device and stream
_counts: dict[tuple[int, int], Tensor] = {}


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or None and why there are none."""
    package = Path(__file__).parents[1]
    found = sorted(package.glob("_cuda*.so"))
    if not found:
        note = package / "native" / "why_no_cuda.txt"
        if note.is_file():
            return None, note.read_text(encoding="utf-8").strip()
        return None, "the CUDA kernels were not built: PEFAST_CUDA=1 and nvcc build them with the extension"
    return opened(found[0])


def opened(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library in this file, or None and why it is of no use."""
    try:
        kernels = ctypes.CDLL(str(path))
        run, layout = kernels.pefast_delta_linear_decode, kernels.pefast_delta_linear_decode_layout
    except (OSError, AttributeError) as error:
        return None, f"the CUDA kernels were built but do not load: {error}"
    layout.restype, run.argtypes = ctypes.c_int64, (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    if layout() != _CALL.size + _DELTA.size:
        return None, "the CUDA kernels were built from other sources than this pefast: build them again"
    return kernels, ""


def why_not(call) -> str:
    """Why csrc cannot run this call on a GPU, or ""."""
    x, w = call.x, call.w
    if x.device.type != _device:
        return f"needs a GPU, x is on {x.device}"
    kernels, why = library()
    if kernels is None:
        return why
    if through_the_registry(x):
        return "is called by its address, which a compiler or a subclass of Tensor cannot see"
    if x.shape[0] > ROWS:
        return f"takes the {ROWS} rows of a decoding step at most, x has {x.shape[0]}"
    if x.dtype not in _TYPES or w.dtype is not x.dtype:
        return f"takes float32, bfloat16 and float16, x is {_name(x)} and the weight {_name(w)}"
    if w.device != x.device:
        return f"needs every tensor on {x.device}, the weight is on {w.device}"
    if not w.numel() or not _has_rows(w):
        return f"takes a weight with neighbouring columns, it is {list(w.shape)} with strides {w.stride()}"
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _NO_GRADIENTS
    for name, t in (("bias", call.bias), ("gain", call.gain)):
        if t is not None and (why := _why_not_parameter(name, t, x)):
            return why
    return _why_not_segments(call)


def _why_not_segments(call) -> str:
    x, ids = call.x, call.ids
    if len(call.segments) > DELTAS:
        return f"takes {DELTAS} segments at most, here are {len(call.segments)}"
    if ids is not None and not (ids.dtype is torch.int64 and ids.device == x.device and ids.is_contiguous()):
        return f"takes ids in contiguous int64 on {x.device}, they are {_name(ids)} on {ids.device}"
    for s in call.segments:
        if s.h is not None or s.activation != "identity" or s.c is not None or s.d is not None:
            return "takes LoRAs, here is an activation, a trained bias or a waist from elsewhere"
        if s.dropout:
            return f"has no dropout, a segment's is {s.dropout}"
        if why := _why_not_parameter("a", s.a, x) or _why_not_parameter("b", s.b, x):
            return why
    return ""


def _why_not_parameter(name: str, t: Tensor, x: Tensor) -> str:
    if t.requires_grad and torch.is_grad_enabled():
        return _NO_GRADIENTS
    if t.device != x.device:
        return f"needs every tensor on {x.device}, {name} is on {t.device}"
    if t.dtype is not x.dtype and t.dtype is not torch.float32:
        return f"takes {name} in {_name(x)} or float32, it is {_name(t)}"
    if not t.numel() or not _has_rows(t):
        return f"takes {name} with neighbouring columns, it is {list(t.shape)} with strides {t.stride()}"
    return ""


def _has_rows(t: Tensor) -> bool:
    """Whether neighbours of a row, or of a vector, lie side by side."""
    return t.stride(-1) == 1 or t.shape[-1] == 1


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def forward(call) -> tuple[Tensor, list]:
    """y [M, N], and nothing for a backward.

    Raises RuntimeError where CUDA does not launch the kernel.
    """
    x, w, bias, gain, ids, segments = call.x, call.w, call.bias, call.gain, call.ids, call.segments
    x = x if _has_rows(x) else x.contiguous()
    (m, k), n = x.shape, w.shape[0]
    y = x.new_empty((m, n))
    slots = sum(-(-s.a.shape[0] // 32) * 32 for s in segments)
    h = torch.empty((m, slots), device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    packed = b"".join(
        _DELTA.pack(
            *(s.a.data_ptr(), s.b.data_ptr(), s.a.stride(0), s.b.stride(0), s.a.shape[0]),
            *(s.a.dtype is torch.float32, s.b.dtype is torch.float32),
            *(EVERY_ROW if s.adapter is None else s.adapter, s.scale),
        )
        for s in segments
    )
    given = _CALL.pack(
        *(x.data_ptr(), w.data_ptr(), _address(bias), _address(gain), _address(ids), y.data_ptr()),
        *(h.data_ptr(), _counters(x.device, stream).data_ptr(), m, n, k, x.stride(0), w.stride(0)),
        *(_TYPES[x.dtype], _wide(bias), _wide(gain), len(segments), _processors(x.device)),
    )
    with torch.cuda.device_of(x):
        error = library()[0].pefast_delta_linear_decode(given, packed, stream)
    if error:
        raise RuntimeError(f"delta_linear: CUDA did not launch the kernel of a decoding step: error {error}")
    return y, []


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _wide(t: Tensor | None) -> bool:
    return t is not None and t.dtype is torch.float32


def _counters(device: torch.device, stream: int) -> Tensor:
    """Three zeros, which every launch leaves as zeros. Launches that may overlap have their own."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a graph may be replayed beside other work on any stream
        return torch.zeros(3, dtype=torch.int32, device=device)
    place = (device.index or 0, stream)
    if place not in _counts:
        _counts[place] = torch.zeros(3, dtype=torch.int32, device=device)
    return _counts[place]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
