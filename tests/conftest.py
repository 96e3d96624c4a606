"""Tests run side by side, one a core: each keeps to one thread, or they would wait for each other. And offline."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  (it reads the line above)

torch.set_num_threads(1)
