"""Questions about videos, and the frames or features they are about: the input of DualVGR.

    train = load_questions("msvd", root="msvd_qa", split="train")     # list of Question
    vocabulary = build_vocabulary(train)                              # the three tables of HCRN's vocab.json
    encoded = encode(train, vocabulary, split="train")                # padded ids, answers: HCRN's arrays
    frames = open_frames("frames.zip")                                # data/frames.py
    frames.clips(train[0].video, clips=8, frames=16, size=224)        # (8, 16, 3, 224, 224) in [-1, 1]

NAMES says which question files are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import csv
import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import quiz, safe
from data.parts import FILMS, check_name, part_of, set_aside

NAMES = ("builtin", "msvd", "msrvtt", "tgif", "svqa", "activitynet", "codraw", "pororo", "video_clips")
KINDS = ("action", "transition", "count", "frameqa")                       # of TGIF-QA
FRAMEQA = ("object", "number", "colour", "location")
ACTIVITYNET = ("motion", "spatial", "temporal", "yes/no", "colour", "object", "location", "number", "other")
ANSWERS = 4000                            # HCRN keeps the most frequent answers of the training part


class Question(NamedTuple):
    """One question; `choices` and `correct` (the index of the answer) only where it is multiple choice."""
    text: str
    answer: str
    video: str                            # name of its frames
    number: int = -1                      # its row in feature files, -1 where it has none
    type: str = ""                        # first word, or the data set's own kind
    id: str = ""
    choices: tuple = ()
    correct: int = -1


# -- question files ------------------------------------------------------------------------------------------


def load_questions(name="builtin", root="", split="train", kind="action", holdout=0.1, seed=0):
    """The questions of one split.   -> list of Question

    kind      TGIF-QA: action, transition, count or frameqa
    holdout   share of the training videos that become "valid" where the set has only two parts (tgif, codraw)
    raises    FileNotFoundError or ValueError: one sentence with the file, the entry and what was expected
    """
    check_name(name, NAMES, root, split, "questions")
    root, part = Path(root), {"valid": "val"}.get(split, split)
    if name == "builtin":
        return builtin(split, seed)
    if name in ("msvd", "msrvtt"):        # clips_qa.json: the test questions of a few clips
        return msvd(first_of(root / f"{part}_qa.json", *[root / "clips_qa.json"] * (part == "test")), name)
    if name == "activitynet":
        return activitynet(*(first_of(root / f"{part}_{x}.json", root / f"{part}_{x}.json.gz") for x in "qa"))
    if name == "svqa":
        ids = f"{part}_svqa_ids.txt"
        return svqa(root / "questions.json", first_of(root / ids, root / "SVQA_splits" / ids))
    if name == "pororo":
        return [q for q in pororo(root / "qa.json") if split == part_of(q.video)]
    if name == "video_clips":             # 194 questions, too few to split: every part is all of them
        return video_clips(root / "clips.json")
    return two_files(name, root, split, kind, holdout)


def two_files(name, root, split, kind, holdout):
    """TGIF-QA and CoDraw: the second file is test, and questions about some videos of the first are valid."""
    def read(part):
        return tgif(root, part, kind) if name == "tgif" else msvd(root / f"qa_{part}.json", name)

    if split == "test":
        return read("test" if name == "tgif" else "val")
    found = read("train")
    valid = set(set_aside([q.video for q in found], holdout))
    return [q for n, q in enumerate(found) if (n in valid) == (split == "valid")]


def builtin(split, seed):
    """Questions about the moving shapes of data/quiz.py; `open_frames("builtin")` has their frames."""
    view = quiz.clips(range(FILMS[split]), seed, split)
    rows = zip(view["question"], view["answer"], view["video"], view["type"], strict=True)
    return [Question(text, answer, str(video), video, kind, str(n))
            for n, (text, answer, video, kind) in enumerate(rows)]


def first_of(*files):
    return next((file for file in files if file.is_file()), files[0])


def msvd(file, name="msvd"):
    """[{"answer", "id", "question", "video_id"}, ...]: MSVD-QA, MSRVTT-QA, CoDraw's questions."""
    prefix = {"msvd": "vid", "msrvtt": "video", "codraw": ""}[name]
    found = []
    for n, row in enumerate(safe.read_json(file, list, "a list of {answer, id, question, video_id}")):
        safe.check_row(row, {"question": str, "answer": str, "video_id": int}, f"{file}, entry {n}")
        check_words(row["question"], file, n)
        found.append(Question(row["question"], row["answer"], f"{prefix}{row['video_id']}", row["video_id"],
                              row.get("type", row["question"].split()[0].lower()), str(row.get("id", n))))
    return found


