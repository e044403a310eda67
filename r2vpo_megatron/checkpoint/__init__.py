"""Weights in two formats, and what one is of the other.

layout.py                  what Megatron makes of each Hugging Face tensor: pure functions
tensor_check.py            whether a checkpoint's tensors are those of its model
hf_bridge.py               checkpoint folder -> this rank's parameters -> stream of whole tensors
safetensors_io.py          read slices of a Hugging Face folder, write a new one
safetensors_header.py, safetensors_stream.py    its files' headers; files written as a stream
companions.py              config, tokenizer and all that is not weights
torch_dist.py              read and write Megatron-core's torch_dist format without process group
torch_dist_metadata.py, torch_blob.py, restricted_pickle.py    its parts
megatron_keys.py           a torch_dist folder seen as Hugging Face tensors
closing.py                 readers as context managers
run_folder.py              folders of a run's checkpoints: whole or not there; manifest, hashes
state_file.py              nested state in files that nothing executes
run_differences.py         in what a run that goes on differs from the one that was saved
content_sample.py          tell large files apart in milliseconds
durable.py                 bring a folder to the disk before it gets its name
"""
