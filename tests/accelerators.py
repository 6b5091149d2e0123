"""The command line with CPUs presented as accelerators, because accelerate shards models only over accelerators.

Everything else is real: accelerate's configuration, FSDP2, and gloo between the processes.
"""

from accelerate import PartialState
from accelerate.utils import DistributedType

from gossamer.cli import main

_join = PartialState.__init__


def _join_as_accelerator(self: PartialState, *arguments: object, **options: object) -> None:
    _join(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _join_as_accelerator
main()
