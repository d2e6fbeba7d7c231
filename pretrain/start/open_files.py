"""The number of files that a process may have open: the usual limit of 1,024 ends near 100 data sets.

Every map of a file into memory counts, and every connection to another rank.
"""

import resource

from megatron_ladder.errors import UserError
from pretrain.data.folders import DataFolder

# A limit of billions is common in containers. Programs that close all numbers up to it take minutes.
_MOST = 1 << 20
# Of a data set in training: its tokens (the file and its map), .idx, three index files, loss masks.
_A_DATA_SET = 7
# Of a validation split, or of the index files while they are made; only one data set at a time.
_ONE_MORE = 7
# Libraries, sockets of NCCL or gloo, the checkpoint's files, pipes to helper processes.
_OTHERS = 512


def raise_limit() -> int:
    """Raises this process's limit, and that of the processes it starts, as far as the system lets a user.

    Returns:
        The limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else _MOST


def needed(folders: int, ranks: int) -> int:
    """The most files that one process of a run has open: the first rank, which holds a connection to each.

    Args:
        folders: the number of data sets.
    """
    return _A_DATA_SET * folders + _ONE_MORE + ranks + _OTHERS


def check_open_files(folders: list[DataFolder], ranks: int) -> None:
    """Refuses a run that would have more files open than this machine allows.

    Raises:
        UserError: it names both numbers.
    """
    limit, wanted = raise_limit(), needed(len(folders), ranks)
    if limit < wanted:
        raise UserError(
            f"{len(folders):,} data sets and {ranks:,} ranks take up to {wanted:,} open files in a "
            f"process, this machine allows {limit:,} (`ulimit -Hn`): ask its administrator for more "
            "(LimitNOFILE of slurmd), or make fewer and larger data sets"
        )
