"""Pickles of other people: arrays and sparse matrices are rebuilt from bytes, everything else is refused by name.

A pickle is a program. The usual one says "call numpy's reconstructor, call scipy's coo_matrix, fill in these fields";
a hostile one says "call os.system". Here every name is looked up in ALLOWED, which leads only to the small classes of
this file: neither numpy's nor scipy's code is ever run by the pickle, and scipy need not be installed.
"""
import pickle
import re

import numpy as np


class Dtype:
    """Stand-in for numpy.dtype: plain numbers only."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[<>=|]?[biuf]\d{1,2}", code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {code!r}, only numbers are read")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class Array:
    """Stand-in for numpy.ndarray: numpy never sees the pickle, only bytes, a checked dtype and a shape."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw            # Python 2
        self.value = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if fortran else "C")


class Coo:
    """Stand-in for scipy's coo matrix: the unpickler fills in _shape, data and row, col (or coords)."""

    def pairs(self):
        row, col = self.coords if hasattr(self, "coords") else (self.row, self.col)
        return np.stack([row.value, col.value], 1)[self.data.value != 0]


class Csr:
    """Stand-in for scipy's csr matrix: _shape, data, indices, indptr."""

    def pairs(self):
        row = np.repeat(np.arange(len(self.indptr.value) - 1), np.diff(self.indptr.value))
        return np.stack([row, self.indices.value], 1)[self.data.value != 0]


def from_buffer(raw, dtype, shape, order):                 # how protocol 5 writes an array
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


ALLOWED = {("numpy", "dtype"): Dtype, ("numpy", "ndarray"): Array,
           ("builtins", "object"): object, ("copyreg", "_reconstructor"): lambda kind, *_: kind(),
           ("_codecs", "encode"): lambda text, codec: text.encode("latin1"),    # bytes in protocol 2
           **{(f"scipy.sparse{module}", f"{kind}_{form}"): stand_in for kind, stand_in in (("coo", Coo), ("csr", Csr))
              for module in ("", f".{kind}", f"._{kind}") for form in ("matrix", "array")},
           **{(f"numpy.{core}.multiarray", name): build for core in ("core", "_core") for name, build in (
               ("_reconstruct", lambda *_: Array()), ("scalar", lambda d, raw: np.frombuffer(raw, d.value)[0].item()))},
           **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")}}


class Reader(pickle.Unpickler):
    """Builds only what ALLOWED names, out of our own classes; scipy need not be installed."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays and sparse matrices are read")
        return ALLOWED[module, name]


def sparse_pairs(path):
    """A pickled scipy coo or csr matrix -> the (E, 2) places of its non-zero entries, its shape."""
    try:
        with open(path, "rb") as file:
            matrix = Reader(file, encoding="latin1").load()
        return matrix.pairs(), tuple(int(n) for n in matrix._shape)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the DiffMM layout is trnMat.pkl, valMat.pkl, tstMat.pkl") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a pickled sparse matrix, or it is cut: {str(error)[:160]}") from error
