"""Commands: train and explain."""
