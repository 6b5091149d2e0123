"""The command line with CPUs that pass for accelerators: accelerate shards models over accelerators only.

Everything else is the real thing: accelerate's configuration, FSDP2, gloo between the processes.
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
