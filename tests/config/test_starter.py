"""The file that `fedlora init` writes."""

import re
import tomllib

from fedlora.config import starter
from fedlora.config.experiment import Experiment, build

UNCOMMENTED = re.sub(r"^#(?=\w+ = )", "", starter.text(), flags=re.MULTILINE)


def test_the_uncommented_lines_are_the_defaults():
    written, defaults = tomllib.loads(starter.text()), Experiment().model_dump()
    for section, value in written.items():
        assert value == ({key: defaults[section][key] for key in value} if isinstance(value, dict) else defaults[section])
    assert build(written) == Experiment()


def test_with_every_line_uncommented_it_is_a_valid_experiment():
    written = tomllib.loads(UNCOMMENTED)
    experiment = build(written)
    assert experiment.data.test == written["data"]["test"] and experiment.lora.targets == written["lora"]["targets"]


def test_every_setting_is_described_above_its_line():
    lines = starter.text().splitlines()
    places = [i for i, line in enumerate(lines) if re.match(r"#?\w+ = ", line)]
    assert len(places) == len(starter._KEYS)
    assert all(lines[place - 1].startswith("# ") for place in places)
    assert max(map(len, lines)) <= 100
