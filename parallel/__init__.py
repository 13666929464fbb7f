"""The model and how it is cut."""

import os

import torch

if not torch.cuda.is_available():  # DeepSpeed would find out by itself, and print a warning on stdout
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
