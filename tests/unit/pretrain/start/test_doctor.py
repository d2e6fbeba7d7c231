import importlib.metadata

import pytest

from pretrain import cli
from pretrain.start import doctor


def pretend(monkeypatch, versions: dict[str, str], modules: set[str] = frozenset()) -> None:
    """A machine with these packages and importable modules, and no others."""

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_has_module", lambda name: name in modules)


def test_this_machine_can_train_on_the_cpu(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for heading in ("Machine", "Packages", "GPU"):
        assert f"{heading}\n" in output
    for package in ("torch", "megatron-core", "transformer-engine", "apex", "transformers"):
        assert f"  {package} " in output
    assert "Ready for CPU training: yes. Missing for GPU: " in output.splitlines()[-1]


def test_what_is_missing_comes_with_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if "engine" in name else "1")
    doctor.run_doctor()
    output = capsys.readouterr().out
    assert "missing; needed for GPU layers and FP8: pip install" in output
    assert "transformer-engine" in output.splitlines()[-1].split("Missing for FP8:")[1]


def test_a_checkout_that_is_not_installed(monkeypatch, capsys) -> None:
    """On PYTHONPATH alone, as on a machine that nothing can be installed on."""

    def requires(package: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    assert doctor.run_doctor() == 0
    assert "not installed: versions are not checked" in capsys.readouterr().out


def test_the_other_apex_is_named(monkeypatch) -> None:
    pretend(monkeypatch, {"apex": "0.9.10.dev0"})
    verdict = doctor.apex_verdict()
    assert "ANOTHER PROJECT" in verdict
    assert "pip uninstall apex" in verdict


@pytest.mark.parametrize("module", ["amp_C", "apex.optimizers"])
def test_nvidias_apex_is_recognised(monkeypatch, module) -> None:
    pretend(monkeypatch, {"apex": "0.1"}, {module})
    assert doctor.apex_verdict() == "0.1 (NVIDIA's)"


def test_no_apex_is_no_problem(monkeypatch) -> None:
    pretend(monkeypatch, {})
    assert "optional" in doctor.apex_verdict()


def test_versions_outside_the_supported_range_are_named(monkeypatch, capsys) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: "2.2.0" if n == "torch" else real(n))
    assert doctor.run_doctor() == 1
    output = capsys.readouterr().out
    assert "torch 2.2.0 is not supported: needs torch" in output
    assert "Ready for CPU training: no." in output
