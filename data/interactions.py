"""Who clicked what, and what the items look like: the built-in shop and the layouts people download.

    data = load("builtin")                                    # 1,000 users x 600 items with planted tastes
    data = load("tiktok", root="folder", modalities=("image", "audio"))
    users, positives, negatives = data.sampler(device).batch(seed, t, size=2048)

Everything is checked here, once, at the door: after `load` ids are in range, pairs are unique, features are
finite.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.batches import batch_rows, generator
from data.metrics import ranking_chance
from data.safe import load_pickle, read_arrays, read_json, read_text, reason
from data.shop import shop, split_rule

SPLITS = ("train", "valid", "test")


@dataclass
class Interactions:
    """One data set. Pairs are (user, item), int64 on the CPU, sorted by user, then item; each occurs once."""
    users: int                                       # U
    items: int                                       # I
    train: torch.Tensor                             # (E, 2): graphs and negatives come from these edges alone
    valid: torch.Tensor                              # (E', 2)
    test: torch.Tensor                               # (E'', 2)
    features: dict = field(default_factory=dict)     # modality -> (I, d_m) float32, row = item id
    titles: list | None = None                       # I sentences, where the items have words
    pictures: Callable | None = None           # item ids -> (n, 3, H, W) in [-1, 1], where they have pictures
    noise: torch.Tensor | None = None                # (E,) bool: planted accidental clicks among `train`
    truth: dict = field(default_factory=dict)        # built-in data only: the planted tastes and attributes
    source: str = ""                                 # which file or generator
    dropped: dict = field(default_factory=dict)      # split -> rows of users who have no training row
    repaired: dict = field(default_factory=dict)    # what `repair` changed: "pairs" or a modality -> how many

    def sampler(self, device="cpu"):
        return Sampler(self, device)

    def chance(self):
        """What a shuffled list scores on test, training items left out (data.metrics.ranking)."""
        clicked = torch.bincount(self.train[:, 0], minlength=self.users)
        return ranking_chance(users=self.test[:, 0], items=self.items, seen=clicked)

    def name(self, item):
        return f"{self.titles[item]} (#{item})" if self.titles else f"item {item}"

    def history(self, user):
        """Training items of a user.   raises ValueError for an unknown user, or one without a training click"""
        if not 0 <= user < self.users:
            raise ValueError(f"there is no user {user}: ids run from 0 to {self.users - 1}; pass one with --user")
        history = self.train[self.train[:, 0] == user, 1]
        if not len(history):
            raise ValueError(f"user {user} has no training click, so nothing is known to recommend from; try --user "
                             f"{int(self.train[len(self.train) // 2, 0])}")
        return history

    def lists(self, users, best, scores):
        """What users clicked and what a model ranks first for them, hits marked, as lines.   users (n,), best, scores (n, k)"""
        lines = []
        for user, items, values in zip(users.tolist(), best.tolist(), scores.tolist(), strict=True):
            past, wanted = (part[part[:, 0] == user, 1].tolist() for part in (self.train, self.test))
            lines += ["", f"user {user} clicked: " + "; ".join(map(self.name, past[:12]))]
            lines += [f"  {place:2}  {score:7.3f}  {self.name(i)}{'   <- the held-out item' * (i in wanted)}"
                      for place, (i, score) in enumerate(zip(items, values, strict=True), 1) if i >= 0]
        return lines

    def __str__(self):
        sizes = " / ".join(f"{len(getattr(self, s)):,}" for s in SPLITS)
        widths = ", ".join(f"{name} {x.shape[1]}" for name, x in self.features.items()) or "no features"
        return (f"{self.source}: {self.users:,} users, {self.items:,} items, {sizes} train / valid / test, "
                f"{widths}")


class Sampler:
    """Uniform negatives for (user, positive) pairs, on the device, without a loop and without waiting for it.

    MMRec draws an item that occurs in train and draws again while the user has it. The same distribution
    comes from one draw: number the P items of the pool, let p_0 < p_1 < ... be the user's own; then q_j = p_j
    - j free items lie below p_j, so the r-th free item is r + #{j: q_j <= r}, one binary search in the sorted
    keys u (P + 1) + q.
    """

    def __init__(self, data, device="cpu"):
        user, item = data.train.T.contiguous()
        self.pool = torch.unique(item)                               # (P,) items that occur in train
        size = len(self.pool)
        own = torch.searchsorted(self.pool, item)              # (E,) places in the pool, sorted for each user
        count = torch.bincount(user, minlength=data.users)           # (U,)
        start = count.cumsum(0) - count
        full = torch.nonzero(count == size).flatten()
        if len(full):
            raise ValueError(f"user {full[0]} of {data.source or 'these data'} has every one of the {size:,} "
                             "items that occur in training, so no negative can be drawn: leave this user out")
        keys = user * (size + 1) + own - (torch.arange(len(user)) - start[user])
        self.train, self.size = data.train, size
        self.free = (size - count).to(device)                        # (U,) items a user does not have
        self.keys, self.start, self.pool = keys.to(device), start.to(device), self.pool.to(device)

    def negatives(self, users, generator):
        """One item of the pool for each of users (B,), uniform among those not in the user's train.   -> (B,)

        The B numbers come from the CPU generator, so every device sees the same batch.
        """
        draw = torch.rand(len(users), generator=generator, dtype=torch.float64).to(users.device)
        r = (draw * self.free[users]).long().clamp_max(self.free[users] - 1)
        below = torch.searchsorted(self.keys, users * (self.size + 1) + r, right=True) - self.start[users]
        return self.pool[r + below]

    def batch(self, seed, t, size):
        """Global batch t: users, positives, negatives, (size,) on the device; depends on (seed, t) alone."""
        rows = batch_rows(len(self.train), size, seed, t)
        users, positives = self.train[rows].T.contiguous().to(self.pool.device)
        return users, positives, self.negatives(users, generator(seed, t, 1))


# ---- reading what people download --------------------------------------------------------------------------

def load(name="builtin", root="", seed=0, modalities=(), repair=False):
    """The built-in shop, or a data set in a folder as MMRec, BeFA, MMSSL, DiffMM or an .npz pack have it.

    name        "builtin", or what the files are called: NAME.inter, NAME.npz, else the layout's fixed names
    root        the folder; features are its *_feat.npy, and the prefix is the modality's name
    seed        of the built-in shop, and of the split where a table has no x_label column
    modalities  which ones and in which order; (): all of them, in alphabetical order; ("none",): none
    repair      False: a pair given twice, or a feature row that is zero or not finite, is an error.
                True: keep a pair's first occurrence (train before valid before test), and give bad rows the
                mean of the good ones, as MMRec does for items without a picture; `repaired` counts both
    raises      FileNotFoundError, ValueError: one sentence each
    """
    if name == "builtin":
        data = Interactions(**shop(seed))
        data.features = {m: data.features[m] for m in chosen(data.features, modalities, "the built-in shop")}
        return data
    path = find(name, root)
    splits, users, items = read(path, seed)
    splits = {s: np.asarray(pairs, dtype=np.int64).reshape(-1, 2) for s, pairs in splits.items()}
    if not len(splits["train"]):
        raise ValueError(f"{path}: the train split is empty; train, valid and test all need rows")
    check_ids(splits, users, items, path)
    users, items = (given or 1 + max(int(pairs[:, c].max()) for pairs in splits.values() if len(pairs))
                    for c, given in enumerate((users, items)))
    repaired, dropped = {}, {}
    splits = unique_pairs(splits, items, path, repair, repaired)
    known = np.unique(splits["train"][:, 0])
    for s in ("valid", "test"):            # MMRec's filter_out_cod_start_users: nothing was learnt about them
        keep = np.isin(splits[s][:, 0], known)
        splits[s], dropped[s] = splits[s][keep], int((~keep).sum())
    for s, pairs in splits.items():
        if not len(pairs):
            lost = dropped.get(s)
            after = f" after dropping {lost} rows of users without a training row" if lost else ""
            raise ValueError(f"{path}: the {s} split is empty{after}; train, valid and test all need rows")
    features = read_features(path, items, modalities, repair, repaired)
    tensors = {s: torch.from_numpy(pairs) for s, pairs in splits.items()}
    return Interactions(users, items, **tensors, features=features, source=str(path.name), dropped=dropped,
                        repaired=repaired)


def find(name, root):
    """The file that holds the interactions of `name` in folder `root`."""
    if not str(root) or not Path(root).is_dir():
        raise FileNotFoundError(f"--data={name} needs --root=FOLDER with {name}.inter and *_feat.npy files "
                                f"({root!s:.80} is no folder); or train on the built-in data: --data=builtin")
    root = Path(root)
    names = [name, f"{name}.inter", f"{name}.npz", "interactions.npz", "inter.csv", "inter_small.csv",
             "trnMat.pkl", "train.json"]
    for folder in (root, root / name):
        for candidate in names:
            if (folder / candidate).is_file():
                return folder / candidate
    raise FileNotFoundError(f"{root} holds none of {', '.join(dict.fromkeys(names))}: point --root at "
                            f"the folder with the interactions of {name}, or use --data=builtin")


def read(path, seed):
    """-> {split: (E, 2) pairs}, users, items; the counts are None where the layout does not state them."""
    folder = path.parent
    if path.suffix == ".npz":
        pack = read_arrays(path)
        pack = {"valid" if k == "val" else k: x for k, x in pack.items()}
        for s in SPLITS:
            if s not in pack:
                raise ValueError(f"{path} has no array {s!r}; it has {', '.join(sorted(pack))}")
        counts = [pack.get(k) for k in ("n_users", "n_items")]
        if odd := [x for x in counts if x is not None and (x.size != 1 or x.dtype.kind not in "iu")]:
            raise ValueError(f"{path}: n_users and n_items must be whole numbers, one is {odd[0]!r:.60}")
        counts = [x if x is None else int(x.item()) for x in counts]
        pairs = {s: pack[s] for s in SPLITS}
        for s, x in pairs.items():
            if x.ndim != 2 or x.shape[1] != 2 or x.dtype.kind not in "iu":
                raise ValueError(f"{path}: {s!r} must hold integer pairs (E, 2), it is {x.dtype} {x.shape}")
        return pairs, *counts
    if path.name == "trnMat.pkl":                                   # DiffMM
        mats = [sparse_pairs(folder / f"{s}Mat.pkl") for s in ("trn", "val", "tst")]
        shapes = {shape for _, shape in mats}
        if len(shapes) > 1:
            raise ValueError(f"{folder}: trnMat, valMat and tstMat differ in shape: {sorted(shapes)}")
        return dict(zip(SPLITS, (pairs for pairs, _ in mats), strict=True)), *shapes.pop()
    if path.name == "train.json":                              # MMSSL; train_mat, if there, states the counts
        pairs = {s: json_pairs(folder / f"{s.removesuffix('id')}.json") for s in SPLITS}    # val.json
        stated = sparse_pairs(folder / "train_mat")[1] if (folder / "train_mat").is_file() else (None, None)
        return pairs, *stated
    return table_pairs(path, seed), None, None


def table_pairs(path, seed):
    """MMRec's .inter or BeFA's .csv: a header, tabs or commas, x_label 0 train, 1 valid, 2 test.

    Other columns are ignored. Without x_label the rows are split by MMRec's rule and `seed`.
    """
    lines = read_text(path).splitlines()
    header = lines[0] if lines else ""
    comma = "\t" if "\t" in header else ","
    names = [name.split(":")[0].strip() for name in header.split(comma)]        # RecBole writes user_id:token
    columns = [names.index(n) for n in ("userID", "user_id", "itemID", "item_id", "x_label") if n in names]
    if len(columns) != 2 + ("x_label" in names):
        raise ValueError(f"{path}: the header must name userID and itemID (or user_id, item_id), it is "
                         f"{header[:60]!r}")
    if len(lines) < 2:
        raise ValueError(f"{path} has a header and no rows")
    try:
        table = np.loadtxt(lines[1:], dtype=np.int64, delimiter=comma, usecols=columns, ndmin=2)
    except ValueError as error:                 # numpy names row and column: "could not convert ... at row 3"
        raise ValueError(f"{path}, after the header: {error}; every line needs whole numbers; "
                         "is the file cut?") from error
    if len(columns) == 2:
        label = split_rule(table[:, 0], seed)
    else:
        label = table[:, 2]
        if not np.isin(label, (0, 1, 2)).all():
            row = int(np.argmin(np.isin(label, (0, 1, 2))))
            raise ValueError(f"{path}, line {row + 2}: x_label is {label[row]}, not 0 train, 1 valid, 2 test")
    return {s: table[label == k, :2] for k, s in enumerate(SPLITS)}


def json_pairs(path):
    """{"user": [item, ...], ...} -> (E, 2)"""
    table = read_json(path, dict, "the MMSSL layout is train.json, val.json and test.json")
    try:
        pairs = [(int(u), i) for u, row in table.items() for i in row]
        if odd := [i for _, i in pairs if type(i) is not int]:
            raise ValueError(f"item {odd[0]!r:.40} is not a whole number")
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f'{path} must hold {{"user": [item, ...]}} in whole numbers: {reason(error)}') from error


def sparse_pairs(path):
    """A pickled scipy coo or csr matrix -> the (E, 2) places of its non-zero entries, and its shape."""
    m = load_pickle(path, hint="the DiffMM layout is trnMat.pkl, valMat.pkl and tstMat.pkl")
    if not isinstance(m, dict) or m.get("format") not in ("coo", "csr"):
        raise ValueError(f"{path} holds {type(m).__name__}, expected one scipy.sparse coo or csr matrix")
    try:
        if m["format"] == "coo":
            row, col = m["row"], m["col"]
        else:
            row, col = np.repeat(np.arange(len(m["indptr"]) - 1), np.diff(m["indptr"])), m["indices"]
        users, items = m["shape"]
        return np.stack([row, col], 1)[m["data"] != 0], (int(users), int(items))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: the arrays of the sparse matrix do not fit together ({error})") from error


def read_features(path, items, modalities, repair, repaired):
    """{modality: (I, d) float32} from the *_feat.npy files beside `path`; row = item id."""
    there = {file.name.removesuffix("_feat.npy"): file for file in sorted(path.parent.glob("*_feat.npy"))}
    features = {}
    for name in chosen(there, modalities, path.parent):
        file, x = there[name], read_arrays(there[name])
        if x.ndim != 2 or x.dtype.kind not in "fiu" or len(x) != items:
            raise ValueError(f"{file} is {x.dtype} {x.shape}; it must hold numbers ({items}, d), one row "
                             f"per item of {path.name}")
        x = x.astype(np.float32)                    # TikTok ships float16, whose sums overflow
        bad = ~np.isfinite(x).all(1) | ~x.any(1)
        if bad.any() and not repair:
            row = int(bad.argmax())
            what = "all zeros: its cosine with anything is undefined" if not x[row].any() else "not finite"
            raise ValueError(f"{file}, row {row} is {what} ({bad.sum()} such rows); fix the file, or pass "
                             "--repair to give them the mean of the good rows")
        if bad.all():
            raise ValueError(f"{file} has no usable row: all are zero or not finite")
        if bad.any():
            x[bad], repaired[name] = x[~bad].mean(0), int(bad.sum())
        features[name] = torch.from_numpy(x)
    return features


def chosen(there, wanted, where):
    """The wanted modality names, all of which must be there; (): all, in alphabetical order; ("none",): none."""
    wanted = () if tuple(wanted) == ("none",) else wanted or sorted(there)
    for name in wanted:
        if name not in there:
            raise ValueError(f"{where} has no modality {name!r}; it has {', '.join(sorted(there)) or 'none'}")
    return list(wanted)


def check_ids(splits, users, items, path):
    for s, pairs in splits.items():
        for column, limit, what in ((0, users, "user"), (1, items, "item")):
            ids = pairs[:, column]
            bad = (ids < 0) | (ids >= (limit or 2**31))
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(f"{path}, {s} row {row}: {what} id {ids[row]} is outside 0 .. "
                                 f"{(limit or 2**31) - 1}")


def unique_pairs(splits, items, path, repair, repaired):
    """Each split, sorted by user, then item. A pair that occurs twice, in one split or two, is an error."""
    keys = np.concatenate([pairs[:, 0] * items + pairs[:, 1] for pairs in splits.values()])
    split = np.repeat(np.arange(3), [len(pairs) for pairs in splits.values()])
    order = np.lexsort((split, keys))               # first occurrence first: train before valid before test
    keys, split = keys[order], split[order]
    again = np.r_[False, keys[1:] == keys[:-1]]
    if again.any() and not repair:
        at = int(again.argmax())
        user, item = divmod(int(keys[at]), items)
        raise ValueError(f"{path}: user {user} and item {item} occur twice ({SPLITS[split[at - 1]]} and "
                         f"{SPLITS[split[at]]}; {again.sum()} repeats in all); remove them, or pass "
                         "--repair to keep the first")
    if again.any():
        repaired["pairs"] = int(again.sum())
    return {s: np.stack(np.divmod(keys[~again & (split == k)], items), 1) for k, s in enumerate(SPLITS)}
