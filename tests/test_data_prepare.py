"""Downloads against a server on this machine, archives that mean harm, pickles that are programs."""
import errno
import gzip
import hashlib
import http.server
import io
import pickle
import sys
import tarfile
import threading
import types
import zipfile

import numpy as np
import pytest

from data import prepare, safe
from data.archives import unpack
from data.prepare import fetch, listed, main

BODY = bytes(range(256)) * 4096                                          # 1 MiB, so that four blocks are read
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """/good and /SET/FILE answer Range; /deaf ignores it; /cut stops half-way; /wrong has another byte; /long goes on."""
    cuts, asked = [], []

    def do_GET(self):
        kind, start = self.path.strip("/").split("/")[0], 0
        Server.asked.append((self.path, self.headers.get("Range")))
        body = {"wrong": BODY[:-1] + b"?", "long": BODY + b"more"}.get(kind, BODY)
        if kind == "gone":
            return self.send_error(404)
        if kind != "deaf" and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if kind != "long":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = len(body)
        if kind == "cut" and self.cuts:
            stop = start + self.cuts.pop()
        self.wfile.write(body[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.cuts, Server.asked = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as opened:
        opened.handle_error = lambda *_: None                           # a client that hangs up is part of the tests
        thread = threading.Thread(target=opened.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{opened.server_address[1]}"
        opened.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, tmp_path):
    file = tmp_path / "new" / "x.bin"
    assert fetch(f"{server}/good", file, len(BODY), SHA) == len(BODY) and file.read_bytes() == BODY
    assert fetch(f"{server}/good", file, len(BODY), SHA) == 0, "it is there already"
    assert len(Server.asked) == 1 and [f.name for f in file.parent.iterdir()] == ["x.bin"]


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    file, Server.cuts = tmp_path / "x.bin", [1000, 300_000]
    for have in (300_000, 301_000):
        with pytest.raises(ValueError, match=f"/cut was cut after {have:,} of 1,048,576 bytes; the same command goes on"):
            fetch(f"{server}/cut", file, len(BODY), SHA)
        assert not file.exists() and (tmp_path / "x.bin.part").stat().st_size == have
    assert fetch(f"{server}/cut", file, len(BODY), SHA) == len(BODY) - 301_000 and file.read_bytes() == BODY
    assert [wanted for _, wanted in Server.asked] == [None, "bytes=300000-", "bytes=301000-"]
    assert not (tmp_path / "x.bin.part").exists()


def test_a_server_that_ignores_range_starts_anew(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(BODY[:5000])
    assert fetch(f"{server}/deaf", tmp_path / "x.bin", len(BODY), SHA) == len(BODY)
    assert (tmp_path / "x.bin").read_bytes() == BODY


def test_a_whole_part_needs_no_server_and_too_long_a_part_starts_anew(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(BODY)
    assert fetch(f"{server}/gone", tmp_path / "x.bin", len(BODY), SHA) == 0 and not Server.asked
    (tmp_path / "y.bin.part").write_bytes(BODY + b"junk")
    fetch(f"{server}/good", tmp_path / "y.bin", len(BODY), SHA)
    assert Server.asked == [("/good", None)] and (tmp_path / "y.bin").read_bytes() == BODY


@pytest.mark.parametrize("kind", ["wrong", "long"])
def test_other_content_is_thrown_away(server, tmp_path, kind):
    with pytest.raises(ValueError, match=f"/{kind} is not the published file: its checksum or size differs"):
        fetch(f"{server}/{kind}", tmp_path / "x.bin", len(BODY), SHA)
    assert not list(tmp_path.iterdir()), "neither the file nor a part may stay"


def test_a_part_of_something_else_is_found_out_and_then_fetched_anew(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(b"z" * 5000)
    with pytest.raises(ValueError, match="checksum or size differs"):
        fetch(f"{server}/good", tmp_path / "x.bin", len(BODY), SHA)
    assert fetch(f"{server}/good", tmp_path / "x.bin", len(BODY), SHA) == len(BODY)


def test_a_file_of_that_name_that_is_another_is_not_touched(server, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"x\.bin is not the published file \(4 bytes, expected 1,048,576 .*move it away"):
        fetch(f"{server}/good", tmp_path / "x.bin", len(BODY), SHA)
    assert (tmp_path / "x.bin").read_bytes() == b"mine" and not Server.asked


def test_servers_that_do_not_answer_are_sentences(server, tmp_path):
    with pytest.raises(ValueError, match="/gone answers 404 Not Found; the file may have moved"):
        fetch(f"{server}/gone", tmp_path / "x.bin", len(BODY), SHA)
    with pytest.raises(ValueError, match="http://127.0.0.1:9/x cannot be reached .*the same command tries again"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x.bin", len(BODY), SHA, timeout=5)
    with pytest.raises(ValueError, match="links must begin with http"):
        fetch((tmp_path / "x").as_uri(), tmp_path / "x.bin", len(BODY), SHA)
    assert not list(tmp_path.iterdir())


class Full(io.FileIO):
    """A disk with room for one block."""

    def write(self, block):
        if self.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(block)


def test_a_full_disk_keeps_what_came_and_the_next_try_goes_on(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", Full, raising=False)
        with pytest.raises(ValueError, match=r"x\.bin\.part cannot be written \(No space left on device\); make room"):
            fetch(f"{server}/good", tmp_path / "x.bin", len(BODY), SHA)
    have = (tmp_path / "x.bin.part").stat().st_size
    assert not (tmp_path / "x.bin").exists() and 0 < have < len(BODY)
    assert fetch(f"{server}/good", tmp_path / "x.bin", len(BODY), SHA) == len(BODY) - have


def test_a_folder_that_cannot_be_made_is_a_sentence(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"x\.bin\.part cannot be written \(.*\); make room .* or choose another --root"):
        fetch(f"{server}/good", tmp_path / "file" / "x.bin", len(BODY), SHA)


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_fetches_what_it_lists_and_says_the_rest(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare.FETCH, "svqa", ("good", f"\n   a.txt {len(BODY)} {SHA}\n   b.txt {len(BODY)} {SHA}\n"))
    main(["svqa", f"--root={tmp_path / 'svqa'}", f"--mirror={server}"])
    told = capsys.readouterr().out
    assert "svqa comes from" in told and "questions.json" in told and "--check" in told and told.count("fetched") == 2
    assert [path for path, _ in Server.asked] == [f"/good/{name}.txt" for name in "ab"]
    assert sorted(f.name for f in (tmp_path / "svqa").iterdir()) == ["a.txt", "b.txt"]
    main(["svqa", f"--root={tmp_path / 'svqa'}", f"--mirror={server}"])
    assert capsys.readouterr().out.count("complete") == 2


def test_sets_without_a_link_are_explained_and_leave_no_folder(tmp_path, capsys):
    main(["cub", f"--root={tmp_path / 'birds'}"])
    told = capsys.readouterr().out
    assert "CUB_200_2011.tgz" in told and "bounding_boxes" in told and "no plain link" in told
    assert not list(tmp_path.iterdir())
    main([])
    listing = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{listing}" for name in prepare.PLACES)
    with pytest.raises(ValueError, match="data set 'brids' is unknown; there are birds, coco"):
        main(["brids"])


def test_every_fetched_file_is_the_one_we_measured(shared):
    """Size and SHA-256 of the table against the copies at hand; activitynet lies there gzipped."""
    folders = {"msvd": "msvd_qa", "tgif": "tgif_qa", "svqa": "svqa_splits", "activitynet": "activitynet_qa",
               "tiktok": "rec_tiktok"}
    assert set(folders) == set(prepare.FETCH) <= set(prepare.PLACES)
    for name, folder in folders.items():
        for url, file, size, sha in listed(name):
            path = shared / folder / file
            raw = path.read_bytes() if path.is_file() else gzip.open(f"{path}.gz").read()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, sha), file
            assert url.startswith("https://github.com/")


def test_check_counts_a_folder_with_our_loaders(shared, capsys):
    main(["clevr", f"--root={shared / 'clevr_sv'}", "--check"])
    assert "train stories: 60 with 240 sentences" in capsys.readouterr().out
    main(["msvd", f"--root={shared / 'msvd_qa'}", "--check"])
    told = capsys.readouterr().out
    assert "train questions: 30,933 about 1,161 videos, 1,852 answers" in told
    assert "test questions: absent" in told and "test_qa.json is missing" in told
    main(["tiktok", f"--root={shared / 'rec_tiktok'}", "--check"])
    assert "9,308 users, 6,710 items, train 59,541" in capsys.readouterr().out
    main(["pororo", f"--root={shared / 'pororo_text'}", "--check"])
    assert "descriptions: 13,089" in capsys.readouterr().out


# -- archives ------------------------------------------------------------------------------------------------


def packed(path, members):
    """A zip or tar.gz of {name: bytes, or None for a folder, or ("link", target)}."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                info = zipfile.ZipInfo(name)
                if isinstance(content, tuple):
                    info.external_attr, content = 0o120777 << 16, content[1].encode()
                archive.writestr(info, content or b"")
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname, content = tarfile.SYMTYPE, content[1], b""
            elif content is None:
                info.type, content = tarfile.DIRTYPE, b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


KINDS = pytest.mark.parametrize("kind", ["x.zip", "x.tar.gz"])


@KINDS
def test_a_good_archive_is_unpacked_whole(tmp_path, kind):
    archive = packed(tmp_path / kind, {"a/": None, "a/b.txt": b"text", "a/c/d.bin": BODY, "top.txt": b"t"})
    assert unpack(archive, tmp_path / "out") == 3
    assert (tmp_path / "out" / "a" / "c" / "d.bin").read_bytes() == BODY
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "top.txt"]
    with pytest.raises(ValueError, match="a exists already; move it away first"):
        unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"text"


@KINDS
@pytest.mark.parametrize("name, content, sentence", [
    ("../evil.txt", b"x", r"member '\.\./evil\.txt' would be written outside the folder"),
    ("a/../../evil.txt", b"x", "would be written outside the folder"),
    ("/" + "evil.txt", b"x", "would be written outside the folder"),
    ("..\\evil.txt", b"x", "would be written outside the folder"),
    ("C:evil.txt", b"x", "would be written outside the folder"),
    ("link", ("link", "../evil.txt"), "member 'link' is a link")])
def test_an_archive_that_means_harm_leaves_nothing(tmp_path, kind, name, content, sentence):
    archive = packed(tmp_path / kind, {"good.txt": b"x", name: content})
    with pytest.raises(ValueError, match=sentence) as caught:
        unpack(archive, tmp_path / "out")
    assert "was not unpacked" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([kind, "out"]), "nothing may be left behind"


@KINDS
def test_a_bomb_stops_at_the_limit(tmp_path, kind):
    archive = packed(tmp_path / kind, {"zeros": bytes(5_000_000)})
    with pytest.raises(ValueError, match="it holds more than 1,000,000 bytes"):
        unpack(archive, tmp_path / "out", limit=1_000_000)
    assert not list((tmp_path / "out").iterdir())


@KINDS
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_a_cut_archive_leaves_nothing(tmp_path, kind, keep):
    rng = np.random.default_rng(0)
    archive = packed(tmp_path / kind, {f"{n}.bin": rng.bytes(50_000) for n in range(4)})
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ValueError, match=f"{kind} was not unpacked: .*nothing was left behind"):
        unpack(archive, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
    archive = packed(tmp_path / "x.zip", {"a.bin": np.random.default_rng(0).bytes(50_000)})
    raw = bytearray(archive.read_bytes())
    raw[20_000] ^= 255
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.zip was not unpacked"):
        unpack(archive, tmp_path / "out")


def test_the_command_unpacks_what_was_downloaded_by_hand(tmp_path, capsys):
    packed(tmp_path / "x.zip", {"CUB_200_2011/images.txt": b"1 a.jpg\n"})
    main(["birds", f"--root={tmp_path / 'birds'}", f"--unpack={tmp_path / 'x.zip'}"])
    assert "1 files unpacked" in capsys.readouterr().out and (tmp_path / "birds" / "CUB_200_2011" / "images.txt").is_file()
    with pytest.raises(FileNotFoundError, match=r"no\.zip is missing"):
        unpack(tmp_path / "no.zip", tmp_path / "birds")


# -- pickles -------------------------------------------------------------------------------------------------

VALUES = {"a": np.arange(6).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "t": np.array(["ab", "c"]),
          "z": np.empty((0, 4), np.float32), "b": b"\xff\0", "e": b"", "s": [np.float32(2.5), (1, np.int64(3))], "none": None,
          "u": "na\u00efve", "big": np.arange(3, dtype=">i2"), "bool": np.array([True, False]), "set": {1, 2},
          "d": {1: [2, {3: "x"}]}}


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_from_every_protocol(tmp_path, protocol):
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps(VALUES, protocol))
    found = safe.load_pickle(file)
    assert all(same(VALUES[key], found[key]) for key in VALUES) and found.keys() == VALUES.keys()


def test_a_list_that_holds_itself_and_shared_parts_survive():
    loop = [1]
    loop.append(loop)
    found = safe.load_pickle(pickle.dumps(loop))
    assert found[1] is found
    part = np.arange(3)
    found = safe.load_pickle(pickle.dumps([part, part, (part,)]))
    assert found[0] is found[1] is found[2][0]


def matrix(form, module, protocol):
    """The bytes that pickling a scipy matrix gives, made without scipy: a class of that name with the same state."""
    kind = type(f"{form}_matrix", (), {"__module__": module})
    names = {"coo": ("row", "col"), "csr": ("indices", "indptr"), "csc": ("indices", "indptr")}[form]
    arrays = {"coo": ([0, 1], [2, 0]), "csr": ([2, 0], [0, 1, 2]), "csc": ([1, 0], [0, 1, 1, 2])}[form]
    value = kind()
    value.__dict__.update({"_shape": (2, 3), "data": np.array([5.0, 6.0]), "maxprint": 50,
                           **{name: np.array(a, np.int32) for name, a in zip(names, arrays, strict=True)}})
    stub, kept = types.ModuleType(module), sys.modules.get(module)
    setattr(stub, kind.__name__, kind)
    parents = [".".join(module.split(".")[:k]) for k in range(1, module.count(".") + 1)]
    saved = {name: sys.modules.get(name) for name in parents}
    try:
        sys.modules.update({module: stub, **{name: types.ModuleType(name) for name in parents}})
        return pickle.dumps({"m": value}, protocol), names
    finally:
        for name, old in {**saved, module: kept}.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


@pytest.mark.parametrize("form", ["coo", "csr", "csc"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_sparse_matrices_become_dicts_of_arrays_without_scipy(form, protocol):
    for module in (f"scipy.sparse.{form}", f"scipy.sparse._{form}"):
        raw, names = matrix(form, module, protocol)
        found = safe.load_pickle(raw)["m"]
        assert found["format"] == form and found["shape"] == (2, 3) and found["data"].tolist() == [5, 6]
        assert all(isinstance(found[name], np.ndarray) for name in names)


class Hostile:
    """Its pickle is a program."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


HOSTILE = [pickle.dumps({"a": [Hostile()]}, protocol) for protocol in range(6)] + [
    b"cos\nsystem\n(S'echo x'\ntR.", b"c__builtin__\neval\n(S'1'\ntR.",
    b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'x'\ntR.",
    b"cnumpy\nload\n(S'x'\ntR.", b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
    b"cdata.safe\nload_pickle\n(S'x'\ntR.", b"ctypes\nFunctionType\n."]


@pytest.mark.parametrize("raw", HOSTILE)
def test_a_pickle_that_is_a_program_is_refused_by_name(tmp_path, capsys, raw):
    (tmp_path / "x.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.pkl is refused: the pickle asks for [\w.]+, and only numbers, text") as caught:
        safe.load_pickle(tmp_path / "x.pkl")
    assert "never be printed" not in capsys.readouterr().out and "\n" not in str(caught.value)


def test_a_pickle_that_numbers_its_objects_from_two_thousand_millions_costs_nothing():
    assert safe.load_pickle(b"S'a'\nr\xff\xff\xff\x7f.") == "a", "the reader in C would clear 32 GiB first"


@pytest.mark.parametrize("raw", [b"", b"abc", b"\x80\x05\x96" + (2**45).to_bytes(8, "little"), b"P1\n.", b"\x80\x04]\x94h\x05.",
                                 b"(" * 3000, pickle.dumps(VALUES)[:-40]])
def test_a_damaged_pickle_is_a_sentence(raw):
    with pytest.raises(ValueError, match="the pickle is not a pickle|the pickle is refused") as caught:
        safe.load_pickle(raw)
    assert "\n" not in str(caught.value)


def test_only_a_pickle_whose_every_line_was_changed_is_repaired():
    keys = ["001.A/a_1", "002.B/b"]
    raw = pickle.dumps(keys, 0)
    assert safe.load_pickle(raw.replace(b"\n", b"\r\n")) == keys
    kept = pickle.dumps(["two\r\nlines"], 0)
    assert safe.load_pickle(kept) == ["two\r\nlines"]


def test_object_arrays_are_read_through_the_same_door(tmp_path):
    np.save(tmp_path / "d.npy", np.array({"k": [np.arange(2)]}, dtype=object))
    assert safe.load_object_array(tmp_path / "d.npy")["k"][0].tolist() == [0, 1]
    np.save(tmp_path / "p.npy", np.arange(3))
    assert safe.load_object_array(tmp_path / "p.npy").tolist() == [0, 1, 2]
    np.save(tmp_path / "h.npy", np.array([Hostile()], dtype=object))
    with pytest.raises(ValueError, match=r"h\.npy is refused: the pickle asks for"):
        safe.load_object_array(tmp_path / "h.npy")
    (tmp_path / "c.npy").write_bytes(b"\x93NUM")
    with pytest.raises(ValueError, match=r"c\.npy is not an \.npy file, or it is cut"):
        safe.load_object_array(tmp_path / "c.npy")
