"""Frames with sentences: packs, PororoSV, FlintstonesSV, CLEVR-SV and AR-LDM's file, on real folders and on spoilt copies."""
import io
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import stories, views, world
from data.stories import load
from tests.test_data_prepare import Hostile


@pytest.mark.parametrize("name, folder, split, count, frames", [
    ("codraw", "codraw", "train", 1600, 5), ("codraw", "codraw", "test", 200, 5),
    ("clevr", "clevr_sv", "train", 60, 4), ("clevr", "clevr_sv", "test", 16, 4)])
def test_real_packs_have_the_counts_of_their_readme(shared, name, folder, split, count, frames):
    data = load(name, shared / folder, split, 64, holdout=0)
    assert len(data) == count and all(len(told) == frames for told in data.captions)
    shown = data.frames([0, count - 1])
    assert shown.shape == (2, frames, 3, 64, 64) and -1 <= shown.min() < shown.max() <= 1
    part = "train" if split == "train" else "val"
    with np.load(shared / folder / f"stories64_{part}.npz") as arrays:
        first = arrays["images"][0]
    assert np.allclose(shown[0].permute(0, 2, 3, 1), first / 127.5 - 1, atol=1e-6)


def test_held_out_stories_are_not_in_train(shared):
    parts = [load("codraw", shared / "codraw", split) for split in ("train", "valid")]
    assert [len(part) for part in parts] == [1440, 160]
    assert not set(parts[0].names) & set(parts[1].names)
    assert len(parts[1].extra["objects"]) == 160


def test_clevr_sentences_are_written_from_the_attributes_as_in_the_pack(shared):
    for split in ("train", "test"):
        data = load("clevr", shared / "clevr_sv", split, holdout=0)
        for told, attributes in zip(data.captions, data.extra["attributes"], strict=True):
            assert stories.clevr_captions(attributes) == told


def test_pororos_descriptions_have_the_counts_of_their_readme(shared):
    described = stories.pororo_descriptions(shared / "pororo_text" / "descriptions.csv")
    assert sum(map(len, described.values())) == 13089
    assert described["Pororo_ENGLISH1_1_ep10/1"][0] == "Eddy is looking for something in Eddy's library."


def test_five_consecutive_shots_make_a_story(shared):
    """Oracle: for every shot, scan all shots of its episode for the next four starting frames."""
    rows = (shared / "flintstones_text" / "val.tsv").read_text().splitlines()[1:]
    shots = sorted(row.partition("\t")[0] for row in rows)
    found = stories.following(shots[::-1])
    for shot in shots[:300]:
        episode = shot.split("_shot_")[0]
        later = sorted((s for s in shots if s.split("_shot_")[0] == episode and s > shot), key=lambda s: int(s.split("_")[-2]))
        assert found.get(shot) == (later[:4] if len(later) >= 4 else None)
    with pytest.raises(ValueError, match="'shot7' is not the id of a shot such as"):
        stories.following(["shot7"])


# -- PororoSV -------------------------------------------------------------------------------------------------------


def pororo(root, scenes=9):
    """One episode of nine scenes, strips of 1 to 3 frames whose grey value is 20 scene + frame; stories of train start at 1."""
    (root / "ep1").mkdir(parents=True)
    for n in range(1, scenes + 1):
        strip = np.repeat([[[20 * n + f] * 3] * 8 for f in range(1 + n % 3)], 8, 0).astype(np.uint8)
        Image.fromarray(strip.reshape(-1, 8, 3)).save(root / "ep1" / f"{n}.png")
    rows = [f'ep1,{n},"scene {n}, first"\nep1,{n},scene {n} again\n' for n in range(1, scenes + 1)]
    (root / "descriptions.csv").write_text("".join(rows))
    paths = [str(f"ep1/{n}.png".encode()) for n in range(1, scenes + 1)]                # text such as "b'ep1/1.png'"
    starts = range(scenes - 4)
    np.save(root / "img_cache4.npy", np.array([paths[n] for n in starts]))
    np.save(root / "following_cache4.npy", np.array([paths[n + 1 : n + 5] for n in starts]))
    ids = np.empty(3, dtype=object)
    ids[:] = [np.array([0, 2]), np.array([3]), np.array([1, 4])]
    np.save(root / "train_seen_unseen_ids.npy", ids)
    np.save(root / "labels.npy", np.array({f"ep1/{n}": np.eye(9)[n % 9] for n in range(1, scenes + 1)}, dtype=object))
    return root


