"""What holds for every test."""

from __future__ import annotations

import os

# Before torch, tokenizers or vLLM are imported. Tests start many processes on few cores: threads
# that spin while they wait would starve them. Nothing may ask a server for a model.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
