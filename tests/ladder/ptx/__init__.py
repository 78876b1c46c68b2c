"""A machine for PTX on the CPU: what the compiler really made of a kernel, executed and checked.

    run_ptx     plain PTX text, nvcc's or any other's
    on_ptx      inside, every Triton launch on CPU tensors compiles for an absent GPU and runs here

    parse        text to instructions
    bits         PTX's types as numpy's, and the roundings numpy lacks
    memory       global and shared memory, with their books
    machine      lanes, registers, branches, barriers
    arithmetic, bitwise, control, transfer, tensor_cores, wgmma    the instructions
    launch       the two doors above
    faults       mistakes to plant into PTX

What it checks and a GPU does not:

    bounds       a global access outside the elements of every tensor argument; a shared one outside its block
    races        two warps at one place of shared memory, one of them writing, and no barrier between
    unwritten    a read of shared memory that nothing wrote
    waits        a copy of cp.async is not there before its wait; a result of wgmma not before its own
    async proxy  what wgmma reads through descriptors was fenced, and is not overwritten while it may be read

Not modelled: time, bank conflicts, TMA, mbarrier, tcgen05, clusters, the order of memory between blocks, the
order in which a tensor core adds. What is missing stops with a sentence that names the instruction.
"""

from .bits import PtxError
from .launch import on_ptx, run_ptx

__all__ = ["PtxError", "on_ptx", "run_ptx"]
