"""Prompts, chat templates and packed micro-batches."""
