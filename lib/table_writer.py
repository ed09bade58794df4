"""Write Parquet files: one format for the tables of all stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import BadData

if TYPE_CHECKING:
    import pyarrow as pa

    from lib.schema import TableSchema


class TableWriter:
    """Writes a Parquet file with zstd and page checksums.

    Each `write` of at least one row makes a row group. Keys must be unique over all of them; `close` checks this.
    """

    def __init__(self, path: Path, schema: "TableSchema", metadata: Mapping[str, str] | None = None):
        self._path, self._schema, self._file, self._metadata = path, schema, None, dict(metadata or {})
        self._keys: list = []
        self.num_rows = 0
        self.columns: dict[str, str] = {}

    def write(self, table: "pa.Table") -> None:
        from lib.schema import conform, key_hashes

        table = conform(table, self._schema)
        if self._file is None:
            self._open(table.schema)
        assert self._file is not None
        self._keys.append(key_hashes(table, self._schema))
        if table.num_rows:  # readers such as `datasets` refuse an empty row group
            self._file.write_table(table)
        self.num_rows += table.num_rows

    def _open(self, arrow_schema) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.columns = {f.name: str(f.type) for f in arrow_schema}
        # No statistics for text columns: their minimum and maximum are whole texts, of no use and large
        columns_with_statistics = [
            f.name
            for f in arrow_schema
            if not (pa.types.is_large_string(f.type) or pa.types.is_nested(f.type))
        ]
        self._file = pq.ParquetWriter(
            self._path,
            arrow_schema.with_metadata(self._metadata),
            compression="zstd",
            write_page_checksum=True,
            write_statistics=columns_with_statistics,  # type: ignore[arg-type] - a list is documented
        )

    def close(self) -> None:
        """Finish the file. Raises BadData if two rows have the same key."""
        import numpy as np

        if self._file is None:
            self._open(self._schema.arrow)
        assert self._file is not None
        self._file.close()
        keys = np.concatenate(self._keys) if self._keys else np.empty(0)
        if len(np.unique(keys)) != len(keys):
            raise BadData(f"table {self._schema.name}: two rows have the same {self._schema.key}")
