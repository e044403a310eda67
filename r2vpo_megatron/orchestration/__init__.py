"""The driver: processes, the loop (loop.py is the algorithm) and what a run writes."""