def check_words(text, file, n):
    if not text.strip(" ?"):
        raise ValueError(f"{file}, entry {n} has an empty question")


def table(file, columns, separator="\t"):
    """Rows of a text table with a header that names at least `columns`.   -> [(line, {column: text})]"""
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    rows = safe.read_rows(file, f"a table with {', '.join(columns)}", delimiter=separator, quoting=quoting)
    head = rows[0][1] if rows else []
    if lost := [c for c in columns if c not in head]:
        raise ValueError(f"{file} has no column {lost[0]!r}; its first line must name {', '.join(columns)}")
    for line, row in rows:
        if row and len(row) < len(head):
            raise ValueError(f"{file}, line {line} has {len(row)} fields, expected {len(head)}")
    return [(line, dict(zip(head, row, strict=False))) for line, row in rows[1:] if row]


def tgif(root, part, kind):
    """{Train,Test}_KIND_question.csv, separated by tabs despite the name; `key` is the number of the GIF."""
    if kind not in KINDS:
        raise ValueError(f"TGIF-QA has no kind {kind!r}; it has {', '.join(KINDS)}")
    file = root / f"{part.title()}_{kind}_question.csv"
    other = root / "hqga_frameqa_train.csv"
    if kind == "frameqa" and part == "train" and not file.is_file() and other.is_file():
        return hqga(other)
    choices = [f"a{k}" for k in range(1, 6)] if kind in ("action", "transition") else []
    found = []
    for line, row in table(file, ["gif_name", "question", *choices, "answer", "vid_id", "key"]):
        check_words(row["question"], file, line)
        try:
            correct, key = int(row["answer"]) if choices or kind == "count" else 0, int(row["key"])
            options = tuple(row[c] for c in choices)
            answer = options[correct] if choices else row["answer"]
            what = FRAMEQA[int(row["type"])] if kind == "frameqa" else kind
            if correct < 0:
                raise IndexError("negative")
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {line}: answer {row['answer']!r}, key {row['key']!r} or type is not "
                             f"what TGIF-QA's {kind} has ({safe.reason(error)})") from error
        found.append(Question(row["question"], answer, row["gif_name"], key, what, row["vid_id"], options,
                              correct if choices else -1))
    return found


def hqga(file):
    """The FrameQA training part in another form, comma-separated; without the question's final mark."""
    found = []
    for line, row in table(file, ["video", "question", "answer", "qid"], ","):
        if not row["video"].isdigit():
            raise ValueError(f"{file}, line {line}: video {row['video']!r} is not the number of a GIF")
        found.append(Question(row["question"] + "?", row["answer"], row["video"], int(row["video"]), "frameqa",
                              row["qid"]))
    return found


def svqa(file, ids):
    """[{"id", "question", "ans", "program"}, ...]; the type is the function of the program's last step."""
    told = safe.read_text(ids, "the video numbers of this part, one a line").split()
    if odd := [word for word in told if not word.isdecimal()]:
        raise ValueError(f"{ids} must hold the numbers of videos, one a line, not {odd[0]!r:.40}")
    wanted = set(map(int, told))
    found = []
    for n, row in enumerate(safe.read_json(file, list, "a list of {id, question, ans, program}")):
        safe.check_row(row, {"id": int, "question": str, "program": list}, f"{file}, entry {n}")
        if row["id"] not in wanted:
            continue
        step = row["program"][-1] if row["program"] else None
        safe.check_row(step, {"function": str}, f"{file}, entry {n}, last step of its program")
        check_words(row["question"], file, n)
        found.append(Question(row["question"], str(row.get("ans", "")), str(row["id"]), row["id"],
                              step["function"], str(n)))
    return found


