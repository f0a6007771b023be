"""One way of combining adapters per file; ``registry`` collects them."""
