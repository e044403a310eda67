"""Weights in and out.

layout.py          what Megatron makes of each Hugging Face tensor: pure functions
hf_bridge.py       checkpoint folder -> this rank's parameters -> stream of whole tensors
safetensors_io.py  read slices of a checkpoint folder, write a new one
"""
