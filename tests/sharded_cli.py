"""`pefast train` under accelerate's FSDP2 on CPUs, which accelerate itself keeps for GPUs: only the choice is
made here, all that follows is accelerate's, transformers' and torch's own.
"""

from accelerate import state
from accelerate.utils import DistributedType

from pefast.cli import main

plain = state.AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    """AcceleratorState as it is on GPUs."""
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = sharded
    main()
