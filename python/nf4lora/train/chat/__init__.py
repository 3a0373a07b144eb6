"""From samples to tokens and labels: the chat template, and which of the tokens it makes are trained."""
