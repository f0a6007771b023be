"""The Python API: the commands as functions. Paths in, reports out; writing is always explicit."""
