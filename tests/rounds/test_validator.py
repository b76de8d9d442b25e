import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedlora.adapter import AdapterSpec
from fedlora.config.sections import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import Method, fit
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.wrap.head import HeadRule
from fedlora.rounds.codec import encode
from fedlora.rounds.cohort_checks import difference_norm
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.sample import choose
from fedlora.rounds.validator import Failed

from toy import toy_metrics

NAN, INF = math.nan, math.inf
SPEC = AdapterSpec(modules={"q": (6, 4), "v": (5, 3)}, head={"out.w": torch.linspace(-1, 1, 8).view(2, 4)})
METHOD = HeadRule(FactorAveraging(rank=4), "averaged")
MEMBERS = [ClientInfo(name, rank=4, examples=10 + 3 * i) for i, name in enumerate("abcdefgh")]
BEFORE = METHOD.init_server(SPEC, seed=0)
INDEX = 4


def honest(client, rnd, download):
    """A reply that depends on the client and the attempt, so that no two states are equal by chance."""
    rng = rnd.rng(f"move {rnd.attempt}", client.id)
    upload = {name: x + torch.randn(x.shape, generator=rng) / 10 for name, x in download.items()}
    return Reply(client, rnd, Upload(upload), float(client.examples), 1.0, 1)


def as_it_is(reply):
    return [reply]


@dataclass(frozen=True)
class Answers:
    """A backend whose clients answer honestly, but for what `bend` makes of it."""

    members: list[ClientInfo]
    bend: Callable[[Reply], list[Reply | Failed]] = as_it_is

    def clients(self):
        return self.members

    def held(self):
        return {}

    def merge_into_base(self, change):
        raise AssertionError("this method base updates nothing")

    def train_clients(self, rnd, sent, missed):
        for client, download in sent.items():
            yield from self.bend(honest(client, rnd, download))

    def evaluate(self, rnd, sent, missed):
        yield from ()


class NoFolds:
    """A store for a method that base updates nothing."""

    def save_base_update(self, index, base_update):
        raise AssertionError("this method base updates nothing")

    def base_update(self, index):
        raise AssertionError("this method base updates nothing")


@dataclass(frozen=True)
class Watched:
    """A watcher that remembers."""

    cohorts: list[list[ClientInfo]] = field(default_factory=list)
    answers: list[tuple[str, str | None]] = field(default_factory=list)

    def notify(self, message):
        pass

    def round_started(self, rnd, chosen):
        self.cohorts.append(list(chosen))

    def answered(self, client, rejected):
        self.answers.append((client.id, rejected))

    def round_ended(self, row):
        pass


def run_rounds(backend, watch=None, method=METHOD, before=BEFORE, uniform=False, **sampling):
    """The server's state after a round, and the row."""
    plan = Plan(
        method,
        SPEC,
        0,
        Sampling(**sampling),
        Evaluate(clients="none"),
        rounds=9,
        uniform_weights=uniform,
        metrics=toy_metrics,
    )
    after, row = one_round(plan, backend, NoFolds(), RunState(before), INDEX, watch or Watched())
    return after.server, row


def only(client, change):
    """Bends the replies of one client."""
    return lambda reply: [change(reply)] if reply.client.id == client else [reply]


def upload(**changes):
    """Changes tensors of the upload; None leaves one out."""

    def change(reply):
        bent: Mapping[str, torch.Tensor | None] = {
            **reply.upload.values,
            **{k: f(reply.upload.values.get(k)) for k, f in changes.items()},
        }
        return replace(reply, upload=Upload({name: x for name, x in bent.items() if x is not None}))

    return change


def spoilt(value):
    """One entry of a tensor replaced."""
    return lambda x: x.flatten().index_fill(0, torch.tensor([x.numel() - 1]), value).view(x.shape)


def equal(x, y):
    return encode({**x.inner, **x.head}) == encode({**y.inner, **y.head})


