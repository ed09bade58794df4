"""Files that users bring: found in folders, unpacked, decoded and cut into rows. Every fault is named.

| ending             | rows                                                          |
|--------------------|---------------------------------------------------------------|
| .txt               | none: the whole file is one text                              |
| .jsonl             | one JSON value per line                                       |
| .json              | one list of JSON values                                       |
| .csv, .tsv         | lines below a header; the delimiter is a comma, ; or a tab    |
| .parquet           | rows of the table                                             |

All but .parquet may be compressed with gzip (`.txt.gz`). Text is UTF-8; a byte order mark at its start is removed.
"""
