"""The server's experiment with the node's own data settings: only the node determines the files that it reads."""

import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.paths import looks_local


def local_experiment(text: str, overrides: Sequence[str], own_file: bool) -> Experiment:
    """Parses the experiment in `text`, with the node's own `data` section: the defaults and the node's overrides.

    A file, column or local model that only the server sets is never used. A node without its own file must set the same
    data source as the server; otherwise its clients' examples would differ from the server's partition.

    Raises:
        UserError: the experiment is invalid, or needs data or a model that the node itself has not set.
    """
    served = tomllib.loads(text)
    table: dict[str, Any] = {key: value for key, value in served.items() if key != "data"}
    origin = "the server's experiment"
    local, theirs = build(table, overrides, origin), build(served, (), origin)
    named = any(override.partition("=")[0].strip() == "model" for override in overrides)
    if not named and not _from_elsewhere(local.model):
        raise UserError(f"the server's model is the path {local.model!r}; allow a path with --set model=PATH")
    if own_file and (local.data.text_pair is None) != (theirs.data.text_pair is None):
        raise UserError(
            "the server's experiment reads pairs of texts; name the second column with --set data.text_pair=COLUMN"
            if local.data.text_pair is None
            else "the server's experiment reads single texts; remove data.text_pair"
        )
    if not own_file:
        ours, other = local.data.model_dump(), theirs.data.model_dump()
        if differing := [key for key in ours if ours[key] != other[key]]:
            wanted = " ".join(f"--set data.{key}={other[key]!r}" for key in differing)
            raise UserError(f"the server's data differ from this node's; to accept them, join with {wanted}")
    return local


def _from_elsewhere(model: str) -> bool:
    """Whether the model is on the hub or in an installed package, rather than at a path on this machine."""
    if model.startswith("package:"):
        name, _, folder = model.removeprefix("package:").partition("/")
        inside = PurePosixPath(folder)
        return name.isidentifier() and not inside.is_absolute() and ".." not in inside.parts
    return not looks_local(model) and not Path(model).exists()
