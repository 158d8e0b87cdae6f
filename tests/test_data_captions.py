"""Pictures with sentences: real folders with the counts of their READMEs, AttnGAN's rules, and every kind of bad input."""
import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data import captions, edits, parts, safe, views, world
from data.captions import load
from data.edits import load as load_edits
from tests.test_data_prepare import Hostile

COUNTS = [("birds", "birds", "train", 215, 2150), ("birds", "birds", "test", 220, 2200),
          ("birds64", "birds", "train", 215, 2150), ("birds64", "birds", "test", 220, 2200),
          ("noto", "emoji", "train", 2391, 9521), ("noto", "emoji", "test", 388, 1544),
          ("emojitwo", "emoji", "train", 1263, 5012), ("emojitwo", "emoji", "test", 168, 665),
          ("codraw", "codraw", "train", 2400, None), ("codraw", "codraw", "test", 300, None),
          ("cifar10", "cifar10_subset", "train", 5000, 5000), ("cifar10", "cifar10_subset", "test", 1000, 1000)]


@pytest.mark.parametrize("name, folder, split, pictures, sentences", COUNTS)
def test_real_sets_have_the_counts_of_their_readme(shared, name, folder, split, pictures, sentences):
    data = load(name, shared / folder, split, 64, holdout=0)
    assert len(data) == len(data.captions) == len(data.names) == pictures
    assert sentences in (None, sum(map(len, data.captions)))
    some = data.images([0, len(data) - 1], seed=1)
    assert some.shape == (2, 3, 64, 64) and some.dtype == torch.float32
    assert -1 <= some.min() < some.max() <= 1


def test_birds_are_cut_as_the_ready_made_crops_are(shared):
    """birds64 holds the same boxes cut from the full-size originals; ours come from reduced JPEGs, so not to the bit."""
    files, crops = (load(name, shared / "birds", "test", 64, holdout=0) for name in ("birds", "birds64"))
    assert files.names == crops.names and files.extra["class_id"] == crops.extra["class_id"]
    assert [sorted(c) for c in files.captions] == [sorted(c) for c in crops.captions]
    boxes = captions.read_boxes(shared / "birds" / "CUB_200_2011")
    apart = []
    for row in range(0, 220, 20):
        key = files.names[row]
        image = safe.open_image(shared / "birds" / "CUB_200_2011" / "images" / f"{key}.jpg")
        ours = np.asarray(captions.cut_to_box(image, boxes[key]).resize((64, 64), Image.LANCZOS), dtype=float)
        theirs = ((crops.images([row])[0] + 1) * 127.5).permute(1, 2, 0).numpy()
        apart.append(abs(ours - theirs).mean())
    assert np.mean(apart) < 8, "levels of 255; over all 220 we measured 4.0 (whole pixels of the box), other birds 68"


# -- a small AttnGAN folder of our own ------------------------------------------------------------------------------


