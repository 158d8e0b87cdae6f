"""DualVGR's data, training and answers: features that see motion, exact resuming, evidence scores, questions about any clip."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import clip as clips
from data import quiz
from data.metrics import roc_auc
from data.videos import load_questions
from videoqa import answer, explain
from videoqa.features import cached, digest, extract, flow, looked
from videoqa.model import QuestionOnly
from videoqa.questions import groups_of
from videoqa.task import Config, Task, paper, rate

SMALL = dict(videos=30, questions=4, steps=60, eval_every=20, batch=32, width=32, word_width=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """The folder of a run of 60 steps."""
    return words_of(cache, tmp_path_factory.mktemp("whole"), "--steps=60")


def words_of(cache, out, *words):
    options = [f"--{key}={value}" for key, value in SMALL.items() if key != "steps"]
    train.main(["dualvgr", f"--out={out}", f"--cache={cache}", "--device=cpu", *options, *words])
    return out / "dualvgr-default"


def task(cache, **changes):
    torch.manual_seed(0)
    return Task(Config(**SMALL | {"cache": cache} | changes), CPU)


# -- features ---------------------------------------------------------------------------------------------------------------


def disc(x, y, colour, size=64):
    """A soft disc of a colour at (x, y) in [-1, 1] on grey."""
    grid = torch.linspace(-1, 1, size)
    mask = torch.sigmoid(20 * (0.4 - ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()))
    return mask * torch.tensor(colour)[:, None, None]


@pytest.mark.parametrize("colour", [(1.0, -1.0, -1.0), (-0.9, -0.9, -0.9), (0.2, 0.9, 0.1)])
@pytest.mark.parametrize("k, way", list(enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)])))
def test_flow_tells_which_way_things_of_any_colour_move(colour, k, way):
    steps = torch.linspace(-0.3, 0.3, 4)
    film = torch.stack([disc(way[0] * s, way[1] * s, colour) for s in steps])
    found = flow(film[None])[0]                                           # right, left, down, up, change, rest, edges
    assert found[:4].argmax() == k and found[k] > 0.3 and found[:4].sum() - found[k] < 0.05 and found[4] > 1


def test_flow_of_a_still_film_is_rest_and_knows_that_something_is_there():
    still, empty = flow(torch.stack([disc(0.1, 0.2, (1.0, 0.0, 0.0)), torch.zeros(3, 64, 64)])[:, None].expand(2, 4, 3, 64, 64))
    assert torch.equal(still[:6], empty[:6]) and still[:6].tolist() == [0, 0, 0, 0, 0, 1] and still[6] > empty[6] + 2


def test_words_and_motion_of_a_clip_can_be_read_from_its_features(cache):
    """Zero-shot: the words that CLIP finds most probable are those of the thing in the clip."""
    t = task(cache)
    shown, part = quiz.clips(range(30), questions=1)["videos"], t.parts["train"]
    match = shown["clip"][:, None] == torch.arange(8)[:, None]                                   # (V, 8, 6)
    own = {name: shown[name].gather(1, match.int().argmax(2))[match.any(2)] for name in ("size", "colour", "shape", "motion")}
    words = t.standard.read(part.appearance, part.motion)[0].mean(2)[match.any(2)]
    right = {name: float((words[:, a:b].argmax(1) == own[name]).float().mean())
             for name, a, b in (("size", 0, 2), ("colour", 2, 10), ("shape", 10, 18))}
    assert min(right.values()) > 0.9, right
    way = part.motion.float()[match.any(2)][:, [1, 0, 3, 2]]                                     # left, right, up, down
    assert (way.argmax(1) == own["motion"])[own["motion"] < 4].float().mean() > 0.97


def test_features_hold_the_frames_that_were_asked_for():
    clip = clips.small()
    film = quiz.film(quiz.clips(range(2), questions=1), range(2), 64).unflatten(1, (8, 4))
    look, move = extract(film, clip, 3)
    assert look.shape == (2, 8, 3, 64) and move.shape == (2, 8, 7) and look.dtype == torch.float16
    assert looked(4, 2).tolist() == [0, 3] and looked(16, 16).tolist() == list(range(16))
    with torch.no_grad():
        embedding = clip.encode_image(clips.standard(film[1, 5, :1], 64))[1]
    torch.testing.assert_close(look[1, 5, 0].float(), embedding[0], rtol=2e-3, atol=2e-3)


def test_features_are_made_once_and_named_by_their_content(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(3.0)}

    keys = [digest("a", np.arange(3)), digest("a", np.arange(3)), digest("a", np.arange(4)), digest("ab"), digest("a", "b")]
    assert keys[0] == keys[1] and len(set(keys)) == 4
    for _ in range(2):
        assert torch.equal(cached(tmp_path, keys[0], make)["x"], torch.arange(3.0))
    assert len(made) == 1
    cached("", keys[0], make)
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 1


# -- training -----------------------------------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart(cache):
    t = task(cache, lr=3e-3, steps=200)
    batch = next(t.batches(0, 0, 1))
    losses = [float(t.update(batch, 100)["answer"]) for _ in range(120)]
    assert losses[-1] < 0.05 * losses[0], f"only from {losses[0]:.3f} to {losses[-1]:.3f}"


def test_sixty_steps_equal_forty_then_twenty(cache, run, tmp_path):
    words_of(cache, tmp_path, "--steps=40")
    words_of(cache, tmp_path, "--steps=60")
    folder = tmp_path / "dualvgr-default"
    parts, whole = (torch.load(f / "last.pt", weights_only=True)["state"] for f in (folder, run))
    assert all(torch.equal(parts["model"][k], whole["model"][k]) for k in whole["model"])


def test_a_run_leaves_sheets_scores_and_an_answer_to_the_papers_claim(run):
    result = json.loads((run / "result.json").read_text())
    assert result["chance"]["accuracy"] > 0.2 and "AUC motion 2" in result["metrics"] and "query colour" in result["metrics"]
    assert {"majority answer of the type", "question only"} == set(result["rivals"])
    assert "chance 0.5" in (run / "evidence.txt").read_text() and list(run.glob("clip-*.png"))


@pytest.mark.parametrize("changes", [
    {"punish": "off"}, {"punish": "oracle"}, {"views": 1}, {"streams": "appearance"}, {"cycles": 1},
    {"streams": "motion"}, {"streams": "none"}, {"graph": "attention"}, {"alpha": 0.0}, {"beta": 1.0}, {"evidence_loss": 0.1},
    {"per_video": 1, "dropout": 1.0}])
def test_every_switch_trains(cache, changes):
    t = task(cache, **changes)
    batch = next(t.batches(0, 0, 1))
    before = float(t.update(batch, 100)["answer"])
    for _ in range(8):
        t.update(batch, 100)
    assert float(t.update(batch, 100)["answer"]) < before


def test_the_oracle_row_really_uses_the_evidence(cache):
    t = task(cache, punish="oracle")
    rows = torch.arange(6)
    scores = t.run(t.parts["test"], rows).scores
    assert torch.equal(scores, t.parts["test"].evidence[:6].float().expand_as(scores))


def test_losses_and_their_weights_enter_the_gradient(cache):
    grads = {}
    for name, changes in (("none", {}), ("alpha", {"alpha": 1.0}), ("beta", {"beta": 1.0})):
        t = task(cache, lr=0.0, **{"alpha": 0.0, "beta": 0.0} | changes)
        t.update(next(t.batches(0, 0, 1)), 100)
        grads[name] = t.model.units[0].graph.project.weight.grad.clone()
    for name in ("alpha", "beta"):
        assert (grads[name] - grads["none"]).norm() > 1e-3 * grads["none"].norm(), name


def test_groups_hold_every_question_and_one_video_each():
    row = torch.tensor([0, 1, 0, 0, 2, 0, 0])
    groups = groups_of(row, 3)
    assert groups.shape == (4, 3) and set(groups.flatten().tolist()) == set(range(7))
    assert all(len(set(row[g].tolist())) == 1 for g in groups)
    assert groups_of(row, 1).flatten().sort().values.tolist() == list(range(7))


def test_a_video_is_encoded_once_without_changing_the_answer(cache):
    t = task(cache)
    t.model.eval()
    part, rows = t.parts["test"], torch.tensor([3, 9, 1, 0, 10])
    shared, alone = t.run(part, rows).logits, torch.cat([t.run(part, rows[i : i + 1]).logits for i in range(5)])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)       # padding to the longest: 1e-5 in word attention


def test_evidence_auc_is_the_area_under_the_curve_of_each_question():
    torch.manual_seed(0)
    scores, evidence = torch.rand(5, 8).mul(4).round(), torch.rand(5, 8) < 0.4
    slow = torch.tensor([roc_auc(s, e) for s, e in zip(scores, evidence, strict=True)])
    torch.testing.assert_close(explain.evidence_auc(scores, evidence), slow)
    assert explain.evidence_auc(scores[:1], torch.zeros(1, 8, dtype=torch.bool)).isnan().all()
    assert explain.evidence_auc(evidence.float(), evidence).eq(1).all()


def test_schedules_are_the_official_halving_and_a_cosine():
    assert [rate(s, 250, "halve") for s in (0, 99, 100, 199, 200, 249)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rate(0, 1000, "cosine") == pytest.approx(0.01) and rate(999, 1000, "cosine") < 1e-5


def test_the_question_only_model_is_blind():
    torch.manual_seed(0)
    model = QuestionOnly(9, 5, 16, 8).eval()
    tokens, lengths = torch.tensor([[2, 3, 4]]), torch.tensor([3])
    outs = [model(tokens, lengths, torch.randn(1, 8, 2, 6), torch.randn(1, 8, 6)).logits for _ in range(2)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("name, n", [("msvd", 8), ("msrvtt", 16), ("svqa", 20)])
def test_published_sizes_build_the_published_network(name, n):
    cfg = Config(**paper(name))
    assert (cfg.clips, cfg.width, cfg.batch, cfg.lr, cfg.alpha) == (n, 768, 256, 1e-4, 1.0) and math.isclose(cfg.beta, 2.56e-6)
    with pytest.raises(ValueError, match="--paper=other is unknown; there are msvd, msrvtt, svqa"):
        paper("other")


@pytest.mark.parametrize("changes, sentence", [
    ({"punish": "maybe"}, "--punish=maybe is unknown; choose learnt, off, oracle"),
    ({"batch": 30, "per_video": 4}, "--batch=30 must be a multiple of --per_video=4"),
    ({"data": "codraw", "punish": "oracle"}, "evidence is known only in the built-in clips"),
    ({"clips": 4}, "the built-in videos have 8 clips"),
    ({"data": "msvd", "root": "."}, "train_qa.json is missing")])
def test_a_wrong_configuration_is_one_sentence(cache, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        task(cache, **changes)


# -- answers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Test video 0 as .npz, GIF, folder and zip."""
    import shutil
    folder = tmp_path_factory.mktemp("film")
    shown = quiz.film(quiz.clips([0], 0, "test", 8), [0], 64)[0]
    frames = shown.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(folder / "clip.npz", a=frames)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(folder / "clip.gif", save_all=True, append_images=images[1:])
    (folder / "all" / "a").mkdir(parents=True)
    for n, image in enumerate(images):
        image.save(folder / "all" / "a" / f"{n:03d}.png")
    shutil.make_archive(str(folder / "clip"), "zip", folder / "all")
    return folder