BAD = {
    "NaN": (upload(**{"v.a": spoilt(NAN)}), "sent v.a with NaN or infinite"),
    "infinite": (upload(**{"q.b": spoilt(INF)}), "sent q.b with NaN or infinite"),
    "minus infinite head": (upload(**{"head/out.w": spoilt(-INF)}), "sent head/out.w with NaN or infinite"),
    "just too large": (
        upload(**{"v.a": spoilt(-1.001e10)}),
        "sent v.a with an entry of magnitude 1.001e+10, expected at most 1e+10",
    ),
    "of the largest floats": (
        upload(**{"q.b": spoilt(3e38)}),
        "sent q.b with an entry of magnitude 3e+38, expected at most 1e+10",
    ),
    "transposed": (upload(**{"q.b": lambda x: x.T}), r"sent q.b with shape (4, 6), expected (6, 4)"),
    "of rank 1": (upload(**{"q.b": lambda x: x[:, :1], "q.a": lambda x: x[:1]}), "with shape (6, 1), expected (6, 4)"),
    "a number": (upload(**{"v.b": lambda x: x.sum()}), "sent v.b with shape (), expected (5, 4)"),
    "with a batch axis": (upload(**{"v.b": lambda x: x[None]}), "sent v.b with shape (1, 5, 4), expected (5, 4)"),
    "empty": (lambda r: replace(r, upload=Upload({})), "missing head/out.w and 4 more"),
    "without one factor": (upload(**{"v.a": lambda x: None}), "missing v.a"),
    "without the head": (upload(**{"head/out.w": lambda x: None}), "missing head/out.w"),
    "with another factor": (upload(**{"k.b": lambda x: torch.ones(6, 4)}), "unexpected k.b"),
    "in fp64": (upload(**{"q.a": lambda x: x.double()}), "sent q.a as torch.float64, expected torch.float32"),
    "in bf16": (upload(**{"q.a": lambda x: x.bfloat16()}), "sent q.a as torch.bfloat16, expected torch.float32"),
    "in whole numbers": (upload(**{"q.a": lambda x: x.int()}), "sent q.a as torch.int32, expected torch.float32"),
    "of weight 0": (lambda r: replace(r, weight=0.0), "has weight 0.0, expected"),
    "of weight -1": (lambda r: replace(r, weight=-1.0), "has weight -1.0, expected"),
    "of weight NaN": (lambda r: replace(r, weight=NAN), "has weight nan, expected"),
    "of infinite weight": (lambda r: replace(r, weight=INF), "has weight inf, expected"),
    "from an old round": (lambda r: replace(r, round=Round(INDEX - 1, 0)), "reply is for round 4, current is round 5"),
    "to another attempt": (
        lambda r: replace(r, round=Round(INDEX, 0, attempt=1)),
        "reply is for round 5, attempt 2, current is",
    ),
    "from another run": (lambda r: replace(r, round=Round(INDEX, 99)), "reply is for"),
    "with more examples": (lambda r: replace(r, client=replace(r.client, examples=10**6)), "number of examples"),
    "of another rank": (lambda r: replace(r, client=replace(r.client, rank=2)), "has a different rank"),
    "missing": (lambda r: Failed(r.client, "the connection was lost"), "the connection was lost"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("client", ["a", "c", "d"])
def test_a_bad_reply_is_refused_by_name_and_the_round_is_as_without_that_client(client, change, reason):
    watch = Watched()
    after, row = run_rounds(Answers(MEMBERS[:4], only(client, change)), watch)
    alone, _ = run_rounds(Answers([one for one in MEMBERS[:4] if one.id != client]))
    assert equal(after, alone)
    assert row.rejected.keys() == {client} and reason in row.rejected[client]
    assert row.accepted == [one.id for one in MEMBERS[:4] if one.id != client] and row.attempts == 1
    assert dict(watch.answers) == {one.id: row.rejected.get(one.id) for one in MEMBERS[:4]}


def test_an_upload_too_far_from_what_was_sent_is_refused_and_one_just_near_enough_is_not():
    def far(norm):
        """A change of that norm in all, spread over two tensors."""
        return lambda download: {
            **download,
            "q.b": download["q.b"] + norm * 0.6 / 24**0.5,
            "v.a": download["v.a"] + norm * 0.8 / 12**0.5,
        }

    download = METHOD.send(BEFORE, MEMBERS[0], Round(INDEX, 0))
    near, beyond = [only("b", lambda r, n=n: replace(r, upload=Upload(far(n)(download)))) for n in (99.9, 100.1)]
    after, row = run_rounds(Answers(MEMBERS[:4], beyond), max_norm=100.0)
    assert equal(after, run_rounds(Answers([MEMBERS[0], *MEMBERS[2:4]]))[0])
    assert "change has norm 100.1, expected at most 100" in row.rejected["b"]
    assert run_rounds(Answers(MEMBERS[:4], near), max_norm=100.0)[1].rejected == {}


def test_a_norm_that_no_float_can_hold_is_refused():
    huge = only("b", upload(**{"q.b": lambda x: torch.full_like(x, 3e38)}))
    _, row = run_rounds(Answers(MEMBERS[:4], huge), max_norm=100.0)
    assert row.rejected.keys() == {"b"}


def test_a_second_reply_is_refused_and_the_first_one_counts():
    def again(reply):
        return [reply, replace(reply, weight=1e6)] if reply.client.id == "b" else [reply]

    after, row = run_rounds(Answers(MEMBERS[:4], again))
    assert equal(after, run_rounds(Answers(MEMBERS[:4]))[0])
    assert row.rejected == {"b": "has already replied in this round"} and row.accepted == ["a", "b", "c", "d"]


def test_a_client_may_mend_a_refused_reply():
    def twice(reply):
        return [replace(reply, weight=NAN), reply] if reply.client.id == "b" else [reply]

    after, row = run_rounds(Answers(MEMBERS[:4], twice))
    assert equal(after, run_rounds(Answers(MEMBERS[:4]))[0]) and row.accepted == ["a", "b", "c", "d"]


def test_a_client_that_was_not_chosen_is_refused():
    def intrude(reply):
        return [reply, replace(reply, client=ClientInfo("stranger", 4, 10))]

    after, row = run_rounds(Answers(MEMBERS[:4], intrude))
    assert equal(after, run_rounds(Answers(MEMBERS[:4]))[0])
    assert row.rejected.keys() == {"stranger"} and "was not selected" in row.rejected["stranger"]


def test_no_accepted_weight_makes_the_merged_state_infinite():
    heavy = Answers(
        MEMBERS[:4], lambda r: [replace(r, weight=1e308, upload=Upload({k: 100 + x for k, x in r.upload.values.items()}))]
    )
    try:
        after, _ = run_rounds(heavy, attempts=1)
    except RunStopped:
        return
    assert all(bool(x.isfinite().all()) for x in {**after.inner, **after.head}.values())


def test_a_client_that_claims_more_examples_than_the_server_allows_is_refused():
    many = [replace(MEMBERS[0], examples=1001), *MEMBERS[1:4]]
    after, row = run_rounds(Answers(many), max_examples=1000)
    assert equal(after, run_rounds(Answers(MEMBERS[1:4]))[0])
    assert row.rejected == {"a": "claims 1001 examples, expected at most 1000 (sampling.max_examples)"}
    assert run_rounds(Answers(many), max_examples=1001)[1].rejected == {}
    assert run_rounds(Answers([replace(MEMBERS[0], examples=10**9), *MEMBERS[1:4]]))[1].rejected.keys() == {"a"}


def test_only_what_this_round_trains_is_expected():
    method = HeadRule(FactorAveraging(rank=4, schedule=("a", "b")), "frozen")
    before = method.init_server(SPEC, seed=0)
    trained_a = Answers(MEMBERS[:4], lambda r: [replace(r, upload=Upload({k: r.upload.values[k] for k in ("q.a", "v.a")}))])
    assert run_rounds(trained_a, method=method, before=before)[1].rejected == {}
    with pytest.raises(RunStopped, match=r"unexpected q\.b"):
        run_rounds(Answers(MEMBERS[:4]), method=method, before=before)


def test_too_few_replies_repeat_the_round_with_fresh_cohorts_and_only_the_last_one_counts():
    watch = Watched()
    some = Answers(MEMBERS, lambda r: [r] if r.round.attempt == 2 or r.client.id < "c" else [Failed(r.client, "silent")])
    after, row = run_rounds(some, watch, fraction=0.5, min_replies=3, attempts=4)
    last = Round(INDEX, 0, attempt=2)
    assert watch.cohorts == [choose(MEMBERS, 0.5, Round(INDEX, 0, attempt=i)) for i in range(3)]
    assert watch.cohorts[0] != watch.cohorts[1] != watch.cohorts[2] and row.attempts == 3
    assert row.chosen == row.accepted == [client.id for client in watch.cohorts[2]]
    replies = [honest(client, last, METHOD.send(BEFORE, client, last)) for client in watch.cohorts[2]]
    assert equal(after, METHOD.merge(BEFORE, Mean.of((r.weight, r.upload.values) for r in replies), last).server)


def test_the_bytes_of_all_attempts_are_counted():
    some = Answers(MEMBERS, lambda r: [r] if r.round.attempt == 1 else [replace(r, weight=NAN)])
    _, row = run_rounds(some, fraction=0.5)
    payload = len(encode(METHOD.send(BEFORE, MEMBERS[0], Round(INDEX, 0))))
    assert row.attempts == 2
    assert row.bytes_up == row.bytes_down == 2 * 4 * payload


@pytest.mark.parametrize("min_replies", [1, 3])
def test_after_the_last_attempt_the_run_stops_and_the_state_is_as_before(min_replies):
    watch, written = Watched(), encode({**BEFORE.inner, **BEFORE.head})
    some = Answers(MEMBERS, lambda r: [r] if min_replies == 3 and r.client.id < "c" else [Failed(r.client, "silent")])
    with pytest.raises(
        RunStopped, match=rf"round {INDEX + 1}: no attempt \(2 made\).*{min_replies} valid uploads.*h: silent"
    ):
        run_rounds(some, watch, fraction=0.75, min_replies=min_replies, attempts=2)
    assert len(watch.cohorts) == 2
    assert encode({**BEFORE.inner, **BEFORE.head}) == written


def test_a_round_leaves_the_state_it_started_from_as_it_was():
    written = encode({**BEFORE.inner, **BEFORE.head})
    after, _ = run_rounds(Answers(MEMBERS))
    assert not equal(after, BEFORE) and encode({**BEFORE.inner, **BEFORE.head}) == written


def test_uniform_weights_count_every_accepted_client_once():
    after, _ = run_rounds(Answers(MEMBERS[:3]), uniform=True)
    alike = [replace(client, examples=1) for client in MEMBERS[:3]]
    assert equal(after, run_rounds(Answers(alike))[0])


@dataclass(frozen=True)
class Chosen(Method[torch.Tensor, None, float]):
    """A method whose clients send as many ones as they like, up to their rank, and say how many."""

    rank: int = 4

    def init_server(self, spec, seed):
        return torch.zeros(())

    def send(self, server, client, rnd):
        return {}

    def view(self, state, download, client):
        return {}

    def work(self, state, download, client, rnd):
        yield from fit({})
        return state, Upload({"values": torch.ones(0)}, {"count": torch.tensor(0)})

    def expected_upload(self, known, upload, template):
        count = int(upload.choices["count"])
        if not 0 <= count <= known.client.rank:
            raise ValueError(f"{count} are too many")
        return replace(template, values={"values": torch.ones(count)})

    def collect(self, server, collected, reply):
        return (collected or 0.0) + float(reply.upload.values["values"].sum())

    def merge(self, server, collected, rnd):
        return Merged(server + collected)

    def update(self, known, upload):
        return None


@pytest.mark.parametrize(
    ("values", "count", "reason"),
    [
        (torch.ones(3), torch.tensor(3), None),
        (torch.ones(0), torch.tensor(0), None),
        (torch.ones(3), torch.tensor(2), "sent values with shape (3,), expected (2,)"),
        (torch.ones(5), torch.tensor(5), "invalid selection: 5 are too many"),
        (torch.ones(3), torch.tensor(3.0), "sent choice/count as torch.float32, expected torch.int64"),
        (torch.tensor([1.0, NAN]), torch.tensor(2), "sent values with NaN"),
        (torch.ones(1, 2), torch.tensor(2), "sent values with shape (1, 2), expected (2,)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["frozen", "averaged"])
def test_what_clients_choose_themselves_is_held_against_what_they_say_about_it(rule, values, count, reason):
    method = HeadRule(Chosen(), rule)
    head = {f"head/{name}": x for name, x in SPEC.head.items()} if rule == "averaged" else {}

    def choose_values(reply):
        own, number = (values, count) if reply.client.id == "b" else (torch.ones(1), torch.tensor(1))
        return [replace(reply, upload=Upload({"values": own, **head}, {"count": number}))]

    after, row = run_rounds(Answers(MEMBERS[:3], choose_values), method=method, before=method.init_server(SPEC, 0))
    assert row.rejected.get("b") == reason or (reason is not None and reason in row.rejected["b"])
    assert float(after.inner) == 2 + (0 if reason else len(values))


def test_choices_have_no_part_in_the_norm_of_a_change():
    upload, template = (
        Upload({"x": x}, {"n": torch.tensor(200)}) for x in (torch.tensor([3.0, 5.0]), torch.tensor([0.0, 1.0]))
    )
    assert difference_norm(upload, template) == 5.0


def test_a_head_of_the_wrong_shape_is_refused_also_where_clients_choose():
    method = HeadRule(Chosen(), "averaged")
    bad = Upload({"values": torch.ones(1), "head/out.w": torch.ones(4, 2)}, {"count": torch.tensor(1)})
    answers = Answers(MEMBERS[:2], lambda r: [replace(r, upload=bad)])
    with pytest.raises(RunStopped, match=r"sent head/out\.w with shape \(4, 2\), expected \(2, 4\)"):
        run_rounds(answers, method=method, before=method.init_server(SPEC, 0))
