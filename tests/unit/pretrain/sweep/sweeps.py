"""A small sweep's file."""

from pathlib import Path

from tests.data_sets import write_data_set

SMALL = """
preset = "debug"

[fields]
data.paths = ["{data}"]
data.seq_length = 32
model.hidden_size = 16
model.ffn_hidden_size = 32
model.num_layers = 2
global_batch_size = 4
schedule.warmup_steps = 1
tensorboard = false
async_save = false
eval_sequences = 4
"""


def write_sweep(folder: Path, rest: str, validation_documents: int = 12) -> Path:
    """A data set, and a sweep's file of small runs that goes on with `rest`."""
    data = write_data_set(folder / "data", validation_documents=validation_documents)
    file = folder / "sweep.toml"
    file.write_text(SMALL.format(data=data) + rest)
    return file
