"""Rows of parquet and of Arrow files; Hugging Face's `datasets` saves its folders as Arrow files.

Arrow has two formats: the stream, which `datasets` writes, and the file (Feather), which has a table of
contents at its end."""

from collections.abc import Callable, Iterator
from typing import Any

from data_prep.errors import UserError
from data_prep.read.reading import Reading
from data_prep.read.sources import Source, open_source

# At once: fewer where they are long on average.
ROWS, ROWS_BYTES = 64, 4 << 20
ARROW_FILE = b"ARROW1\0\0"


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
    reading: Reading,
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches, with the wanted columns only. Text may be bytes: in columns of bytes, and where a
    column's text is not UTF-8.

    Args:
        reading: names the columns, or paths into nested ones (`meta.text`).
        begin, end: row groups of a parquet file; an Arrow file is read whole.

    Raises:
        UserError: the file is damaged, or has none of the columns.
    """
    import pyarrow as pa

    read = _parquet_batches if source.kind == "parquet" else _arrow_batches
    try:
        for batch in read(source, reading, begin, end, progress):
            rows = max(1, min(ROWS, ROWS_BYTES * max(1, batch.num_rows) // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, rows):
                yield _values(batch.slice(start, rows))
    except (pa.ArrowException, OSError) as error:
        if source.remote and isinstance(error, OSError):
            raise
        raise UserError(f"{source.path} is damaged: {error}") from error


def _values(batch: Any) -> list[dict[str, Any]]:
    """The rows as Python's values; those with text that is not UTF-8 with bytes for text."""
    import pyarrow as pa

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [column.cast(_with_bytes(column.type)) for column in batch.columns]
        return pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _with_bytes(kind: Any) -> Any:
    """An Arrow type with bytes for strings."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if types.is_struct(kind):
        return pa.struct([(field.name, _with_bytes(field.type)) for field in kind])
    if types.is_list(kind):
        return pa.list_(_with_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_with_bytes(kind.value_type))
    bytes_of = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return bytes_of.get(kind, kind)


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
    reading: Reading,
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[Any]:
    with _parquet(source) as file:
        _check_columns(source, reading, file.schema_arrow)
        count = file.num_row_groups if end is None else end
        for group in range(begin, count):
            rows = _rows_at_once(file.metadata.row_group(group))
            yield from file.iter_batches(rows, row_groups=[group], columns=list(reading.columns))
            progress(source.bytes // max(1, file.num_row_groups))


def _rows_at_once(group: Any) -> int:
    """A batch of so many rows takes about `ROWS_BYTES`."""
    text = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
    return max(1, min(ROWS, ROWS_BYTES * max(1, group.num_rows) // max(1, text)))


def _arrow_batches(
    source: Source,
    reading: Reading,
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
) -> Iterator[Any]:
    import pyarrow as pa

    with open_source(source) as file:
        is_stream = file.read(len(ARROW_FILE)) != ARROW_FILE
    with open_source(source) as file:
        counted = 0
        if not is_stream:  # the stream is behind the first bytes, and then a table of its batches
            file.read(len(ARROW_FILE))
        with pa.ipc.open_stream(file) as stream:
            _check_columns(source, reading, stream.schema)
            fields = reading.columns
            columns = list(dict.fromkeys(field.split(".")[0] for field in fields))
            wanted = [c for c in (*fields, *columns) if c in stream.schema.names]
            for batch in stream:
                yield batch.select(list(dict.fromkeys(wanted)))
                at = file.tell()
                progress(at - counted)
                counted = at


def _check_columns(source: Source, reading: Reading, schema: Any) -> None:
    for field in reading.columns:
        if field not in schema.names and field.split(".")[0] not in schema.names:
            raise UserError(
                f"{source.path}: no column is named {field!r}; it has "
                f"{', '.join(schema.names[:20])}: give {reading.option_of(field)} NAME"
            )
