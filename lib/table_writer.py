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
    """The hashes of all keys of a table, in a temporary file: 8 bytes per row, of which memory holds a part."""

    AT_A_TIME = 2**20  # hashes that are compared at a time

    def __init__(self) -> None:
        # In memory up to this size; the file has no name and vanishes with the process
        self._file = tempfile.SpooledTemporaryFile(8 * self.AT_A_TIME)  # noqa: SIM115 - closed in `are_repeated`
        self._count = 0

    def add(self, hashes: "np.ndarray") -> None:
        """(R,) uint64."""
        self._file.write(hashes.astype("<u8").tobytes())
        self._count += len(hashes)

    def are_repeated(self) -> bool:
        """Whether two hashes are equal. Closes the file."""
        import numpy as np

        # Equal hashes are in the same part, by their highest bits. Each pass over the file looks at one part
        parts = -(-self._count // self.AT_A_TIME)
        shift = np.uint64(64 - max(parts - 1, 0).bit_length())
        with self._file as file:
            for part in range(1 if parts < 2 else 2 ** (64 - int(shift))):
                file.seek(0)
                found = []
                while data := file.read(8 * self.AT_A_TIME):
                    hashes = np.frombuffer(data, "<u8")
                    found.append(hashes if parts < 2 else hashes[hashes >> shift == part])
                together = np.sort(np.concatenate(found)) if found else np.empty(0)
                if (together[1:] == together[:-1]).any():
                    return True
        return False
