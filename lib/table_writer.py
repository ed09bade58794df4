"""Write Parquet files: one format for the tables of all stages."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import BadData

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from lib.schema import TableSchema


class TableWriter:
    """Writes a Parquet file with zstd and page checksums.

    Each `write` of at least one row makes a row group. Keys must be unique over all of them; `close` checks this.
    """

    def __init__(self, path: Path, schema: "TableSchema", metadata: Mapping[str, str] | None = None):
        self._path, self._schema, self._file, self._metadata = path, schema, None, dict(metadata or {})
        self._keys = KeyHashes()
        self.num_rows = 0
        self.columns: dict[str, str] = {}

    def write(self, table: "pa.Table") -> None:
        from lib.schema import conform, key_hashes

        table = conform(table, self._schema)
        if self._file is None:
            self._open(table.schema)
        assert self._file is not None
        self._keys.add(key_hashes(table, self._schema))
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
        if self._file is None:
            self._open(self._schema.arrow)
        assert self._file is not None
        self._file.close()
        if self._keys.are_repeated():
            raise BadData(f"table {self._schema.name}: two rows have the same {self._schema.key}")


class KeyHashes:
    """The hashes of all keys of a table, in temporary files: 8 bytes per row.

    Equal hashes are in the same file, by their highest bits. So each file is compared alone, and memory holds one of them.
    """

    BITS = 6  # 64 files
    IN_MEMORY = 2**17  # bytes of each file that stay in memory

    def __init__(self) -> None:
        # The files have no names and vanish with the process
        self._files = [tempfile.SpooledTemporaryFile(self.IN_MEMORY) for _ in range(2**self.BITS)]  # noqa: SIM115

    def add(self, hashes: "np.ndarray") -> None:
        """(R,) uint64."""
        import numpy as np

        files = (hashes >> np.uint64(64 - self.BITS)).astype(np.int64)
        by_file = hashes.astype("<u8")[np.argsort(files)]
        ends = np.cumsum(np.bincount(files, minlength=len(self._files)))
        for file, own in zip(self._files, np.split(by_file, ends[:-1]), strict=True):
            if len(own):
                file.write(own.tobytes())

    def are_repeated(self) -> bool:
        """Whether two hashes are equal. Closes the files."""
        import numpy as np

        repeated = False
        for opened in self._files:
            with opened as file:
                file.seek(0)
                hashes = np.sort(np.frombuffer(file.read(), "<u8")) if not repeated else np.empty(0)
                repeated = repeated or bool((hashes[1:] == hashes[:-1]).any())
        return repeated
