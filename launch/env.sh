# Environment of a run, sourced by local.sh and slurm.sbatch. What is already set stays.
export PYTHONUNBUFFERED=1 # progress lines appear when they are printed
# CPU threads sleep while they wait: spinning ones made a run twenty times slower on a machine with other work.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Less fragmentation at long context.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A lost peer ends the run instead of hanging it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# A run saves before it stops. torchrun waits 30 s for that and then kills, unless it can be told otherwise (newer ones can).
TORCHRUN_FLAGS=(--signals-to-handle SIGTERM,SIGINT,SIGUSR1)
torchrun_source="$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')"
if grep -q -- --shutdown-timeout "$torchrun_source/distributed/run.py"; then
    TORCHRUN_FLAGS+=(--shutdown-timeout 280)
fi
