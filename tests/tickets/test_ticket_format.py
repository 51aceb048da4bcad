"""A ticket file gives back every bit; anything else under its name is refused before it does harm."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.errors import DataError, IntegrityError, NumericsError
from pipeline.tickets import verify
from pipeline.tickets.format import Ticket, decode, encode, read_packed, ticket_of
from pipeline.tickets.network import Network
from pipeline.tickets.store import TicketStore
from tests.campaigns.bad_saved import joined, parts
from tests.support.stored_run import FIXTURES

MakeTicket = Callable[..., Ticket]


def assert_equal(one: Ticket, other: Ticket) -> None:
    assert one.provenance == other.provenance
    assert one.buffers == other.buffers
    assert list(one.state) == list(other.state)  # in state_dict order, which breaks ties in superposition
    for name, tensor in one.state.items():
        assert tensor.dtype == other.state[name].dtype and torch.equal(tensor, other.state[name]), name
    assert one.masks.keys() == other.masks.keys()
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


def test_round_trip(make_ticket: MakeTicket, tmp_path: Path) -> None:
    ticket = make_ticket()
    (tmp_path / "t").write_bytes(encode(ticket))
    for source in (encode(ticket), tmp_path / "t", str(tmp_path / "t")):
        assert_equal(decode(source), ticket)
    assert read_packed(tmp_path / "t").content_digest == ticket.content_digest == decode(encode(ticket)).content_digest


def test_counts_of_the_small_network(make_ticket: MakeTicket) -> None:
    ticket = make_ticket()
    assert ticket.num_active == 8 + 3
    assert ticket.density == 11 / 46
    assert ticket.num_parameters == 11 + 2  # and the bias; BatchNorm statistics are not parameters


def test_equal_tickets_are_equal_bytes_and_every_part_counts(make_ticket: MakeTicket) -> None:
    assert encode(make_ticket()) == encode(make_ticket())
    digests = {make_ticket().content_digest}
    digests.add(make_ticket(r_s=0.75).content_digest)
    digests.add(make_ticket(seed=1).content_digest)
    less = make_ticket()
    less.state["fc.bias"][1] = -0.5
    digests.add(less.content_digest)
    renamed = Ticket(less.provenance, less.state, less.masks, less.buffers - {"bn.running_mean"})
    digests.add(renamed.content_digest)
    assert len(digests) == 5


def test_a_ticket_of_a_channels_last_model_is_a_copy_in_logical_order() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    mask = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    mask[0, 1, 0, 1] = mask[2, 0, 1, 1] = True
    with torch.no_grad():
        model[0].weight.mul_(mask)
    before = model[0].weight.detach().clone()
    provenance = decode(_crafted({})).provenance
    ticket = ticket_of(
        model, {"0.weight": mask}, provenance=provenance, buffers={"1.running_mean": torch.tensor([1.0, 2.0, 3.0])}
    )
    with torch.no_grad():
        model[0].weight.zero_()
    again = decode(encode(ticket))
    assert_equal(again, ticket)
    assert torch.equal(again.state["0.weight"], before)
    assert again.state["1.running_mean"].tolist() == [1.0, 2.0, 3.0]
    assert again.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert again.num_parameters == 2 + 3 + 3 + 3  # active weights, bias, BatchNorm weight and bias


def test_bf16_rounds_parameters_and_comes_back_exactly(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.BatchNorm1d(1))
    mask = torch.tensor([[True, True, False, True]])
    step = 1 / 128  # from 1 to the next bf16
    with torch.no_grad():
        model[0].weight.copy_(
            torch.tensor([[1 + step / 4, 1 + step / 2, 0, 1 + 3 * step / 2]])
        )  # nearest; ties to the even neighbour
        model[0].bias.fill_(-1 - 3 * step / 4)
        model[1].running_var.fill_(1 + step / 4)
    provenance = decode(_crafted({})).provenance
    ticket = ticket_of(model, {"0.weight": mask}, provenance=provenance, dtype=torch.bfloat16)
    assert ticket.state["0.weight"].tolist() == [[1, 1, 0, 1 + 2 * step]] and ticket.state["0.bias"].tolist() == [
        -1 - step
    ]
    assert ticket.dtype == torch.bfloat16 and ticket.state["1.running_var"].tolist() == [
        1 + step / 4
    ]  # statistics are not rounded
    again = decode(encode(ticket))
    assert_equal(again, ticket)
    assert (
        again.content_digest
        == ticket.content_digest
        != ticket_of(model, {"0.weight": mask}, provenance=provenance).content_digest
    )
    packed = read_packed(encode(ticket)).tensors
    assert (
        packed["values/0.weight"].dtype
        == packed["dense/0.bias"].dtype
        == packed["dense/1.weight"].dtype
        == torch.bfloat16
    )
    model.load_state_dict(again.state)  # into fp32: no further rounding
    assert torch.equal(model[0].weight.bfloat16(), ticket.state["0.weight"]) and model[0].weight.dtype == torch.float32


def test_a_layer_without_active_weights_round_trips(make_ticket: MakeTicket) -> None:
    ticket = make_ticket()
    ticket.state["fc.weight"].zero_()
    ticket.masks["fc.weight"].zero_()
    assert_equal(decode(encode(ticket)), ticket)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "fc.bias", "bn.running_mean"])
def test_a_value_that_is_not_finite_is_never_written(make_ticket: MakeTicket, name: str, value: float) -> None:
    ticket = make_ticket()
    ticket.state[name].view(-1)[0] = value
    with pytest.raises(NumericsError, match=re.escape(name)):
        encode(ticket)


def test_the_reader_in_the_document_works_without_this_project(make_ticket: MakeTicket, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "ticket-format.md").read_text()
    reader = re.search(r"```python\n(.*?)```", document, re.DOTALL)
    assert reader is not None and len(reader.group(1).strip().splitlines()) <= 25
    ticket = make_ticket()
    (tmp_path / "ticket-000.safetensors").write_bytes(encode(ticket))
    (tmp_path / "reader.py").write_text(reader.group(1))
    code = (
        "import sys, reader, numpy as np\n"
        "provenance, state, masks = reader.read_ticket('ticket-000.safetensors')\n"
        "np.savez('out.npz', index=provenance['index'], **{'state/' + k: v for k, v in state.items()},"
        " **{'mask/' + k: v for k, v in masks.items()})\n"
        "assert 'torch' not in sys.modules and 'pipeline' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    out = np.load(tmp_path / "out.npz")
    for name, tensor in ticket.state.items():
        np.testing.assert_array_equal(out["state/" + name], tensor.numpy())
    for name, mask in ticket.masks.items():
        np.testing.assert_array_equal(out["mask/" + name], mask.numpy())


# --- versions of the format ---

NETWORK = Network(("ant", "bee"), parameters=48, density=13 / 48, dense={"fc.bias": "named in dense_layers"})


def test_version_2_says_what_the_tensors_do_not(make_ticket: MakeTicket) -> None:
    ticket = dataclasses.replace(make_ticket(preprocessing={"eval_resolution": 28}), network=NETWORK)
    _, header, _ = parts(encode(ticket))
    assert [*header] == ["format", "minor", "provenance", "network", "tensors", "content_sha256"]
    assert (header["format"], header["minor"]) == (2, 0)
    assert header["network"] == {
        "classes": ["ant", "bee"],
        "parameters": 48,
        "density": 13 / 48,
        "dense": {"fc.bias": "named in dense_layers"},
    }
    assert header["provenance"]["preprocessing"] == {"eval_resolution": 28}
    assert header["provenance"]["model_args"] == {"width": 4}
    assert decode(encode(ticket)).network == NETWORK
    assert NETWORK.with_active(46, 46).density == 1.0 and NETWORK.with_active(0, 46).density == 2 / 48
    assert decode(encode(make_ticket())).network is None  # nobody recorded it


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("**/ticket-*.safetensors")), ids=lambda path: path.name)
def test_a_file_of_version_1_is_read_and_written_again_byte_for_byte(path: Path) -> None:
    ticket = decode(path)
    assert (ticket.format.version, ticket.network) == (1, None)
    assert encode(ticket) == path.read_bytes()
    assert read_packed(path).content_digest == ticket.content_digest


def test_a_ticket_that_version_1_saved_is_the_same_ticket_today(make_ticket: MakeTicket, tmp_path: Path) -> None:
    """A run that resumes publishes its last ticket again."""
    old = dataclasses.replace(make_ticket(), format=dataclasses.replace(make_ticket().format, version=1))
    new = dataclasses.replace(make_ticket(), network=NETWORK)
    store = TicketStore(tmp_path / "tickets", owner="run", copy_to=f"file://{tmp_path}/copy")
    path = store.save(old)
    content = path.read_bytes()
    store.save(new)
    assert path.read_bytes() == content == (tmp_path / "copy" / path.name).read_bytes()
    with pytest.raises(IntegrityError, match="already exists with content sha256"):
        store.save(dataclasses.replace(new, provenance=dataclasses.replace(new.provenance, seed=9)))


def test_fields_of_a_later_minor_version_are_kept(make_ticket: MakeTicket) -> None:
    entries, header, body = parts(encode(dataclasses.replace(make_ticket(), network=NETWORK)))
    header["minor"] = 3
    header["provenance"] |= {"weather": {"rain": [1, 2]}}
    header["network"] |= {"interpolation": "bilinear"}
    header = {key: value for key, value in header.items() if key != "content_sha256"} | {"licence": "Apache-2.0"}
    later = joined(entries, header, body)
    ticket = decode(later)
    assert ticket.provenance == make_ticket().provenance and ticket.network == NETWORK
    assert ticket.format.unknown == {
        "header": {"licence": "Apache-2.0"},
        "provenance": {"weather": {"rain": [1, 2]}},
        "network": {"interpolation": "bilinear"},
    }
    again = encode(ticket)
    assert parts(again)[1] == parts(later)[1]  # with the same digest
    assert ticket.content_digest == read_packed(later).content_digest
    for place in ("header", "provenance", "network"):  # of this minor version they are an error
        current = parts(later)[1] | {"minor": 0}
        for other in {"header", "provenance", "network"} - {place}:
            (current if other == "header" else current[other]).pop(next(iter(ticket.format.unknown[other])))
        with pytest.raises(IntegrityError, match="unknown field"):
            decode(joined(entries, current, body))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"minor": True}, "minor format version: expected a whole number >= 0, got true"),
        ({"minor": None}, "minor format version: expected a whole number >= 0, got null"),
        ({"network": []}, "network: expected a JSON object, got a list"),
        ({"network": {"classes": []}}, "network: missing field 'dense'"),
    ],
)
def test_a_header_of_version_2_is_checked(make_ticket: MakeTicket, changes: dict[str, Any], reason: str) -> None:
    entries, header, body = parts(encode(make_ticket()))
    with pytest.raises(IntegrityError, match=reason):
        decode(joined(entries, header | changes, body))
    del header["provenance"]["preprocessing"]  # which version 1 may lack
    with pytest.raises(IntegrityError, match="provenance: missing field 'preprocessing'"):
        decode(joined(entries, header, body))


# --- damaged, truncated, foreign and hostile files ---


def test_a_flipped_bit_in_any_byte_is_found(make_ticket: MakeTicket) -> None:
    content = encode(make_ticket())
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(IntegrityError, match="not an intact ticket"):
            decode(bytes(damaged))


def test_a_file_cut_anywhere_is_found(make_ticket: MakeTicket, tmp_path: Path) -> None:
    content = encode(make_ticket())
    path = tmp_path / "t"
    for length in [0, 7, 8, 9, *range(10, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(IntegrityError, match=f"{path}: is not an intact ticket"):
            decode(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(IntegrityError, match=f"{len(content) + 1} bytes, but the header describes {len(content)}"):
        decode(path)


def test_both_hashes_are_named(make_ticket: MakeTicket) -> None:
    content = bytearray(encode(make_ticket()))
    content[-1] ^= 1
    with pytest.raises(
        IntegrityError, match=rf"sha256 of its content is \w{{64}}, but the header says {make_ticket().content_digest}"
    ):
        decode(bytes(content))


def _crafted(entries: dict[str, Any], *, header: Any = None, body: bytes = b"") -> bytes:
    """Make a file with a given header; without one, an empty ticket, which is valid."""
    provenance = {
        "index": 0,
        "model": "m",
        "model_args": {},
        "num_classes": 2,
        "method": "set",
        "phase": "p",
        "step": 0,
    }
    provenance |= {
        "samples_seen": 0,
        "epochs": 0.0,
        "density": 0.5,
        "r_s": 0.5,
        "seed": 0,
        "config_digest": "",
        "data_digest": "",
    }
    provenance |= {"class_list_digest": "", "mask_digest": "", "parent_run": "", "extra": {}}
    content: Any = {"format": 1, "provenance": provenance, "tensors": {}}
    if isinstance(header, dict):
        content |= {key: value for key, value in header.items() if key != "provenance"}
        content["provenance"] = provenance | header.get("provenance", {})
    if not entries and not body:
        content["content_sha256"] = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    text = header if isinstance(header, str) else json.dumps(content)
    head = json.dumps({"__metadata__": {"ticket": text}} | entries).encode()
    return struct.pack("<Q", len(head)) + head + body


def _entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_the_crafted_file_would_be_accepted_but_for_what_is_wrong_in_it() -> None:
    assert decode(_crafted({})).provenance.model == "m"


SPARSE = {"tensors": {"w": {"kind": "sparse", "shape": [100]}}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04" + bytes(100), "is truncated or is not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "is truncated or is not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object, got a list"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "twice"),
        (save({"w": torch.zeros(3)}), "not a ticket"),
        (_crafted({}, header="[]"), "expected a JSON object, got a list"),
        (_crafted({}, header="{"), r"its ticket header is not valid JSON: expected"),
        (_crafted({}, header='{"format": NaN}'), "NaN is not allowed"),
        (_crafted({}, header={"format": 3}), "expected ticket format 1 or 2, got 3"),
        (_crafted({})[:-1], "truncated"),
        (_crafted({}, header={"provenance": {"index": -1}}), "index: expected 0 to 9223372036854775807, got -1"),
        (_crafted({}, header={"provenance": {"density": 2.0}}), "density: expected 0 to 1, got 2.0"),
        (_crafted({}, header={"provenance": {"r_s": 1.5}}), "r_s: expected 0 to 1, got 1.5"),
        (_crafted({}, header={"provenance": {"epochs": -1.0}}), "epochs: expected at least 0, got -1.0"),
        (_crafted({}, header={"provenance": {"index": "0"}}), 'index: expected a whole number, got "0"'),
        (_crafted({}, header={"provenance": {"seed": True}}), "seed: expected a whole number, got true"),
        (_crafted({}, header={"provenance": {"extra": {"a": "b"}}}), "extra is not a finite number"),
        (_crafted({}, header={"provenance": {"extra": {"a": 10**400}}}), "a number has 401 digits"),
        (_crafted({}, header={"provenance": {"more": 1}}), "unknown field 'more'"),
        (_crafted({}, header=SPARSE), "w: is missing"),
        (
            _crafted({}, header={"tensors": {"../w": {"kind": "parameter", "shape": []}}}),
            "'../w' is not a valid tensor name",
        ),
        (_crafted({}, header={"tensors": {"w": {"kind": "code", "shape": []}}}), 'or buffer, got "code"'),
        (_crafted({"dense/w": _entry("F32", [1], 0, 4)}, body=bytes(4)), "unexpected tensors: dense/w"),
        (_crafted({"dense/w": _entry("F32", [1], 0, 4)}, body=bytes(3)), "bytes, but the header describes"),
        (_crafted({"dense/w": _entry("F32", [2], 0, 4)}, body=bytes(4)), "4 bytes for F32"),
        (_crafted({"dense/w": _entry("F32", [-1], 0, 4)}, body=bytes(4)), r"shape: expected .*, got \[-1\]"),
        (_crafted({"dense/w": _entry("F32", [2**60], 0, 4)}, body=bytes(4)), r"got \[1152921504606846976\]"),
        (_crafted({"dense/w": _entry("OBJ", [1], 0, 4)}, body=bytes(4)), 'dtype: expected .*, got "OBJ"'),
        (
            _crafted(
                {"mask/w": _entry("U8", [1], 0, 1), "values/w": _entry("F32", [0], 1, 1)}, header=SPARSE, body=bytes(1)
            ),
            "does not fit the shape",
        ),
        (
            _crafted(
                {"mask/w": _entry("U8", [13], 0, 13), "values/w": _entry("I32", [1], 13, 17)},
                header=SPARSE,
                body=bytes(17),
            ),
            "does not fit the shape",
        ),
        (
            _crafted(
                {"mask/w": _entry("U8", [13], 0, 13), "values/w": _entry("F32", [1], 12, 16)},
                header=SPARSE,
                body=bytes(17),
            ),
            "starts at byte 12, expected 13 .tensors must follow",  # overlapping tensors
        ),
    ],
)
def test_hostile_content_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        decode(content)


def test_a_consistent_file_with_a_wrong_count_is_refused(
    make_ticket: MakeTicket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is right, as an attacker's would be; only the count of mask bits is wrong."""
    from pipeline.tickets import format as ticket_format

    def with_a_bit_more(*arguments: Any) -> dict[str, torch.Tensor]:
        packed = original(*arguments)
        packed["mask/fc.weight"] |= 2
        return packed

    original = ticket_format.pack_sparse
    monkeypatch.setattr(ticket_format, "pack_sparse", with_a_bit_more)
    content = encode(make_ticket())
    with pytest.raises(IntegrityError, match=r"fc\.weight: the mask has 4 active weights, but 3 values are stored"):
        read_packed(content)


