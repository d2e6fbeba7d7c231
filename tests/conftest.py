"""One thread a process: ranks are forked from this one, and forking with OpenMP's threads hangs."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import warnings

warnings.filterwarnings("ignore", module="megatron")
