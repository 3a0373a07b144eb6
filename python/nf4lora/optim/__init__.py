"""PagedAdamW: its state in memory that can be smaller than it."""
