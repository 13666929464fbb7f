"""The rows of the speed table: what runs, what others reach in it, and what is to be reached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One training run; speeds in tokens/s of all its GPUs. The peers' were measured on H200s, as many."""

    name: str
    gpus: int  # 0: one process, wherever it is
    overrides: str  # of train.py
    peers: str = ""  # with the peak of a GPU
    must: float = 0.0
    aim: float = 0.0

    @property
    def processes(self) -> int:
        return max(1, self.gpus)

    @property
    def twin(self) -> "Row | None":
        """The same run with full attention, of a sparse one."""
        sparse = "attention=nsa"
        if sparse not in self.overrides:
            return None
        return Row(f"{self.name}, full", self.gpus, self.overrides.replace(sparse, "attention=full"))


ONE = "experiment=bench_1b"
NSA = f"{ONE} attention=nsa model.kv_heads=2"
LONG = "data.seq_len=65536 train.micro_batch=1"

ROWS = [
    Row("full-8k", 1, f"{ONE} train.micro_batch=4", "torchtitan 61.6k, 61 GiB", 62e3, 68e3),
    Row("full-64k", 1, f"{ONE} {LONG} train.global_batch=1", "torchtitan 21.6k, 100 GiB", 21.6e3, 23e3),
    Row("nsa-8k", 1, f"{NSA} train.micro_batch=8", "fla 45.0k, 56 GiB", 56e3, 64e3),
    Row(
        "nsa-32k",
        1,
        f"{NSA} data.seq_len=32768 train.global_batch=2 train.micro_batch=2",
        "fla 28.8k, 56 GiB; torchtitan dense 34.2k, 61 GiB",
        50e3,
        58e3,
    ),
    Row(
        "nsa-64k",
        1,
        f"{NSA} {LONG} train.global_batch=1",
        "fla 26.9k, 90 GiB; torchtitan dense 21.6k, 100 GiB",
        46e3,
        55e3,
    ),
    Row(
        "nsa-128k",
        1,
        f"{NSA} data.seq_len=131072 train.global_batch=1 parallel.recompute=mlp",
        "dense about 13k (computed)",
        40e3,
        50e3,
    ),
    # Two GPUs: 65,536 tokens a step too, of sparse attention half of what four have. Nobody was measured on two.
    Row("dp2-zero1", 2, f"{ONE} train.micro_batch=4"),
    Row("dp2-zero3", 2, f"{ONE} train.micro_batch=4 parallel.zero=3"),
    Row("tp2", 2, f"{ONE} train.micro_batch=4 parallel.tp=2 parallel.sequence=true"),
    Row("pp2", 2, f"{ONE} parallel.pp=2"),
    Row("nsa-dp2-64k", 2, f"{NSA} {LONG} train.global_batch=2"),
    Row("nsa-tp2-64k", 2, f"{NSA} {LONG} train.global_batch=1 parallel.tp=2 parallel.sequence=true"),
    Row(
        "dp4-zero1",
        4,
        f"{ONE} train.micro_batch=2",
        "torchtitan FSDP 222k, 25 GiB; DeepSpeed 231k, 30 GiB",
        231e3,
        250e3,
    ),
    Row("dp4-zero3", 4, f"{ONE} train.micro_batch=2 parallel.zero=3", "DeepSpeed 192k, 31 GiB", 200e3, 235e3),
    Row(
        "tp4",
        4,
        f"{ONE} train.micro_batch=4 parallel.tp=4 parallel.sequence=true",
        "torchtitan 156k, 36 GiB",
        165e3,
        195e3,
    ),
    Row("pp2-dp2", 4, f"{ONE} parallel.pp=2", "DeepSpeed 179k, 17 GiB", 180e3, 200e3),
    Row(
        "tp2-pp2",
        4,
        f"{ONE} parallel.tp=2 parallel.sequence=true parallel.pp=2",
        "torchtitan 125k, 11 GiB",
        150e3,
        175e3,
    ),
    Row(
        "pp4",
        4,
        f"{ONE} parallel.pp=4",
        "torchtitan 131k, 16 GiB; DeepSpeed 164k, 17 GiB (1F1B), 179k, 22 GiB (DualPipeV)",
        179e3,
        195e3,
    ),
    Row(
        "nsa-dp4-64k",
        4,
        f"{NSA} {LONG} train.global_batch=4",
        "fla 105k, 80 GiB; torchtitan dense 83k, 91 GiB",
        180e3,
        215e3,
    ),
    Row(
        "nsa-tp2-dp2-64k",
        4,
        f"{NSA} {LONG} train.global_batch=2 parallel.tp=2 parallel.sequence=true",
        "",
        150e3,
        180e3,
    ),
    Row(  # to see the command work where there is no GPU
        "tiny",
        0,
        f"{ONE} model=debug attention=nsa model.kv_heads=2 data.random=512 data.seq_len=128 train.precision=fp32",
    ),
]