def test_an_answer_needs_only_the_checkpoint_and_equals_the_tasks(cache, run, film):
    t = task(cache)
    answerer = answer.Answerer(run / "best.pt")
    t.model.load_state_dict(answerer.model.state_dict())
    logits, scores = t.answer("test")
    shown, *seen = answerer.see(answer.open_clip(film / "clip.npz"), "a")
    exact = t.standard(*(x[t.parts["test"].row[:1]] for x in (t.parts["test"].appearance, t.parts["test"].motion)))
    for ours, theirs in zip(seen, exact, strict=True):
        assert (ours - theirs).abs().max() < 0.2                          # standard deviations; frames were rounded to 8 bits
    for q in range(4):
        question = t.parts["test"].questions[q].text
        out, p = answerer.answer(answerer.read(question)[1], *exact)
        torch.testing.assert_close(out.logits[0], logits[q], rtol=1e-3, atol=1e-3)
        assert p[:2].sum() == 0 and p.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["clip.npz", "clip.gif", "clip.zip", "all/a", "all"])
def test_clips_of_every_form_are_answered_and_drawn(run, film, name, tmp_path, capsys):
    answer.main([str(film / name), "what colour is the heart?", f"--ckpt={run}/best.pt", f"--out={tmp_path}/sheet.png"])
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    line = capsys.readouterr().out.splitlines()[1]
    assert len(line.split(",")) == 3 and all(0 <= float(part.split()[-1]) <= 1 for part in line.split(","))


