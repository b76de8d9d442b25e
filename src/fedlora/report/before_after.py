"""A language model's answers before and after training, side by side, and the gain in its scores."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedlora.printable import number, printable
from fedlora.report.text_gains import Answers, before_and_after, gain
from fedlora.runs.result import Result
from fedlora.tasks.text_metrics import TEXT_METRICS

_SHOWN = 4  # prompts


def summary(result: Result) -> Group | None:
    """A few test prompts with their reference and both answers, and the scores on all of them; None without answers."""
    if not (answers := before_and_after(result.folder)):
        return None
    shown = [answers[i * len(answers) // _SHOWN] for i in range(_SHOWN)] if len(answers) > _SHOWN else answers
    heading = Text(f"{len(shown)} of {len(answers)} test examples, at equal distances in the list of all\n")
    return Group(heading, *side_by_side(shown), _scores(result, answers))


def side_by_side(answers: Sequence[Answers]) -> Iterator[Text | Padding]:
    """Yields the first line of each prompt, and a table of three columns, together as wide as the terminal."""
    for one in answers:
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        texts = {"reference": one.references[0], "before": one.before, "after": one.after}
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(printable(" ".join(text.split()))) for text in texts.values()))
        yield Text(printable(one.prompt.strip().partition("\n")[0]), "bold")
        yield Padding(table, (0, 0, 1, 2))


def _scores(result: Result, answers: Sequence[Answers]) -> Table:
    """Loss and ROUGE-L before and after training, and the gains."""
    table = Table("", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("before", "after", "gain", "95 % interval"):
        table.add_column(name, justify="right")
    first, *_, last = (row.global_["loss"] for row in result.rows if row.global_ is not None)
    table.add_row("test loss", number(first, 2), number(last, 2), f"{last - first:+.2f}")
    rouge = gain(TEXT_METRICS["rouge"], "rougeL", answers)
    ends = f"{rouge.interval.low:+.1f} to {rouge.interval.high:+.1f}"
    gained = f"{rouge.after - rouge.before:+.1f}"
    table.add_row("ROUGE-L", number(rouge.before, 1), number(rouge.after, 1), gained, ends)
    return table
