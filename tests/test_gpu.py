"""What has to hold on a GPU: the definition computes there what it computes on a CPU, and layouts train alike."""

import pytest
import torch

from configs.schema import Precision, Recompute
from nsa.cases import CASES, Case, make_inputs
from parallel import mesh
from tests import ranks, test_nsa_reference, tiny
from tests.test_parity import STEPS, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case", [*CASES, Case("several chunks", (700, 2500), qk_dim=32, v_dim=16)], ids=lambda c: c.name
)
def test_the_definition_on_a_gpu(case):
    results = []
    for device in ("cpu", "cuda"):
        x = make_inputs(case, torch.float64, device)
        o = test_nsa_reference.run(case, x)
        o.sin().sum().backward()
        results.append([o.detach().cpu(), *(t.grad.cpu() for t in x.values() if t.numel())])
    for cpu, gpu in zip(*results):
        torch.testing.assert_close(gpu, cpu, rtol=1e-8, atol=1e-8)


LAYOUTS = [
    {"tp": 2},
    {"tp": 2, "sequence": True, "recompute": Recompute.full},
    {"pp": 2},
    {"pp": 2, "recompute": Recompute.full},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3, "recompute": Recompute.full},
]


def can_run(layout: dict) -> None:
    """Two processes can share a GPU through gloo, which moves no tensors of a GPU from one stage to the next."""
    if torch.cuda.device_count() < 2 and "pp" in layout:
        pytest.skip("pipeline stages need a GPU each")


@pytest.fixture(scope="module", params=["nsa", "full"])
def one_gpu(request, corpus):
    cfg = tiny.config(request.param, data__path=corpus)
    return cfg, ranks.run(1, train, cfg, timeout=300)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_in_fp32(one_gpu, layout):
    can_run(layout)
    cfg, expected = one_gpu
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(2, train, cfg, timeout=300):
        for step, (ours, theirs) in enumerate(zip(out, expected)):
            assert ours == pytest.approx(theirs, rel=1e-4), f"step {step}"


@pytest.mark.parametrize("layout", [{}, *LAYOUTS[1:5:2], LAYOUTS[4], LAYOUTS[-1]], ids=str)
def test_bf16_stays_near_fp32(one_gpu, layout):
    can_run(layout)
    cfg, exact = one_gpu
    changes = {f"parallel__{k}": v for k, v in layout.items()}
    cfg = tiny.change(cfg, train__precision=Precision.bf16, **changes)
    for out in ranks.run(2 if layout else 1, train, cfg, timeout=300):
        assert [loss for loss, _ in out] == pytest.approx([loss for loss, _ in exact], rel=5e-3)
        assert [norm for _, norm in out[:STEPS]] == pytest.approx([norm for _, norm in exact[:STEPS]], rel=0.05)


def where() -> str:
    return str(mesh.build(1, 1).device)


def test_processes_use_the_gpus():
    assert ranks.run(1, where, timeout=120) == ["cuda:0"]
