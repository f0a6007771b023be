"""Pictures of reports: one self-contained HTML page, PNG, SVG. Knows pages, not LoRA."""
