"""Making a model trainable: planning, a trial without memory, doing it, and reporting what was done."""
