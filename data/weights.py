"""Weights and checkpoints on disk: written aside and renamed, read without ever executing a pickle.

save_checkpoint, load_checkpoint     our own runs (torch format, weights only)
open_run, load_parts                 what a verb needs of one: its options, and its parts checked one by one
write_safetensors, read_safetensors  8 bytes of header length, a JSON header, raw numbers: no code can hide in it
read_state, load_checked, sha256     somebody else's weights: any of the two formats, checked name by name
"""
import hashlib
import json
import os
import struct
from pathlib import Path

import torch

from data.safe import reason, there

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000     # bytes; the limit of the format's own reader: a bad length cannot fill memory


def write_aside(path, write, before=None):
    """Let `write(file)` fill `<path>.tmp`, flush it to the disk, and only then give it the final name.

    before  the name that the file it replaces gets, if it is to be kept
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if before and path.exists():
        os.replace(path, before)
    os.replace(aside, path)


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# -- checkpoints of our own runs -----------------------------------------------------------------------------


def save_checkpoint(path, checkpoint, before=None):
    """Write a dict of tensors and plain values: a kill at any moment leaves the old file or the new one, whole."""
    write_aside(path, lambda file: torch.save(checkpoint, file), before)


def load_checkpoint(path, device="cpu"):
    """Read what `save_checkpoint` wrote.   raises FileNotFoundError or ValueError, each with what to type"""
    path = there(path, "train first, or point --ckpt at another checkpoint")
    found = torch_load(path, "is damaged or not a checkpoint of this project", device)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a checkpoint of this project: it holds one {type(found).__name__}")
    return found


def open_run(path, *names):
    """A checkpoint that train.py wrote for one of the models `names`.   -> its options (plain values), its state

    raises FileNotFoundError or ValueError
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("name") not in names or not {"config", "state"} <= checkpoint.keys():
        raise ValueError(f"{path} holds '{checkpoint.get('name')}', not a run of {' or '.join(names)}; point --ckpt at one")
    return checkpoint["config"], checkpoint["state"]


def load_parts(parts, state, where, optimisers=False):
    """Load the state of a checkpoint into {name: part}.   raises ValueError, starting with `where`, if one does not fit"""
    for name, part in parts.items():
        if optimisers or not isinstance(part, torch.optim.Optimizer):
            try:
                part.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"{where}: '{name}': {' '.join(str(error).split())[:300]}") from None


def torch_load(path, complaint, device="cpu"):
    """torch's weights-only reader, which raises whatever the bytes of a damaged file lead it to."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} {complaint} ({reason(error)})") from error


# -- safetensors ---------------------------------------------------------------------------------------------


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and {str: str} metadata.   The same content gives the same bytes: names are sorted."""
    names, header, start = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    if metadata:
        header["__metadata__"] = {key: str(value) for key, value in metadata.items()}
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                          # the numbers start at a multiple of eight bytes

    def write(file):
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())

    write_aside(path, write)


def read_safetensors(path):
    """-> ({name: tensor}, {str: str} metadata), on the CPU, in the stored types.

    raises  FileNotFoundError, or ValueError for a file that is cut short, padded, or whose header lies about it
    """
    size = there(path, "a safetensors file was expected there").stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path} is not a whole safetensors file: it claims a header of {length:,} bytes and "
                             f"has {size:,} bytes in all; copy it again")
        header = read_header(path, file.read(length))
        metadata = header.pop("__metadata__", {})
        check_layout(path, header, size - 8 - length)
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            raw = bytearray(file.read(stop - start))         # a copy of its own: aligned, writable
            dtype = DTYPES[entry["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata


def read_header(path, raw):
    """Header bytes -> dict of entries, each with a known type, whole sizes and two offsets."""
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError(f"{path}: the safetensors header should be a table of tensors")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        lists = [entry.get("shape"), entry.get("data_offsets")]
        whole = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in lists)
        if not whole or len(lists[1]) != 2 or str(entry.get("dtype")) not in DTYPES:
            raise ValueError(f"{path}: the header's entry for '{name}' is unreadable: {str(entry)[:80]}; "
                             f"types are {', '.join(DTYPES)}")
    return header


def check_layout(path, header, size):
    """Every byte of the data belongs to exactly one tensor and each shape fits its bytes.   raises ValueError"""
    reached = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), numbers = entry["data_offsets"], 1
        for n in entry["shape"]:
            numbers *= n
        if start != reached or stop - start != numbers * DTYPES[entry["dtype"]].itemsize:
            raise ValueError(f"{path}: tensor '{name}' of shape {tuple(entry['shape'])} does not fit bytes "
                             f"{start}-{stop}")
        reached = stop
    if reached != size:
        raise ValueError(f"{path} holds {size:,} bytes of numbers, its header describes {reached:,}: the file was "
                         "cut or extended; copy it again")


# -- weights from elsewhere ----------------------------------------------------------------------------------


def read_state(path):
    """A state dict and its metadata from .safetensors, or from .pt, .pth, .bin by torch's weights-only reader.

    A wrapper {"state_dict": ...} or {"model": ...} is opened. TorchScript archives are data.clip.read_torchscript's.
    """
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    there(path, "a file of weights (.safetensors, .pt, .bin) was expected there")
    state = torch_load(path, "is damaged, or holds more than plain tensors, which is refused because reading it would "
                             "run code")
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a table of named tensors")
    return dict(state), {}


def check_names(expected, state, where):
    """Compare {name: shape} with a state dict.   raises ValueError listing what is missing, unknown or misshapen"""
    def listed(title, names):
        names = sorted(names)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        return [f"{len(names)} {title}: {', '.join(names[:6])}{more}"] if names else []

    wrong = [f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}" for name, shape in expected.items()
             if name in state and tuple(state[name].shape) != tuple(shape)]
    complaints = [*listed("missing", expected.keys() - state.keys()),
                  *listed("unknown", state.keys() - expected.keys()), *listed("misshapen", wrong)]
    if complaints:
        raise ValueError(f"{where} does not fit: " + "; ".join(complaints))


def load_checked(module, state, where):
    """Copy a state dict into a module, strictly; numbers take the module's types.   -> the module

    raises ValueError listing missing, unknown and misshapen entries; nothing is loaded then
    """
    check_names({name: tensor.shape for name, tensor in module.state_dict().items()}, state, where)
    module.load_state_dict(state)
    return module
