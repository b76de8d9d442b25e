"""Command line: a thin layer with one function per command."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from fedlora.errors import RunStopped, UserError
from fedlora.printable import printable
from fedlora.version import __version__

if TYPE_CHECKING:  # the commands import what they need: torch takes seconds, and --help should not
    from fedlora.rounds.progress import Progress
    from fedlora.runs.result import Result

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

deploy = typer.Typer(no_args_is_help=True, help="Run over Flower on this machine, for local testing.")
app.add_typer(deploy, name="deploy")

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: method.rank=4")]
Out = Annotated[Path | None, typer.Option("--out", help="A new folder for the run; by default one in runs/.")]
File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.TOML", show_default=False)]
Resume = Annotated[
    Path | None, typer.Option(metavar="RUN_DIR", help="Resume a run; with --set rounds=N, up to N rounds in all.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)]


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Federated fine-tuning of transformers with LoRA adapters."""


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.TOML]", show_default=False)] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Run an experiment, or resume one."""
    if resume is not None:
        _check_resumed(file, out)
        _resume(resume, overrides)
    elif file is None:
        raise UserError("run needs an experiment file, or --resume RUN_DIR")
    else:
        _run(file, overrides, out)


@deploy.command("local")
def deploy_local(
    file: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.TOML]", show_default=False)] = None,
    clients: Annotated[int, typer.Option(help="Number of SuperNodes; the default of clients.count.")] = 4,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Run an experiment over Flower, with server and clients in processes on this machine."""
    from fedlora.config.experiment import Experiment

    _need_flower()
    from fedlora.deploy import launch as flower

    def ready(path: Path) -> None:
        if resume is None and file is not None:
            experiment = Experiment.load(file, overrides or ())
            if experiment.clients.count is None:
                experiment = Experiment.load(file, [*(overrides or ()), f"clients.count={clients}"])
            flower.prepare(experiment, path)

    _serve(
        file,
        overrides,
        out,
        resume,
        ready,
        lambda path, progress: flower.local(path, clients, progress, _note),
        "deploy local",
    )


@app.command()
def serve(
    file: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.TOML]", show_default=False)] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where nodes connect.")] = "127.0.0.1:9092",
    keys: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Made by fedlora keys.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A SuperLink that runs on this machine already, instead.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="That SuperLink's ca.crt.")] = None,
) -> None:
    """Run an experiment with clients on other machines: a Flower SuperLink, and the run."""
    from fedlora.config.experiment import Experiment

    _need_flower()
    from fedlora.deploy import launch as flower
    from fedlora.deploy.address import Address

    def ready(path: Path) -> None:
        if resume is None and file is not None:
            flower.prepare(Experiment.load(file, overrides or ()), path)

    if superlink is not None:
        running = Address.parse(superlink)
        again = f"serve --superlink {superlink}" + ("" if ca is None else f" --ca {ca}")
        _serve(
            file,
            overrides,
            out,
            resume,
            ready,
            lambda path, progress: flower.serve_on(path, running, ca, progress, _note),
            again,
        )
        return
    address = Address.parse(listen)
    found = flower.needed(address, keys)
    again = f"serve --listen {listen}" + ("" if keys is None else f" --keys {keys}")
    _serve(
        file,
        overrides,
        out,
        resume,
        ready,
        lambda path, progress: flower.serve(path, address, found, progress, _note),
        again,
    )


@app.command()
def join(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")],
    client: Annotated[list[str], typer.Option(help="The name of the data owner; with --data, one.")],
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Its examples; by default its partition.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the node keeps its state; by default nodes/CLIENT.")] = None,
    rank: Annotated[int | None, typer.Option(help="The client's rank; by default method.rank.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="This node's private key.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's ca.crt.")] = None,
    overrides: Overrides = None,
) -> None:
    """Take part in a run with the examples on this machine: a Flower SuperNode and its worker. Ends with Ctrl-C."""
    _need_flower()
    from fedlora.deploy import join as node
    from fedlora.deploy.address import Address
    from fedlora.deploy.settings import Settings

    address = Address.parse(server)
    settings = Settings(clients=client, data=None if data is None else str(data), rank=rank, overrides=overrides or [])
    where = folder or Path("nodes", client[0])
    try:
        with _interruptible():
            node.join(where, settings, address, node.credentials(address, key, ca), _note)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    host: Annotated[list[str] | None, typer.Option(help="A name or address by which nodes reach the server.")] = None,
    node: Annotated[list[str] | None, typer.Option(help="Make a key for this node.")] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="A client that the node may bring; by default the one of the node's name.")
    ] = None,
) -> None:
    """Make the server's certificate, and a key for each node that may connect."""
    _need_flower()
    from fedlora.deploy.keys import Keys

    made = Keys(folder)
    if not host and not node:
        raise UserError("nothing to make; give --host for the server's certificate, --node for a node's key")
    if client and len(node or ()) != 1:
        raise UserError("--client says what one node may bring; give exactly one --node with it")
    if host:
        made.make_server(host)
        print(printable(str(made.ca)))
    for name in node or ():
        print(printable(str(made.make_node(name, client or ()))))


