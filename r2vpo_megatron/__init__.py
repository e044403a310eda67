"""R2VPO reinforcement learning of language models on Megatron-core, vLLM and Ray."""
