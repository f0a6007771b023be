"""Cards and uploads. The only place that imports huggingface_hub."""
