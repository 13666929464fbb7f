"""python -m nsa.bench: NSA forward and backward beside full attention by cuDNN and FlashAttention 2, in one process.

NSA is all between projections and output: compression by its MLP, three branches, selection, gates given; its rotations
are left out, as those of full attention are. Correctness comes first. Times are of CUDA graphs, which leave the host
out, taken in turns so that clocks and heat are shared; the eager ones stand beside them. The floor is what the
arithmetic takes at TFLOPS, with the traffic that no fusion avoids at BANDWIDTH.
"""

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.errors import ConfigError, RunError, exit_code
from configs.options import Options, filled, number
from configs.schema import Attention, Backend
from nsa import Documents, NSACore, nsa_attention
from nsa.cases import Case, make_inputs

SHAPES = ("64,4,128", "64,4,192/128", "32,2,64", "32,8,128")
LENGTHS = "8192,16384,32768,65536,131072"
TFLOPS = 790.0  # dense bf16 that an H200 sustains in large products
BANDWIDTH = 4.3  # TB/s of its memory that a copy reaches
CHECKED = 2048  # tokens that are compared with the definition
OFF = 0.02  # relative error (norm) of bf16 there that is too much
SLOW = 512  # tokens over which trained-like queries and keys turn into others
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and widths of a head."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """From H,G,D or H,G,DK/DV. Raises ConfigError."""
        try:
            heads, kv_heads, width = text.split(",")
            qk_dim, _, v_dim = width.partition("/")
            made = cls(int(heads), int(kv_heads), int(qk_dim), int(v_dim or qk_dim))
        except ValueError:
            raise ConfigError(
                "shape", text, "not heads,KV heads,width", "give such as 64,4,128 or 64,4,192/128"
            ) from None
        if min(asdict(made).values()) < 1 or made.heads % made.kv_heads:
            raise ConfigError("shape", text, "heads are no multiple of the KV heads", "give such as 64,4,128")
        return made

    def __str__(self) -> str:
        width = str(self.qk_dim) if self.qk_dim == self.v_dim else f"{self.qk_dim}/{self.v_dim}"
        return f"{self.heads},{self.kv_heads},{width}"


def floors(shape: Shape, tokens: int, a: Attention, tflops: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds that forward and (deterministic) backward take at least, for one document.

    Forward has QK and PV of each branch and QK again for the scores. Backward has QK and dP twice, once for dQ and once
    for dK and dV. Outputs of the branches go through memory once, the scores of blocks as well.
    """
    t = torch.arange(tokens, dtype=torch.float64)
    blocks = float(((t + 1 - a.l).div(a.d, rounding_mode="floor") + 1).clamp(min=0).sum())
    selected = float(torch.minimum(t + 1, (a.n - 1) * a.l_slc + t % a.l_slc + 1).sum())
    near = float((t + 1).clamp(max=a.w).sum())
    e, f, h = shape.qk_dim, shape.v_dim, shape.heads
    layers = 2 * shape.kv_heads * ((tokens - a.l) // a.d + 1) * (a.l + 1) * (e * e + f * f)
    forward = 2 * h * ((e + f) * (blocks + selected + near) + e * blocks) + layers
    backward = 2 * h * (4 * e + 3 * f) * (blocks + selected + near) + 2 * layers
    output, scores = 2 * tokens * h * f, 8 * shape.kv_heads * tokens**2 / (2 * a.l_slc)
    traffic = {"fwd": 4 * output + scores, "bwd": 7 * output}
    flops = {"fwd": forward, "bwd": backward}
    return {way: (flops[way] / tflops + traffic[way] / bandwidth) / 1e9 for way in flops}


def check(shape: Shape, a: Attention) -> dict[str, float]:
    """Relative errors of the output and each gradient in bf16 against the definition in fp32. Raises RunError."""
    case = Case("check", (CHECKED,), shape.heads, shape.kv_heads, shape.qk_dim, shape.v_dim, a)
    x = make_inputs(case, torch.bfloat16, "cuda")
    do = torch.randn(CHECKED, shape.heads, shape.v_dim, device="cuda")

    def results(x: dict[str, Tensor], backend: Backend) -> list[Tensor]:
        kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
        sizes = Attention(**{**vars(a), "backend": backend})
        o = nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], case.cu_seqlens, sizes)
        return [o, *torch.autograd.grad(o, list(x.values()), do.to(o.dtype))]

    exact = results({name: t.detach().float().requires_grad_() for name, t in x.items()}, Backend.torch)
    found = dict(zip(("o", *x), zip(results(x, Backend.triton), exact, strict=True), strict=True))
    found |= check_compression(shape, a, x["k_slc"].detach(), x["v_slc"].detach())
    errors = {
        name: float((ours.detach().float() - want.detach()).norm() / want.detach().norm())
        for name, (ours, want) in found.items()
    }
    for name, error in errors.items():
        if not error < OFF:
            why, fix = f"off by {error:.1%} in bf16", "times of wrong results are worth nothing: run pytest -m gpu"
            raise RunError("kernels", f"{name} at {shape}", why, fix)
    return errors


