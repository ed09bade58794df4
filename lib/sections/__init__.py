"""The sections of the config: name, type and limits of every setting. lib/config.py merges the files."""
