"""The cases, one module each, with `QUESTION` and `run(settings) -> list[Table]`."""
