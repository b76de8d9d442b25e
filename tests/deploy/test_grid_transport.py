"""Replies through Flower's Grid: complete, still being uploaded, lost, and with anything in them."""

import time
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.deploy.flower_records import to_record
from fedlora.deploy.grid_transport import GridTransport

LONGEST = 300.0


class SuperLink:
    """Hands each reply out once, and its objects as far as they were uploaded; None stands for a deleted object."""

    def __init__(self):
        self.replies, self.objects, self.received = {}, {}, []

    def upload(self, message_id, reply, forge=lambda content: content):
        contents = {name: forge(part.deflate()) for name, part in get_all_nested_objects(reply).items()}
        self.replies[message_id] = get_object_tree(reply)
        return contents

    def PullMessages(self, request):
        ids = [message_id for message_id in request.message_ids if message_id in self.replies]
        replies = [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=message_id)) for message_id in ids]
        return SimpleNamespace(messages_list=replies, message_object_trees=[self.replies.pop(i) for i in ids])

    def PullObject(self, request):
        content = self.objects.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request):
        self.received.append(request.message_object_id)


@pytest.fixture
def link():
    return SuperLink()


@pytest.fixture
def transport(link, monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(HttpGrid, "_runtime_client", link)
    monkeypatch.setattr(HttpGrid, "run", SimpleNamespace(run_id=1))
    transport = GridTransport(HttpGrid(token="of no server"))
    transport.send({}, LONGEST)
    return transport


def reply(content):
    return Message(content, dst_node_id=1, message_type="query")


def test_a_reply_that_is_still_being_uploaded_delays_no_other(link, transport):
    slow, whole = link.upload("slow", reply(to_record(b"1"))), link.upload("whole", reply(to_record(b"2")))
    link.objects = dict(list(slow.items())[1:]) | whole
    assert transport.collect(["slow", "whole"]) == {"whole": b"2"}
    assert transport.collect(["slow"]) == {}
    link.objects |= slow
    assert transport.collect(["slow"]) == {"slow": b"1"}
    assert len(link.received) == 2 and transport.collect([]) == {}


def test_a_reply_whose_upload_was_interrupted_is_an_absence(link, transport):
    parts = link.upload("lost", reply(to_record(b"1")))
    assert transport.collect(["lost"]) == {}
    link.objects = dict.fromkeys(parts)
    assert transport.collect(["lost"]) == {"lost": "its node's reply was not uploaded completely"}


def test_a_node_may_leave_after_its_upload(link, transport):
    parts = link.upload("slow", reply(to_record(b"1")))
    assert transport.collect(["slow"]) == {}
    error = Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=reply(to_record(b"1")))
    link.objects = parts | link.upload("slow", error)
    assert transport.collect(["slow"]) == {"slow": b"1"}


def test_two_requests_may_be_awaited_in_turn(link, transport):
    one, other = (link.upload(name, reply(to_record(name.encode()))) for name in ("one", "other"))
    assert transport.collect(["one"]) == {} and transport.collect(["other"]) == {}
    link.objects = one | other
    assert transport.collect(["one"]) == {"one": b"one"} and transport.collect(["other"]) == {"other": b"other"}


def test_an_upload_that_nobody_awaits_any_more_is_dropped(link, transport, monkeypatch):
    link.upload("late", reply(to_record(b"1")))
    assert transport.collect(["late"]) == {} and len(transport._uploads) == 1
    later = time.monotonic() + LONGEST
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert transport.collect(["other"]) == {} and transport._uploads == {}


@pytest.mark.parametrize(
    "content, forge",
    [
        (RecordDict({"other": ConfigRecord({"key": 1})}), lambda content: content),
        (to_record(b"1"), lambda content: b"anything"),
        (to_record(b"1"), lambda content: content[:-1]),
        (to_record(b"1"), lambda content: content.replace(b"Message", b"Array")),
    ],
)
def test_a_reply_with_any_other_content_stops_no_run(link, transport, content, forge):
    link.objects = link.upload("hostile", reply(content), forge) | link.upload("good", reply(to_record(b"2")))
    assert transport.collect(["hostile", "good"]) == {
        "hostile": "its node's reply is not a message of fedlora",
        "good": b"2",
    }


def test_an_error_is_stated_in_this_packages_words(link, transport):
    error = Message(Error(ErrorCode.CLIENT_APP_CRASHED, "the node's own text"), reply_to=reply(to_record(b"1")))
    link.objects = link.upload("failed", error)
    assert transport.collect(["failed"]) == {"failed": "its node's worker is not responding"}
