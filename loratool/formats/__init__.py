"""One adapter format per file: names and shapes to and from an Adapter. No paths, no I/O."""
