"""The grid of ranks, its reductions, and the vocabulary-parallel LM head."""
