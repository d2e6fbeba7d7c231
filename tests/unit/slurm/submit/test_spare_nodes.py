"""How a job with spare nodes chooses its nodes: the script's own lines, with stand-ins for SLURM."""

import os
import re
import subprocess
from pathlib import Path

from slurm.submit.profile import Profile
from slurm.submit.render import Resources, train_script

NODES = 512
ALL = [f"node{number}" for number in range(NODES + 2)]
SQUEUE = '#!/bin/bash\necho "$LEFT"\n'
SCONTROL = '#!/bin/bash\ntr " " "\\n" <<< "${@: -1}"\n'
# As SLURM's: it refuses a step that names a node which it has taken from the job. At a dead node the step
# fails, and those that it has reached have answered.
SRUN = """#!/bin/bash
for word in "$@"; do case $word in --nodelist=*) names=${word#*=} ;; esac; done
echo "$names" >> sruns
for name in ${names//,/ }; do
  [[ " $LEFT " == *" $name "* ]] || exit 1
done
status=0
for name in ${names//,/ }; do
  if [[ " $DEAD " == *" $name "* ]]; then status=233
  elif [[ $names != *,* || " $BEHIND " != *" $name "* ]]; then echo "$name"; fi
done
exit "$status"
"""


def choose(
    folder: Path, *, left: list[str] = ALL, dead: tuple[str, ...] = (), behind: tuple[str, ...] = ()
) -> tuple[list[str] | None, list[str]]:
    """The chosen nodes (None: too few), and the nodes of each step.

    Args:
        left: those that SLURM counts to the job.
        dead: on which no step starts.
        behind: which only a step of their own reaches, because another one hangs.
    """
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    resources = Resources(NODES, 8, spare_nodes=2)
    script = train_script(Profile(), resources, ["--x"], Path("r"), Path("r/slurm/1"))
    lines = re.search(r"^answering\(\) \{.*?^\}\nchoose_hosts\(\) \{.*?^\}\n", script, re.M | re.S)
    assert lines
    done = subprocess.run(
        ["bash", "-c", f'set -u\n{lines[0]}choose_hosts || exit 1; echo "${{hosts[@]}}"'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "LEFT": " ".join(left),
            "DEAD": " ".join(dead),
            "BEHIND": " ".join(behind),
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": " ".join(ALL),
            "nodes": str(NODES),
        },
    )
    assert done.stderr == ""
    sruns = (folder / "sruns").read_text().splitlines()
    return done.stdout.split() if done.returncode == 0 else None, sruns


def test_one_step_asks_all_nodes(tmp_path: Path) -> None:
    hosts, sruns = choose(tmp_path)
    assert hosts == ALL[:NODES]
    assert sruns == [",".join(ALL)]


def test_a_dead_node_is_passed_over(tmp_path: Path) -> None:
    hosts, sruns = choose(tmp_path, dead=("node3",))
    assert hosts == [name for name in ALL[: NODES + 1] if name != "node3"]
    assert len(sruns) == 1


def test_a_node_that_slurm_has_taken_away_is_not_asked(tmp_path: Path) -> None:
    left = [name for name in ALL if name != "node3"]
    hosts, sruns = choose(tmp_path, left=left)
    assert hosts == left[:NODES]
    assert sruns == [",".join(left)]


def test_nodes_behind_one_that_hangs_get_a_step_of_their_own(tmp_path: Path) -> None:
    behind = tuple(f"node{number}" for number in range(10, 40))
    hosts, sruns = choose(tmp_path, dead=("node9",), behind=behind)
    assert hosts == [name for name in ALL[: NODES + 1] if name != "node9"]
    assert sorted(sruns[1:]) == sorted(("node9", *behind))


def test_too_few(tmp_path: Path) -> None:
    hosts, sruns = choose(tmp_path, dead=("node0", "node3", "node9"))
    assert hosts is None
    assert len(sruns) == 4
