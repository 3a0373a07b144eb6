"""The command line, a module a command. Here alone the process itself is changed: what it prints, warns and obeys."""
