"""Where SLURM may place a job and on what terms: fields of a profile that one submission may replace."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from slurm.errors import UserError

NAME = r"[A-Za-z0-9][A-Za-z0-9_.,+-]*"
HOSTS = r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*"
PATTERNS = {
    "partition": NAME,
    "account": NAME,
    "qos": NAME,
    "wckey": NAME,
    "constraint": r"[A-Za-z0-9_(\[][A-Za-z0-9_.,+&|*()\[\]:-]*",
    "reservation": r"[A-Za-z0-9][A-Za-z0-9_.,:+@-]*",
    "nodelist": HOSTS,
    "exclude": HOSTS,
    "licenses": r"[A-Za-z0-9][A-Za-z0-9_.,:;|@+-]*",
    "mail_user": r"[A-Za-z0-9][A-Za-z0-9_.,+%@-]*",
    "comment": r"[^\x00-\x1f\x7f]+",
}
MAIL_TYPES = (
    *(
        "NONE",
        "BEGIN",
        "END",
        "FAIL",
        "REQUEUE",
        "ALL",
        "INVALID_DEPEND",
        "STAGE_OUT",
        "ARRAY_TASKS",
    ),
    *("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"),
)


@dataclass(frozen=True)
class Placement:
    """Options of sbatch, as sbatch takes them."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have: "a100&ib"."""
    reservation: str | None = None
    nodelist: str | None = None
    """Nodes that each job gets, all of them: "node[01-04]". Commands other than train have one node."""
    exclude: str | None = None
    """Nodes that no job may get: "node07,node[11-12]"."""
    exclusive: bool = False
    """Whole nodes, without other jobs on them."""
    licenses: str | None = None
    """"matlab:2,lumerical"."""
    comment: str | None = None
    """Any text, for the people who run the cluster."""
    wckey: str | None = None
    """What the cluster's accounting books the job under."""
    mail_type: str | None = None
    """When SLURM sends a mail: "END,FAIL"."""
    mail_user: str | None = None
    """To whom; without it to the user who submits."""

    def __post_init__(self) -> None:
        for name, pattern in PATTERNS.items():
            check(name, getattr(self, name), pattern)
        for kind in self.mail_type.split(",") if self.mail_type is not None else ():
            if kind.upper() not in MAIL_TYPES:
                raise UserError(
                    f"mail_type {self.mail_type!r} is not allowed: give {', '.join(MAIL_TYPES)}, or "
                    "several of them, separated by commas"
                )


Kind = TypeVar("Kind", bound=Placement)


def placed(profile: Kind, asked: Mapping[str, Any]) -> Kind:
    """`profile` with the fields that one submission gives.

    Args:
        asked: by the names of Placement's fields; None and False are not given.
    """
    given = {
        name: value for name, value in asked.items() if value is not None and value is not False
    }
    return replace(profile, **given)


def from_environment(profile: Kind, environment: Mapping[str, str]) -> tuple[Kind, list[str]]:
    """`profile` with what SBATCH_* variables say of fields that it leaves open.

    A site's modules set SBATCH_ACCOUNT and the like. Other such variables are not used: they would change
    what the script is written for (nodes, tasks, cores, signals).

    Returns:
        The profile, and lines that say what was taken and what was not.

    Raises:
        UserError: a value that is not allowed, or the whole asks for nothing.
    """
    names = {f"SBATCH_{field.name.upper()}": field.name for field in fields(Placement)}
    taken: dict[str, Any] = {}
    unused, lines = [], []
    for variable in sorted(name for name in environment if name.startswith("SBATCH_")):
        text, name = environment[variable], names.get(variable)
        value: Any = text
        if name == "exclusive":  # sbatch takes the variable, without a value, as the option
            value = text.lower() in ("", "1", "yes", "true", "exclusive")
        if name and value and not getattr(profile, name):
            taken[name] = value
            lines.append(f"{name} {text} is that of {variable} in the environment")
        elif name is None or not value or getattr(profile, name) != value:
            unused.append(f"{variable}={text}")
    if unused:
        lines.append(
            f"not used: {', '.join(unused)} of the environment: the profile and submit's options decide"
        )
    try:
        whole = placed(profile, taken)
    except UserError as error:
        raise UserError(f"SBATCH_* of the environment: {error}") from None
    if whole.mail_user and not whole.mail_type:
        raise UserError(
            "mail_user is given without mail_type, and SLURM would send no mail: give mail_type too, such "
            "as END,FAIL"
        )
    return whole, lines


def check(name: str, value: str | None, pattern: str) -> None:
    """Refuses a value that does not match. "" is refused too: sbatch would take it as an option's end."""
    if value is not None and not re.fullmatch(pattern, value):
        raise UserError(
            f"{name} {value!r} is not allowed: it must match the regular expression {pattern}"
        )