def activitynet(questions, answers):
    """ActivityNet-QA: questions and answers in two files, joined on question_id."""
    told = {}
    for n, row in enumerate(safe.read_json(answers, list, "a list of {answer, type, question_id}")):
        safe.check_row(row, {"answer": str, "type": int, "question_id": str}, f"{answers}, entry {n}")
        told[row["question_id"]] = row
    found = []
    for n, row in enumerate(safe.read_json(questions, list, "a list of {video_name, question, question_id}")):
        fields = {"video_name": str, "question": str, "question_id": str}
        safe.check_row(row, fields, f"{questions}, entry {n}")
        check_words(row["question"], questions, n)
        answer = told.get(row["question_id"])
        if answer is None or not 0 <= answer["type"] < len(ACTIVITYNET):
            raise ValueError(f"{answers} has no answer of a known type for question {row['question_id']}")
        found.append(Question(row["question"], answer["answer"], row["video_name"], -1,
                              ACTIVITYNET[answer["type"]], row["question_id"]))
    return found


def pororo(file):
    """{"PororoQA": [{qid, question, answer0..answer4, correct_idx, video_name}, ...]}, multiple choice."""
    rows = safe.read_json(file, dict, '{"PororoQA": [...]}').get("PororoQA")
    if not isinstance(rows, list):
        raise ValueError(f'{file} must be {{"PororoQA": [...]}}')
    keys, found = [f"answer{k}" for k in range(5)], []
    fields = {"question": str, "correct_idx": int, "video_name": str, **dict.fromkeys(keys, str)}
    for n, row in enumerate(rows):
        safe.check_row(row, fields, f"{file}, entry {n}")
        check_words(row["question"], file, n)
        if not 0 <= row["correct_idx"] < 5:
            raise ValueError(f"{file}, entry {n}: correct_idx is {row['correct_idx']}, expected 0 to 4")
        choices = tuple(row[key] for key in keys)
        found.append(Question(row["question"], choices[row["correct_idx"]], row["video_name"], -1,
                              row["question"].split()[0].lower(), str(row.get("qid", n)), choices,
                              row["correct_idx"]))
    return found


def video_clips(file):
    """clips.json: [{"clip", "qa": [{"question", "answer", "type", "question_id", "choices"}, ...]}, ...]"""
    found = []
    for n, clip in enumerate(safe.read_json(file, list, "a list of {clip, qa}")):
        safe.check_row(clip, {"clip": str, "qa": list}, f"{file}, entry {n}")
        for row in clip["qa"]:
            safe.check_row(row, {"question": str, "answer": str, "type": str}, f"{file}, entry {n}, qa")
            safe.check_row({"choices": [], **row}, {"choices": list}, f"{file}, entry {n}, qa")
            choices = tuple(map(str, row.get("choices", ())))
            if choices and row["answer"] not in choices:
                raise ValueError(f"{file}, entry {n}: answer {row['answer']!r} is not among its choices")
            correct = choices.index(row["answer"]) if choices else -1
            found.append(Question(row["question"], row["answer"], clip["clip"], -1, row["type"],
                                  str(row.get("question_id", "")), choices, correct))
    return found


def with_videos(questions, names, drop=False):
    """The questions whose video is among `names`; others are an error, or with drop=True are left out."""
    names = set(names)
    absent = [q for q in questions if q.video not in names]
    if absent and not drop:
        raise ValueError(f"{len(absent)} of {len(questions)} questions are about videos that are not here, the "
                         f"first about {absent[0].video!r}; add its frames, or pass drop=True")
    kept = [q for q in questions if q.video in names]
    if not kept:
        raise ValueError(f"none of {len(questions)} questions is about one of the {len(names)} videos here, "
                         f"such as {min(names, default='')!r}")
    return kept


# -- words and ids -------------------------------------------------------------------------------------------

MARKS = re.compile(r"(\.{2,}|--|''|``|[;@#$%&?!*\[\](){}<>«»“”‘’„`—…]|[:,](?!\d))")
JOINED = {"cannot": 3, "gimme": 3, "gonna": 3, "gotta": 3, "lemme": 3, "wanna": 3,       # word: where to cut
          "d'ye": 1, "more'n": 4}


