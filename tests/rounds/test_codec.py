import json
import random
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save

from fedlora.linalg.lowrank import LowRank
from fedlora.methods.wrap.head import WithHead
from fedlora.rounds import checksum, codec
from fedlora.rounds.codec import decode, decode_state, encode, encode_state, encoded_size, outline
from fedlora.rounds.plan import RunState

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
PAYLOAD = encode({"q.b": torch.randn(3, 2), "q.a": torch.arange(8).view(2, 4), "x": torch.ones(0, 3, dtype=torch.bfloat16)})


@dataclass(frozen=True)
class Nested:
    """A method's state with everything that a state may have."""

    factors: LowRank
    others: tuple[object, ...]


def same(x, y):
    """Whether two states are equal: structure, types, dtypes and every bit of the tensors."""
    if isinstance(x, torch.Tensor):
        return (
            isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.shape == y.shape and encode({"": x}) == encode({"": y})
        )
    if type(x) is not type(y):
        return False
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, dict):
        return list(x) == list(y) and all(same(x[key], y[key]) for key in x)
    return same(vars(x), vars(y)) if hasattr(x, "__dataclass_fields__") else x == y


def there_and_back(path, state):
    path.write_bytes(encode_state(state))
    return decode_state(str(path))[0]


def test_tensors_come_back_in_their_order():
    names = [f"layer.{i}.{part}" for i in (2, 10, 1) for part in "ba"]
    assert list(decode(encode({name: torch.ones(2) for name in names}))) == names


@pytest.mark.parametrize("order", ["", "0 0", "0 2", "0 x", "0 1 1"])
def test_an_order_of_other_names_is_refused(order):
    with pytest.raises(ValueError, match="not a payload of tensors"):
        decode(save({"a": torch.ones(1), "b": torch.ones(1)}, metadata={"order": order}))


