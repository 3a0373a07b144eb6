"""The output folder of a run: its files, its checkpoints, what a run that goes on must agree with."""
