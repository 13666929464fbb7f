"""python -m launch.dashboard: create the W&B workspace that compares the runs of a project.

Each time it is called it creates a view of its own; those of others stay. --output writes what would be sent instead.
Exit codes: 0; 64 for a bad option, no login, or a key that the server refuses; 75 for a server that does not answer
(try again).
"""

import sys
from pathlib import Path
from typing import Optional

from configs.errors import ConfigError, exit_code
from configs.options import Options, filled, place, write
from configs.rules import check_project
from launch.tracking import failure, has_key

TOKENS = "tokens"  # the axis of every curve
CURVES = {  # section: title of a panel and what it shows, names of metrics.jsonl
    "Loss": {
        "Loss": ["loss"],
        "Validation loss": ["val_loss"],
        "Gradient norm": ["grad_norm"],
        "Learning rate": ["lr"],
    },
    "Speed and its accounting": {
        "Tokens/s per GPU": ["tokens_per_s_per_gpu"],
        "MFU (FLOPs that NSA needs)": ["mfu"],
        "Speed-up over full attention, measured (config: run.twin; speedup_from says where)": ["speedup_vs_full"],
        "FLOPs saved by formula, and the share realised": ["flop_saving", "saving_realised"],
        "Model TFLOP/s per GPU": ["model_tflops"],
        "TFLOP/s that full attention would need (no MFU)": ["dense_equiv_tflops"],
    },
    "Time, memory, faults": {
        "Memory, GiB": ["mem_gib"],
        "Goodput": ["goodput"],
        "Step and wait for data, s": ["step_s", "data_wait_s"],
        "Updates and rows left out, loss spikes": ["updates_skipped", "rows_skipped", "loss_spikes"],
    },
}
FAMILIES = {  # section: title of a panel and the beginning of the names that it shows
    "Loss": {"Validation loss by position in the document": "val_loss_from/"},
    "Time, memory, faults": {"Parts of a step, s, rank 0": "time/"},
    "Sparsity, by layer": {
        "Gate of the compressed branch": "sparsity/gate_cmp/",
        "Gate of the selected branch": "sparsity/gate_slc/",
        "Gate of the window": "sparsity/gate_win/",
        "Chosen blocks beyond the window, share": "sparsity/far/",
        "Entropy of the block scores": "sparsity/entropy/",
        "Overlap between neighbouring queries": "sparsity/overlap/",
    },
}
BY_CONTEXT = {  # title: last value, over the context length of the run
    "Tokens/s per GPU by context": "tokens_per_s_per_gpu",
    "Speed-up over full attention by context": "speedup_vs_full",
    "Memory by context, GiB": "mem_gib",
}


def workspace(entity: str, project: str):
    """The view, not saved yet."""
    import wandb_workspaces.reports.v2 as wr  # takes seconds
    import wandb_workspaces.workspaces as ws

    sections = []
    for name in dict.fromkeys([*CURVES, *FAMILIES]):
        panels = [wr.LinePlot(title=title, x=TOKENS, y=names) for title, names in CURVES.get(name, {}).items()]
        for title, begin in FAMILIES.get(name, {}).items():
            panels.append(wr.LinePlot(title=title, x=TOKENS, metric_regex=f"^{begin}.*"))
        sections.append(ws.Section(name=name, panels=panels, is_open=True))
    x = wr.Config("data.seq_len")
    points = [wr.ScatterPlot(title=t, x=x, y=wr.SummaryMetric(name), log_x=True) for t, name in BY_CONTEXT.items()]
    sections.insert(2, ws.Section(name="By context length", panels=points, is_open=True))
    settings = ws.WorkspaceSettings(x_axis=TOKENS)
    name = "NSA against full attention"
    return ws.Workspace(name=name, entity=entity, project=project, sections=sections, settings=settings)


def create(entity: str, project: str, output: Optional[Path]) -> None:
    """Save the view, or write its description. Raises RunError."""
    if output:
        view = workspace(entity, project)._to_model()
        write("--output", output, view.model_dump_json(by_alias=True, exclude_none=True))
        print(output)
        return
    if not has_key():
        raise ConfigError("W&B", "login", "no key for the server", "run `wandb login`, or set WANDB_API_KEY")
    import wandb

    try:
        owner = entity or wandb.Api().default_entity
        print(workspace(owner, project).save().url)
    except Exception as e:  # W&B has many
        where = f"{entity}/{project}" if entity else project
        raise failure(e, f"project {where}", "try again") from e


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = Options("python -m launch.dashboard", __doc__.split(": ", 1)[1])
    parser.add_argument("--entity", default="", help="user or team; default: that of the key")
    parser.add_argument("--project", type=filled, default="sparsetron", help="wandb.project of the runs")
    parser.add_argument("--output", type=place, help="write the view here (JSON) and send nothing")

    def work() -> None:
        args = parser.parse_args(argv)
        check_project(args.project)
        create(args.entity, args.project, args.output)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
