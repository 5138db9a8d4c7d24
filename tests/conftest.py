"""Tiny models run fastest on one thread, and two test processes on one machine then do not slow each other down."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network
