"""Reports as pages: one file per kind of report, and a line in ``registry``."""
