"""One way of starting an adapter per file; ``registry`` collects them."""
