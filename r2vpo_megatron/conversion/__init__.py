"""Checkpoint conversion between the two formats, as a job that can be trusted.

plan.py            what is read and written, checked and told before anything is
to_megatron.py     Hugging Face -> torch_dist, one file a (pipeline chunk, tensor rank)
megatron_pieces.py how those files are cut
to_hf.py           torch_dist -> Hugging Face
hf_export.py       which folders and tensors that takes
carry_out.py       a plan carried out, a piece of a tensor in memory at a time
journal.py, folder_lock.py    the output folder: appears whole or not at all, resumable
verify.py, logits_check.py    every bit and a few logits of both sides compared
inspection.py      what a checkpoint folder holds and lacks
progress.py        bytes a second and the time left
command.py         what the two command lines have in common
"""
