"""The fields of pipeline stages."""

from typing import Any

from megatron_ladder.errors import UserError


def check_stages(num_layers: int, parallel: Any) -> None:
    """Checks that layers divide over pipeline stages. Raises UserError when they do not.

    Args:
        num_layers: of the model.
        parallel: a `ParallelConfig`.
    """
    pp = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    given = [n for n in (first, last) if n is not None]
    others, left = pp - len(given), num_layers - sum(given)
    # All other stages get the same number of layers. Without other stages, no layer may be left over.
    fits = left == 0 if others == 0 else left >= others and left % others == 0
    if not fits:
        raise UserError(
            f"model.num_layers {num_layers} do not divide over "
            f"parallel.pipeline_model_parallel_size {pp}"
            + (f" (first stage: {first or 'even'}, last stage: {last or 'even'})" if given else "")
            + ": choose another size, or set parallel.num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage so that all other stages get the same number of layers"
        )
    for layers in {*given, left // others if others else 0}:
        if layers % parallel.num_chunks:
            raise UserError(
                f"{layers} layers of a pipeline stage do not divide into "
                f"parallel.virtual_pipeline_model_parallel_size {parallel.num_chunks} parts"
            )


def layers_of_stages(num_layers: int, parallel: Any) -> list[int]:
    """The number of layers of each pipeline stage, first to last.

    Args:
        parallel: a `ParallelConfig` that `check_stages` allows.
    """
    pp = parallel.pipeline_model_parallel_size
    if pp == 1:
        return [num_layers]
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    given = [n for n in (first, last) if n is not None]
    each = (num_layers - sum(given)) // max(1, pp - len(given))
    ends = (each if first is None else first), (each if last is None else last)
    return [ends[0], *[each] * (pp - 2), ends[1]]


def chunks_of_stages(num_layers: int, parallel: Any) -> list[list[range]]:
    """The numbers of the layers, from 0, of each chunk of each pipeline stage.

    Args:
        parallel: a `ParallelConfig` that `check_stages` allows.
    """
    counts, first = layers_of_stages(num_layers, parallel), 0
    stages: list[list[range]] = [[] for _ in counts]
    for _ in range(parallel.num_chunks):
        for stage, count in zip(stages, counts, strict=True):
            stage.append(range(first, first + count // parallel.num_chunks))
            first += count // parallel.num_chunks
    return stages