def attngan(root, keys=("001.A/a_1", "001.A/a_2", "002.B/b_1"), boxes=True):
    """Three pictures of 100 x 80 with a box, two sentences each, everything in the train part."""
    rng = np.random.default_rng(0)
    for key in keys:
        for folder, end in (("CUB_200_2011/images", "jpg"), ("text", "txt")):
            (root / folder / key).parent.mkdir(parents=True, exist_ok=True)
            if end == "txt":
                (root / folder / f"{key}.{end}").write_text(f"sentence one of {key}\n\n sentence two of {key} \n")
            else:
                Image.fromarray(rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(root / folder / f"{key}.{end}")
    for part in ("train", "test"):
        (root / part).mkdir()
        (root / part / "filenames.txt").write_text("\n".join(keys))
    cub = root / "CUB_200_2011"
    (cub / "images.txt").write_text("".join(f"{n + 7} {key}.jpg\n" for n, key in enumerate(keys)))
    (cub / "bounding_boxes.txt").write_text("".join(f"{n + 7} 30.9 20.2 40.6 20.0\n" for n in range(len(keys))))
    return root


def test_the_box_is_cut_by_the_rule_of_the_papers(tmp_path):
    """By hand: box (30, 20, 40, 20), r = int(0.75 * 40) = 30, centre (50, 30) -> columns 20..80, rows 0..60."""
    image = Image.fromarray(np.arange(80 * 100, dtype=np.int32).reshape(80, 100).astype(np.uint8))
    cut = np.asarray(captions.cut_to_box(image, (30, 20, 40, 20)))
    assert cut.shape == (60, 60) and (cut == np.asarray(image)[0:60, 20:80]).all()
    with pytest.raises(ValueError, match="lies outside"):
        captions.cut_to_box(image, (500, 500, 4, 4))
    assert captions.read_boxes(attngan(tmp_path) / "CUB_200_2011")["001.A/a_1"] == (30, 20, 40, 20)


@pytest.mark.parametrize("wide, high", [(500, 400), (333, 500), (64, 64), (90, 1000)])
def test_the_short_side_becomes_76_64ths_of_the_size(wide, high):
    out = parts.shrink(Image.new("RGB", (wide, high)), 64)
    assert min(out.shape[:2]) == 76
    assert abs(max(out.shape[:2]) - 76 * max(wide, high) / min(wide, high)) < 1


def test_crop_and_flip_are_functions_of_seed_and_row_alone():
    picture = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    fetch = parts.cropped(lambda row: picture, 8, True)
    together, alone = fetch([0, 1, 2, 3], 5), fetch([2], 5)
    assert torch.equal(together[2:3], alone)
    windows = {}
    for top in range(3):
        for left in range(5):
            window = picture[top : top + 8, left : left + 8]
            for mirrored, shown in ((False, window), (True, window[:, ::-1])):
                windows[parts.to_tensor([shown]).numpy().tobytes()] = (top, left, mirrored)
    seen = [windows[fetch([row], 9).numpy().tobytes()] for row in range(600)]            # KeyError: not a window at all
    assert set(seen) == set(windows.values()), "every window, mirrored or not, should turn up in 600 draws"
    assert 240 < sum(mirrored for *_, mirrored in seen) < 360                          # binomial, 5 standard deviations
    assert windows[fetch([0], None).numpy().tobytes()] == (1, 2, False), "without a seed it is the centre"


def test_sentences_are_drawn_evenly_and_reproducibly(tmp_path):
    data = load("birds", attngan(tmp_path), "train", 32, holdout=0)
    assert data.captions[0] == ["sentence one of 001.A/a_1", "sentence two of 001.A/a_1"]
    assert data.sentences([2, 0], 4) == [data.sentences([2], 4)[0], data.sentences([0], 4)[0]]
    drawn = [data.sentences([0], seed)[0] for seed in range(200)]
    assert 60 < sum(text == data.captions[0][0] for text in drawn) < 140
    assert data.extra["class_id"] == [1, 1, 2]


def test_pickled_lists_are_read_even_after_a_windows_checkout(tmp_path):
    root = attngan(tmp_path)
    keys = (root / "train" / "filenames.txt").read_text().split()
    for protocol in (0, 2, 4):
        (root / "train" / "filenames.txt").unlink(missing_ok=True)
        raw = pickle.dumps(keys, protocol)
        (root / "train" / "filenames.pickle").write_bytes(raw.replace(b"\n", b"\r\n") if protocol == 0 else raw)
        assert load("birds", root, "train", 32, holdout=0).names == keys


def spoil_hostile(root):
    (root / "train" / "filenames.txt").unlink()
    (root / "train" / "filenames.pickle").write_bytes(pickle.dumps(["a", Hostile()]))


def spoil_picture(root):
    file = root / "CUB_200_2011" / "images" / "001.A" / "a_1.jpg"
    file.write_bytes(file.read_bytes()[:-400])


def write(name, content):
    return lambda root: (root / name).write_bytes(content)


@pytest.mark.parametrize("spoil, sentence", [
    (spoil_hostile, r"filenames\.pickle is refused: the pickle asks for (builtins|__builtin__)\.print"),
    (spoil_picture, r"a_1\.jpg is not a picture that can be read, or it is cut"),
    (lambda root: (root / "CUB_200_2011/images/001.A/a_2.jpg").unlink(), r"a_2\.jpg is missing: .*train lists it"),
    (lambda root: (root / "text/002.B/b_1.txt").unlink(), r"b_1\.txt is missing: the sentences of 002\.B/b_1"),
    (write("text/002.B/b_1.txt", b"\n  \n"), r"b_1\.txt holds no sentence; write at least one"),
    (write("text/002.B/b_1.txt", "fine\nna\u00efve".encode("latin1")), r"b_1\.txt, line 2: byte 0xef is not UTF-8"),
    (write("train/filenames.txt", b""), r"train: filenames must be a list of keys"),
    (write("train/filenames.txt", b"../../a"), r"key '\.\./\.\./a' leads outside the folder"),
    (write("CUB_200_2011/bounding_boxes.txt", b"7 1 2 3\n"), r"bounding_boxes\.txt, line 1: '7 1 2 3' is not '<id> x y w h'"),
    (write("CUB_200_2011/bounding_boxes.txt", b"7 1 2 30 40\n"), r"001\.A/a_2 has no line in images\.txt and bounding_boxes"),
])
def test_a_spoilt_folder_ends_in_one_sentence(tmp_path, capsys, spoil, sentence):
    root = attngan(tmp_path)
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load("birds", root, "train", 32, holdout=0).images([0, 1, 2])
    assert "\n" not in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out


def test_coco_is_found_in_all_its_folders(tmp_path):
    for where in ("images/{}", "images/{}/jpg", "images"):
        root = tmp_path / where.replace("/", "-")
        for part, key in (("train", "COCO_train2014_000000000009"), ("test", "COCO_val2014_000000000042")):
            folder = root / where.format(key.split("_")[1])
            for made in (folder, root / "text", root / part):
                made.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (50, 40), (255, 0, 0)).save(folder / f"{key}.jpg")
            (root / "text" / f"{key}.txt").write_text("a red picture\n")
            (root / part / "filenames.pickle").write_bytes(pickle.dumps([key]))
        for part in ("train", "test"):
            data = load("coco", root, part, 16, holdout=0)
            assert data.captions == [["a red picture"]] and data.images([0])[0, 0].min() > 0.9