def test_nothing_is_read_or_allocated_for_an_impossible_size(tmp_path: Path) -> None:
    """A sparse file of a terabyte with a matching header is refused by its header alone."""
    size = 2**40
    header = {"tensors": {"w": {"kind": "parameter", "shape": [size // 4]}}}
    path = tmp_path / "t"
    path.write_bytes(_crafted({"dense/w": _entry("F32", [size // 4], 0, size)}, header=header, body=b"\0"))
    os.truncate(path, path.stat().st_size - 1 + size)
    with pytest.raises(IntegrityError, match="unpacks to 1099511627776 bytes"):
        decode(path)
    # A small file whose mask, were it unpacked, would be large.
    header = {"tensors": {"w": {"kind": "sparse", "shape": [verify.MAX_DENSE_BYTES]}}}
    entries = {"mask/w": _entry("U8", [2**31], 0, 2**31), "values/w": _entry("F32", [0], 2**31, 2**31)}
    path.write_bytes(_crafted(entries, header=header, body=b"\0"))
    os.truncate(path, path.stat().st_size - 1 + 2**31)
    with pytest.raises(IntegrityError, match="unpacks to"):
        decode(path)


def test_only_regular_files_are_opened(make_ticket: MakeTicket, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(encode(make_ticket()))
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IntegrityError, match="link: is not an intact ticket: it is a symbolic link"):
        decode(tmp_path / "link")
    for path, reason in (
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
    ):
        with pytest.raises(IntegrityError, match=reason):
            decode(path)
    with pytest.raises(DataError, match="none: does not exist"):
        decode(tmp_path / "none")
