"""What the cases measure with: contenders, processes, timing, tables, and results on disk."""
