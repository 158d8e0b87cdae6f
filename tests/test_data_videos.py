"""Questions, their encoding, frames and features: real folders with their counts, HCRN's arrays as golden reference."""
import csv
import gzip
import json
import shutil
import sys
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from data import quiz, safe
from data.frames import clip_rows, load_features, open_frames, read_glove
from data.videos import Question, build_vocabulary, encode, load_questions, question_words, with_videos, words

# -- real question files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, folder, split, kind, count, videos, answers", [
    ("msvd", "msvd_qa", "train", "", 30933, 1161, 1852), ("msvd", "msvd_qa", "valid", "", 6415, 245, None),
    ("msrvtt", "msrvtt_qa", "valid", "", 12278, 497, 1602), ("msrvtt", "msrvtt_qa", "test", "", 181, 8, None),
    ("tgif", "tgif_qa", "train", "action", 20471, None, None), ("tgif", "tgif_qa", "test", "action", 2274, None, None),
    ("tgif", "tgif_qa", "train", "count", 26839, None, None), ("tgif", "tgif_qa", "test", "count", 3554, None, None),
    ("tgif", "tgif_qa", "train", "frameqa", 39392, None, None), ("tgif", "tgif_qa", "test", "frameqa", 13691, None, None),
    ("activitynet", "activitynet_qa", "train", "", 32000, None, None),
    ("activitynet", "activitynet_qa", "valid", "", 18000, None, None),
    ("codraw", "codraw", "train", "", 12133, 1600, 73), ("codraw", "codraw", "test", "", 1534, 200, None),
    ("video_clips", "video_clips", "test", "", 194, 11, None)])
def test_real_questions_have_the_counts_of_their_readme(shared, name, folder, split, kind, count, videos, answers):
    found = load_questions(name, shared / folder, split, kind=kind, holdout=0)
    assert len(found) == count and all(q.text and q.answer and q.type for q in found)
    assert videos in (None, len({q.video for q in found})) and answers in (None, len({q.answer for q in found}))