def test_a_question_file_becomes_one_answer_a_line(run, film, tmp_path, capsys):
    rows = [{"question": "how many red things are there?", "answer": "2"}, {"question": "zebras?"}, {"question": "what shape?"}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    answer.main([str(film / "clip.npz"), f"--questions={tmp_path}/q.json", f"--out={tmp_path}/a.jsonl", f"--ckpt={run}/best.pt"])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [("predicted" in line, "error" in line) for line in lines] == [(True, False), (False, True), (True, False)]
    assert np.array(lines[0]["punishment"]).shape == (2, 2, 8) and "of 1 right" in capsys.readouterr().out


def test_what_cannot_be_answered_is_one_sentence(run, film, tmp_path):
    ckpt, clip = f"--ckpt={run}/best.pt", str(film / "clip.npz")
    Image.new("RGB", (20, 20)).save(tmp_path / "one.gif")
    (tmp_path / "cut.gif").write_bytes((film / "clip.gif").read_bytes()[:900])
    (tmp_path / "single").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "single" / "0.png")
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 8, 8, 3), np.uint8), b=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "empty.json").write_text("[]")
    torch.save({"name": "galip", "config": {}, "state": {}}, tmp_path / "other.pt")
    for words, sentence in [
            ([clip, " ?", ckpt], "the question is empty"), ([clip, "wer ist das?", ckpt], "knows none of the words"),
            ([clip, ckpt], "say which clip, then a question"), ([str(tmp_path / "one.gif"), "what?", ckpt], "has a single frame"),
            ([str(tmp_path / "cut.gif"), "what colour?", ckpt], "cut.gif is not a GIF that can be read, or it is cut"),
            ([str(tmp_path / "single"), "what colour?", ckpt], "single frame"), ([str(tmp_path / "no"), "what?", ckpt], "no"),
            ([str(tmp_path / "two.npz"), "what colour?", ckpt], "holds 2 videos; choose one with --video"),
            ([clip, f"--questions={tmp_path}/empty.json", ckpt], "holds no question"),
            ([clip, "what?", f"--ckpt={tmp_path}/other.pt"], "holds 'galip', not a run of dualvgr"),
            ([clip, "what?", "--tpo=3", ckpt], "did you mean --top")]:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            answer.main(words)