def test_pororo_is_read_in_the_official_layout(tmp_path):
    data = load("pororo", pororo(tmp_path / "p"), "train", 8)
    assert data.names == ["ep1/1", "ep1/3"] and len(load("pororo", tmp_path / "p", "test", 8)) == 2
    assert data.captions[1] == [f"scene {n}, first" for n in range(3, 8)]
    assert data.extra["descriptions"][0][0] == ["scene 1, first", "scene 1 again"]
    assert data.extra["characters"][0][2].argmax() == 3
    level = lambda shown: ((shown[..., 0, 0, 0] + 1) * 127.5).round().int()  # noqa: E731
    assert level(data.frames([0]))[0].tolist() == [20 * n + (1 + n % 3) // 2 for n in range(1, 6)], "the middle frame"
    drawn = torch.stack([level(data.frames([0], seed))[0] for seed in range(60)])
    for f, n in enumerate(range(1, 6)):
        assert set(drawn[:, f].tolist()) == {20 * n + k for k in range(1 + n % 3)}, "every frame of a strip is drawn"
    assert torch.equal(data.frames([1, 0], 7)[1:], data.frames([0], 7)), "a function of (seed, row)"


def test_pororo_descriptions_may_be_a_pickled_table(tmp_path):
    root = pororo(tmp_path)
    table = stories.pororo_descriptions(root / "descriptions.csv")
    (root / "descriptions.csv").unlink()
    np.save(root / "descriptions.npy", np.array(table, dtype=object))
    assert load("pororo", root, "valid", 8).captions == [[f"scene {n}, first" for n in range(4, 9)]]


def save_hostile(root):
    np.save(root / "labels.npy", np.array({"ep1/1": Hostile()}, dtype=object))


def shorten(name, rows):
    return lambda root: np.save(root / name, np.load(root / name)[:rows])


@pytest.mark.parametrize("spoil, sentence", [
    (save_hostile, r"labels\.npy is refused: the pickle asks for \w+\.print"),
    (lambda root: (root / "ep1/3.png").unlink(), r"3\.png is missing: img_cache4\.npy and following_cache4\.npy list it"),
    (lambda root: (root / "img_cache4.npy").unlink(), r"img_cache4\.npy is missing"),
    (shorten("img_cache4.npy", 4), r"img_cache4\.npy has 4 stories, following_cache4\.npy 5"),
    (lambda root: (root / "descriptions.csv").write_text("ep1,1,only this\n"), r"the scene ep1/2 is part of a story and has no"),
    (lambda root: (root / "descriptions.csv").write_text("ep1,1,fine\nep1,2,\n"), r"descriptions\.csv, row 2: 'ep1,2,' is not"),
    (lambda root: (root / "descriptions.csv").write_bytes(b"ep1,1,na\xefve\n"), r"descriptions\.csv, line 1: byte 0xef is not"),
    (lambda root: Image.new("RGB", (8, 12)).save(root / "ep1/1.png"), r"1\.png is 8 x 12 pixels; a strip's height is a multiple"),
    (lambda root: (root / "ep1/1.png").write_bytes(b"\x89PNG"), r"1\.png is not a picture that can be read"),
    (lambda root: np.save(root / "labels.npy", np.array({"ep1/1": [1]}, dtype=object)), r"labels\.npy has no character flags"),
    (lambda root: np.save(root / "img_cache4.npy", np.array(["../../x.png"] * 5)), r"names '\.\./\.\./x\.png', which leads out"),
])
def test_a_spoilt_pororo_folder_ends_in_one_sentence(tmp_path, capsys, spoil, sentence):
    root = pororo(tmp_path)
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load("pororo", root, "train", 8).frames([0, 1])
    assert "\n" not in str(caught.value) and "never be printed" not in capsys.readouterr().out


# -- FlintstonesSV, CLEVR-SV, AR-LDM -------------------------------------------------------------------------------


def flintstones(root, count=7):
    """One episode of seven shots of three frames; the grey value is 10 shot + frame."""
    (root / "video_frames_sampled").mkdir(parents=True)
    shots = [f"s_01_e_02_shot_{n:06d}_{n + 9:06d}" for n in range(count)]
    told = [{"globalID": shot, "description": f" Fred is in shot {n}. "} for n, shot in enumerate(shots)]
    (root / "flintstones_annotations_v1-0.json").write_text(json.dumps(told))
    for n, shot in enumerate(shots):
        clip = np.stack([np.full((8, 8, 3), 10 * n + f, np.uint8) for f in range(3)])
        np.save(root / "video_frames_sampled" / f"{shot}.npy", clip)
    split = {"train": shots[:2] + shots[-1:], "val": shots[2:3], "test": []}
    (root / "train-val-test_split.json").write_text(json.dumps(split))
    return shots


def test_flintstones_is_read_with_and_without_the_cache_of_followers(tmp_path):
    shots = flintstones(tmp_path)
    plain = load("flintstones", tmp_path, "train", 8)
    assert plain.names == shots[:2], "the last shot has no four followers, so it starts no story"
    later = {shot: shots[n + 1 : n + 5] for n, shot in enumerate(shots) if n < 3}
    (tmp_path / "following_cache4.pkl").write_bytes(pickle.dumps(later, 0).replace(b"\n", b"\r\n"))
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps({shot: np.arange(7) for shot in shots}, 2))
    data = load("flintstones", tmp_path, "train", 8)
    assert data.names == plain.names and data.captions == plain.captions
    assert data.captions[1] == [f"Fred is in shot {n}." for n in range(1, 6)] and len(data.extra["characters"][0]) == 5
    assert ((data.frames([1])[0, :, 0, 0, 0] + 1) * 127.5).round().tolist() == [10 * n + 1 for n in range(1, 6)]
    assert load("flintstones", tmp_path, "valid", 8).names == [shots[2]]


