"""Rollout: sampling responses from the current policy with an inference engine."""
