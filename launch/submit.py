"""python -m launch.submit --nodes=4 model=8b ...: queue a run on slurm, or with -m a job array and then its comparison.

What begins with -- goes to sbatch as it is (--KEY=VALUE), the rest is a command line of train.py. Every run is checked
for its number of processes before anything is queued. Exit codes: 0; 64 for a mistake, or what sbatch refuses.
"""

import os
import shlex
import subprocess
import sys
from typing import Optional

from configs.errors import ConfigError, exit_code
from launch.compose import compose, compose_all, is_multirun
from launch.sweep import ROOT, Job, plan

SCRIPT = ROOT / "launch/slurm.sbatch"
DEFAULTS = {"--nodes": "1", "--ntasks-per-node": "1", "--gpus-per-node": "8"}  # of that script
SHAPE = (*DEFAULTS, "--ntasks", "--gpus", "--cpus", "--mem", "--gres", "--exclusive", "--oversubscribe", "--time")


def submit(arguments: list[str]) -> None:
    """Check and queue what the arguments describe. Raises ConfigError."""
    if "--help" in arguments:
        print(__doc__)
        return
    options = [a for a in arguments if a.startswith("--") and a not in ("--multirun", "--cfg")]
    sys.argv = ["train.py", *(a for a in arguments if a not in options)]
    if is_multirun():
        jobs = plan(compose_all(processes(options)))
        if jobs:  # without any, Hydra showed something
            submit_array(jobs, options)
    elif compose(processes(options)):
        print(f"job {sbatch(*options, str(SCRIPT), *sys.argv[1:])}")


def processes(options: list[str]) -> int:
    """Of one run, under these options of sbatch."""
    given = DEFAULTS | dict(option.split("=", 1) for option in options if "=" in option)
    try:
        nodes, tasks = int(given["--nodes"]), int(given["--ntasks-per-node"])
        gpus = int(given["--gpus-per-node"].rsplit(":", 1)[-1])  # h100:8
        return nodes * (tasks if tasks > 1 else int(os.environ.get("SPARSETRON_PROCESSES", gpus)))
    except ValueError as e:
        sizes = " ".join(f"{key}={given[key]}" for key in DEFAULTS)
        raise ConfigError("option", sizes, f"not numbers ({e})", "give --nodes=4 --gpus-per-node=8") from e


def submit_array(jobs: list[Job], options: list[str]) -> None:
    """Queue a job array with a task for each run, and behind it, however they end, the comparison of what is done.

    Beside the runs lies array/: the overrides and the output of each, under its number.
    """
    folder = jobs[0].directory.parent.absolute()
    array = folder / "array"
    array.mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(jobs):
        (array / str(i)).write_text("".join(f"{override}\0" for override in job.overrides))
    pattern = str(array).replace("%", "%%")  # slurm's patterns begin with it
    tasks = [f"--array=0-{len(jobs) - 1}", f"--output={pattern}/%a.out"]
    number = sbatch(*tasks, *options, str(SCRIPT), str(array))
    print(f"job array {number}: {len(jobs)} runs in {folder}")

    runs = [str(job.directory.absolute()) for job in jobs]
    command = [sys.executable, "-m", "launch.compare", "--finished", *runs, "--output", str(folder / "compare.html")]
    wrap = f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"
    small = ["--nodes=1", "--ntasks=1", "--job-name=compare", f"--output={pattern}/compare.out"]
    other = [option for option in options if not option.startswith((*SHAPE, "--array"))]
    after = sbatch(*other, *small, f"--dependency=afterany:{number}", f"--wrap={wrap}")
    print(f"job {after}: their comparison, {folder / 'compare.html'}")


def sbatch(*arguments: str) -> str:
    """Submit a job; its number. Raises ConfigError."""
    fix = "give it options that your cluster accepts: partition, account, nodes, GPUs"
    command, env = ["sbatch", "--parsable", *arguments], {**os.environ, "SPARSETRON_HOME": str(ROOT)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    except OSError as e:
        raise ConfigError("program", "sbatch", e.strerror, "submit on a machine of the cluster") from e
    if done.returncode:
        raise ConfigError("program", "sbatch", " ".join(done.stderr.split()), fix)
    return done.stdout.strip().split(";")[0]  # and the name of the cluster, where there are several


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    return exit_code(lambda: submit(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
