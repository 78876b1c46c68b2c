"""The machine for PTX by itself: small kernels, sound and with each of the faults that it must name."""

import numpy as np
import pytest
import torch
from ptx import PtxError, run_ptx
from ptx.bits import from_bf16, to_bf16

HEAD = """
.version 8.0
.target sm_80
.address_size 64
"""

# y[i] = 2 x[i] for i < n, through shared memory, each thread reading what its neighbour wrote
TURN = (
    HEAD
    + """
.visible .entry turn(.param .u64 turn_x, .param .u64 turn_y, .param .u32 turn_n)
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<8>;
    .shared .align 16 .b8 kept[512];
    ld.param.u64 %rd1, [turn_x];
    ld.param.u64 %rd2, [turn_y];
    ld.param.u32 %r1, [turn_n];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r4, %r3, 128, %r2;
    setp.lt.s32 %p1, %r4, %r1;
    mul.wide.s32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    mov.u32 %r5, kept;
    shl.b32 %r6, %r2, 2;
    add.s32 %r7, %r5, %r6;
    mov.b32 %f1, 0f00000000;
    @%p1 ld.global.f32 %f1, [%rd4];
    st.shared.f32 [%r7], %f1;
    bar.sync 0;
    xor.b32 %r8, %r6, 128;
    add.s32 %r9, %r5, %r8;
    ld.shared.f32 %f2, [%r9];
    add.f32 %f3, %f2, %f2;
    @%p1 st.global.f32 [%rd5], %f3;
    ret;
}
"""
)

# a copy of 16 bytes a thread to shared memory and out again
COPY = (
    HEAD
    + """
.visible .entry copy(.param .u64 copy_x, .param .u64 copy_y)
{
    .reg .b32 %r<9>;
    .reg .b64 %rd<6>;
    .shared .align 16 .b8 kept[1024];
    ld.param.u64 %rd1, [copy_x];
    ld.param.u64 %rd2, [copy_y];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, kept;
    add.s32 %r4, %r3, %r2;
    cp.async.cg.shared.global [%r4], [%rd4], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];
    st.global.v4.b32 [%rd5], {%r5, %r6, %r7, %r8};
    ret;
}
"""
)

# the last block adds, the others wait until it has: they must run side by side
WAIT = (
    HEAD
    + """
.visible .entry wait(.param .align 8 .b8 wait_call[16])
{
    .reg .pred %p<4>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [wait_call];
    ld.param.u32 %r1, [wait_call+8];
    mov.u32 %r2, %ctaid.x;
    setp.eq.u32 %p1, %r2, %r1;
    @%p1 bra $last;
$again:
    ld.acquire.gpu.u32 %r3, [%rd1];
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra $again;
    bra $end;
$last:
    mov.u32 %r4, %tid.x;
    setp.eq.u32 %p3, %r4, 0;
    @%p3 red.global.add.u32 [%rd1], 5;
$end:
    ret;
}
"""
)


def turned(text=TURN, n=200, room=200):
    """What TURN makes of 1, 2, 3 …, and what it should."""
    x, y = torch.arange(1.0, n + 1), torch.zeros(room)
    run_ptx(text, "turn", (2,), (128,), [x, y, n])
    wanted = torch.zeros(256)
    wanted[:n] = x
    return y, 2 * wanted[torch.arange(256) ^ 32][:n]


def test_a_sound_kernel_is_right():
    got, wanted = turned()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("line", "fault", "words"),
    [
        ("bar.sync 0;", "", "race: a load reads shared memory"),
        ("bar.sync 0;", "@%p1 bar.sync 0;", "divergence: a barrier in a part of a warp"),
        ("st.shared.f32 [%r7], %f1;", "", "unwritten"),
        ("st.shared.f32 [%r7], %f1;", "st.shared.f32 [%r5], %f1;", "race: lanes store different values"),
        ("@%p1 st.global", "st.global", "bounds: a global store of 56 lanes"),
        ("kept[512]", "kept[256]", "bounds: a shared store"),
        ("ld.global.f32 %f1, [%rd4]", "ld.global.f32 %f1, [%rd4+2]", "alignment"),
        ("add.f32 %f3", "frob.f32 %f3", "this machine has no instruction frob.f32"),
        ("bar.sync 0;", "bar.sync 0, 64;", "a barrier of 64 threads in a block of 128"),
        ("bar.sync 0;", "cp.async.bulk.wait_group 0;", "tensor memory accelerator"),
    ],
)
def test_a_fault_is_named(line, fault, words):
    assert TURN.count(line) == 1
    with pytest.raises(PtxError) as found:
        turned(TURN.replace(line, fault))
    assert words in str(found.value) and "turn" in str(found.value)


def test_elements_between_those_of_a_view_are_out_of_bounds():
    x, y = torch.zeros(400)[::2], torch.zeros(200)
    with pytest.raises(PtxError, match="bounds: a global load"):
        run_ptx(TURN, "turn", (2,), (128,), [x, y, 200])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("cp.async.wait_group 0;", ""),
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;"),
        ("cp.async.commit_group;", ""),
    ],
)
def test_a_copy_is_there_at_its_wait_and_not_before(line, fault):
    x, y = torch.randn(256), torch.zeros(256)
    run_ptx(COPY, "copy", (1,), (64,), [x, y])
    assert torch.equal(x, y)
    with pytest.raises(PtxError, match=r"unwritten|waits"):
        run_ptx(COPY.replace(line, fault), "copy", (1,), (64,), [x, y])


def test_blocks_may_wait_for_each_other_and_structures_hold_pointers():
    count = torch.zeros(1, dtype=torch.int32)
    call = np.array([count.data_ptr(), 2], np.uint64).tobytes()
    run_ptx(WAIT, "wait", (3,), (32,), [(call, [count])], blocks_at_once=3)
    assert count.item() == 5


@pytest.mark.parametrize(
    ("entry", "block", "arguments", "words"),
    [
        ("twist", (128,), 3, "fits 0 kernels of"),
        ("turn", (100,), 3, "blocks of 100 threads"),
        ("turn", (128,), 4, "4 arguments came, it takes 3"),
    ],
)
def test_a_wrong_call_is_refused_in_words(entry, block, arguments, words):
    with pytest.raises(PtxError, match=words):
        run_ptx(TURN, entry, (1,), block, [torch.zeros(128), torch.zeros(128), 128, 0][:arguments])


def test_bfloat16_rounds_as_pytorch_does():
    x = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    assert np.array_equal(to_bf16(x.numpy()), x.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(from_bf16(to_bf16(x.numpy())), x.bfloat16().float().numpy())
