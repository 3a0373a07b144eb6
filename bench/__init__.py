"""Benchmarks: `python -m bench` in the repository, `python -m nf4lora.bench` where it is installed."""
