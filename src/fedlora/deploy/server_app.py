"""The Flower ServerApp: one run over the Grid, begun or taken up where its folder says."""

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.deploy.keys import Keys
from fedlora.deploy.server import serve
from fedlora.deploy.transport import GridTransport
from fedlora.deploy.watchdog import end_with

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs what the run's setting `folder`, a path on the server, holds; an error is also in the folder's journal.

    The setting `keys` is the folder of the nodes' keys; empty: the SuperLink has none.
    """
    end_with(os.getppid())  # a server without its SuperLink would keep the run's folder
    keys = str(context.run_config["keys"])
    serve(Path(str(context.run_config["folder"])), GridTransport(grid, Keys(Path(keys)).credentials() if keys else None))
