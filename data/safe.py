"""Files of other people, read without trusting them: text, JSON lines, arrays, pictures, pickles.

Each reader either returns what was asked for or raises one sentence that names the file and what to do. A pickle is a program:
it may only call the stand-ins of this file, which rebuild plain numbers and arrays from bytes, so neither numpy's nor scipy's
code is run by it and scipy need not be installed.
"""
import codecs
import csv
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import tokenize
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

DAMAGED = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, struct.error, zlib.error,
           zipfile.BadZipFile, tarfile.TarError, tokenize.TokenError, pickle.UnpicklingError, OverflowError, MemoryError,
           NotImplementedError, RuntimeError, Image.DecompressionBombError)      # what damaged bytes lead readers to
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
LONGEST = 250                 # how many times as long as wide a picture may be: enlarged, it would fill the memory


def reason(error):
    """First line of an error, short enough for a sentence."""
    return (str(error).splitlines() or [""])[0][:140] or type(error).__name__


def missing(path, hint=""):
    return FileNotFoundError(f"{str(path):.300} is missing" + (f": {hint}" if hint else ""))


def there(path, hint=""):
    """A file's path, if there is such a file."""
    if not Path(path).is_file():
        raise missing(path, hint)
    return Path(path)


@contextmanager
def damage(where, complaint="is damaged or cut"):
    """Whatever goes wrong in this block is the fault of the file `where`, and one sentence says so."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{where} {complaint} ({reason(error)}); copy it again") from error


def outside(name):
    """Is a file name out of an archive or a list no name at all, or one that could lead out of its folder?"""
    path = PurePosixPath(name.replace("\\", "/"))
    return (path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or len(name) > 1000
            or re.match(r"[A-Za-z]:", name) or max(len(part.encode(errors="replace")) for part in path.parts) > 240)


# -- text, JSON and arrays -----------------------------------------------------------------------------------


def read_text(path, hint=""):
    """A UTF-8 text file, gzipped or not; a byte order mark is dropped."""
    path = there(path, hint)
    with damage(path):
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#x} is not UTF-8 text; save the file as UTF-8") from error


def read_lines(path, hint=""):
    """The lines of a text file, stripped; blank ones are left out."""
    return [line.strip() for line in read_text(path, hint).splitlines() if line.strip()]


def read_json(path, kind, hint=""):
    """A JSON file whose outermost value is a `kind` (list or dict)."""
    text = read_text(path, hint)
    with damage(path, "is not JSON, or it is cut"):
        table = json.loads(text)
    return of_kind(table, kind, path, hint)


def of_kind(found, kind, where, hint=""):
    if not isinstance(found, kind):
        raise ValueError(f"{where} holds a {type(found).__name__}, expected a {named(kind)}" + (f": {hint}" if hint else ""))
    return found


def read_rows(path, hint="", **how):
    """A table as the csv module reads it.   how: of csv.reader   -> [(line, cells), ...]"""
    reader = csv.reader(io.StringIO(read_text(path, hint)), **how)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}; is it a table?") from error


def read_jsonl(path, fields, hint=""):
    """One JSON object a line.   fields: {key: type} that every row must have   -> list of dict"""
    rows = []
    for number, line in enumerate(read_text(path, hint).splitlines(), 1):
        if not line.strip():
            continue
        with damage(f"{path}, line {number}", "is not JSON"):
            row = json.loads(line)
        check_row(row, fields, f"{path}, line {number}")
        rows.append(row)
    return rows


def check_row(row, fields, where):
    """raises ValueError unless `row` is a dict with each field of the wanted type"""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object with {', '.join(fields)}")
    for key, kind in fields.items():
        if not isinstance(row.get(key), kind) or isinstance(row.get(key), bool):
            raise ValueError(f"{where}: {key!r} is {row.get(key, 'missing')!r:.60}, expected {named(kind)}")


def named(kind):
    """The name of a type, or the names of several."""
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def read_arrays(path, names=None, hint=""):
    """An .npz as a dict of arrays, or an .npy as one array; never a pickle.   names: arrays an .npz must have"""
    with open(there(path, hint), "rb") as file, damage(path, "is damaged, cut, or not the numpy file expected"):
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            found = readable(found)
        else:
            found = {name: readable(found[name]) for name in (names or found.files)}
    if names and not isinstance(found, dict):
        raise ValueError(f"{path} is one array; it must be an .npz with {', '.join(names)}")
    return found


def readable(x):
    """An array, unless it is text with numbers that are no characters: numpy does not look."""
    codes = np.frombuffer(x.tobytes(), np.dtype("u4").newbyteorder(x.dtype.byteorder)) if x.dtype.kind == "U" else []
    if len(codes) and codes.max() > 0x10FFFF:
        raise ValueError("its text is not Unicode")
    return x


# -- pictures ------------------------------------------------------------------------------------------------


def open_image(source, where=None, upright=False):
    """Any picture file (path, bytes or open file) as an RGB Pillow image; whatever is transparent becomes white.

    where     the name used in error messages, if `source` is not a path
    upright   turn photographs as their EXIF tag says; leave False where boxes or labels use the stored pixels
    """
    if isinstance(source, str | os.PathLike):
        there(source)
    with damage(where or source, "is not a picture that can be read, or it is cut"):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            check_size(image)
            image.load()
            return on_white(ImageOps.exif_transpose(image) if upright else image)


def check_size(image, frames=1):
    """raises ValueError for what would fill the memory: more pixels than Pillow's limit in all, or a mere thread"""
    if image.width * image.height * frames > Image.MAX_IMAGE_PIXELS or max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"it is too large: {frames} x {image.width} x {image.height} pixels")


