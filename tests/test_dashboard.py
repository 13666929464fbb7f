"""The workspace: what W&B's own library reads back from what is sent, and that it is sent."""

import json

import pytest
import wandb
from wandb_workspaces.reports.v2 import Config, LinePlot, Metric, ScatterPlot, SummaryMetric
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from launch import dashboard
from tests.wandb_server import serve


@pytest.fixture(autouse=True)
def _fresh_client():
    """W&B's client in this process keeps the server that it began with."""
    yield
    wandb.teardown()


def read_back(text: str) -> list:
    """The panels that the library finds in a view."""
    return [
        panel for section in Workspace._from_model(View.model_validate_json(text)).sections for panel in section.panels
    ]


def test_the_library_reads_every_panel_back(tmp_path, capsys):
    out = tmp_path / "view.json"
    assert dashboard.main(["--entity", "me", "--project", "p", "--output", str(out)]) == 0
    panels = {panel.title: panel for panel in read_back(out.read_text())}
    curves = {title: names for panels in dashboard.CURVES.values() for title, names in panels.items()}
    for title, names in curves.items():
        assert isinstance(panels[title], LinePlot)
        assert panels[title].x in ("tokens", Metric("tokens"))
        assert [y if isinstance(y, str) else y.name for y in panels[title].y] == names
    families = {title: begin for panels in dashboard.FAMILIES.values() for title, begin in panels.items()}
    for title, begin in families.items():
        assert panels[title].metric_regex == f"^{begin}.*"
    for title, name in dashboard.BY_CONTEXT.items():
        assert isinstance(panels[title], ScatterPlot)
        assert (panels[title].x, panels[title].y) == (Config("data.seq_len"), SummaryMetric(name))
    assert len(panels) == len(curves) + len(families) + len(dashboard.BY_CONTEXT), "no title twice"


def test_it_is_sent_to_the_project(monkeypatch, capsys):
    with serve() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        assert dashboard.main(["--project", "p"]) == 0
        (view,) = server.views
        assert (view["entityName"], view["projectName"]) == ("tester", "p")
        sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
        assert sum(len(section["panels"]) for section in sections) > 20
        assert "/tester/p?nw=" in capsys.readouterr().out


def test_a_server_that_is_not_there_and_no_key_are_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboard.main([]) == 64
    assert dashboard.main(["--project", "a/b"]) == 64
    with serve() as server:
        server.status = 400
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        assert dashboard.main(["--entity", "me"]) == 75
        server.status = 403
        assert dashboard.main(["--entity", "me"]) == 64
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert "wandb.project=a/b" in errors[1]
    assert "project me/sparsetron" in errors[2]
    assert "check the key" in errors[3]
