"""deterministic=true: a GPU computes the same bits each time. NSA's kernels and everything on a CPU do so anyway."""

import os

import torch


def deterministic() -> None:
    """Choose algorithms of torch, cuBLAS, cuDNN and NCCL that repeat; before the first of them is used.

    An operation that has none ends the run by its name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # trees and switches sum in the order of arrival
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)  # with warn_only torch's attention would keep its usual kernels
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over each new tensor
