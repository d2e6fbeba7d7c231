"""The estimate of a run, against numbers worked out by hand for the paper's 1B."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.side.config import SideConfig
from pretrain.commands.bench import bench
from pretrain.config.presets import PRESETS
from pretrain.plan.estimate import Estimate, estimate, format_estimate, hardware_of
from pretrain.plan.search import row

CONFIG = PRESETS["paper-1b"]()
H100 = hardware_of("h100")

# 40 layers of 4 x 1536 x 1536 + 3 x 1536 x 4096 weights and two norms, a norm, a tied table of 49,152.
PARAMETERS = 40 * (9_437_184 + 18_874_368 + 3_072) + 1_536 + 75_497_472
# 6 a weight that multiplies, and 12 x 40 layers x 1536 x 2048 for attention.
FLOPS_PER_TOKEN = 6 * 1_207_959_552 + 1_509_949_440
BEGIN_S = 16_913_175_552 / 64 / 5e9 + 64 * 1e-3
STEP_S = 4_194_304 * FLOPS_PER_TOKEN / (64 * 989e12 * 0.4)


def paper_1b(**options) -> Estimate:
    return estimate(CONFIG, ranks=64, hardware=H100, mfu=0.4, **options)


def test_time_by_hand() -> None:
    found = paper_1b(storage_bytes_per_s=1e9, start_up_s=100.0)
    assert found.step_s == pytest.approx(STEP_S) == pytest.approx(1.4508, abs=1e-4)
    assert found.tokens == 104_857_600_000
    assert found.training_s == pytest.approx(25_000 * 1.4508, rel=1e-4)
    # 50 times 4096 sequences, forward alone: twice a step's sequences at a third of the work.
    assert found.validation_s == pytest.approx(50 * 2 * STEP_S / 3)
    # 50 times 64 ranks copy a 64th each and are listed; the last time all of it is waited for.
    assert pytest.approx(0.0529 + 0.064, abs=1e-4) == BEGIN_S
    assert found.saving_s == pytest.approx(50 * BEGIN_S + 16.913175552)
    assert (found.write_s, found.too_slow) == (16.913175552, False)
    assert (found.jobs, found.starting_s) == (1, 100.0)
    seconds = 25_000 * STEP_S + 100 * STEP_S / 3 + 50 * BEGIN_S + 16.913175552 + 100
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.gpu_hours == pytest.approx(64 * seconds / 3600)


def test_sizes_by_hand() -> None:
    found = paper_1b()
    assert found.parameters == PARAMETERS == 1_208_083_968
    assert found.checkpoint_bytes == 16_913_175_552  # 2 + 4 + 4 + 4 B
    assert found.stored_bytes == 3 * 16_913_175_552  # keep_last, and the one being written
    assert found.exported_bytes == 2 * PARAMETERS
    padded = replace(CONFIG, model=replace(CONFIG.model, vocab_size=49_152 - 100))
    exported = estimate(padded, ranks=64, hardware=H100, mfu=0.4).exported_bytes
    assert exported == 2 * (PARAMETERS - 100 * 1536)


def test_jobs_by_hand() -> None:
    """Of 2 hours, 100 s are the start, 34 s reading a checkpoint twice, 300 s before the end it stops."""
    found = paper_1b(time_limit_s=7200, start_up_s=100, lead_s=300, storage_bytes_per_s=1e9)
    work_s = 25_000 * STEP_S + 100 * STEP_S / 3 + 50 * BEGIN_S + 16.913175552
    assert work_s / (7200 - 100 - 300 - 33.826351104) == pytest.approx(5.3711, abs=1e-4)
    assert found.jobs == 6
    assert found.starting_s == pytest.approx(6 * 100 + 5 * 33.826351104)
    assert found.saving_s == pytest.approx(55 * BEGIN_S + 6 * 16.913175552)


def test_a_ramp_takes_the_time_of_its_tokens() -> None:
    """A quarter of the batch, a half and three quarters, for as many sequences each: 8,192 of 3 x 8,192."""
    ramp = replace(CONFIG.schedule, rampup_batch_size=(512, 512, 24_576))
    found = estimate(replace(CONFIG, schedule=ramp), ranks=64, hardware=H100, mfu=0.4)
    steps = {512: 16, 1024: 8, 1536: 6}  # 16 x 512 + 8 x 1024 = 16,384, and 6 x 1536 pass 24,576
    sequences = sum(size * count for size, count in steps.items()) + 2048 * (25_000 - 30)
    assert found.tokens == sequences * 2048
    assert found.training_s == pytest.approx(sequences / 2048 * STEP_S)
    assert found.step_s == pytest.approx(STEP_S)
    by_planner = estimate(replace(CONFIG, schedule=ramp), ranks=64, hardware=H100)
    by_hand = sum(
        row(replace(CONFIG, global_batch_size=size), 64, H100).step_s * count
        for size, count in {**steps, 2048: 25_000 - 30}.items()
    )
    assert by_planner.training_s == pytest.approx(by_hand)


def test_muons_checkpoints_have_one_moment_of_matrices() -> None:
    muon = replace(CONFIG, optimizer=replace(CONFIG.optimizer, optimizer="muon"))
    found = estimate(muon, ranks=64, hardware=H100, mfu=0.4)
    matrices = 40 * (9_437_184 + 18_874_368)
    saved = 16_913_175_552 - found.checkpoint_bytes
    assert saved == pytest.approx(4 * matrices, rel=1e-3)
    planned = estimate(muon, ranks=64, hardware=H100).memory_bytes
    whole = estimate(CONFIG, ranks=64, hardware=H100).memory_bytes
    assert planned is not None and whole is not None
    assert whole - planned == pytest.approx(4 * matrices / 64, rel=1e-3)


def test_training_waits_for_storage_that_is_too_slow() -> None:
    """500 steps take 725 s, a checkpoint at 20 MB/s 846 s."""
    found = paper_1b(storage_bytes_per_s=2e7)
    between = CONFIG.save_interval * STEP_S
    late = BEGIN_S + 16_913_175_552 / 2e7 - between
    assert late == pytest.approx(120.4, abs=0.1)
    assert found.saving_s == pytest.approx(49 * (BEGIN_S + late) + between + late)
    assert "raise save_interval" in format_estimate(found)
    assert "raise save_interval" not in format_estimate(paper_1b())


def test_training_waits_for_each_checkpoint_without_async_save() -> None:
    waiting = replace(CONFIG, async_save=False)
    found = estimate(waiting, ranks=64, hardware=H100, mfu=0.4, storage_bytes_per_s=1e9)
    assert found.saving_s == pytest.approx(50 * (BEGIN_S + 16.913175552))


def test_the_planner_gives_step_and_memory() -> None:
    found = estimate(CONFIG, ranks=64, hardware=H100)
    planned = row(CONFIG, 64, H100)
    assert (found.step_s, found.mfu) == (planned.step_s, planned.mfu)
    assert found.memory_bytes == pytest.approx(planned.memory_gb * 1e9)
    assert found.memory_limit_bytes == pytest.approx(0.95 * 80e9)
    # The MFU that it finds gives its time again.
    again = estimate(CONFIG, ranks=64, hardware=H100, mfu=found.mfu)
    assert again.step_s == pytest.approx(found.step_s)


def test_fp8_makes_the_steps_gemms_faster() -> None:
    fp8 = replace(CONFIG, fp8=Fp8Config("tensorwise"))
    found, bf16 = (estimate(c, ranks=64, hardware=H100) for c in (fp8, CONFIG))
    planned = row(fp8, 64, replace(H100, fp8=True))
    assert (found.step_s, found.mfu) == (planned.step_s, planned.mfu)
    assert found.step_s < 0.8 * bf16.step_s
    assert f"MFU {found.mfu:.1%} of the bf16 peak; the planner" in format_estimate(found)
    assert "bf16 peak" not in format_estimate(bf16)
    with pytest.raises(UserError, match=r"fp8\.recipe tensorwise: A100 has no fp8 units"):
        estimate(fp8, ranks=64, hardware=hardware_of("a100"))


def test_side_tuning_takes_a_forward_of_the_backbone_and_a_training_of_the_side_network() -> None:
    side = replace(CONFIG, side=SideConfig(8, start="random"), init_from=Path("backbone"))
    found, whole = estimate(side, ranks=64, hardware=H100, mfu=0.4), paper_1b()
    small = side.side.num_parameters(CONFIG.model)
    of_side = 6 * small + 12 * 40 * 1536 / 8 * 2048
    head = 2 * 49_152 * 1536
    by_hand = FLOPS_PER_TOKEN / 3 + head + of_side
    assert found.step_s == pytest.approx(STEP_S * by_hand / FLOPS_PER_TOKEN)
    assert found.step_s < 0.5 * whole.step_s
    # A forward of both: nearly as long as for the backbone alone.
    forward = (FLOPS_PER_TOKEN + of_side) / FLOPS_PER_TOKEN
    assert found.validation_s == pytest.approx(whole.validation_s * forward)
    with pytest.raises(UserError, match=r"does not model side-tuning .*8\): give an MFU"):
        estimate(side, ranks=64, hardware=H100)


def test_units_are_named_and_what_does_not_fit_is_said() -> None:
    text = format_estimate(paper_1b(time_limit_s=7200))
    for words in (
        "104,857,600,000 tokens",
        "1.45 s",
        "64 x H100",
        "an MFU of 40%",
        "GPU-hours, in 6 jobs",
    ):
        assert words in text
    assert "50.7 GB for checkpoints of 16.9 GB, each written in 8 s; exported 2.42 GB" in text
    assert "FIT" not in text
    large = replace(PRESETS["llama-3-70b"](), parallel=ParallelConfig(tensor_model_parallel_size=8))
    assert "IT DOES NOT FIT" in format_estimate(estimate(large, ranks=8, hardware=H100, mfu=0.4))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"mfu": 40.0}, "MFU of 40.0: it must be above 0"),
        ({}, {"time_limit_s": 400.0}, r"a job of 0\.1 h is too short: start-up takes 180 s"),
        ({}, {"ranks": 63}, "not a multiple of micro_batch_size 8 x data-parallel size 63"),
        ({"precision": "fp32"}, {}, "not ladder in fp32: give an MFU"),
        ({"model": replace(CONFIG.model, residual="desync")}, {}, "not desync in bf16"),
        ({"model": replace(CONFIG.model, vocab_size=None)}, {}, "needs model.vocab_size"),
    ],
)
def test_what_cannot_be_estimated_is_refused(change, options, message) -> None:
    options = {"ranks": 64, "hardware": H100, **options}
    with pytest.raises(UserError, match=message):
        estimate(replace(CONFIG, **change), **options)


def test_a_device_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="no device 'tpu': choose one of h100, h200, a100"):
        hardware_of("tpu")


def test_the_planner_says_what_its_best_takes(capsys) -> None:
    assert bench(["plan", "--preset", "llama-3-8b", "--gpus", "16"]) == 0
    output = capsys.readouterr().out
    assert "run with the first ladder layout:" in output
    lines = [line for line in output.splitlines() if "step s" in line or line.startswith("ladder ")]
    end = lines[0].index("step s") + len("step s")
    assert f"25,000 steps of {float(lines[1][:end].split()[-1]):.2f} s" in output
    assert "GPU-hours" in output
