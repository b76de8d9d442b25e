import math
import random
import tracemalloc

import pytest

from fedlora.deploy import wire
from fedlora.deploy.guard import HEADER, Guard
from fedlora.deploy.reasons import Reason
from fedlora.deploy.wire import (
    AcknowledgedRecord,
    Batch,
    ClientRecord,
    ClientResult,
    ClientTask,
    Done,
    Failure,
    Rejected,
    RoundRecord,
    TaskRequest,
    encode_message,
)
from fedlora.deploy.wire import decode_message as decode_for
from fedlora.messages import Acknowledged, ClientInfo, Round

ROUND = RoundRecord(index=3, seed=1, attempt=0)
REQUEST = TaskRequest(
    kind="train",
    run="r",
    round_record=ROUND,
    expected_base_updates=[0, 2],
    tasks=[ClientTask(client=ClientRecord(id="a/é", rank=2, examples=7), download=0, base_updates=1)],
)
PAYLOADS = [b"", b"\x00" * 5, random.Random(0).randbytes(3000)]


def decode_message(message):
    return decode_for(message, 100)


@pytest.mark.parametrize(
    "header",
    [
        REQUEST,
        Batch(),
        Rejected(failure=Failure(reason=Reason.DATA, count=3)),
        Done(round_record=ROUND, base_updates=[], results=[ClientResult(id="a")]),
    ],
)
def test_what_is_sealed_is_unsealed(header):
    assert decode_message(encode_message(header, PAYLOADS)) == (header, PAYLOADS)


def test_the_name_of_a_clients_task_stays_at_home_and_the_client_is_the_same():
    client = ClientInfo("a", 2, 7, task="secret")
    assert ClientRecord.of(client).info() == client and "secret" not in ClientRecord.of(client).model_dump_json()


def test_a_loss_that_is_no_number_arrives_as_it_is():
    done = Done(
        round_record=ROUND,
        base_updates=[],
        results=[ClientResult(id="a", loss=float("nan"), steps=3)],
    )
    found = decode_message(encode_message(done))[0].results[0]
    assert math.isnan(found.loss) and found.steps == 3


def test_any_damage_gives_one_clear_error():
    rng, message = random.Random(0), encode_message(REQUEST, PAYLOADS)
    for _ in range(3000):
        bad = bytearray(message)
        match rng.randrange(5):
            case 0:
                bad = bad[: rng.randrange(len(bad))]
            case 1:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            case 2:
                bad += rng.randbytes(rng.randrange(1, 20))
            case 3:
                at = rng.randrange(len(bad))
                del bad[at : at + rng.randrange(1, 40)]
            case 4:
                bad = bytearray(rng.randbytes(rng.randrange(100)))
        with pytest.raises(ValueError, match="message") as error:
            decode_message(bytes(bad))
        assert "\n" not in str(error.value)


def forged(frame, payloads=b""):
    """A message with a valid digest, whatever is in it."""
    rest = len(frame).to_bytes(8, "big") + frame + payloads
    return wire._MAGIC + wire._digest(rest) + rest


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"header": {"kind": "other"}, "sizes": []}',
        b'{"header": {"kind": "batch"}, "sizes": [-1]}',
        b'{"header": {"kind": "batch"}, "sizes": [9999999999999999999999]}',
        b'{"header": {"kind": "batch", "more": 1}, "sizes": []}',
        b'{"header": {"kind": "rejected", "failure": {"reason": 1}}, "sizes": []}',
        b"\xff\xfe",
    ],
)
def test_a_header_made_to_harm_gives_one_clear_error(frame):
    with pytest.raises(ValueError, match="a message whose") as error:
        decode_message(forged(frame))
    assert "\n" not in str(error.value)


def many_answers(count):
    results = b",".join([b'{"id":"a"}'] * count)
    round_record = b'{"index":0,"seed":0,"attempt":0}'
    return forged(
        b'{"header":{"kind":"done","round_record":'
        + round_record
        + b',"base_updates":[],"results":['
        + results
        + b']},"sizes":[]}'
    )


@pytest.mark.parametrize("count", [90_000, 700_000])
def test_more_answers_than_clients_cost_memory_in_proportion_to_the_message(count):
    message = many_answers(count)
    tracemalloc.start()
    with pytest.raises(ValueError, match="a message whose header") as error:
        decode_for(message, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20 and len(str(error.value)) < 200


def test_a_message_may_speak_of_as_many_clients_as_are_expected():
    assert len(decode_for(many_answers(3), 3)[0].results) == 3
    with pytest.raises(ValueError, match="3 entries, expected at most 2"):
        decode_for(many_answers(3), 2)


def test_a_header_said_to_be_larger_than_the_message_is_not_believed():
    rest = (2**62).to_bytes(8, "big") + b"{}"
    with pytest.raises(ValueError, match="header would have"):
        decode_message(wire._MAGIC + wire._digest(rest) + rest)


def test_a_message_above_the_limit_is_neither_sealed_nor_unsealed(monkeypatch):
    message = encode_message(REQUEST, PAYLOADS)
    monkeypatch.setattr(wire, "MAX_BYTES", len(message) - 1)
    for rejected in (lambda: encode_message(REQUEST, PAYLOADS), lambda: decode_message(message)):
        with pytest.raises(ValueError, match="too large"):
            rejected()


@pytest.mark.parametrize(
    ("path", "secrets", "passes"),
    [
        ("/v1/control/start-run", [], False),
        ("/v1/control/register-node", [b"other"], False),
        ("/v1/runtime/acquire-task", [b""], False),
        ("/v1/runtime/pull-messages", [b"right", b"right"], False),
        ("/docs", [], False),
        ("/v1/fleet/../control/start-run", [], False),
        ("/v1/fleet/pull-messages", [], True),
        ("/v1/control/start-run", [b"right"], True),
    ],
)
def test_without_the_secret_only_what_nodes_need_can_be_reached_from_wherever(path, secrets, passes):
    passed, sent = [], []

    async def inner(scope, receive, send):
        passed.append(scope["path"])

    async def send(event):
        sent.append(event)

    headers = [(b"host", b"x"), *((HEADER.encode(), secret) for secret in secrets)]
    scope = {"type": "http", "path": path, "client": ("127.0.0.1", 1), "headers": headers}
    run = Guard(inner, "right")(scope, None, send)
    with pytest.raises(StopIteration):
        run.send(None)
    assert bool(passed) == passes
    assert [event.get("status") for event in sent if "status" in event] == ([] if passes else [403])


def test_a_round_crosses_the_wire_with_the_acknowledgement_of_each_task():
    rnd = Round(3, 1, 2, registered=9, expected_cohort=4, acknowledged={"a": Acknowledged(2, 0.25)})
    found = RoundRecord.of(rnd).round(rnd.acknowledged)
    assert vars(found) == vars(rnd)
    task = ClientTask(
        client=ClientRecord(id="a", rank=2, examples=7), download=0, acknowledged=AcknowledgedRecord(index=2, share=0.25)
    )
    request = REQUEST.model_copy(update={"tasks": [task]})
    assert decode_message(encode_message(request, [b"x"])) == (request, [b"x"])
