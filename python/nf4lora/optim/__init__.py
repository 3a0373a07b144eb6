"""PagedAdamW: AdamW whose state may be larger than the memory it is used in."""
