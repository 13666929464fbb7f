# Environment of a run, sourced by local.sh and slurm.sbatch. What is already set stays.
lacking="$(command -v python3 >/dev/null || echo python3)$(python3 2>/dev/null -c 'from importlib.util import find_spec
print(*(name for name in ("torch", "deepspeed", "hydra", "psutil") if not find_spec(name)), sep=", ")')"
if [ -n "$lacking" ]; then
    echo "error: environment ${VIRTUAL_ENV:-of the system}: has no $lacking; activate the one of Sparsetron (source .venv/bin/activate)" >&2
    exit 64
fi
export PYTHONUNBUFFERED=1 # progress lines appear when they are printed
# Less fragmentation at long context.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A lost peer ends the run instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
