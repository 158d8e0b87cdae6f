"""Answer questions about a clip with a trained DualVGR, and show what it looked at.

    python -m videoqa.answer clip.gif "what colour is the square that moves left?"
    python -m videoqa.answer frames.zip --questions=questions.json --out=answers.jsonl       # a whole question file

CLIP is a GIF, a folder of pictures, a zip, an .npy or an .npz. A question file is a text with one question a line, or JSON:
a list of {"question", and where there are several videos "video" or "video_id", and "answer" if it is known}.
The sheet has the query's weights over words, the punishment of every clip and the attention of every graph in each cycle,
the weight of each clip's frames in the pooled video, and how much the answer loses without each clip.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data import clip as clips
from data import safe
from data.frames import Frames, blocks, open_frames, pictures_of
from data.options import from_plain, options_of, run, words_first
from data.parts import Lazy
from data.videos import question_words
from data.weights import load_parts, open_run
from videoqa.explain import best_answers, draw, probabilities, without_each_clip
from videoqa.features import Standard, captions, extract, looked
from videoqa.questions import Words
from videoqa.task import Config, build


@dataclass
class Options:
    """Answer questions about CLIP:  python -m videoqa.answer CLIP "QUESTION" ["QUESTION" ...] [--option=value ...]"""

    video: str = ""                                 # which video, where CLIP holds several
    top: int = 3                                    # answers to tell
    questions: str = ""                             # a file of questions: answers go to --out, one JSON object a line
    out: str = ""                                   # the picture (answer.png), or the answers (answers.jsonl)
    ckpt: str = "runs/dualvgr-default/best.pt"      # a checkpoint that train.py wrote


class Answerer:
    """A trained DualVGR with its words and its frozen CLIP; no data set is opened."""

    def __init__(self, ckpt):
        config, state = open_run(ckpt, "dualvgr")
        self.cfg = from_plain(Config, config)
        if self.cfg.streams == "none":
            raise ValueError(f"{ckpt} is a question-only model, which looks at no clip; point --ckpt at another run")
        if self.cfg.features:
            raise ValueError(f"{ckpt} was trained on feature files ({self.cfg.features[0]}), which frames cannot be turned into "
                             "here; train on frames with --films=FOLDER")
        self.words, self.clip = Words(), clips.small()
        self.standard = Standard(0, captions(self.clip))
        load_parts({"words": self.words, "standard": self.standard}, state, f"{ckpt} does not fit")
        self.ids = {word: n for n, word in enumerate(self.words.tables["question"])}
        self.model = build(self.cfg, self.words, self.standard.width).eval()
        load_parts({"model": self.model}, state, f"{ckpt} does not fit")

    def see(self, frames, name):
        """One video.   -> its clips (N, F, 3, 64, 64), appearance (1, N, L, D), motion (1, N, D), standardised"""
        if len(frames[name]) < 2:
            raise ValueError(f"{frames.where}: video {name!r} has a single frame, so nothing in it moves; a video needs two")
        shown = frames.clips(name, self.cfg.clips, self.cfg.frames, self.clip.size)
        return shown, *self.standard(*extract(shown[None], self.clip, self.cfg.look))

    def read(self, question):
        """Words and ids of a question.   raises ValueError if it has none, or none that the model knows"""
        words = question_words(question)
        known = [word for word in words if word in self.ids]
        if not words:
            raise ValueError("the question is empty; ask something such as 'what colour is the star?'")
        if not known:
            raise ValueError(f"the model knows none of the words of '{question}'; it was trained on such words as "
                             f"{', '.join(list(self.ids)[2:14])}")
        return list(words), torch.tensor([[self.ids.get(word, 1) for word in words]])

    @torch.no_grad()
    def answer(self, tokens, appearance, motion):
        """-> Output, probabilities (A,) of every answer but the two that stand for unknown ones"""
        out = self.model(tokens, torch.tensor([tokens.shape[1]]), appearance, motion)
        return out, probabilities(out.logits[0])

    def best(self, p, top):
        """-> [(answer, probability), ...]"""
        return best_answers(p, self.words.tables["answer"], top)


def open_clip(path):
    """Frames of CLIP: what data.frames opens, or one folder of pictures. A film of N x F frames is cut into its N shots."""
    path = Path(path)
    if path.is_dir() and (files := pictures_of(path)):
        return Frames(path, {path.name: lambda: Lazy(len(files), lambda n: safe.open_image(files[n]))}, blocks)
    frames = open_frames(path)
    frames.rows = blocks
    return frames


def pick(frames, name):
    """The video that is asked about.   raises ValueError where the choice is open"""
    if not name and len(frames.names) > 1:
        raise ValueError(f"{frames.where} holds {len(frames.names)} videos; choose one with --video, such as "
                         f"--video={frames.names[0]}")
    return name or frames.names[0]


def read_questions(file, frames):
    """[{"question", "video", "answer"?}] from a text or JSON file.   raises ValueError naming the line or the entry"""
    if Path(file).suffix.lower() == ".txt":
        lines = [line.strip() for line in safe.read_text(file, "one question a line").splitlines()]
        return [{"question": line, "video": pick(frames, "")} for line in lines if line]
    rows = []
    for n, row in enumerate(safe.read_json(file, list, "a list of {question, video, answer}")):
        safe.check_row(row, {"question": str}, f"{file}, entry {n}")
        video = str(row.get("video", row.get("video_id", "")))
        name = next((v for v in (video, f"video{video}", f"vid{video}") if v in frames.names), video)
        rows.append({"question": row["question"], "video": pick(frames, name)} | {k: row[k] for k in ("answer",) if k in row})
    if not rows:
        raise ValueError(f"{file} holds no question")
    return rows


def answer_file(answerer, frames, options):
    """Every question of a file, each video seen once; one JSON object a line. A question that cannot be read says why."""
    rows, lines, seen, right, known = read_questions(options.questions, frames), [], {}, 0, 0
    for row in rows:
        if row["video"] not in seen:
            seen = {row["video"]: answerer.see(frames, row["video"])[1:]}         # one video at a time is held
        try:
            out, p = answerer.answer(answerer.read(row["question"])[1], *seen[row["video"]])
        except ValueError as error:
            lines.append(row | {"error": str(error)})
            continue
        told = [(answer, round(x, 4)) for answer, x in answerer.best(p, options.top)]
        punishment = out.scores[:, :, 0].numpy().round(4).tolist()
        lines.append(row | {"predicted": told[0][0], "runners_up": told, "punishment": punishment})
        known += "answer" in row
        right += row.get("answer") == told[0][0]
    path = Path(options.out or "answers.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = f"; {right} of {known} right" if known else ""
    print(f"{len(lines)} questions about {len({row['video'] for row in rows})} videos{scored} -> {path}")


def main(argv):
    words, argv = words_first(argv)
    options = options_of(argv, Options, "python -m videoqa.answer")
    if not words or (len(words) > 1) == bool(options.questions):
        raise ValueError("say which clip, then a question or --questions=FILE:  python -m videoqa.answer clip.gif 'what "
                         "colour is the star?'")
    answerer, frames = Answerer(options.ckpt), open_clip(words[0])
    if options.questions:
        return answer_file(answerer, frames, options)
    shown, appearance, motion = answerer.see(frames, pick(frames, options.video))
    for k, question in enumerate(words[1:]):
        asked, tokens = answerer.read(question)
        out, p = answerer.answer(tokens, appearance, motion)
        told = ", ".join(f"{answer} {x:.2f}" for answer, x in answerer.best(p, options.top))
        unknown = [word for word in asked if word not in answerer.ids]
        note = [f"unknown to the model: {', '.join(unknown)}"] if unknown else []
        print("\n  ".join([question, told, *note]))
        path = Path(options.out or "answer.png")
        path = path if k == 0 else path.with_stem(f"{path.stem}-{k + 1}")
        effect = without_each_clip(answerer.model, tokens, appearance, motion, int(p.argmax()))
        draw(path, asked, [f"answers: {told}", *note], shown[:, looked(shown.shape[1], answerer.cfg.look)], out, effect)
        print(f"  -> {path}")


if __name__ == "__main__":
    run(main)
