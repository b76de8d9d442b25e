"""Which part of the house may know what."""

import ast
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import fedlora
from fedlora.methods.table import TABLE
from fedlora.parts.table import Part

ROOT = Path(fedlora.__file__).parent


@cache
def imports(part: str) -> dict[str, set[str]]:
    """File -> everything it imports, as dotted names."""
    found = {}
    for file in sorted((ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else [ROOT / part]):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[str(file.relative_to(ROOT))] = names
    assert found
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_linalg_knows_tensors_only():
    for file, names in imports("linalg").items():
        assert not any(
            within(n, "torch.nn") or (within(n, "fedlora") and not within(n, "fedlora.linalg")) for n in names
        ), file
        assert "client" not in (ROOT / file).read_text().lower(), file


def test_the_layer_and_what_loads_it_name_no_factor_of_a_part():
    kinds = [kind for kind in get_args(Part) if not kind.in_head]
    factors, names = {factor.name for kind in kinds for factor in fields(kind)}, {kind.__name__ for kind in kinds}
    for file in ("adapted", "layers", "requests", "structure"):
        for node in ast.walk(ast.parse((ROOT / "models" / f"{file}.py").read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr in factors), f"{file}: {ast.unparse(node)}"
            assert not (isinstance(node, ast.Constant) and node.value in factors), f"{file}: {ast.unparse(node)}"
            assert not (isinstance(node, ast.Name) and node.id in names - {"LowRank"}), f"{file}: {node.id}"  # base updates


def test_methods_know_neither_models_nor_rounds():
    allowed = (
        "linalg",
        "parts",
        "adapter",
        "messages",
        "method",
        "methods",
        "randomness",
        "ranges",
    )  # ranges: of their settings
    for file, names in imports("methods").items():
        own = {n for n in names if within(n, "fedlora")}
        assert all(within(n, *(f"fedlora.{part}" for part in allowed)) for n in own), file
        assert not any(within(n, "transformers", "peft", "datasets", "torch.nn") for n in names), file


@pytest.mark.parametrize("part", ["rounds", "train", "models", "tasks", "deploy"])
def test_the_engine_names_no_method(part):
    for file in imports(part):
        text = (ROOT / file).read_text().lower()
        assert not any(name in text or name.replace("-", "_") in text for name in TABLE), file


def test_only_the_tasks_know_their_kinds():
    words, named_in = ("classification", "classifier", "regression", "seq2seq", "num_labels", "seq_cls"), {}
    for file in imports(""):
        if not file.startswith("tasks/"):
            named_in[file] = [word for word in words if word in (ROOT / file).read_text().lower()]
    assert named_in.pop("config/sections.py") == ["classification", "regression", "seq2seq"], "the setting task.kind"
    assert not any(named_in.values()), {file: found for file, found in named_in.items() if found}


def test_imports_between_folders_and_modules_run_one_way():
    folders = {d.name for d in ROOT.iterdir() if (d / "__init__.py").exists()}
    parts = {name: name for name in folders} | {f.stem: f.name for f in ROOT.glob("*.py") if f.stem != "__init__"}
    needs = {
        part: {
            other
            for names in imports(path).values()
            for other in parts.keys() - {part}
            if any(within(name, f"fedlora.{other}") for name in names)
        }
        for part, path in parts.items()
    }
    while free := {part for part, needed in needs.items() if not needed}:
        needs = {part: needed - free for part, needed in needs.items() if part not in free}
    assert not needs, f"parts that need each other: {needs}"


@pytest.mark.parametrize("folder", sorted(file.parent.relative_to(ROOT).as_posix() for file in ROOT.rglob("*/__init__.py")))
def test_the_init_file_of_a_folder_holds_its_docstring_alone(folder):
    code = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert ast.get_docstring(code) and len(code.body) == 1


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("transformers", ("models", "tasks", "exporting", "train/packing.py")),
        ("peft", ("models", "exporting")),
        ("datasets", ("data",)),
        ("PIL", ("data", "models/image_processor.py")),
        ("sklearn", ("linalg",)),
        ("flwr_datasets", ("data",)),
        ("typer", ("cli/",)),
        ("rich", ("cli/", "report/")),
        ("flwr", ("deploy",)),
        ("cryptography", ("deploy",)),
        ("sklearn", ("linalg",)),
        ("ot", ("linalg",)),
        ("rouge_score", ("tasks",)),
        ("sacrebleu", ("tasks",)),
        ("dp_accounting", ("privacy/account.py",)),
    ],
)
def test_a_library_is_known_only_where_it_belongs(library, homes):
    for file, names in imports("").items():
        if any(within(name, library) for name in names):
            assert file.startswith(homes), f"{file} imports {library}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cli.main", ("torch", "pydantic")),
        ("deploy.join", ("torch", "transformers", "datasets")),
        ("deploy.supernode", ("torch", "transformers", "datasets")),  # stays as long as the node does
        ("deploy.launch", ("transformers", "datasets")),
        ("report.tables", ("transformers",)),
        ("report.terminal", ("transformers", "datasets")),
        ("report.comparison", ("transformers", "datasets")),
        ("api", ("peft", "transformers.modeling_utils", "dp_accounting")),  # before the data are known to be good
    ],
)
@pytest.mark.slow
def test_what_needs_no_model_does_not_import_what_loads_one(module, heavy):
    found = f"[m for m in {heavy} if m in sys.modules]"
    code = f"import sys, fedlora.{module}; sys.exit(str({found}) if {found} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_pickled_but_what_the_processes_of_one_run_say_to_each_other():
    picklers = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "torch.save")
    files = {file for file, names in imports("").items() if any(within(name, *picklers) for name in names)}
    assert files == {"train/devices.py"}


def test_a_section_of_the_settings_is_known_only_where_most_of_it_is_used():
    trained_by = ("batched", "independence", "job", "local", "optimizer", "schedule", "steps")
    trained_by += ("step_gradients", "private_gradients")
    homes = ("config", "data", "federated_data.py", "rounds/plan.py", *(f"train/{name}.py" for name in trained_by))
    homes += ("privacy/record.py",)
    for file, names in imports("").items():
        if any(within(name, "fedlora.config.sections") for name in names):
            assert file.startswith(homes), f"{file}: pass the values that it needs"


def test_importing_a_module_neither_reads_nor_writes_the_environment():
    for file in imports(""):
        code = ast.parse((ROOT / file).read_text())
        code.body = [node for node in code.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert "os.environ" not in ast.unparse(code), file


def test_only_the_spec_divides_by_a_rank():
    for file in imports(""):
        divisions = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.BinOp)]
        scaled = [n for n in divisions if isinstance(n.op, ast.Div) and "alpha" in ast.unparse(n.left)]
        assert bool(scaled) == (file == "adapter.py"), file


def test_what_the_package_offers_is_what_it_has():
    assert all(getattr(fedlora, name) is not None for name in fedlora.__all__)
