"""From what a user writes to a TrainConfig: flags, a YAML file, and the keys that files for other tools have."""
