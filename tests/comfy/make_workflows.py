"""Write workflows/*.json as the browser saves graphs, workflows/api/*.json as /prompt takes them, and subgraphs/*.json.

python tests/comfy/make_workflows.py; `make comfy-workflows` does it in the right environment. What the graphs are is
in sheets_*.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api
from comfy_client import REPOSITORY, start
from sheet import Schemas
from sheets_blueprints import adapter_to_picture, train_and_compare
from sheets_judging import best_of_n, best_of_n_rewards, compare_adapters, strengths_by_step
from sheets_sampling import neighbor_explorer, sample_flux_with_adapter, sample_with_adapter
from sheets_training import compare_algorithms, train_embedded, train_flux, vote

WORKFLOWS, SUBGRAPHS = REPOSITORY / "workflows", REPOSITORY / "subgraphs"
BLUEPRINTS = (adapter_to_picture, train_and_compare)
GRAPHS = (
    sample_with_adapter,
    compare_adapters,
    strengths_by_step,
    best_of_n,
    best_of_n_rewards,
    neighbor_explorer,
    train_embedded,
    compare_algorithms,
    train_flux,
    sample_flux_with_adapter,
    vote,
)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_blueprints(schemas: Schemas, folder: Path) -> None:
    """All nodes that are graphs."""
    folder.mkdir(exist_ok=True)
    for make in BLUEPRINTS:
        sheet = make(schemas)
        write_json(folder / f"{sheet.name}.json", sheet.ui())


def write(schemas: Schemas, folder: Path) -> None:
    """All graphs, in both formats."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for make in GRAPHS:
        sheet = make(schemas)
        saved = sheet.ui()
        write_json(folder / f"{sheet.name}.json", saved)
        write_json(folder / "api" / f"{sheet.name}.json", convert_ui_to_api(saved, schemas))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        server = start(Path(base))
        try:
            schemas = server.get("/object_info")
            write(schemas, WORKFLOWS)
            write_blueprints(schemas, SUBGRAPHS)
        finally:
            server.stop()
