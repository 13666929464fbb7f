# Environment of a run, sourced by local.sh and slurm.sbatch. What is already set stays.
export PYTHONUNBUFFERED=1                                              # progress lines appear when they are printed
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # less fragmentation at long context
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"        # a lost peer ends the run
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-8}"                # compute and communication overlap
