"""A tiny model and a verifiable task, made in seconds, that stand in for a real checkpoint."""
