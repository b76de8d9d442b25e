"""Finished runs of tiny models, with their exports."""

import json
from pathlib import Path
from typing import Any

from fedlora import Experiment, run
from fedlora.api import export
from fedlora.models.loading import quiet
from tiny_tasks import tiny_task


class Trained:
    """A finished run, its exports, and all of its examples: in a file, and as rows."""

    def __init__(self, home: Path, kind: str, method: str = "fedit", **tables: Any) -> None:
        quiet()
        settings = tiny_task(kind, home)
        self.data = settings["data"]["source"]
        data = {**settings["data"], "test": self.data, "test_rows": 12}
        table = {
            "rounds": 2,
            "clients": {"count": 2, "partition": "iid"},
            "method": {"name": method, "rank": 2},
            "train": {"lr": 0.02, "max_length": 32, "device": "cpu"},
            **settings,
            **tables,
            "data": data,
        }
        self.result = run(Experiment.model_validate(table), home / "run", progress=False)
        self.run, self.adapter, self.merged = home / "run", home / "run" / "adapter", home / "merged"
        if "" in self.result.adapters:
            export(self.run, "merged", self.merged)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.data).read_text().splitlines()]
