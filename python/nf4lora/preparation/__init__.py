"""From a model to one that can be trained: planned, tried without memory, done, and said."""