@app.command()
def demo(overrides: Overrides = None, out: Out = None) -> None:
    """Run the built-in experiment: a real MiniLM, ten clients, the documentation of Python's standard library."""
    _run(None, overrides, out)


@app.command()
def init(file: Annotated[Path, typer.Argument(metavar="[FILE]", show_default=False)] = Path("experiment.toml")) -> None:
    """Write an experiment file with comments, experiment.toml by default, to be changed and run."""
    from fedlora.config import starter

    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(starter.text())
    except FileExistsError:
        raise UserError(f"{file}: already exists; give the name of a new file: fedlora init FILE") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    print(printable(str(file)))


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Check an experiment, its data, partition, model and device without training; print the clients."""
    from fedlora import listings
    from fedlora.config.experiment import Experiment
    from fedlora.federated_data import FederatedData
    from fedlora.session import check as check_experiment

    experiment = Experiment.load(file, overrides or ())
    federated_data = FederatedData.make(experiment)
    check_experiment(experiment, federated_data)
    console = Console()
    console.width = max(console.width, listings.CLIENTS_WIDTH)
    console.print(listings.clients(federated_data))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    secure: Annotated[bool, typer.Option("--secure", help="Only those that work with secure aggregation.")] = False,
    mixed_ranks: Annotated[
        bool, typer.Option("--mixed-ranks", help="Only those for clients with different ranks.")
    ] = False,
    personal: Annotated[bool, typer.Option("--personal", help="Only those with personal models.")] = False,
) -> None:
    """List the methods, or describe one."""
    from fedlora import listings
    from fedlora.config.experiment import build
    from fedlora.methods.table import TABLE

    if name is not None:
        if secure or mixed_ranks or personal:
            raise UserError(f"methods {name}: expected a NAME or filters, found both; leave out one of them")
        Console().print(listings.method(build({"method": {"name": name}}).method.row))
        return
    rows = [
        row
        for row in TABLE.values()
        if (not secure or row.secure_sums().startswith("yes"))
        and (not mixed_ranks or row.mixed_ranks)
        and (not personal or row.personal)
    ]
    Console().print(listings.methods(rows) if rows else "no method has all of these properties")


@app.command()
def settings(key: Annotated[str | None, typer.Argument(metavar="[KEY]", show_default=False)] = None) -> None:
    """List the settings of an experiment, or describe one of them or a section."""
    from fedlora import listings
    from fedlora.config import reference

    console = Console()
    if key is None:
        console.print(listings.settings(reference.settings()))
    else:
        console.print(*map(listings.setting, reference.find(key)))


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    to: Annotated[Literal["adapter", "merged"], typer.Option(help="A PEFT folder, or the whole model.")] = "adapter",
    client: Annotated[str | None, typer.Option(help="Only this client's, of a personal method.")] = None,
) -> None:
    """Write the adapter of a run for use elsewhere."""
    from fedlora.api import export as write

    for folder in write(run_dir, to, out, client).values():
        print(printable(str(folder)))


def _run(file: Path | None, overrides: list[str] | None, out: Path | None) -> None:
    from fedlora.config.experiment import Experiment, build
    from fedlora.config.reading import DEMO

    experiment = build(DEMO, overrides or ()) if file is None else Experiment.load(file, overrides or ())
    from fedlora.api import run
    from fedlora.runs.start import new_folder

    path = out or new_folder(experiment)
    _follow(path, experiment.rounds, lambda progress: run(experiment, path, progress))


def _check_resumed(file: Path | None, out: Path | None) -> None:
    if file is not None or out is not None:
        raise UserError(
            "--resume takes no file and no --out; of the settings, --set rounds=N may raise the number of rounds"
        )


def _resume(path: Path, overrides: list[str] | None) -> None:
    from fedlora.api import resume
    from fedlora.runs.start import extend, read_folder

    if overrides:
        extend(path, overrides)
    _follow(path, read_folder(path).rounds, lambda progress: resume(path, progress))


def _follow(path: Path, rounds: int, go: Callable[["Progress"], "Result"], command: str = "run") -> None:
    """Shows the progress of a run and its table at the end; if it stops, prints how to resume it."""
    from fedlora import terminal

    console = Console()
    again = f"go on with: fedlora {command} --resume {path}"
    try:
        with _interruptible(), terminal.Live(console, rounds) as live:
            result = go(live)
    except RunStopped as error:
        raise RunStopped(f"{error}; {again}" if path.exists() else str(error)) from error
    except KeyboardInterrupt:
        started = (path / "experiment.toml").exists()
        _say(f"interrupted; {again}" if started else "interrupted before the first round", "yellow")
        raise typer.Exit(130) from None
    console.print(terminal.closing(result))
    console.print(Text(printable(f"run directory  {result.folder}")), soft_wrap=True)
    for client, folder in list(result.adapters.items())[:1]:
        more = f" and {len(result.adapters) - 1} more beside it" if len(result.adapters) > 1 else ""
        console.print(Text(printable(f"PEFT adapter   {folder}{more if client else ''}")), soft_wrap=True)
    if result.left_out:
        console.print(Text(printable(f"PEFT adapters  {result.left_out}")), soft_wrap=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt for Ctrl-C and SIGTERM, also if interrupted compiled code raises another error instead.

    Only the first signal counts: both are ignored afterwards, so that cleanup is not interrupted.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except (Exception, SystemExit) as error:
        if stopped:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def _serve(
    file: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    resume: Path | None,
    ready: Callable[[Path], None],
    go: Callable[[Path, "Progress"], "Result"],
    again: str,
) -> None:
    """Runs or resumes a run, showing its progress; `again` is the command that resumes it."""
    from fedlora.config.experiment import Experiment
    from fedlora.runs import start as runs

    if resume is not None:
        _check_resumed(file, out)
        if overrides:
            runs.extend(resume, overrides)
        path = resume
    elif file is None:
        raise UserError("an experiment file is needed, or --resume RUN_DIR")
    else:
        path = out or runs.new_folder(Experiment.load(file, overrides or ()))
        ready(path)
    _follow(path, runs.read_folder(path).rounds, lambda progress: go(path, progress), again)


def _need_flower() -> None:
    """Checks that Flower is installed, and makes all files written by this command private to its user."""
    import os
    from importlib.util import find_spec

    os.umask(0o077)

    if find_spec("flwr") is None:
        raise UserError("Flower is not installed; pip install 'fedlora[flower]' brings it")


def _note(message: str) -> None:
    Console().print(Text(printable(message), "yellow"), soft_wrap=True)
    sys.stdout.flush()


def _say(message: str, style: str) -> None:
    Console(stderr=True).print(Text(printable(message), style), soft_wrap=True)


def main() -> None:
    """The `fedlora` command. Exit codes: 0 success, 1 the run stopped, 2 invalid input, 130 Ctrl-C."""
    try:
        with _interruptible():
            app()
    except KeyboardInterrupt:
        _say("interrupted", "yellow")
        sys.exit(130)
    except UserError as error:
        _say(f"error: {error}", "red")
        sys.exit(2)
    except RunStopped as error:
        _say(f"stopped: {error}", "red")
        sys.exit(1)


if __name__ == "__main__":
    main()
