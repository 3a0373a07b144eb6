"""The loss: cross-entropy from hidden states, a chunk of the logits at a time, behind a model's own forward."""
