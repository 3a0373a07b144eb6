"""The cases, a module each: `QUESTION` and `run(settings) -> list[Table]`."""
