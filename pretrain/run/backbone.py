"""The backbone of a side-tuned run: the one checkpoint that the run began with, kept in its folder.

Checkpoints of such a run hold the side network alone, since the backbone does not change. RUN/backbone is
a folder like a run's, with that checkpoint in it. Its files are hard links where the file system allows:
they take no room, and stay when the other run deletes its own. Elsewhere they are copied, once. So the run
is whole by itself, and the checkpoint's manifest has the checksums that show damage.
"""

import os
import shutil
from pathlib import Path

from megatron_ladder.reading.plain_files import refuse_links
from pretrain.files import sync

BACKBONE = "backbone"


def keep_backbone(run_dir: Path, checkpoint: Path) -> None:
    """Keeps a checkpoint as the backbone of a run."""
    refuse_links(checkpoint, home=checkpoint.parents[1])
    folder = backbone_of(run_dir) / "checkpoints"
    new = folder / f"{checkpoint.name}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for file in sorted(checkpoint.iterdir()):
        try:
            os.link(file, new / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, new / file.name)
            sync(new / file.name)
    sync(new)
    new.rename(folder / checkpoint.name)
    sync(folder)


def backbone_of(run_dir: Path) -> Path:
    """The folder of a side-tuned run's backbone, for `find_checkpoint`."""
    return run_dir / BACKBONE
