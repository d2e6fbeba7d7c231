"""Rows of parquet and of Arrow files; Hugging Face's `datasets` saves its folders as Arrow files."""

from collections.abc import Callable, Iterator
from typing import Any

from data_prep.errors import UserError
from data_prep.read.sources import Source, open_source

ROWS = 64  # at once: a row may be long


def row_groups(source: Source) -> list[int]:
    """Bytes of each row group of a parquet file, as stored.

    Raises:
        UserError: it is no parquet file, or it is damaged.
    """
    with _parquet(source) as file:
        data = file.metadata
        groups = [data.row_group(i) for i in range(data.num_row_groups)]
        return [
            sum(group.column(j).total_compressed_size for j in range(group.num_columns))
            for group in groups
        ]


def read_rows(
    source: Source,
    fields: tuple[str, ...],
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches, with the wanted columns only.

    Args:
        fields: columns, or paths into nested ones (`meta.text`).
        begin, end: row groups of a parquet file; an Arrow file is read whole.

    Raises:
        UserError: the file is damaged, or has none of the columns.
    """
    import pyarrow as pa

    read = _parquet_batches if source.kind == "parquet" else _arrow_batches
    try:
        for batch in read(source, fields, begin, end, progress):
            for start in range(0, batch.num_rows, ROWS):
                yield batch.slice(start, ROWS).to_pylist()
    except (pa.ArrowException, OSError) as error:
        if source.remote and isinstance(error, OSError):
            raise
        raise UserError(f"{source.path} is damaged: {error}") from error


def _parquet(source: Source) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(open_source(source), buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        if source.remote and isinstance(error, OSError):
            raise
        raise UserError(f"{source.path} is damaged or is no parquet file: {error}") from error


def _parquet_batches(
    source: Source,
    fields: tuple[str, ...],
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[Any]:
    with _parquet(source) as file:
        _check_columns(source, fields, file.schema_arrow)
        count = file.num_row_groups if end is None else end
        for group in range(begin, count):
            yield from file.iter_batches(ROWS, row_groups=[group], columns=list(fields))
            progress(source.bytes // max(1, file.num_row_groups))


def _arrow_batches(
    source: Source,
    fields: tuple[str, ...],
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[Any]:
    import pyarrow as pa

    with open_source(source) as file:
        counted = 0
        with pa.ipc.open_stream(file) as stream:
            _check_columns(source, fields, stream.schema)
            columns = list(dict.fromkeys(field.split(".")[0] for field in fields))
            wanted = [c for c in (*fields, *columns) if c in stream.schema.names]
            for batch in stream:
                yield batch.select(list(dict.fromkeys(wanted)))
                at = file.tell()
                progress(at - counted)
                counted = at


def _check_columns(source: Source, fields: tuple[str, ...], schema: Any) -> None:
    for field in fields:
        if field not in schema.names and field.split(".")[0] not in schema.names:
            raise UserError(
                f"{source.path}: no column is named {field!r}; it has "
                f"{', '.join(schema.names[:20])}: give --text-field NAME"
            )
