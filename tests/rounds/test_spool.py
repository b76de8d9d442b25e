"""Uploads that wait for the rest of their cohort, in memory or on disk."""

import stat

import pytest
import torch

from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.rounds.spool import Spool


def replies(count: int) -> list[Reply]:
    """From the last client to the first."""
    uploads = [Upload({"b": torch.full((5, 2), float(i))}, {"positions": torch.arange(3) + i}) for i in range(count)]
    return [Reply(ClientInfo(str(i), 2, 10), Round(0, 0), uploads[i], 10.0) for i in reversed(range(count))]


@pytest.mark.parametrize("limit", [0, 100, 10**6])
def test_all_replies_come_back_in_the_order_of_the_clients(tmp_path, limit):
    spool = Spool(tmp_path / "spool", limit)
    for reply in replies(4):
        spool.add(reply)
    for reply, sent in zip(spool, reversed(replies(4)), strict=True):
        assert reply.client == sent.client and reply.weight == sent.weight
        assert all(torch.equal(x, reply.upload.flat()[name]) for name, x in sent.upload.flat().items())


def test_beyond_the_limit_uploads_are_files_that_only_their_user_can_read(tmp_path):
    spool = Spool(tmp_path / "spool", limit=0)
    for reply in replies(2):
        spool.add(reply)
    files = sorted((tmp_path / "spool").iterdir())
    assert len(files) == 2 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    spool.clear()
    assert not (tmp_path / "spool").exists() and list(spool) == []


def test_without_a_folder_everything_stays_in_memory():
    spool = Spool(None, limit=0)
    for reply in replies(3):
        spool.add(reply)
    assert [reply.client.id for reply in spool] == ["0", "1", "2"]
