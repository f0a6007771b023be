"""Low-rank algebra, spectra, rank rules and rounding. Pure: tensors in, tensors out."""
