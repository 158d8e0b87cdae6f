"""Safetensors in and out, checked loading, hostile files."""
import importlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from data import clip
from data.weights import (
    DTYPES,
    load_checked,
    load_checkpoint,
    load_parts,
    open_run,
    read_safetensors,
    read_state,
    save_checkpoint,
    sha256,
    write_safetensors,
)


def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_module_wins_over_the_folder_of_the_same_name():
    module = importlib.import_module("data.weights")
    assert Path(module.__file__).name == "weights.py"
    assert not (Path(module.__file__).parent / "weights" / "__init__.py").exists()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_survives_the_round_trip(dtype, tmp_path):
    tensors = {"a": torch.tensor([[0, 1, 2], [3, 4, 1]]), "scalar": torch.tensor(1), "empty": torch.empty(0, 3),
               "odd": torch.ones(7), "transposed": torch.tensor([[0, 1], [2, 3]]).T}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "w.safetensors", tensors, {"words": "red blue", "heads": 4})
    again, metadata = read_safetensors(tmp_path / "w.safetensors")
    assert metadata == {"words": "red blue", "heads": "4"} and again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype and torch.equal(again[name], tensor)
    again["a"].fill_(0)                                     # writable, and nobody else's memory
    assert torch.equal(again["odd"], tensors["odd"])


def test_the_bytes_are_those_of_the_format(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"b": torch.tensor([1.0]), "a": torch.tensor([2.0, 3.0])})
    content = (tmp_path / "w.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length]) == {"a": entry(), "b": entry((1,), offsets=(8, 12))}
    assert struct.unpack("<3f", content[8 + length :]) == (2.0, 3.0, 1.0)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_safetensors(one, {"a": torch.ones(2), "b": torch.zeros(1)})
    write_safetensors(two, {"b": torch.zeros(1), "a": torch.ones(2)})
    assert sha256(one) == sha256(two) and not list(tmp_path.glob("*.tmp"))


def test_sha256_is_the_published_one_of_three_letters(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("content, message", [
    (b"", "not a whole safetensors file"),
    (b"\x01\x02", "not a whole safetensors file"),
    (raw({}, length=2**62), "claims a header of 4,611,686,018,427,387,904 bytes"),
    (raw(b"{not json"), "its header is not JSON"),
    (raw(b"\xff\xfe{}"), "its header is not JSON"),
    (raw(b"[" * 100_000), "its header is not JSON"),
    (raw(b"[1, 2]"), "should be a table"),
    (raw({"__metadata__": 3}), "should be a table"),
    (raw({"w": 7}), "entry for 'w' is unreadable"),
    (raw({"w": entry(dtype="F8_X")}, b"0" * 8), "types are F64"),
    (raw({"w": entry(shape=(-2,))}, b"0" * 8), "entry for 'w' is unreadable"),
    (raw({"w": entry(shape=(True, 2))}, b"0" * 8), "entry for 'w' is unreadable"),
    (raw({"w": entry(offsets=(0, 8, 16))}, b"0" * 8), "entry for 'w' is unreadable"),
    (raw({"w": entry(offsets=(8, 0))}, b"0" * 8), r"'w' of shape \(2,\) does not fit bytes 8-0"),
    (raw({"w": entry(shape=(3,))}, b"0" * 8), r"'w' of shape \(3,\) does not fit"),
    (raw({"w": entry(shape=(2**62, 2**62))}, b"0" * 8), "does not fit"),
    (raw({"w": entry(), "v": entry()}, b"0" * 8), "does not fit"),                          # two tensors share bytes
    (raw({"w": entry(offsets=(4, 12))}, b"0" * 12), "does not fit"),                        # a hole
    (raw({"w": entry()}, b"0" * 6), "the file was cut or extended"),
    (raw({"w": entry()}, b"0" * 9), "the file was cut or extended"),
])
def test_a_lying_header_is_refused(content, message, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_safetensors(tmp_path / "w.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(5), "b": torch.ones(2, 3)}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_safetensors(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_safetensors(path, {"a": torch.ones(1, dtype=torch.complex64)})
    assert path.read_bytes() == before


# -- checked loading -----------------------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_entries_are_listed_by_name():
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(ValueError) as error:
        load_checked(layer, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, "w.pt")
    assert str(error.value) == ("w.pt does not fit: 1 missing: bias; 1 unknown: extra; "
                                "1 misshapen: weight (3, 3) instead of (2, 3)")
    assert torch.equal(layer.weight, before)


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match="9 unknown: x0, x1, x2, x3, x4, x5 and 3 more"):
        load_checked(nn.Linear(1, 1), nn.Linear(1, 1).state_dict() | {f"x{n}": torch.zeros(1) for n in range(9)}, "w")


def test_numbers_take_the_types_of_the_module():
    layer = load_checked(nn.Linear(3, 2), {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2)}, "w")
    assert torch.equal(layer.weight, torch.ones(2, 3)) and layer.weight.dtype == torch.float32


def test_state_dicts_in_torchs_format_are_read_and_unwrapped(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    for content in (state, {"state_dict": state}, {"model": state}):
        torch.save(content, tmp_path / "w.pt")
        assert torch.equal(read_state(tmp_path / "w.pt")[0]["weight"], state["weight"])
    torch.save({"weight": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not a table of named tensors"):
        read_state(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_state(tmp_path / "absent.pt")


def test_a_checkpoint_is_read_back(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.arange(3), "step": 4})
    assert load_checkpoint(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2] and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(FileNotFoundError, match="train first"):
        load_checkpoint(tmp_path / "b.pt")


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_run_of_another_model_or_of_other_sizes_is_refused(tmp_path):
    layer = nn.Linear(2, 3)
    save_checkpoint(tmp_path / "a.pt", {"name": "toy", "config": {"width": 2}, "state": {"model": layer.state_dict()}})
    config, state = open_run(tmp_path / "a.pt", "toy", "other")
    load_parts({"model": layer, "adam": torch.optim.Adam(layer.parameters())}, state, "a.pt does not fit")
    assert config == {"width": 2}
    with pytest.raises(ValueError, match="a.pt does not fit: 'model': .*size mismatch"):
        load_parts({"model": nn.Linear(4, 3)}, state, "a.pt does not fit")
    with pytest.raises(ValueError, match="holds 'toy', not a run of galip or denet"):
        open_run(tmp_path / "a.pt", "galip", "denet")


@pytest.mark.parametrize("read", [read_state, load_checkpoint, clip.load])
def test_a_pickle_that_runs_code_is_refused(read, tmp_path):
    torch.save({"weight": Bomb(tmp_path / "boom")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="damaged|would run code"):
        read(tmp_path / "w.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("read", [read_state, load_checkpoint])
def test_damaged_torch_files_are_refused(read, tmp_path):
    path = tmp_path / "w.pt"
    save_checkpoint(path, {"weight": torch.ones(100)})
    whole = path.read_bytes()
    for content in (b"", b"hello", b"PK", whole[: len(whole) // 2], whole[:-1], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read(path)
