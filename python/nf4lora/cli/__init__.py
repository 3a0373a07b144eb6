"""The command line, one module for each command. Only here is the process changed: its output, warnings and signals."""
