"""Mistakes to plant into PTX: what a careless compiler, or hand, might leave out."""

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """One place in a kernel's text, and what is to stand there."""

    name: str
    begin: int
    end: int
    text: str

    def __call__(self, ptx: str) -> str:
        """The text with the fault in it."""
        return ptx[: self.begin] + self.text + ptx[self.end :]


# name: (the instruction, what takes its place)
KINDS = {
    "barrier removed": (r"bar\.sync\s+0;", ""),
    "copies not waited for": (r"cp\.async\.wait_group\s+\S+;", ""),
    "one copy too few waited for": (r"cp\.async\.wait_group\s+(\S+);", "cp.async.wait_group {plus_one};"),
    "copies not committed": (r"cp\.async\.commit_group\s*;", ""),
    "products not waited for": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "one product too few waited for": (
        r"wgmma\.wait_group\.sync\.aligned\s+(\d+);",
        "wgmma.wait_group.sync.aligned {plus_one};",
    ),
    "fence of registers removed": (r"wgmma\.fence\.sync\.aligned;", ""),
    "fence of shared memory removed": (r"fence\.proxy\.async[\w.:]*;", ""),
    "matrices not transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x\d)\.trans(\.shared\.b16)", "{0}{1}"),
    "matrices transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x\d)(\.shared\.b16)", "{0}.trans{1}"),
    "store without its mask": (r"@!?%p\d+ (st\.global)", "{0}"),
    "load without its mask": (r"@!?%p\d+ (ld\.global)", "{0}"),
    "sum begun anew": (
        r"(mma\.sync[^;]*), \{[^{};]*\};",
        "{0}, {{ 0f00000000, 0f00000000, 0f00000000, 0f00000000 }};",
    ),
    "product subtracted": (r"(wgmma\.mma_async[^;]*\}[^;]*, )1(, 1[^;]*;)", "{0}-1{1}"),
}


def faults(ptx: str, kinds=KINDS):
    """Every fault that fits the text, in the text's order."""
    for name in kinds:
        pattern, instead = KINDS[name]
        for number, match in enumerate(re.finditer(pattern, ptx)):
            groups = match.groups()
            # a wait names how many groups may still be under way
            more = int(groups[0], 0) + 1 if "{plus_one}" in instead else 0
            yield Fault(f"{name}, {number}", *match.span(), instead.format(*groups, plus_one=more))
