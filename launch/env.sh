# Environment of a run, sourced by local.sh and slurm.sbatch. What is already set stays.
export PYTHONUNBUFFERED=1 # progress lines appear when they are printed
# Less fragmentation at long context.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A lost peer ends the run instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
