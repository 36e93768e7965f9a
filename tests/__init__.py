"""Tests, by the rooms of the package."""

import os

# Before anything imports numpy or torch: several processes of tests share the cores, and the threads of each would spin
# while they wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