def on_white(image):
    """A loaded Pillow image in any mode -> RGB. 16-bit grey keeps its top 8 bits."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"mode {image.mode} has no fixed white; save it as 8-bit or 16-bit")
        image = Image.fromarray((grey // 257).astype(np.uint8))       # 65535 / 257 = 255
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# -- pickles -------------------------------------------------------------------------------------------------


class Refused(Exception):
    """What a pickle asked for that is not read."""


class Dtype:
    """Stand-in for numpy.dtype: numbers, fixed-width text, and `O` (a list of already checked values)."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>=|]?([biuf]\d{1,2}|[SU]\d{1,6}|O8?)", code):
            raise Refused(f"an array of dtype {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1]) if state[1] in ("<", ">") else self.value


class Array:
    """Stand-in for numpy.ndarray: a checked dtype, a shape and the bytes (or, for dtype O, a list)."""

    def __setstate__(self, state):
        _, self.shape, dtype, fortran, self.raw = state
        self.dtype, self.order = dtype.value, "F" if fortran else "C"

    def build(self, visit):
        if self.dtype == object:
            flat = np.empty(len(self.raw), dtype=object)
            for n, value in enumerate(self.raw):
                flat[n] = visit(value)
        else:
            raw = octets(self.raw)
            flat = np.frombuffer(raw, self.dtype) if len(raw) else np.empty(0, self.dtype)
        return readable(flat.reshape(self.shape, order=self.order))


class Sparse:
    """Stand-in for a scipy.sparse matrix, which becomes {"format", "shape", "data", ...}: a dict of arrays."""

    def __setstate__(self, state):
        self.fields = state

    def build(self, visit):
        fields = {str(k): visit(v) for k, v in self.fields.items()}
        row_col = fields.pop("coords", None)
        if row_col is not None:
            fields["row"], fields["col"] = row_col
        return {"format": type(self).__name__, "shape": tuple(fields.pop("_shape")), **fields}


def from_buffer(raw, dtype, shape, order):                 # how protocol 5 writes an array
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def octets(raw):                                           # Python 2 wrote the bytes of arrays as text
    return raw.encode("latin1") if isinstance(raw, str) else raw


def scalar(dtype, raw):
    return np.frombuffer(octets(raw), dtype.value)[0].item()


def latin1(text, codec="latin1"):                          # how protocol 2 writes bytes
    if codecs.lookup(codec).name != "iso8859-1":
        raise Refused(f"text in {codec!r}")
    return text.encode("latin1")


ALLOWED = {("numpy", "dtype"): Dtype, ("numpy", "ndarray"): Array, ("_codecs", "encode"): latin1,
           ("copyreg", "_reconstructor"): lambda kind, *_: kind(), ("builtins", "object"): object,
           ("collections", "OrderedDict"): dict, ("collections", "defaultdict"): lambda *_: {},
           **{("builtins", t.__name__): t for t in (list, dict, set, frozenset, int, float, complex)},
           ("builtins", "bytes"): lambda: b"",          # how protocols 0 to 2 write the empty one
           **{(f"scipy.sparse{module}", f"{form}_{kind}"): type(form, (Sparse,), {}) for form in ("coo", "csr", "csc")
              for module in ("", f".{form}", f"._{form}") for kind in ("matrix", "array")},
           **{(f"numpy.{core}.multiarray", name): build for core in ("core", "_core")
              for name, build in (("_reconstruct", lambda *_: Array()), ("scalar", scalar))},
           **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")}}


class Reader(pickle._Unpickler):
    """Calls only what ALLOWED names. In Python: the reader in C reserves memory for as many objects as a file claims."""

    def find_class(self, module, name):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)      # Python 2 names
        if (module, name) not in ALLOWED:
            raise Refused(f"{module}.{name}")
        return ALLOWED[module, name]


def plain(value):
    """Replace every stand-in inside lists, dicts and tuples by what it stands for; shared parts stay shared."""
    done = {}

    def visit(x):
        if id(x) in done:
            return done[id(x)][1]
        y = x
        if isinstance(x, Dtype):
            y = x.value
        elif isinstance(x, Array | Sparse):
            y = x.build(visit)
        elif isinstance(x, tuple):
            y = tuple(visit(v) for v in x)
        done[id(x)] = (x, y)                               # before its parts: a list may contain itself
        if isinstance(x, list):
            x[:] = [visit(v) if type(v) not in (int, str, float) else v for v in x]
        elif isinstance(x, dict):
            for key in x:
                x[key] = visit(x[key])
        return y

    return visit(value)


def load_pickle(path, kind=object, hint=""):
    """A pickle of numbers, text, builtin containers, numpy arrays and scipy matrices; all else is refused.

    path    a file, or bytes. A sparse matrix comes back as a dict: format, shape, data, and row, col (coo) or indices, indptr
            (csr, csc). Strings of Python 2 are read as latin1, which keeps the bytes of arrays
    kind    the type that the outermost value must have
    raises  ValueError that names the file and the class it asked for
    A protocol-0 pickle that went through a Windows checkout (CR LF at every line's end) is repaired on the way.
    """
    raw, where = (path, hint or "the pickle") if isinstance(path, bytes) else (there(path, hint).read_bytes(), path)
    if not raw.startswith(b"\x80") and 0 < raw.count(b"\r\n") == raw.count(b"\n"):
        raw = raw.replace(b"\r\n", b"\n")
    try:
        with damage(where, "is not a pickle of data, or it is cut"):
            found = plain(Reader(io.BytesIO(raw), encoding="latin1").load())
    except Refused as error:                               # no kind of DAMAGED
        raise ValueError(f"{where} is refused: the pickle asks for {error}, and only numbers, text, containers, arrays "
                         "and sparse matrices are read") from error
    return of_kind(found, kind, where)


def load_object_array(path, kind=object, hint=""):
    """An .npy file of a dict, a list of arrays or an array of objects: its pickle goes through `load_pickle`."""
    with open(there(path, hint), "rb") as file:
        with damage(path, "is not an .npy file, or it is cut"):
            headers = np.lib.format
            first = headers.read_magic(file) == (1, 0)
            dtype = (headers.read_array_header_1_0 if first else headers.read_array_header_2_0)(file)[2]
        found = load_pickle(file.read(), hint=str(path)) if dtype.hasobject else read_arrays(path)
    return of_kind(found.item() if isinstance(found, np.ndarray) and found.ndim == 0 else found, kind, path)


# -- HDF5, which is optional ---------------------------------------------------------------------------------


def open_hdf5(path, hint=""):
    """An open h5py file, if h5py happens to be installed; this project does without it everywhere else."""
    there(path, hint)
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path} is an HDF5 file and the package h5py is not installed: type  pip install h5py, or convert the "
                         "file to .npz where it is") from error
    with damage(path, "is not an HDF5 file, or it is cut"):
        return h5py.File(path, "r")
