"""RUN/metrics.prom: a run's status as Prometheus text, for the node exporter's textfile collector."""

from typing import Any

NAMES = {
    "step": "Steps trained.",
    "train_steps": "Steps of the whole run.",
    "tokens": "Tokens trained on.",
    "loss": "Training loss of the last step, nats a token.",
    "tokens_per_second": "Tokens a second, over the last steps.",
    "eta_s": "Seconds of training left.",
    "last_checkpoint": "Step of the newest checkpoint.",
    "starts": "Times the run was started.",
    "world_size": "Ranks.",
    "unix_time": "When these figures were written.",
}
DEVICE_NAMES = {
    "memory_used_bytes": "Device memory in use.",
    "utilization_percent": "Share of the last sample period with a kernel running.",
    "temperature_celsius": "Temperature.",
    "power_watts": "Power drawn.",
}


def prometheus_text(run: str, status: dict[str, Any], devices: list[dict[str, float]]) -> str:
    """The status as Prometheus text: gauges named megatron_ladder_*. Unknown values are left out.

    Args:
        run: the run's name, a label of each gauge.
        status: the fields of RUN/status.json.
        devices: from `device_figures`.
    """
    label = f'run="{_escaped(run)}"'
    lines: list[str] = []
    for name, what in NAMES.items():
        if status[name] is not None:
            lines += _header(name, what)
            lines.append(f"megatron_ladder_{name}{{{label}}} {float(status[name])}")
    lines += _header("state", "1 for the state that the run is in.")
    lines.append(f'megatron_ladder_state{{{label},state="{status["state"]}"}} 1')
    for name, what in DEVICE_NAMES.items():
        samples = [
            f'megatron_ladder_gpu_{name}{{{label},gpu="{number}"}} {figures[name]}'
            for number, figures in enumerate(devices)
            if name in figures
        ]
        lines += [*_header(f"gpu_{name}", what), *samples] if samples else []
    return "\n".join(lines) + "\n"


def device_figures() -> list[dict[str, float]]:
    """Figures of each GPU of this machine, by the names in DEVICE_NAMES; [] without a GPU.

    They come from NVML, which torch reads if nvidia-ml-py is installed. Otherwise there is only the memory
    that this process has reserved on its own GPU. Before CUDA has started the list is empty: a query would
    start CUDA too early, before its environment variables are set (model/setup.py) and before processes are
    forked.
    """
    import torch  # imported here, because the report reads a run's status without torch

    if not torch.cuda.is_initialized():
        return []
    try:
        return [
            {
                "memory_used_bytes": float(torch.cuda.device_memory_used(i)),
                "utilization_percent": float(torch.cuda.utilization(i)),
                "temperature_celsius": float(torch.cuda.temperature(i)),
                "power_watts": torch.cuda.power_draw(i) / 1000,
            }
            for i in range(torch.cuda.device_count())
        ]
    except Exception:  # no nvidia-ml-py, or a card without these figures: the run must continue
        figures: list[dict[str, float]] = [{} for _ in range(torch.cuda.device_count())]
        figures[torch.cuda.current_device()] = {
            "memory_used_bytes": float(torch.cuda.memory_reserved())
        }
        return figures


def _header(name: str, what: str) -> list[str]:
    return [f"# HELP megatron_ladder_{name} {what}", f"# TYPE megatron_ladder_{name} gauge"]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
