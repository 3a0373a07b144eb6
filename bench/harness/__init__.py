"""Tools of the cases: contenders, processes, timing, tables, and results on disk."""