@pytest.mark.parametrize("name, content, sentence", [
    ("flintstones_annotations_v1-0.json", b"{}", "annotations_v1-0.json holds a dict, expected a list"),
    ("flintstones_annotations_v1-0.json", b"[1]", "annotations_v1-0.json, entry 0 is a int, expected an object with globalID"),
    ("flintstones_annotations_v1-0.json", b'[{"globalID": "s_01_e_0', "annotations_v1-0.json is not JSON, or it is cut"),
    ("train-val-test_split.json", b'{"train": 3}', "split.json needs lists under train, val and test"),
    ("following_cache4.pkl", pickle.dumps({"a": Hostile()}), r"following_cache4\.pkl is refused: the pickle asks for"),
    ("labels.pkl", b"\x80\x04nonsense", r"labels\.pkl is not a pickle"),
    ("video_frames_sampled/s_01_e_02_shot_000001_000010.npy", b"\x93NUMPY", r"_000010\.npy is damaged, cut"),
])
def test_a_spoilt_flintstones_folder_ends_in_one_sentence(tmp_path, capsys, name, content, sentence):
    flintstones(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load("flintstones", tmp_path, "train", 8).frames([0])
    assert "never be printed" not in capsys.readouterr().out


def test_clevr_is_read_in_storygans_own_layout(tmp_path, shared):
    """The attributes of ten real stories, pictures of our own."""
    real = load("clevr", shared / "clevr_sv", "train", holdout=0)
    (tmp_path / "images").mkdir()
    table = {}
    for story in range(10):
        for t in range(4):
            name = f"CLEVR_new_{story:06d}_{t + 1}.png"
            table[name] = real.extra["attributes"][story][t]
            Image.new("RGB", (32, 24), (story * 10, t * 10, 0)).save(tmp_path / "images" / name)
    np.save(tmp_path / "CLEVR_dict.npy", np.array(table, dtype=object))
    train, test = (load("clevr", tmp_path, split, 16, holdout=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and train.captions == real.captions[:8] and test.captions == real.captions[8:10]
    shown = ((train.frames([3])[0, :, :2, 5, 5] + 1) * 127.5).round().int()
    assert shown.tolist() == [[30, 10 * t] for t in range(4)]
    (tmp_path / "images" / "CLEVR_new_000003_2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"000003_2\.png is missing: CLEVR_dict\.npy lists it"):
        load("clevr", tmp_path, "train", 16)


def test_hdf5_without_h5py_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "pororo.h5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)                                     # import h5py raises ImportError
    with pytest.raises(ValueError, match=r"pororo\.h5 is an HDF5 file and the package h5py is not installed: type  pip inst"):
        load("hdf5", tmp_path / "pororo.h5", "train")


def test_ar_ldms_file_is_read_where_h5py_is_installed(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed, and this project does without it")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("train")
        group.create_dataset("text", data=[b"a|b|c|d|e", b"f|g|h|i|j"], dtype=h5py.string_dtype())
        for f in range(5):
            image = group.create_dataset(f"image{f}", (2,), dtype=h5py.vlen_dtype(np.uint8))
            for n in range(2):
                out = io.BytesIO()
                Image.new("RGB", (8, 16), (n * 50, f * 20, 200)).save(out, "PNG")
                image[n] = np.frombuffer(out.getvalue(), np.uint8)
    data = load("hdf5", tmp_path / "x.h5", "train", 8)
    assert data.captions == [list("abcde"), list("fghij")]
    assert ((data.frames([1])[0, :, :, 3, 3] + 1) * 127.5).round().tolist() == [[50, f * 20, 200] for f in range(5)]
    with pytest.raises(ValueError, match="x.h5 has no group 'test' with image0"):
        load("hdf5", tmp_path / "x.h5", "test")
    (tmp_path / "y.h5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match=r"y\.h5 is not an HDF5 file, or it is cut"):
        load("hdf5", tmp_path / "y.h5", "train")


# -- packs that are wrong, the built-in world -----------------------------------------------------------------------


@pytest.mark.parametrize("captions, images, sentence", [
    ([["a", "b"], ["c"]], (2, 2, 4, 4, 3), r"jsonl, line 2 needs 2 captions, one a frame and none empty; it has 1"),
    ([["a", "b"], ["c", " "]], (2, 2, 4, 4, 3), r"jsonl, line 2 needs 2 captions"),
    ([["a", "b"]], (2, 2, 4, 4, 3), r"jsonl has 1 lines, .*npz has 2 rows"),
    ([["a", "b"]], (1, 4, 4, 3), r"npz: `images` is uint8 \(1, 4, 4, 3\); it must be uint8 \(N, F, h, w, 3\)"),
])
def test_a_pack_of_the_wrong_shape_ends_in_one_sentence(tmp_path, captions, images, sentence):
    np.savez(tmp_path / "stories64_train.npz", images=np.zeros(images, np.uint8))
    lines = [json.dumps({"index": n, "captions": told}) for n, told in enumerate(captions)]
    (tmp_path / "stories_train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=sentence):
        load("codraw", tmp_path, "train", 4, holdout=0)


def test_builtin_stories_are_the_worlds():
    data = load(split="valid", size=16, seed=2, frames=3, looks="story")
    view = views.stories([4, 8], 2, "valid", 3, "story")
    assert data.captions[8] == view["sentences"][1] and len(data) == 2048
    expected = world.render(view["scene"], 16)[0].view(2, 3, 3, 16, 16)
    assert torch.equal(data.frames([4, 8]), expected)
    assert torch.equal(data.extra["view"][4]["character"], view["character"][:1])


def test_names_are_checked_at_the_door(tmp_path):
    for call, sentence in ((lambda: load("porora", tmp_path), "stories 'porora' are unknown; there are builtin, codraw"),
                           (lambda: load("pororo", tmp_path / "no"), "no is missing: type  python -m data.prepare pororo"),
                           (lambda: load("codraw", tmp_path, "dev"), "split 'dev' is unknown")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            call()