# -- picture modes --------------------------------------------------------------------------------------------------


def picture(mode):
    """A 4 x 4 picture whose left half is fully transparent where the mode can, and black where it cannot."""
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(np.repeat([[0, 0, 255, 255]], 4, 0).astype(np.uint8))
        image = Image.new("RGB" if mode == "RGBA" else "L", (4, 4))
        image.putalpha(alpha)
        return image
    if mode == "P":
        image = Image.fromarray(np.repeat([[0, 0, 1, 1]], 4, 0).astype(np.uint8)).convert("P")
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        return image
    if mode == "I;16":
        return Image.fromarray(np.repeat([[65535, 65535, 0, 257 * 40]], 4, 0).astype(np.uint16))
    return Image.fromarray(np.repeat([[255, 255, 0, 0]], 4, 0).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16", "CMYK", "RGB"])
def test_every_picture_mode_becomes_rgb_on_white(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = picture(mode)
    image.save(file, **({"transparency": 0} if mode == "P" else {}))
    shown = np.asarray(safe.open_image(file))
    assert shown.shape == (4, 4, 3)
    assert (shown[:, :2] == 255).all(), "transparent or white pixels are white"
    assert (shown[:, 2] == 0).all() and (shown[:, 3] == (40 if mode == "I;16" else 0)).all()


def test_a_float_picture_is_refused_not_guessed(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="x.tif .*no fixed white"):
        safe.open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("end", ["jpg", "png", "gif", "webp", "bmp"])
def test_a_picture_cut_anywhere_is_a_sentence(tmp_path, end):
    file = tmp_path / f"x.{end}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    whole = file.read_bytes()
    for keep in (0, 1, 20, len(whole) // 2, len(whole) - 200):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"x.{end} is not a picture that can be read, or it is cut"):
            safe.open_image(file)


# -- folders and packs ----------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_split_by_name(tmp_path):
    for n in range(60):
        Image.new("RGB", (20, 30), (n, n, n)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"grey number {n}\n")
    found = {split: load("folder", tmp_path, split, 16) for split in ("train", "valid", "test")}
    names = [set(data.names) for data in found.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 60 and all(names)
    some = found["train"]
    level = int(some.names[3])
    assert some.captions[3] == [f"grey number {level}"]
    assert torch.allclose(some.images([3]), torch.tensor(level / 127.5 - 1), atol=1e-6)
    before = set(found["train"].names)
    Image.new("RGB", (20, 30)).save(tmp_path / "new.png")
    (tmp_path / "new.txt").write_text("new")
    assert before <= set(load("folder", tmp_path, "train", 16).names) <= before | {"new"}, "a new file must move no old one"


def test_a_folder_may_bring_its_own_parts(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "deep").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / split / "deep" / "x.webp")
        (tmp_path / split / "deep" / "x.txt").write_text(split)
    assert load("folder", tmp_path, "test", 8).captions == [["test"]]
    (tmp_path / "train" / "deep" / "x.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.txt is missing: the sentences of x\.webp"):
        load("folder", tmp_path, "train", 8)
    (tmp_path / "train" / "deep" / "x.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"x\.txt holds no sentence"):
        load("folder", tmp_path, "train", 8)


def pack(root, n=20, rows=None, images=None):
    images = np.arange(n * 48, dtype=np.uint8).reshape(n, 4, 4, 3) if images is None else images
    np.savez(root / "x.npz", images=images)
    rows = rows or [{"index": i, "captions": [f"number {i}"]} for i in range(n)]
    (root / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "x.npz"


def test_packs_are_read_resized_and_cut_by_rows(tmp_path):
    data = load("npz", pack(tmp_path), "train", 8)
    assert data.images([0]).shape == (1, 3, 8, 8) and data.captions[0] == [f"number {data.names[0]}"]
    exact = load("npz", pack(tmp_path), "train", 4)
    row = int(exact.names[2])
    expected = np.arange(row * 48, row * 48 + 48, dtype=np.uint8).reshape(4, 4, 3).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(exact.images([2], seed=7)[0], expected, atol=1e-6), "stored size: same pixels, never mirrored"


@pytest.mark.parametrize("change, sentence", [
    ({"images": np.zeros((20, 4, 4, 3), np.float32)}, r"x\.npz: `images` is float32 \(20, 4, 4, 3\); it must be uint8 \(N, h"),
    ({"images": np.zeros((19, 4, 4, 3), np.uint8)}, r"x\.jsonl has 20 lines, .*x\.npz has 19 rows"),
    ({"rows": [{"index": 0, "captions": ["a"]}] * 20}, r"x\.jsonl, line 2 has index 0, expected 1"),
    ({"rows": [{"index": i, "captions": ["a"] if i else ["  "]} for i in range(20)]}, r"x\.jsonl, line 1 has no caption"),
    ({"rows": [{"index": i, "captions": "a"} for i in range(20)]}, r"line 1: 'captions' is 'a', expected list"),
    ({"rows": [[1, 2]] * 20}, r"line 1 is a list, expected an object with captions"),
])
def test_a_pack_of_the_wrong_shape_ends_in_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        load("npz", pack(tmp_path, **change), "train", 4)


def test_a_cut_pack_and_a_line_that_is_not_json_are_named(tmp_path):
    file = pack(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"index": 0, "captions": ["a"]}\n{"index": 1, "capt')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2 is not JSON"):
        load("npz", file, "train", 4)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"x\.npz is damaged, cut"):
        load("npz", file, "train", 4)
    np.savez(file, images=np.array([{"a": 1}], dtype=object))                           # a pickle inside
    with pytest.raises(ValueError, match=r"x\.npz is damaged, cut, or not the numpy file"):
        load("npz", file, "train", 4)


def test_class_names_become_sentences(shared):
    told = load("cifar10", shared / "cifar10_subset", "test", 32, holdout=0).captions
    assert {text for [text] in told} == {
        "a photo of an airplane", "a photo of an automobile", "a photo of a bird", "a photo of a cat", "a photo of a deer",
        "a photo of a dog", "a photo of a frog", "a photo of a horse", "a photo of a ship", "a photo of a truck"}


def test_names_and_places_are_checked_at_the_door(tmp_path):
    for call, sentence in ((lambda: load("bird", tmp_path), "captions 'bird' are unknown; there are builtin"),
                           (lambda: load("birds"), "--root for birds is missing: type  python -m data.prepare birds"),
                           (lambda: load("birds", tmp_path, "val"), "split 'val' is unknown; it is train, valid or test"),
                           (lambda: load("noto", tmp_path), r"noto_train\.npz is missing")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            call()


# -- held-out rows, edits, the built-in world -----------------------------------------------------------------------


def test_no_concept_of_an_emoji_is_in_train_and_valid(shared):
    train, valid = (load("noto", shared / "emoji", split, 64) for split in ("train", "valid"))
    assert len(train) + len(valid) == 2391 and 0.09 < len(valid) / 2391 < 0.12
    shared_labels = set(train.extra["base_label"]) & set(valid.extra["base_label"])
    assert not shared_labels, f"the same emoji is on both sides: {sorted(shared_labels)[:3]}"
    first = load("noto", shared / "emoji", "train", 64, holdout=0)
    assert torch.equal(train.images([5]), first.images([first.names.index(train.names[5])])), "rows keep their pictures"


@pytest.mark.parametrize("name, train, test", [("noto", 2104, 356), ("emojitwo", 297, 35)])
def test_emoji_edits_have_the_counts_of_the_readme_and_stay_in_their_part(shared, name, train, test):
    found = {split: load_edits(name, shared / "emoji", split) for split in ("train", "valid", "test")}
    assert len(load_edits(name, shared / "emoji", "train", holdout=0)) == train and len(found["test"]) == test
    assert len(found["train"]) + len(found["valid"]) == train, "a pair across train and valid would be lost"
    with np.load(shared / "emoji" / f"{name}_test.npz") as arrays:
        images = arrays["images"]
    source, target, kind, said = (shared / "emoji" / f"{name}_test_edits.tsv").read_text().splitlines()[4].split("\t")
    pairs = found["test"]
    assert (pairs.kinds[3], pairs.instructions[3]) == (kind, said)
    for row, shown in ((source, pairs.source([3])), (target, pairs.target([3]))):
        assert np.allclose(shown[0].permute(1, 2, 0), images[int(row)] / 127.5 - 1, atol=1e-6)


def test_an_edit_list_that_is_wrong_is_named(tmp_path):
    np.savez(tmp_path / "noto_test.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    rows = [{"index": i, "captions": ["a"], "base_label": "a"} for i in range(3)]
    (tmp_path / "noto_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line, sentence in (("0\t9\ttone\tx", r"rows \(0, 9\) are not among the 3"), ("0 1 tone x", "is not 'source target")):
        (tmp_path / "noto_test_edits.tsv").write_text(f"source\ttarget\tkind\tinstruction\n{line}\n")
        with pytest.raises(ValueError, match=r"edits\.tsv, line 2: .*" + sentence):
            load_edits("noto", tmp_path, "test", 4)


def test_codraw_edits_go_from_frame_to_frame(shared):
    pairs = load_edits("codraw", shared / "codraw", "test")
    assert len(pairs) == 200 * 4
    assert torch.equal(pairs.source([1]), pairs.target([0])) and not torch.equal(pairs.source([4]), pairs.target([3]))
    lines = (shared / "codraw" / "stories_val.jsonl").read_text().splitlines()
    assert pairs.instructions[:4] == json.loads(lines[0])["captions"][1:]


def test_birds_get_another_birds_sentence(shared):
    pairs, again = (load_edits(name, shared / "birds", "test") for name in ("birds", "cub"))
    assert pairs.target is None and list(pairs.instructions) == list(again.instructions)
    own = sum(text in texts for text, texts in zip(pairs.instructions, pairs.captions, strict=True))
    assert own <= 4, "the instruction should come from another picture (a few sentences occur twice in the set)"


def test_builtin_pictures_are_the_worlds():
    data = load(split="valid", size=32, seed=3)
    scene = world.scenes([5, 9], 3, "valid", (1, 1))
    assert torch.equal(data.images([5, 9], seed=1), world.render(scene, 32)[0])
    assert list(data.captions[9]) == [world.captions(scene, k)[1] for k in range(10)]
    assert data.extra["facts"][5] == world.facts(scene)[0]
    drawn = data.sentences(range(40), 2)
    assert drawn == data.sentences(range(40), 2) != data.sentences(range(40), 3)
    assert all(text in data.captions[row] for row, text in enumerate(drawn))


def test_builtin_edits_leave_everything_but_the_mask_alone():
    pairs = load_edits(split="test", size=32)
    rows = list(range(12))
    source, target, mask = pairs.source(rows), pairs.target(rows), pairs.mask(rows)
    assert mask.shape == (12, 1, 32, 32) and ((source == target) | (mask > 0)).all()
    assert all((source[b] != target[b]).any() for b in range(12)), "every edit changes something"
    assert pairs.instructions[4] == views.edits([4], 0, "test")["sentence"][0] and pairs.kinds[4] in views.EDITS


def test_no_error_sentence_spans_lines():
    """What a user reads is one line: no raise in the loaders holds a line break."""
    for module in (captions, edits, parts, safe):
        source = open(module.__file__, encoding="utf-8").read()
        assert not re.search(r'(ValueError|FileNotFoundError)\(f?"[^"]*\\n', source), module.__name__
