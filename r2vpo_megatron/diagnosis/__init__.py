"""What can be known before a job starts: does this installation, on these nodes, do what it should?

diagnose.py   all of it, in order
findings.py   what was found, how bad it is, what to do
packages.py   installed versions against the pinned ones
node.py       a look at one node, from a process there
judgement.py  what the looks at all nodes say
cluster.py    nodes and ranks of a Ray cluster, looked at side by side
inputs.py     model, tokenizer, prompts, and room for checkpoints
"""
