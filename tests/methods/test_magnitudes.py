"""DoRA's magnitudes beside the factors of a method."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.messages import Reply, Round, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.magnitudes import Magnitudes
from fedlora.parts.dora import Dora

from merging import known_of, merge
from toy import SPEC, ToyTrainer, toy_clients

DORA = replace(SPEC, magnitudes={name: SPEC.weight(name).norm(dim=1) for name in SPEC.modules})
CLIENTS = toy_clients(3)
WEIGHTS = {client.id: client.examples / sum(one.examples for one in CLIENTS) for client in CLIENTS}


def made(name: str) -> Magnitudes:
    row = TABLE[name]
    return Magnitudes(row.make(**row.fixed_settings, rank=3), row.magnitudes)


def trained(method: Magnitudes, server: Any, index: int) -> tuple[list[Reply], dict[str, dict[str, Dora]], list[Any]]:
    """The replies of a round of new clients, what each trained, and their states."""
    replies, parts, states, rnd = [], {}, [], Round(index, 0)
    for client in CLIENTS:
        state, download = method.init_client(DORA, client, 0), method.send(server, client, rnd)
        job = method.work(state, download, client, rnd)
        found = ToyTrainer(spec=DORA).fit_one(next(job), client)
        parts[client.id] = dict(found.adapter)
        with pytest.raises(StopIteration) as end:
            job.send(found)
        state, upload = end.value.value
        replies.append(Reply(client, rnd, upload, float(client.examples)))
        states.append(state)
    return replies, parts, states


@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "hetlora", "flasc"])
def test_averaged_magnitudes_are_the_weighted_mean_of_those_that_were_trained(name):
    method = made(name)
    server = method.init_server(DORA, 0)
    replies, parts, _ = trained(method, server, 0)
    after = merge(method, server, replies, DORA).server.magnitudes
    for module, m in DORA.magnitudes.items():
        mean = sum(WEIGHTS[client] * part[module].m for client, part in parts.items())
        assert_close(after[module], mean)
        assert (after[module] - m).abs().max() > 1e-3


def test_magnitudes_start_at_the_norms_of_the_weights_and_follow_b():
    method = made("rolora")
    server = method.init_server(DORA, 0)
    assert all(torch.equal(server.magnitudes[name], m) for name, m in DORA.magnitudes.items())
    names = {f"magnitude/{module}" for module in DORA.modules}
    for index in range(3):
        before, (replies, parts, _) = server.magnitudes, trained(method, server, index)
        moves, server = index % 2 == 0, merge(method, server, replies, DORA).server
        for reply in replies:
            assert names & reply.upload.values.keys() == (names if moves else set())
        for module, m in before.items():
            assert torch.equal(server.magnitudes[module], m) is not moves
            assert all(torch.equal(part[module].m, m) is not moves for part in parts.values())


@pytest.mark.parametrize("name", ["fedsa-lora", "local-only"])
def test_local_magnitudes_stay_on_the_client_and_are_used_there(name):
    method = made(name)
    server = method.init_server(DORA, 0)
    replies, parts, states = trained(method, server, 0)
    assert not server.magnitudes and not any("magnitude" in key for reply in replies for key in reply.upload.values)
    for client, state in zip(CLIENTS, states, strict=True):
        view = method.view(state, method.send(server, client, Round(1, 0)), client)
        assert all(torch.equal(view[module].m, parts[client.id][module].m) for module in DORA.modules)


def test_the_average_is_not_that_of_the_clients_weights_even_where_it_is_with_lora():
    """FFA-LoRA has a common a, so that the mean of b a is exact."""
    method, client = made("ffa-lora"), CLIENTS[0]
    server = method.init_server(DORA, 0)
    replies, parts, _ = trained(method, server, 0)
    large = {key: 40 if key.endswith(".b") else 1 for key in replies[0].upload.values}  # as after many rounds
    replies = [replace(r, upload=Upload({k: large[k] * x for k, x in r.upload.values.items()})) for r in replies]
    parts = {
        one: {module: replace(p, b=40 * p.b) for module, p in part.items() if module in DORA.modules}
        for one, part in parts.items()
    }
    merged = merge(method, server, replies, DORA)
    view = method.view(method.init_client(DORA, client, 0), method.send(merged.server, client, Round(1, 0)), client)
    for module in DORA.modules:
        weight = DORA.weight(module)
        each = [(WEIGHTS[one], part[module]) for one, part in parts.items()]
        assert_close(view[module].b @ view[module].a, sum(w * part.b @ part.a for w, part in each))
        mean = sum(w * part.changed(weight) for w, part in each)
        assert (view[module].changed(weight) - mean).norm() > 0.01 * (mean - weight).norm()
    assert method.update(known_of(method, server, replies[0], DORA), replies[0].upload) is None
    assert "aggregation_error" not in merged.notes


def test_the_wrapped_method_sees_its_own_factors_alone():
    method, bare = made("fedit"), FactorAveraging(rank=3)
    server = method.init_server(DORA, 0)
    replies, _, _ = trained(method, server, 0)
    own = [replace(one, upload=Upload({k: x for k, x in one.upload.values.items() if "/" not in k})) for one in replies]
    after = merge(bare, server.inner, own, SPEC).server
    assert all(torch.equal(x, after[key]) for key, x in merge(method, server, replies, DORA).server.inner.items())