@functools.lru_cache(maxsize=2**16)       # the same choices and questions come again and again
def words(text):
    """Tokens by the Treebank rules, as nltk's word_tokenize makes them of one sentence.   -> tuple"""
    text = re.sub(r"""(^|[\s(\[{<])("|'')""", r"\1 `` ", text).replace('"', " '' ")
    text = re.sub(r"([^.])\.([\])}>'\s]*)$", r"\1 . \2", MARKS.sub(r" \1 ", text))
    return tuple(token for chunk in text.split() for token in clitics(chunk))


def clitics(chunk):
    """A word, its clitics cut off: cat's -> cat 's, don't -> do n't, dogs' -> dogs ', 'em -> ' em."""
    if chunk in ("``", "''"):
        return [chunk]
    ends = []
    for pattern in (r"(.*[^'])(')", r"(.*[^'])('[smd])", r"(.*[^'])('ll|'re|'ve|n't)"):
        if match := re.fullmatch(pattern, chunk):
            chunk, end = match.groups()
            ends.insert(0, end)
    if re.match(r"'(?!(?:re|ve|ll|m|t|s|d|n)\b)\w", chunk):
        return ["'", chunk[1:], *ends]
    cut = JOINED.get(chunk)
    return [*([chunk[:cut], chunk[cut:]] if cut else [chunk]), *ends]


def question_words(text):
    """Words of a question, in lower case and without its final question mark.

    # Official code: drops the last character whatever it is. The same where every question ends in "?" (all of
    # MSVD-QA, MSRVTT-QA, TGIF-QA); where none does, as in ActivityNet-QA, it would cut a letter off.
    """
    return words(text.lower().strip().removesuffix("?"))


def build_vocabulary(train, most=ANSWERS):
    """HCRN's three tables from the training questions, words in order of appearance.   -> {name: {token: id}}

    question_token_to_idx          <NULL> 0, <UNK> 1, then words
    answer_token_to_idx            <UNK0> 0, <UNK1> 1, then the `most` frequent answers; for multiple choice
                                   the words of all choices
    question_answer_token_to_idx   <NULL> 0, <UNK> 1, then both, answers first
    # Official code: for TGIF-QA the validation tenth of the training file is read as well.
    """
    asked = dict.fromkeys(token for q in train for token in question_words(q.text))
    told = dict.fromkeys(token for q in train for choice in q.choices for token in words(choice.lower()))
    if not told:
        told = dict.fromkeys(answer for answer, _ in Counter(q.answer for q in train).most_common(most))
    return {"question_token_to_idx": numbered("<NULL>", "<UNK>", *asked),
            "answer_token_to_idx": numbered("<UNK0>", "<UNK1>", *told),
            "question_answer_token_to_idx": numbered("<NULL>", "<UNK>", *told, *asked)}


def numbered(*tokens):
    return {token: n for n, token in enumerate(dict.fromkeys(tokens))}


def padded(rows):
    """Lists of ids -> int32 (N, L), padded with 0 on the right, and lengths (N,)"""
    out = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)


def encode(questions, vocabulary, split="train"):
    """HCRN's arrays: questions (N, L), questions_len, answers, video_ids, video_names; ans_candidates (N, 5, L).

    A word that is not in the table is 1. An unknown answer is class 0 in train, where it is learnt, and class 1
    in valid and test, which no model ever predicts: always wrong, as it should be.
    """
    choice = bool(questions and questions[0].choices)
    ids = vocabulary["question_answer_token_to_idx" if choice else "question_token_to_idx"]
    rows, lengths = padded([[ids.get(token, 1) for token in question_words(q.text)] for q in questions])
    encoded = {"questions": rows, "questions_len": lengths, "question_id": np.arange(len(questions)),
               "video_ids": np.array([q.number for q in questions]),
               "video_names": [q.video for q in questions]}
    if choice:
        told = [words(choice.lower()) for q in questions for choice in q.choices]
        flat, sizes = padded([[ids.get(token, 1) for token in tokens] for tokens in told])
        encoded |= {"ans_candidates": flat.reshape(len(questions), -1, flat.shape[1]),
                    "ans_candidates_len": sizes.reshape(len(questions), -1)}
        return encoded | {"answers": np.array([q.correct for q in questions])}
    answers, unknown = vocabulary["answer_token_to_idx"], 0 if split == "train" else 1
    return encoded | {"answers": np.array([answers.get(q.answer, unknown) for q in questions])}
