"""Flower ServerApp: runs or resumes one run directory over the Grid."""

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.deploy.grid_transport import GridTransport
from fedlora.deploy.keys import Keys
from fedlora.deploy.server import serve
from fedlora.watchdog import end_with

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the folder in the run setting `folder`, a path on the server; errors are also written to its event log.

    The setting `keys` is the folder of the nodes' keys; empty for a SuperLink without keys.
    """
    end_with(os.getppid())  # a server without its SuperLink would keep the run's folder locked
    assert isinstance(grid, HttpGrid)
    keys = str(context.run_config["keys"])
    serve(Path(str(context.run_config["folder"])), GridTransport(grid, Keys(Path(keys)).credentials() if keys else None))
