"""The learner's ranks: log-probs, policy updates and weight export on Megatron-core."""
