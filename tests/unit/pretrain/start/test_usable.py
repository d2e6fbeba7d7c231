"""Numbers that no run can use are refused before it starts, on the command line as in a file."""

import math
import re
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.start.arguments import parse_train


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--optimizer.lr nan", "optimizer.lr is nan"),
        ("--optimizer.lr inf", "optimizer.lr is inf: it must be at most"),
        ("--optimizer.clip-grad nan", "optimizer.clip_grad is nan"),
        ("--optimizer.adam-eps inf", "optimizer.adam_eps is inf"),
        ("--optimizer.z-loss-coeff inf", "optimizer.z_loss_coeff is inf"),
        ("--faults.spike-factor nan", "faults.spike_factor is nan"),
        (
            "--faults.hang-s 1e12",
            "faults.hang_s is 1,000,000,000,000.0: it must be at most 10,000,000",
        ),
        ("--faults.start-s inf", "faults.start_s is inf: it must be at most"),
        ("--adapt.distillation-temperature nan", "adapt.distillation_temperature is nan"),
        ("--log-interval 99999999999999999999999", "log_interval is 9999.*: give a usual number"),
        ("--seed -1", "seed is -1: it must be at least 0"),
        ("--seed 9223372036854775807", "seed is .*: it must be at most 4,000,000,000"),
        ("--data.num-workers 2147483647", "data.num_workers is .*: it must be at most 1,024"),
        ("--micro-batch-size 100000000 --global-batch-size 100000000", "micro_batch_size is"),
        ("--schedule.train-steps 99999999999", "schedule.train_steps is .*: it must be at most"),
        ("--profile.first-step 1000 --schedule.train-steps 30", "is after the run's 30 steps"),
        ("--profile.steps 3", "profile.steps is 3, but profile.first_step is not set"),
        ("--watch.max-tokens 5", "watch.max_tokens is for the tasks of watch.tasks"),
        ("--plan-only h100 --nproc-per-node 0", "--nproc-per-node 0: start at least one rank"),
    ],
)
def test_numbers_that_no_run_can_use(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["train", "--preset", "debug", *options.split()])
    except SystemExit as ended:  # as argparse ends
        status = ended.code
    assert status == 2
    assert re.search(said, " ".join(capsys.readouterr().err.replace("\u2502", " ").split()))


def test_infinity_may_turn_a_limit_off() -> None:
    assert (
        parse_train(["--preset", "debug", "--optimizer.clip-grad", "inf"])[0].optimizer.clip_grad
        == math.inf
    )


def test_a_file_is_read_before_options_are_put_on_top_of_it(tmp_path: Path) -> None:
    file = tmp_path / "more.json"
    file.write_text(
        '{"profile": {"first_step": 50}, "watch": {"max_tokens": 64}, "seed": 4100000000}'
    )
    options = "--schedule.train-steps 100 --watch.tasks perplexity --seed 1"
    config, _ = parse_train(["--preset", "debug", "--config", str(file), *options.split()])
    assert (config.profile.first_step, config.watch.max_tokens) == (50, 64)
