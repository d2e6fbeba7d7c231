"""`megatron-ladder doctor`."""

from dataclasses import dataclass

import tyro

from pretrain.commands.users import for_users


@dataclass(frozen=True)
class DoctorOptions:
    """Say what is installed, and what is missing for GPU and FP8 use."""


@for_users
def doctor(argv: list[str]) -> int:
    """Prints what this machine can do, and what is missing."""
    tyro.cli(DoctorOptions, args=argv, prog="megatron-ladder doctor")
    from pretrain.start.doctor import run_doctor

    return run_doctor()
