"""Data sets, prompts, chat templates and packed micro-batches."""
