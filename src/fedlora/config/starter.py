"""The `experiment.toml` of `fedlora init`: the most frequently changed settings, with descriptions."""

import textwrap
from itertools import groupby

from fedlora.config.experiment import Experiment
from fedlora.config.reference import Setting, settings

_KEYS = (
    "model",
    "rounds",
    "seed",
    "data.source",
    "data.test",
    "data.text",
    "data.text_pair",
    "data.label",
    "data.user",
    "data.rows",
    "clients.count",
    "clients.partition",
    "clients.alpha",
    "method.name",
    "method.rank",
    "lora.alpha",
    "lora.targets",
    "train.lr",
    "train.epochs",
    "train.batch_size",
    "train.max_length",
    "train.precision",
    "train.device",
    "sampling.fraction",
    "evaluate.every",
)
_INTRO = """\
# An experiment. `fedlora check FILE` checks it, `fedlora run FILE` runs it.
# All values are the defaults. A line such as `#key = value` is an example of a setting without a
# default. `fedlora settings` lists all settings."""
_WIDTH = 100


def text() -> str:
    """Content of the file, TOML with comments; its values are the defaults."""
    parts = [_INTRO]
    for section, entries in groupby(map(_entry, _KEYS), lambda entry: entry.section):
        if section:
            parts.append(f"[{section}]")
        parts += map(_lines, entries)
    return "\n\n".join(parts) + "\n"


def _entry(key: str) -> Setting:
    """Setting with that key; of several, that of the default method."""
    name = Experiment().method.name
    return next(entry for entry in settings() if entry.key == key and (not entry.methods or name in entry.methods))


def _lines(entry: Setting) -> str:
    told = entry.text if entry.values == "text" else f"{entry.text} Values: {entry.values}."
    comment = textwrap.wrap(told, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    line = f"{entry.key.rpartition('.')[2]} = {entry.default or entry.example}"
    return "\n".join([*comment, line if entry.default else f"#{line}"])
