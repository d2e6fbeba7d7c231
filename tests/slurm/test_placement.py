"""That sbatch takes what profile and submit say of where a job runs, and reads it as it is meant."""

import getpass

from pretrain import cli
from tests.slurm.test_restarts import Job, history

COMMENT = 'it\'s "a" \\ back $(id) `id` #1 naïve'


def test_placement_reaches_slurm(cluster, submit, profile, tmp_path, capsys) -> None:
    named = ("ReservationName=maint", "StartTime=now", "Duration=60", "Nodes=node[1-3]")
    cluster.call("scontrol", "create", "reservation", *named, f"Users={getpass.getuser()}")
    try:
        options = ["--reservation", "maint", "--exclude", "node[0,2]", "--nodelist", "node3"]
        options += ["--exclusive", "--licenses", "matlab:1", "--comment", COMMENT]
        options += ["--wckey", "physics", "--mail-type", "END,TIME_LIMIT_90"]
        job = Job(cluster, submit, profile, tmp_path / "run", *options, steps=2)
        shown = cluster.call("scontrol", "-o", "show", "job", job.id)
        for field in (
            *(
                "Reservation=maint",
                "ReqNodeList=node3",
                "ExcNodeList=node[0,2]",
                "OverSubscribe=NO",
            ),
            *("Licenses=matlab:1", f"Comment={COMMENT}", "MailType=END,TIME_LIMIT_90"),
        ):
            assert f"{field} " in shown, shown
        job.wait_for("COMPLETED")
        assert history(job.run)[0][-3:] == ["on", "node1", "node3"]
        # What it refuses is said with what to do.
        argv = ["submit", "--profile", str(tmp_path / "profile.toml")]
        export = ["export", str(tmp_path / "run"), str(tmp_path / "model")]
        for option, value, advice in (
            ("--reservation", "none", "`scontrol show reservation` lists reservations"),
            ("--exclude", "node9", "`sinfo -N` lists the nodes"),
            ("--exclude", "node[0-3]", "exclude leaves too few nodes"),
            ("--licenses", "none:1", "`scontrol show licenses` lists licenses"),
            ("--nodelist", "node[0-1]", "a job gets all nodes of nodelist"),
        ):
            assert cli.main([*argv, option, value, *export]) == 2
            assert advice in capsys.readouterr().err
    finally:
        cluster.call("scancel", "--me")
        cluster.call("scontrol", "delete", "ReservationName=maint")