def test_a_thousand_frames_and_two_frames_are_answered(run, tmp_path):
    answerer = answer.Answerer(run / "best.pt")
    for n in (2, 1000):
        np.savez(tmp_path / "clip.npz", a=np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8))
        seen = answerer.see(answer.open_clip(tmp_path / "clip.npz"), "a")[1:]
        assert answerer.answer(answerer.read("what colour is it")[1], *seen)[1].isfinite().all()


def test_the_loss_without_a_clip_is_what_replacing_it_costs(cache):
    t = task(cache)
    t.model.eval()
    part = t.parts["test"]
    look, move = t.standard(part.appearance[:1], part.motion[:1])
    tokens = part.tokens[:1, : int(part.lengths[0])]
    effect = explain.without_each_clip(t.model, tokens, look, move, 4)
    other = look.clone(), move.clone()
    other[0][:, 2], other[1][:, 2] = 0, 0
    with torch.no_grad():
        p = [t.model(tokens, part.lengths[:1], *x).logits.softmax(1)[0, 4] for x in ((look, move), other)]
    assert effect[2] == pytest.approx(float(p[0] - p[1]), abs=1e-5)


# -- real pictures ------------------------------------------------------------------------------------------------------------


def test_real_clips_go_from_frames_to_a_training_step(cache, shared):
    t = task(cache, data="video_clips", root=str(shared / "video_clips"), eval_every=1, steps=1)
    assert len(t.parts["test"].answers) == 194 and t.parts["test"].appearance.shape[:3] == (11, 8, 2)
    assert torch.isfinite(t.update(next(t.batches(0, 0, 1)), 100)["answer"])


@pytest.mark.parametrize("name, kind, questions", [
    ("msvd", "frameqa", 6415), pytest.param("tgif", "frameqa", 13691, marks=pytest.mark.slow),
    pytest.param("tgif", "count", 3554, marks=pytest.mark.slow)])
def test_real_question_files_train_on_feature_files(shared, tmp_path, name, kind, questions):
    """Real text, vocabularies and ids to a step; nobody may hand out the videos, so the features are noise of HCRN's layout."""
    root = tmp_path / "set"
    root.mkdir()
    for file in (shared / f"{name}_qa").iterdir():
        (root / file.name).symlink_to(file)
    if name == "msvd":
        (root / "test_qa.json").symlink_to(root / "val_qa.json")                          # its test file is not at hand
    ids = np.array(sorted({q.number for part in ("train", "valid", "test") for q in load_questions(name, root, part, kind=kind)}))
    noise = np.random.default_rng(0).normal(size=(len(ids), 8, 3, 6)).astype(np.float16)
    np.savez(tmp_path / "noise.npz", ids=ids, appearance=noise[:, :, :2], motion=noise[:, :, 2])
    t = task("", data=name, root=str(root), kind=kind, features=(str(tmp_path / "noise.npz"),), per_video=1)
    assert len(t.parts["test"].answers) == questions and len(t.words.tables["answer"]) > 10
    assert torch.isfinite(t.update(next(t.batches(0, 0, 1)), 100)["answer"])