def planned(path, plan):
    """A file with any plan and a checksum that fits."""
    text = plan if isinstance(plan, str) else json.dumps({**checksum.EMPTY, **plan} if isinstance(plan, dict) else plan)
    first = json.dumps({**checksum.EMPTY, "": ""})
    content = save({"0": torch.ones(2)}, metadata={"plan": text if checksum.EMPTY["sha256"] in text else first + text})
    path.write_bytes(checksum.sealed(content))
    return str(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_payload_keeps_names_shapes_dtypes_and_values(dtype):
    raw = torch.randint(0, 2, (5, 3)).to(dtype)
    sent = {"z.b": raw.clone(), "a/é.a": raw.T, "": raw[::2, 1:], "scalar": raw[0, 0].clone(), "empty": raw[:, :0]}
    found = decode(encode(sent))
    assert found.keys() == sent.keys()
    assert all(found[name].dtype == dtype and found[name].shape == sent[name].shape for name in sent)
    assert all(torch.equal(found[name], sent[name]) for name in sent)
    assert encoded_size(sent) == len(encode(sent))


def test_a_payload_keeps_nan_infinities_and_negative_zero():
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    assert decode(encode({"x": odd}))["x"].view(torch.int32).tolist() == odd.view(torch.int32).tolist()


def test_a_payload_takes_parameters_that_need_gradients():
    found = decode(encode({"x": torch.nn.Parameter(torch.ones(2, 3))}))
    assert not found["x"].requires_grad and torch.equal(found["x"], torch.ones(2, 3))


def test_a_payload_may_hold_the_same_tensor_under_two_names():
    x = torch.randn(4, 3)
    found = decode(encode({"x": x, "y": x, "part": x[:2]}))
    assert torch.equal(found["x"], x) and torch.equal(found["y"], x) and torch.equal(found["part"], x[:2])


def test_an_empty_payload_is_a_payload():
    assert decode(encode({})) == {}


def test_what_is_decoded_can_be_written_into():
    found = decode(encode({"x": torch.zeros(3)}))["x"].add_(1)
    assert torch.equal(found, torch.ones(3))


@pytest.mark.parametrize(
    "garbage", [b"", b"\0", b"{}", b"PK\x03\x04" * 50, b"\xff" * 64, bytes(8), b"\x02" + bytes(7) + b"[]"]
)
def test_bytes_that_are_no_payload_are_refused(garbage):
    with pytest.raises(ValueError, match="not a payload"):
        decode(garbage)


def test_a_payload_cut_off_anywhere_is_refused():
    for length in range(len(PAYLOAD)):
        with pytest.raises(ValueError, match="not a payload"):
            decode(PAYLOAD[:length])


def test_a_payload_with_a_flipped_bit_is_refused_or_gives_tensors():
    for bit in range(8 * len(PAYLOAD)):
        bent = bytearray(PAYLOAD)
        bent[bit // 8] ^= 1 << bit % 8
        with suppress(ValueError):
            assert all(isinstance(x, torch.Tensor) for x in decode(bytes(bent)).values())


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F8_E5M2", "F6_E2M3", "C64", "U16", "NONE"])
def test_a_payload_of_a_rare_dtype_is_refused_or_gives_tensors(dtype):
    for size in (8, 12, 16, 32, 128):
        header = json.dumps({"x": {"dtype": dtype, "shape": [16], "data_offsets": [0, size]}}).encode()
        with suppress(ValueError):
            assert decode(len(header).to_bytes(8, "little") + header + bytes(size))["x"].numel() == 16


def empty_tensors(count):
    table = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    header = json.dumps({"__metadata__": {"order": " ".join(map(str, range(count)))}, **table}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("count", [1001, 50_000])
def test_more_tensors_than_allowed_are_refused_before_any_is_made(count, monkeypatch):
    monkeypatch.setattr(codec, "load", None)
    payload = empty_tensors(count)
    tracemalloc.start()
    with pytest.raises(ValueError, match="1000"):
        decode(payload, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(payload)


def test_as_many_tensors_as_allowed_are_read():
    assert len(decode(encode({f"{i}": torch.ones(1) for i in range(30)}), 30)) == 30


def test_a_state_comes_back_with_its_structure_types_and_bits(tmp_path):
    factors = LowRank(b=torch.randn(5, 2).bfloat16(), a=torch.randn(3, 2).T)
    inner = Nested(factors, (None, True, False, 3, -0.5, float("inf"), "né\n", [], (), {}, [(), [1, None]]))
    state = WithHead({"": inner, "a.b/c": [factors, torch.tensor(2)]}, {"w": torch.zeros(0, 4)})
    assert same(there_and_back(tmp_path / "s", state), state)


@pytest.mark.parametrize(
    "state", [None, 7, "x", (), torch.tensor(True), {"value": 1}, {"tensor": "0"}, {"class": "x", "fields": {}}]
)
def test_a_state_can_be_a_single_value_or_look_like_a_plan(tmp_path, state):
    assert same(there_and_back(tmp_path / "s", state), state)


def test_tensors_shared_within_a_state_come_back_equal(tmp_path):
    x = torch.randn(4, 3)
    again = there_and_back(tmp_path / "s", {"x": x, "same": x, "part": x[1:], "turned": x.T})
    assert same(again, {"x": x, "same": x, "part": x[1:], "turned": x.T})


def test_notes_travel_beside_the_state(tmp_path):
    (tmp_path / "s").write_bytes(encode_state((), rounds_done=3, client="né"))
    assert decode_state(str(tmp_path / "s")) == ((), {"rounds_done": 3, "client": "né"})


@pytest.mark.parametrize(
    "foreign",
    [{1, 2}, b"x", object(), 1j, LowRank, torch.float32, {1: "x"}, lambda: 0, range(3)],
    ids=lambda x: type(x).__name__,
)
def test_a_state_with_a_foreign_object_is_refused_when_it_is_written(foreign):
    with pytest.raises(TypeError, match="a state"):
        encode_state({"fine": 1, "deep": [(foreign,)]})


@pytest.mark.parametrize("odd", [torch.Size([2, 3]), namedtuple("Pair", "x y")(1, 2)], ids=["Size", "namedtuple"])
def test_what_cannot_come_back_is_refused_when_it_is_written(tmp_path, odd):
    try:
        written = encode_state({"odd": odd})
    except TypeError:
        return
    (tmp_path / "s").write_bytes(written)
    assert tuple(decode_state(str(tmp_path / "s"))[0]["odd"]) == tuple(odd)


@pytest.mark.parametrize(
    "name",
    [
        "this:anything",
        "os:path",
        "os:system",
        "fedlora.rounds.codec:encode",
        "builtins:dict",
        "fedlora.adapter:Nothing",
        "",
        ":",
        3,
    ],
)
def test_reading_a_state_imports_no_foreign_module_and_makes_only_dataclasses(tmp_path, name):
    assert "this" not in sys.modules
    with pytest.raises(ValueError, match="not a state"):
        decode_state(planned(tmp_path / "s", {"state": {"class": name, "fields": {}}, "notes": {}}))
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "plan",
    [
        "no json",
        "[" * 100_000,
        [],
        {},
        {"state": {}},
        {"state": {"tensor": "7"}, "notes": {}},
        {"state": {"tensor": None}, "notes": {}},
        {"state": {"tuple": 3}, "notes": {}},
        {"state": {"mapping": [1]}, "notes": {}},
        {"state": {"class": "fedlora.linalg.lowrank:LowRank", "fields": {"b": {"tensor": "0"}}}, "notes": {}},
    ],
    ids=lambda plan: str(plan)[:20],
)
def test_a_file_with_a_senseless_plan_is_refused(tmp_path, plan):
    path = planned(tmp_path / "s", plan)
    with pytest.raises(ValueError):
        decode_state(path)


def test_a_state_is_read_by_a_process_that_has_not_imported_its_class(tmp_path):
    path = tmp_path / "s"
    path.write_bytes(encode_state(RunState({"a": torch.ones(2)})))
    code = f"from fedlora.rounds.codec import decode_state; print(type(decode_state({str(path)!r})[0]).__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "RunState"


def test_a_payload_without_a_plan_is_no_state(tmp_path):
    (tmp_path / "s").write_bytes(PAYLOAD)
    with pytest.raises(ValueError, match="checksum is missing"):
        decode_state(str(tmp_path / "s"))


def test_a_state_file_with_any_bit_changed_or_bytes_missing_or_added_is_refused(tmp_path):
    whole, rng = (
        encode_state({"factors": LowRank(torch.ones(3, 2), torch.ones(2, 4)), "n": 1}, rounds_done=2),
        random.Random(0),
    )
    bits = rng.sample(range(8 * len(whole)), 400)
    bent = [whole[:i] + bytes([whole[i] ^ 1 << bit % 8]) + whole[i + 1 :] for bit in bits if (i := bit // 8) or True]
    for content in [*bent, *(whole[:length] for length in range(0, len(whole), 11)), whole + b"\0"]:
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(ValueError, match="checksum is missing or wrong"):
            decode_state(str(tmp_path / "s"))


def test_a_state_may_have_entries_that_look_like_a_checksum(tmp_path):
    state = {"sha256": "0" * 64, **{f'"sha256": "{"0" * 64}': '\\"sha256\\": \\"' + "0" * 64}}
    assert there_and_back(tmp_path / "s", state) == state


def test_the_tensors_in_a_state_are_listed_in_the_order_of_its_parts():
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    _, found = outline({"first": (x, [y]), "second": LowRank(b=z[:, None], a=x[None]), "number": 3})
    assert [tuple(t.shape) for t in found] == [(1,), (2,), (3, 1), (1, 1)] and found[0] is x