def test_pororo_questions_are_split_by_episode(shared):
    parts = {split: load_questions("pororo", shared / "pororo_text", split) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 6471 and all(parts.values())
    episodes = [{q.video for q in part} for part in parts.values()]
    assert sum(map(len, episodes)) == len(set.union(*episodes)), "an episode is in two parts"
    assert all(q.choices[q.correct] == q.answer and len(q.choices) == 5 for part in parts.values() for q in part)


def test_entries_keep_their_fields(shared):
    q = load_questions("msvd", shared / "msvd_qa", "train")[0]
    assert q == Question("what is chewing on a nut?", "animal", "vid1", 1, "what", "0")
    q = load_questions("tgif", shared / "tgif_qa", "test", kind="action")[0]
    assert (q.video, q.number, q.correct, q.answer) == ("tumblr_nk172bbdPI1u1lr18o1_250", 26, 4, "flap wings")
    q = load_questions("tgif", shared / "tgif_qa", "test", kind="frameqa")[1]
    assert (q.type, q.answer, q.id) == ("location", "machine", "FRAMEQA9405")
    q = load_questions("activitynet", shared / "activitynet_qa", "valid")[0]
    assert (q.type, q.answer, q.video) == ("yes/no", "yes", "TIEzvhv6xaI")


def test_no_video_is_in_train_and_valid(shared):
    for name, folder, kind in (("codraw", "codraw", ""), ("tgif", "tgif_qa", "frameqa")):
        train, valid = (load_questions(name, shared / folder, split, kind=kind) for split in ("train", "valid"))
        assert not {q.video for q in train} & {q.video for q in valid}
        assert 0.08 < len(valid) / (len(train) + len(valid)) < 0.12


def svqa(root, steps=("filter", "count")):
    rows = [{"id": v, "question": f"How many balls are in {v}?", "ans": v % 3, "program": [{"function": s} for s in steps]}
            for v in (5, 6, 6, 7)]
    (root / "questions.json").write_text(json.dumps(rows))
    for part, ids in (("train", "5\n6\n"), ("val", "7"), ("test", "8")):
        (root / f"{part}_svqa_ids.txt").write_text(ids)
    return root


def test_svqa_is_split_by_its_id_lists(tmp_path, shared):
    train, valid = (load_questions("svqa", svqa(tmp_path), split) for split in ("train", "valid"))
    assert [(q.video, q.number, q.type, q.answer) for q in train] == [("5", 5, "count", "2"), ("6", 6, "count", "0"),
                                                                      ("6", 6, "count", "0")]
    assert [q.video for q in valid] == ["7"]
    for part, count in (("train", 8400), ("val", 1200), ("test", 2400)):
        shutil.copy(shared / "svqa_splits" / f"{part}_svqa_ids.txt", tmp_path / f"{part}_svqa_ids.txt")
        assert len(set(safe.read_text(tmp_path / f"{part}_svqa_ids.txt").split())) == count
    assert load_questions("svqa", tmp_path, "train") == [], "none of our four videos is in the official list"


def msvd(root, rows):
    (root / "train_qa.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return lambda: load_questions("msvd", root, "train")


GOOD = {"answer": "cat", "id": 0, "question": "who sleeps?", "video_id": 3}


@pytest.mark.parametrize("rows, sentence", [
    ({"a": 1}, r"train_qa\.json holds a dict, expected a list"), ("[{", r"train_qa\.json is not JSON, or it is cut"),
    ("[" * 100000, r"train_qa\.json is not JSON, or it is cut"),
    ([GOOD, 7], r"train_qa\.json, entry 1 is a int, expected an object with question, answer, video_id"),
    ([{**GOOD, "video_id": "3"}], r"entry 0: 'video_id' is '3', expected int"),
    ([{k: v for k, v in GOOD.items() if k != "answer"}], r"entry 0: 'answer' is 'missing', expected str"),
    ([GOOD, {**GOOD, "question": " ?"}], r"entry 1 has an empty question")])
def test_question_files_of_the_wrong_shape_end_in_one_sentence(tmp_path, rows, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        msvd(tmp_path, rows)()
    assert "\n" not in str(caught.value)


def spoilt(tmp_path, name, files):
    for file, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(raw)
    return lambda: load_questions(name, tmp_path, "train")


HEAD = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"


@pytest.mark.parametrize("name, files, sentence", [
    ("tgif", {"Train_action_question.csv": HEAD + "g\tq ?\ta\tb\tc\td\te\t7\tA1\t5\n"}, "line 2: answer '7', key '5'"),
    ("tgif", {"Train_action_question.csv": HEAD + "g\tq ?\ta\tb\tc\td\te\tx\tA1\t5\n"}, "line 2: answer 'x', key '5'"),
    ("tgif", {"Train_action_question.csv": HEAD + "g\tq ?\ta\tb\n"}, "line 2 has 4 fields, expected 10"),
    ("tgif", {"Train_action_question.csv": HEAD.replace("key", "kee")}, "has no column 'key'; its first line must name"),
    ("tgif", {"Train_action_question.csv": HEAD.encode() + b"g\tna\xefve ?\n"}, "line 2: byte 0xef is not UTF-8"),
    ("activitynet", {"train_q.json": '[{"video_name": "v", "question": "is it", "question_id": "1"}]', "train_a.json": "[]"},
     r"train_a\.json has no answer of a known type for question 1"),
    ("activitynet", {"train_q.json.gz": gzip.compress(b"[]")[:-4], "train_a.json": "[]"}, r"q\.json\.gz is damaged or cut"),
    ("pororo", {"qa.json": '{"PororoQA": 3}'}, r'qa\.json must be {"PororoQA": \[\.\.\.\]}'),
    ("video_clips", {"clips.json": '[{"clip": "a", "qa": '
                                   '[{"question": "q", "answer": "x", "type": "action", "choices": ["y"]}]}]'},
     "entry 0: answer 'x' is not among its choices"),
    ("svqa", {"questions.json": '[{"id": 5, "question": "q?", "program": []}]', "train_svqa_ids.txt": "5"},
     "entry 0, last step of its program is a NoneType"),
    ("msrvtt", {}, r"train_qa\.json is missing: a list of")])
def test_every_set_names_what_is_wrong_with_it(tmp_path, name, files, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        spoilt(tmp_path, name, files)()
    assert "\n" not in str(caught.value)


def test_questions_about_absent_videos_are_an_error_or_left_out():
    questions = [Question("q?", "a", video) for video in ("x", "y", "x", "z")]
    assert [q.video for q in with_videos(questions, ["x", "z"], drop=True)] == ["x", "x", "z"]
    with pytest.raises(ValueError, match="1 of 4 questions are about videos that are not here, the first about 'y'"):
        with_videos(questions, ["x", "z"])
    with pytest.raises(ValueError, match="none of 4 questions is about one of the 1 videos here, such as 'w'"):
        with_videos(questions, ["w"], drop=True)


# -- words and ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, tokens", [                              # right sides as nltk 3.10 gives them
    ("what's the cat's name", "what 's the cat 's name"), ("he doesn't", "he does n't"), ("dogs' bowls", "dogs ' bowls"),
    ("get 'em", "get ' em"), ("'tis", "' tis"), ("'re you", "'re you"), ("o'neil's", "o'neil 's"), ("they'd've", "they'd 've"),
    ("cannot wanna", "can not wan na"), ('say "hi" (now)', "say `` hi '' ( now )"),
    ("5:30 a:b 1,000 a,b", "5:30 a : b 1,000 a , b"),
    ("u.s. mr. x.", "u.s. mr. x ."), ("wait... what?!", "wait ... what ? !"), ("50% c# a-b a/b a--b", "50 % c # a-b a/b a -- b"),
    ("yes'.", "yes ' ."), ("ain't'", "ai n't '"), ("it''s", "it '' s"), ("says ''huh", "says `` huh"), ("", "")])
def test_words_follow_the_treebank_rules(text, tokens):
    assert words(text) == tuple(tokens.split())


def test_a_question_loses_its_mark_and_nothing_else():
    assert question_words("What does the cat do 7 times ?") == tuple("what does the cat do 7 times".split())
    assert question_words("is the hair black") == ("is", "the", "hair", "black"), "no mark, no letter lost"


@pytest.mark.parametrize("part, rows", [("val", 2047), ("test", 2274)])
def test_encoding_reproduces_hcrns_arrays(shared, part, rows):
    """Every row of the golden arrays whose GIF is in the question file (all but one of val) comes out to the id."""
    vocabulary = json.loads((shared / "tgif_qa" / "hcrn_action" / "vocab.json").read_text())
    questions = load_questions("tgif", shared / "tgif_qa", "train" if part == "val" else "test", kind="action", holdout=0)
    row_of = {(q.number, q.video): n for n, q in enumerate(questions)}
    with np.load(shared / "tgif_qa" / "hcrn_action" / f"{part}_questions.npz") as golden:
        golden = dict(golden)
    keys = [(int(v), str(name)) for v, name in zip(golden["video_ids"], golden["video_names"], strict=True)]
    there = np.array([key in row_of for key in keys])
    assert there.sum() == rows and len(there) - rows <= 1
    ours = encode([questions[row_of[key]] for key, found in zip(keys, there, strict=True) if found], vocabulary, part)
    for name in ("questions", "questions_len", "ans_candidates", "ans_candidates_len", "answers", "video_ids"):
        theirs = golden[name][there]
        if name in ("questions", "ans_candidates"):
            assert not theirs[..., ours[name].shape[-1] :].any(), "only padding may be cut"
            theirs = theirs[..., : ours[name].shape[-1]]
        assert np.array_equal(ours[name], theirs), name


def test_the_one_golden_row_without_a_question_file_entry_is_encoded_as_well(shared):
    vocabulary = json.loads((shared / "tgif_qa" / "hcrn_action" / "vocab.json").read_text())
    with np.load(shared / "tgif_qa" / "hcrn_action" / "val_questions.npz") as golden:
        row = int(np.flatnonzero(golden["video_ids"] == 19199)[0])
        theirs, candidates = golden["questions"][row], golden["ans_candidates"][row]
    choices = ("push back hair", "catch ball", "flap lips", "move hands across face", "hit another person")
    ours = encode([Question("What does the dog do 5 times ?", "catch ball", "g", 1, choices=choices, correct=1)],
                  vocabulary, "val")
    length = ours["questions_len"][0]
    assert ours["questions"][0].tolist() == theirs[:length].tolist() and not theirs[length:].any()
    assert np.array_equal(ours["ans_candidates"][0], candidates[:, : ours["ans_candidates"].shape[2]])


def test_vocabulary_has_hcrns_words_and_its_joint_table(shared):
    """HCRN's tables hold the words of the whole training file, its validation tenth included, in a shuffled order."""
    golden = json.loads((shared / "tgif_qa" / "hcrn_action" / "vocab.json").read_text())
    ours = build_vocabulary(load_questions("tgif", shared / "tgif_qa", "train", kind="action", holdout=0))
    for name, count in (("question_token_to_idx", 1023), ("answer_token_to_idx", 2078), ("question_answer_token_to_idx", 2566)):
        assert set(ours[name]) == set(golden[name]) and len(ours[name]) == count
        assert sorted(ours[name].values()) == list(range(count))
    for tables in (golden, ours):                                       # specials, answer words, then question words
        joint = dict.fromkeys([*list(tables["question_token_to_idx"])[:2], *list(tables["answer_token_to_idx"])[2:],
                               *list(tables["question_token_to_idx"])[2:]])
        assert list(joint) == list(tables["question_answer_token_to_idx"])


def test_open_answers_are_ranked_by_frequency_and_the_unknown_are_always_wrong():
    train = [Question(f"{w} runs?", a, "v")
             for w, a in (("who", "dog"), ("what", "cat"), ("who", "cat"), ("it's", "ant"), ("a", "ant"))]
    tables = build_vocabulary(train, most=2)
    assert tables["question_token_to_idx"] == {w: n for n, w in enumerate("<NULL> <UNK> who runs what it 's a".split())}
    assert tables["answer_token_to_idx"] == {"<UNK0>": 0, "<UNK1>": 1, "cat": 2, "ant": 3}, "ties in order of appearance"
    new = [Question("who swims there?", "dog", "v", 4), Question("a?", "cat", "w", 5)]
    for split, unknown in (("train", 0), ("valid", 1), ("test", 1)):
        out = encode(new, tables, split)
        assert out["questions"].tolist() == [[2, 1, 1], [7, 0, 0]] and out["questions"].dtype == np.int32
        assert out["questions_len"].tolist() == [3, 1] and out["answers"].tolist() == [unknown, 2]
        assert out["video_ids"].tolist() == [4, 5] and out["video_names"] == ["v", "w"]


# -- frames ---------------------------------------------------------------------------------------------------------


def hcrn_clip_rows(total, clips, frames):
    """Slow and literal: cut a list of frame numbers, then pad it at the end where it is short."""
    rows = []
    for centre in np.linspace(0, total, clips + 2, dtype=int)[1 : clips + 1]:
        start, stop = centre - frames // 2, centre + frames // 2
        row = [n for n in range(start, stop) if 0 <= n < total]
        while start < 0:
            row, start = [0, *row], start + 1
        while stop > total:
            row, stop = [*row, total - 1], stop - 1
        rows.append(row)
    return rows


@pytest.mark.parametrize("total, clips, frames", [(64, 8, 16), (20, 8, 16), (2, 3, 4), (300, 20, 16), (5, 16, 16)])
def test_clips_are_sixteen_frames_around_even_centres(total, clips, frames):
    assert clip_rows(total, clips, frames).tolist() == hcrn_clip_rows(total, clips, frames)


def grey(n, size=8):
    return Image.new("RGB", (size, size), (n, n, n))


def levels(video, name, **kwargs):
    shown = video.clips(name, size=8, **kwargs)
    return ((shown[..., 0, 4, 4] + 1) * 127.5).round().int().tolist()


def test_frames_come_from_folders_zips_gifs_and_arrays(tmp_path):
    stack = np.stack([np.asarray(grey(20 * n)) for n in range(10)])
    (tmp_path / "all" / "a").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for n in range(10):
            grey(20 * n).save(tmp_path / "all" / "a" / f"{n:03d}.png")
            archive.write(tmp_path / "all" / "a" / f"{n:03d}.png", f"clips/a/{n:03d}.png")
    grey(0).save(tmp_path / "all" / "b.gif", save_all=True, append_images=[grey(20 * n) for n in range(1, 10)])
    np.save(tmp_path / "all" / "c.npy", stack)
    np.savez(tmp_path / "n.npz", images=np.stack([stack, stack]))
    np.savez(tmp_path / "m.npz", a=stack)
    expected = (clip_rows(10, 3, 4) * 20).tolist()
    for root, names in (("all", ["a", "b", "c"]), ("f.zip", ["a"]), ("n.npz", ["0", "1"]), ("m.npz", ["a"]),
                        ("all/b.gif", ["b"])):
        frames = open_frames(tmp_path / root)
        assert frames.names == names
        for name in names:
            assert levels(frames, name, clips=3, frames=4) == expected, (root, name)
    with pytest.raises(ValueError, match=r"f\.zip has no video 'q'; it has 1, such as a"):
        open_frames(tmp_path / "f.zip")["q"]


def test_real_clips_go_from_pixels_to_encoded_questions(shared):
    frames = open_frames(shared / "video_clips" / "frames.zip")
    assert len(frames.names) == 11 and sum(len(frames[name]) for name in frames.names) == 626
    questions = with_videos(load_questions("video_clips", shared / "video_clips", "test"), frames.names)
    assert len(questions) == 194
    shown = frames.clips(questions[0].video, clips=4, frames=4, size=32)
    assert shown.shape == (4, 4, 3, 32, 32) and shown.std() > 0.1
    raw = open_frames(shared / "video_clips" / "raw")
    assert raw.names == ["tgif_readme_3"] and len(raw["tgif_readme_3"]) == 42
    packed = open_frames(shared / "codraw" / "stories64_val.npz")
    assert len(with_videos(load_questions("codraw", shared / "codraw", "test"), packed.names)) == 1534


def test_frames_that_are_no_video_end_in_one_sentence(tmp_path):
    still, cut, film, bad = (tmp_path / name for name in ("one.gif", "cut.gif", "films", "bad.zip"))
    grey(5).save(still)
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (30, 30, 3), dtype=np.uint8)) for n in range(3)]
    noise[0].save(cut, save_all=True, append_images=noise[1:])
    cut.write_bytes(cut.read_bytes()[:700])
    film.mkdir()
    (film / "x.mp4").write_bytes(b"\0")
    bad.write_bytes(b"PK\x03\x04 not really")
    np.savez(tmp_path / "f.npz", a=np.zeros((3, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "hurt.zip", "w") as archive:
        archive.writestr("v/0.jpg", b"\xff\xd8 this is no picture")
    (tmp_path / "empty").mkdir()
    for call, sentence in (
            (lambda: open_frames(still)["one"], r"one\.gif has a single frame, so nothing in it moves"),
            (lambda: open_frames(cut)["cut"], r"cut\.gif is not a GIF that can be read, or it is cut"),
            (lambda: open_frames(film), "films holds video files; cut films into pictures first, as in  ffmpeg"),
            (lambda: open_frames(film / "x.mp4"), r"x\.mp4 is not a \.zip, \.gif or \.npz; cut films into pictures first"),
            (lambda: open_frames(bad), r"bad\.zip is not a zip, or it is cut"),
            (lambda: open_frames(tmp_path / "f.npz")["a"],
             r"f\.npz, a is uint8 \(3, 4, 4\); it must be uint8 \(F, h, w, 3\), F at least 2"),
            (lambda: open_frames(tmp_path / "hurt.zip")["v"][0], r"hurt\.zip: v/0\.jpg is not a picture that can be read"),
            (lambda: open_frames(tmp_path / "empty"), "empty holds no video: expected a folder of pictures"),
            (lambda: open_frames(tmp_path / "no"), "no is missing: a folder with a folder of pictures for each video")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)


# -- features -------------------------------------------------------------------------------------------------------


def test_features_are_found_by_number(tmp_path):
    ids = np.array([7, 3, 9])
    look, move = np.arange(3 * 2 * 4 * 5.0).reshape(3, 2, 4, 5), np.arange(3 * 2 * 5.0).reshape(3, 2, 5)
    np.savez(tmp_path / "x.npz", ids=ids, appearance=look.astype(np.float32), motion=move.astype(np.float32))
    a, m = load_features(tmp_path / "x.npz").take([9, 7, 9])
    assert a.dtype == torch.float32 and np.array_equal(a, look[[2, 0, 2]]) and np.array_equal(m, move[[2, 0, 2]])
    with pytest.raises(ValueError, match=r"x\.npz has no features of video 4 \(1 of 2 are absent\)"):
        load_features(tmp_path / "x.npz").take([3, 4])
    np.savez(tmp_path / "y.npz", ids=ids, appearance=look[:2], motion=move)
    with pytest.raises(ValueError, match=r"y\.npz: features are \(2, 2, 4, 5\) and \(3, 2, 5\) for 3 ids"):
        load_features(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", ids=ids)
    with pytest.raises(ValueError, match=r"z\.npz is damaged, cut, or not the numpy file"):
        load_features(tmp_path / "z.npz")


def test_hcrns_two_files_are_joined_on_their_ids(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed, and this project does without it")
    look, move = np.random.default_rng(0).random((70, 2, 3, 4)), np.random.default_rng(1).random((70, 2, 4))
    order = np.random.default_rng(2).permutation(70)
    for name, ids, key, values in (("a", np.arange(70), "resnet_features", look), ("m", order, "resnext_features", move[order])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["ids"], file[key] = ids, values.astype(np.float32)
    a, m = load_features(tmp_path / "a.h5", tmp_path / "m.h5").take([69, 0])
    assert np.allclose(a, look[[69, 0]], atol=1e-3) and np.allclose(m, move[[69, 0]], atol=1e-3)
    with pytest.raises(ValueError, match=r"m\.h5 has no resnet_features with ids; it has ids, resnext_features"):
        load_features(tmp_path / "m.h5", tmp_path / "a.h5")


def test_hdf5_without_h5py_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"a\.h5 is an HDF5 file and the package h5py is not installed: type  pip install h5py"):
        load_features(tmp_path / "a.h5", tmp_path / "a.h5")


def test_word_vectors_are_zero_where_there_is_none(tmp_path):
    (tmp_path / "glove.txt").write_text("cat 1 2 3\n. . 7 8\ndog 4 5 6\n")
    out = read_glove(tmp_path / "glove.txt", {"<NULL>": 0, "dog": 1, "cat": 2})
    assert out.tolist() == [[0, 0, 0], [4, 5, 6], [1, 2, 3]]
    (tmp_path / "glove.txt").write_text("cat 1 x 3\n")
    with pytest.raises(ValueError, match=r"glove\.txt, line 1: .* is not a word and numbers"):
        read_glove(tmp_path / "glove.txt", {"cat": 0})
    with pytest.raises(FileNotFoundError, match=r"no\.txt is missing: glove\.840B\.300d\.txt"):
        read_glove(tmp_path / "no.txt", {})


# -- the built-in world ---------------------------------------------------------------------------------------------


def test_builtin_questions_and_frames_are_the_quizs():
    view = quiz.clips(range(200), 3, "valid")
    found = load_questions("builtin", split="valid", seed=3)
    assert len(found) == 1600 and [q.text for q in found] == view["question"] and [q.answer for q in found] == view["answer"]
    assert found[9].video == "1" and found[9].type == view["type"][9]
    frames = open_frames("builtin", "valid", 3)
    expected = quiz.film(view, [1], size=64)[0].view(8, 4, 3, 64, 64)
    assert (frames.clips("1", 8, 4, 64) - expected).abs().max() < 1 / 255 + 1e-6, "clip c is frames 4 c to 4 c + 3, rounded"
    assert frames.clips("1", 4, 2, 16).shape == (4, 2, 3, 16, 16)


@pytest.mark.slow
def test_our_words_agree_with_nltk_on_every_real_text(shared):
    """Where nltk happens to be installed: all questions of the shared sets, one sentence at a time, no exception allowed."""
    nltk = pytest.importorskip("nltk.tokenize", reason="nltk is not installed, and this project does without it")
    theirs, texts = nltk.NLTKWordTokenizer().tokenize, defaultdict(list)
    for name, split in (("msvd", "train"), ("msvd", "valid"), ("msrvtt", "valid"), ("msrvtt", "test"), ("activitynet", "train")):
        texts[name] += [q.text for q in load_questions(name, shared / f"{name}_qa", split)]
    with open(shared / "pororo_text" / "descriptions.csv", encoding="utf-8") as file:
        texts["pororo"] = [row[2] for row in csv.reader(file)]
    for name, found in texts.items():
        for text in found:
            text = text.lower().removesuffix("?")
            assert list(words(text)) == theirs(text), name
