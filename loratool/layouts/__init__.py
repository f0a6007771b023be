"""How adapter modules meet checkpoint tensors: kinds, prefixes, ties."""
