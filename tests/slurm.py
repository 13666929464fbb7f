"""A slurm of two nodes on this machine, by Debian's slurm-wlm and munge, all in one folder and as this user."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Optional

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
SelectType=select/cons_tres
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={n0} CPUs={cpus} Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs={cpus} Gres=gpu:2
PartitionName=normal Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n0,n1 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> Optional[str]:
    """What keeps a slurm from being started here, and what to do about it."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    do = "apt-get install --no-install-recommends slurmctld slurmd slurm-wlm munge"
    return f"no {', '.join(absent)} here: {do}" if absent else None


class Cluster:
    """Nodes n0 and n1, with two slots called GPUs each. `folder` holds all that it writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        with socket.create_server(("", 0)) as a, socket.create_server(("", 0)) as b, socket.create_server(("", 0)) as c:
            ports = dict(zip(("ctld", "n0", "n1"), (s.getsockname()[1] for s in (a, b, c))))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        own = {"host": socket.gethostname().split(".")[0], "user": user, "cpus": os.cpu_count(), "folder": folder}
        (folder / "slurm.conf").write_text(CONF.format(**own, **ports))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero")))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start it and wait until both nodes are idle."""
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{end}" for option, end in names.items()]
        self._start("munged", "--foreground", "--force", *munge)  # a folder that only this user may enter needs --force
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("n0", "n1"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self("sinfo", "-h", "-p", "normal", "-t", "idle", "-o", "%D", check=False) == "2", "slurm")

    def __call__(self, *command: str, check: bool = True, **env: str) -> str:
        """What a command of slurm says. `env` is added to its environment."""
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED and so on."""
        return self("scontrol", "--oneliner", "show", "job", job).split(" JobState=")[1].split()[0]

    def until(self, job: str, *states: str) -> str:
        """Wait until a job is in one of these states; the one it is in."""
        self._wait(lambda: self.state(job) in states, f"job {job} {states}", 180)
        return self.state(job)

    def until_it_says(self, file: Path, text: str) -> None:
        """Wait until a file, such as a job's output, holds a text."""
        self._wait(lambda: file.exists() and text in file.read_text(), f"{text!r} in {file}", 180)

    def until_it_has_a_step(self, job: str) -> None:
        """Wait until the script of a job has started its srun."""
        self._wait(lambda: f"{job}.0" in self("squeue", "--steps", "--noheader"), f"step {job}.0")

    def starts_again(self, job: str) -> None:
        """Wait until a job is queued again, and make seconds of the two minutes that slurm then lets it wait."""
        self.until(job, "PENDING")
        self("scontrol", "update", f"JobId={job}", "StartTime=now+3")  # in the second of its end it could not

    def close(self) -> None:
        """End all jobs, then the daemons."""
        self("scancel", "--full", "--signal=KILL", "--user", str(os.getuid()), check=False)
        self("scancel", "--user", str(os.getuid()), check=False)
        time.sleep(2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(60)

    def _start(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def _wait(self, condition, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not in {seconds} s; see {self.folder}"
            time.sleep(0.2)
