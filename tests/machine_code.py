"""Compiles kernels of NSA for an H100 or H200 on any machine, and looks into their machine code. Run as a script, as
triton has to be itself: prints a line for each kernel in which products of two kinds read one register.

Scores are products of queries, which stay the same in a loop over keys; outputs and gradients are products of what is
computed anew in each round. ptxas 12.8 had both in the same registers (nsa/band.py, `shares_registers`), and all tiles
of keys after the first got wrong scores.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from configs.schema import Attention, Branch
from nsa import band, band_backward, hopper_band, hopper_picked, hopper_picked_backward
from nsa.bands import bands
from nsa.cases import Case, make_inputs
from nsa.pairs import Pairs
from nsa.tiles import Documents
from nsa.visits import Visits
from tests.kernels import packed

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SETS = [["slc"], ["win"], ["cmp"], ["slc", "win"], ["cmp", "slc", "win"]]
PRODUCT = re.compile(r"HGMMA\S+ R\d+, (R\d+), gdesc\[\w+\](\.tnspB)?")  # the operand in registers; of what kind


class Hopper:
    """What triton asks of a device, without one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(work: Callable[[], object]) -> list[tuple[str, str]]:
    """Name and PTX of each kernel that `work` launches; nothing runs."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel.asm["ptx"]))
        return kernel

    JITFunction.run = compile_only
    work()
    JITFunction.run = run
    return found


def sass(ptx: str) -> str:
    """Machine code."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        subprocess.run([TOOLS / "ptxas", "--gpu-name=sm_90a", source, "-o", binary], check=True, capture_output=True)
        return subprocess.run([TOOLS / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout


def shared(code: str) -> list[str]:
    """Registers that products with keys or values as they are, and with the same transposed, both read."""
    kinds: dict[str, set[str]] = {"": set(), ".tnspB": set()}
    for operand, kind in PRODUCT.findall(code):
        kinds[kind].add(operand)
    return sorted(kinds[""] & kinds[".tnspB"])


def inner_loops(code: str) -> list[str]:
    """The innermost loops in which products are, the shortest first: what waits lies elsewhere, and its way back looks
    like a loop too."""
    lines = code.splitlines()
    at = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    jumps = [(at.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_\w+)\)", line))]
    spans = [(i, j) for i, j in jumps if i < j and any("HGMMA" in line for line in lines[i:j])]
    within = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return ["\n".join(lines[i:j]) for i, j in sorted(within, key=lambda s: s[1] - s[0])]


def kernels(names: list[str], width: int) -> list[tuple[str, str]]:
    """Name and PTX of the kernels of these branches that read queries."""
    case = Case("any", (1100, 1, 33), 8, 2, width, width, Attention())
    x = {name: t.detach() for name, t in make_inputs(case, torch.bfloat16).items()}
    documents, kv = packed(case), {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in names}
    runs = {name: bands(case.sizes)[name].run(4) for name in names}
    statistics = {name: (torch.empty(8 // run, 1136, run),) * 2 for name, run in runs.items()}
    forward = compiled(lambda: band.forward(x["q"], kv, documents, case.sizes))
    given = x["q"], kv, x["q"], statistics, torch.empty_like(x["q"]), documents, case.sizes
    return forward + compiled(lambda: band_backward.queries(*given))


def inputs(qk: int, v: int) -> tuple[dict[str, torch.Tensor], Documents]:
    """Of two documents of 1,133 tokens, 32 heads and 2 KV heads."""
    case = Case("any", (1100, 33), 32, 2, qk, v, Attention())
    x = {name: t.detach() for name, t in make_inputs(case, torch.bfloat16).items()}
    return x, packed(case)


def chosen(qk: int, v: int) -> str:
    """Machine code of attention to the chosen blocks by the copy engine."""
    x, documents = inputs(qk, v)
    shape = {"order": 1133 * 2 * 13, "masks": 1133 * 2 * 13, "counts": (1133, 2), "starts": 2 * 20 + 1}
    found = Visits(**{name: torch.zeros(size, dtype=torch.int32) for name, size in shape.items()}, most=13, spans=20)
    o, lse = torch.empty(1133, 2, 13, 16, v, dtype=torch.bfloat16), torch.empty(1133, 2, 13, 16)
    q, k, v = x["q"], x["k_slc"], x["v_slc"]
    _, (_, ptx) = compiled(lambda: hopper_picked.attend(q, k, v, found, documents, 64, o, lse, 0))
    return sass(ptx)


def gradients(qk: int, v: int) -> str:
    """Machine code of its gradients."""
    x, documents = inputs(qk, v)
    pairs = Pairs(*(torch.zeros(size, dtype=torch.int32) for size in (1133 * 26, 1133 * 26, 41)))
    dq, dk, dv = torch.empty(1133, 2, 13, 16, qk).bfloat16(), torch.empty(2, 150, 64, qk), torch.empty(2, 150, 64, v)
    statistics, do = (torch.empty(2, 1136, 16),) * 2, torch.empty(1133, 32, v).bfloat16()
    given = x["q"], x["k_slc"], x["v_slc"], do, *statistics, dq, dk, dv, pairs, documents, 0
    ((_, ptx),) = compiled(lambda: hopper_picked_backward.differentiate(*given))
    return sass(ptx)


def near(qk: int, v: int) -> str:
    """Machine code of attention to bands by the copy engine."""
    x, documents = inputs(qk, v)
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in SETS[-1]}
    out = {name: (torch.empty(1133, 32, v, dtype=torch.bfloat16), torch.empty(32, 1133)) for name in kv}
    ((_, ptx),) = compiled(lambda: hopper_band.forward(x["q"], kv, out, documents, Attention()))
    return sass(ptx)


def main() -> None:
    driver.set_active(Hopper())
    products = 0
    for names, width in itertools.product(SETS, (64, 128)):
        for kernel, ptx in kernels(names, width):
            code = sass(ptx)
            products += len(PRODUCT.findall(code))
            if shared(code):
                print(f"{kernel} of {names} at {width}: {shared(code)}")
    print(f"{products} products", file=sys.stderr)


if __name__ == "__main__":
    assert {b.value for b in Branch} == set(SETS[-1])
    main()
