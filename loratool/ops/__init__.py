"""One file per command: plan_x(), run_x(), XReport. No printing, no exit codes."""