def check_compression(shape: Shape, a: Attention, k: Tensor, v: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Compressed k [n, h_kv, dk] and v [n, h_kv, dv] and all gradients, each beside the definition's in fp32."""
    core = make_core(shape, a)
    blocks = Documents.of(torch.tensor([0, len(k)]), torch.device("cuda")).blocks(a.l, a.d)
    out = []
    for module, pair, kernels in ((core, (k, v), True), (copy.deepcopy(core).float(), (k.float(), v.float()), False)):
        leaves = [*(x.requires_grad_() for x in pair), *module.parameters()]
        compressed = module.compress(*pair, blocks, lambda weight: weight, kernels)
        out.append([*compressed, *torch.autograd.grad(sum(y.sin().sum() for y in compressed), leaves)])
    names = ["phi_k", "phi_v", "phi_k x", "phi_v x", *(name for name, _ in core.named_parameters())]
    return dict(zip(names, zip(*out, strict=True), strict=True))


def make(shape: Shape, tokens: int, kind: str) -> dict[str, Tensor]:
    """What the projections give, bf16 leaves: random, or trained-like, where queries and keys change slowly."""

    def draw(heads: int, width: int, slow: bool) -> Tensor:
        fast = torch.randn(tokens, heads, width, dtype=torch.bfloat16, device="cuda")
        if not slow:
            return fast
        points = torch.randn(tokens // SLOW + 2, heads, width, dtype=torch.bfloat16, device="cuda")
        place = torch.arange(tokens, device="cuda")
        part = (place % SLOW / SLOW)[:, None, None].to(fast.dtype)
        return torch.lerp(points[place // SLOW], points[place // SLOW + 1], part).mul_(1.2).add_(fast, alpha=0.3)

    torch.manual_seed(0)
    slow = kind == "trained-like"
    x = {"q": draw(shape.heads, shape.qk_dim, slow), "gates": draw(shape.heads, 3, False).sigmoid()}
    for name in ("cmp", "slc", "win"):
        x[f"k_{name}"] = draw(shape.kv_heads, shape.qk_dim, slow)
        x[f"v_{name}"] = draw(shape.kv_heads, shape.v_dim, False)
    return {name: t.requires_grad_() for name, t in x.items()}


def make_core(shape: Shape, a: Attention) -> NSACore:
    """With weights that keep the size of what they compress."""
    core = NSACore(a, shape.qk_dim, shape.v_dim).to("cuda", torch.bfloat16)
    for p in core.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.02)
    return core


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention of heads [1, h, n, e]."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def pair(name: str, f: Callable[[], Tensor], leaves: list[Tensor], do: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of f, as calls."""
    o = f()
    backward = lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)  # noqa: E731
    backward()
    return {f"{name} fwd": f, f"{name} bwd": backward}


def graphs(calls: dict[str, Callable[[], object]], stream: torch.cuda.Stream) -> dict[str, Callable[[], object]]:
    """The same as replays of CUDA graphs."""
    made = {}
    for name, call in calls.items():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        made[name] = graph.replay
    return made


def take(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Milliseconds of each call, several times in turns, within `budget` seconds or so."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    done, spent = 0, 0.0
    while done < 3 or (done < 30 and spent + spent / done < budget):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
        done, spent = done + 1, sum(map(sum, times.values())) / 1e3
    return times


def middle(times: list[float]) -> dict[str, float]:
    """Median in ms, and the distance of slowest and fastest as a part of it; the first run only warms up."""
    kept = times[1:] if len(times) > 3 else times
    value = statistics.median(kept)
    return {"ms": value, "spread": (max(kept) - min(kept)) / value}


def measure(shape: Shape, tokens: int, kind: str, a: Attention, full: bool) -> dict:
    """All times of one row: NSA, its parts, and full attention if `full`."""
    from nsa.parts import parts  # triton, where there is a GPU

    core, x = make_core(shape, a), make(shape, tokens, kind)
    documents = Documents.of(torch.tensor([0, tokens]), torch.device("cuda"))
    do = torch.randn(tokens, shape.heads, shape.v_dim, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("cmp", "slc", "win")}
        whole = lambda: core(x["q"], kv, x["gates"], documents, lambda t, _: t)  # noqa: E731
        calls = pair("NSA", whole, [*x.values(), *core.parameters()], do)
        if full:
            heads = [x[n].detach().transpose(0, 1)[None].requires_grad_() for n in ("q", "k_win", "v_win")]
            for name, backend in DENSE.items():
                if name == "FA2" and shape.qk_dim != shape.v_dim:
                    continue  # it has one width
                f = lambda backend=backend: dense(backend, *heads)  # noqa: E731
                calls |= pair(name, f, heads, do.transpose(0, 1)[None])
        eager = take(calls, 3)
        times = {name: middle(t) for name, t in take(graphs(calls, stream), 5).items()}
        for name in times:
            times[name]["eager"] = middle(eager[name])["ms"]
        del calls, whole
        gc.collect()
        some, overlap = parts(core, x, do, documents)
        alone = {
            kind: {name: middle(t)["ms"] for name, t in take(graphs(calls, stream), 2).items()}
            for kind, calls in some.items()
        }
    return {"shape": str(shape), "tokens": tokens, "inputs": kind, "overlap": overlap, "times": times, "parts": alone}


def needed(shape: Shape, tokens: int) -> float:
    """Bytes that a row takes with some to spare: a dozen tensors as large as q for NSA, as many beside it."""
    return 26 * 2 * tokens * shape.heads * max(shape.qk_dim, shape.v_dim) + 10e9


def compare(row: dict, full: dict[str, dict], floor: dict[str, float]) -> None:
    """Adds to a row its ratios to full attention, `full`, and the share of the floor."""
    row["floor_ms"] = floor
    row["share_of_floor"] = {way: floor[way] / row["times"][f"NSA {way}"]["ms"] for way in floor}
    row["ratio"] = {
        name: full[name]["ms"] / row["times"][f"NSA {name.split()[1]}"]["ms"] for name in full if "NSA" not in name
    }


def show(row: dict) -> None:
    """Prints a row, then its parts."""
    for way in ("fwd", "bwd"):
        t, ratios = row["times"][f"NSA {way}"], {k.split()[0]: v for k, v in row["ratio"].items() if k.endswith(way)}
        shown = "".join(f"  {k} x {v:5.2f}" for k, v in ratios.items())
        beside = "".join(
            f"  {k} {v['ms']:.2f} ms +-{v['spread'] / 2:.0%}"
            for k, v in row["times"].items()
            if k.endswith(way) and "NSA" not in k
        )
        print(
            f"{row['shape']:>12} {row['tokens']:>7} {row['inputs']:>12} {way} {t['ms']:8.2f} ms +-{t['spread'] / 2:.0%}"
            f" (eager {t['eager']:.2f}){shown}  floor {row['share_of_floor'][way]:.0%}{beside}"
        )
    for kind, times in row["parts"].items():
        listed = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
        total = "" if kind == "of these" else f"; sum {sum(times.values()):.2f}"
        print(f"{'':12} {kind}: {listed}{total}")
    print(f"{'':12} a query shares {row['overlap']:.0%} of its chosen blocks with the one before", flush=True)


def plot(rows: list[dict], path: Path) -> None:
    """Time against context length: a column of panels a shape, forward above backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(2, len(shapes), figsize=(5 * len(shapes), 8), squeeze=False)
    for (i, way), (j, shape) in itertools.product(enumerate(("fwd", "bwd")), enumerate(shapes)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in (row for row in rows if row["shape"] == shape):
            for name, t in row["times"].items():
                if name.endswith(way):
                    label = f"NSA, {row['inputs']}" if name.startswith("NSA") else name.split()[0]
                    lines.setdefault(label, []).append((row["tokens"], t["ms"]))
            if row["inputs"] == "random":
                lines.setdefault("floor of NSA", []).append((row["tokens"], row["floor_ms"][way]))
        for label, points in lines.items():
            axes[i][j].loglog(*zip(*points), marker="o", label=label, linestyle=":" if "floor" in label else "-")
        axes[i][j].set(title=f"{shape} {way}", xlabel="tokens", ylabel="ms")
        axes[i][j].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine() -> dict[str, str]:
    """Device, versions, commit."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def run(args: argparse.Namespace) -> None:
    """The benchmark. Raises RunError."""
    shapes = [Shape.of(s) for s in ([args.shape] if args.shape else SHAPES)]
    try:
        lengths = [int(t) for t in args.lengths.split(",")]
    except ValueError:
        raise ConfigError("lengths", args.lengths, "not numbers of tokens", "give such as 8192,65536") from None
    if not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "the benchmark times kernels on a GPU, and there is none", "run it on one")
    a, rows, about = Attention(backend=Backend.triton), [], machine()
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"floor at {args.tflops:g} TFLOP/s and {args.bandwidth:g} TB/s; medians, +- half of slowest less fastest")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        errors = check(shape, a)
        print(f"{shape!s:>12} {CHECKED:>7} tokens: off by " + ", ".join(f"{k} {v:.2%}" for k, v in errors.items()))
        for tokens in lengths:
            gc.collect()
            torch.cuda.empty_cache()
            if needed(shape, tokens) > torch.cuda.mem_get_info()[0]:
                print(f"{shape!s:>12} {tokens:>7} skipped: needs {needed(shape, tokens) / 2**30:.0f} GiB")
                continue
            full: dict[str, dict] = {}
            for kind in ("random", "trained-like"):
                row = measure(shape, tokens, kind, a, full=not full)
                full = full or row["times"]
                compare(row, full, floors(shape, tokens, a, args.tflops, args.bandwidth))
                show(row)
                rows.append(row)
                gc.collect()
                torch.cuda.empty_cache()
            written = {"machine": about, "tflops": args.tflops, "bandwidth": args.bandwidth, "rows": rows}
            (output / "nsa.json").write_text(json.dumps(written, indent=1))
    if rows:
        plot(rows, output / "nsa.png")
        print(f"wrote {output / 'nsa.json'} and {output / 'nsa.png'}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Options("python -m nsa.bench", __doc__.split("\n\n")[0])
    parser.add_argument("--shape", help=f"heads,KV heads,width or widths; all of {' '.join(SHAPES)} if left out")
    parser.add_argument("--lengths", default=LENGTHS, help="numbers of tokens (%(default)s)")
    parser.add_argument(
        "--output", type=filled, default="runs/bench", help="directory for nsa.json and nsa.png (%(default)s)"
    )
    parser.add_argument("--tflops", type=number(float, 1), default=TFLOPS, help="of the floor (%(default)s)")
    parser.add_argument(
        "--bandwidth", type=number(float, 0.01), default=BANDWIDTH, help="of the floor, TB/s (%(default)s)"
    )
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
