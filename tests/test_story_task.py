"""StoryImager's two stages, their rivals, the judge, and drawing strips from sentences; tiny sizes."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import stories, views, world
from data.options import plain
from data.reader import reader
from data.text import MERGES
from data.vae import VAE
from data.weights import save_checkpoint, write_safetensors
from story import sample
from story.judge import chance, consistency, judge
from story.storyimager import StoryImager, alpha_bars, past_only, sample_in_order, sampling_times
from story.task import Config, Task, paper
from story.unet import UNet
from story.words import Encoder

TINY = dict(batch=4, size=16, patch=4, channels=12, widths=(8, 16), heads=2, groups=4, width=16, text_heads=2, rank=2, alpha=2.0,
            judged=(4, 4), sampler=2, steps=4, base_steps=2, eval_every=4)
TOLD = ["Pip the red star walks in the snow.", "It meets Mo.", "They jump.", "It stands on the left."]


def task(**switches):
    torch.manual_seed(0)
    return Task(Config(**TINY | switches), torch.device("cpu"))


def steps(t, start, stop):
    losses = []
    for step, batch in zip(range(start, stop), t.batches(0, start, stop), strict=True):
        torch.manual_seed(step)
        losses.append(t.update(batch, step))
    return losses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps through train.py, with everything it leaves behind."""
    folder = tmp_path_factory.mktemp("runs")
    options = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items()]
    train.main(["storyimager", f"--out={folder}", *options])
    return folder / "storyimager-default"


# -- the two stages -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_scores_of_every_task_with_ceilings_and_chance(run):
    result = json.loads((run / "result.json").read_text())
    for kind in ("visualise", "continue", "complete", "real"):
        assert {f"{kind} named", f"{kind} pronoun", f"{kind} attributes", f"{kind} consistency"} <= result["metrics"].keys()
    assert (result["metrics"]["Frechet frame"] > result["metrics"]["real Frechet frame"]
            and result["chance"]["visualise pronoun"] < 0.15)
    assert {"stories.png", "seeds.png", "steps.gif", "curve.png", "best.pt"} <= {p.name for p in run.iterdir()}


def test_six_steps_equal_four_then_two_across_the_change_of_stage(tmp_path):
    options = ["storyimager", "--judged=2,2", "--eval_every=2", *(f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
               for k, v in TINY.items() if k not in ("steps", "judged", "eval_every", "base_steps")),
               f"--out={tmp_path}", "--base_steps=3"]
    for tag, count in (("whole", 6), ("parts", 2), ("parts", 6)):
        module, run = train.find_model("storyimager")[1], train.Run(out=str(tmp_path), tag=tag)
        typed = train.parse(options[1:] + [f"--steps={count}"], module.Config, train.Run)
        train.fit("storyimager", module, run,
                  module.Config(**{k: v for k, v in typed.items() if k in train.fields(module.Config)}), True)
    whole, parts = (torch.load(tmp_path / f"storyimager-{tag}/last.pt", weights_only=True)["state"] for tag in ("whole", "parts"))
    assert all(torch.equal(whole[part][name], parts[part][name]) for part in ("net", "average") for name in whole[part])


def test_stage_one_trains_the_base_and_stage_two_only_what_the_paper_adds():
    t = task(peft=True)
    names = {id(p): name for name, p in t.net.named_parameters()}
    before = {name: p.clone() for name, p in t.net.named_parameters()}
    steps(t, 0, 2)
    moved = {names[id(p)] for name, p in t.net.named_parameters() if not torch.equal(p, before[name])}
    base = {f"story.unet.{name}" for name in t.base.state_dict()}
    words = {name for name in before if name.startswith("words.")}
    assert moved <= base | words and "story.unet.conv_in.weight" in moved and any(name in moved for name in words)
    torch.manual_seed(2)
    (batch,) = t.batches(0, 2, 3)
    t.update(batch, 2)
    middle = {name: p.clone() for name, p in t.net.named_parameters()}
    steps(t, 3, 5)
    moved = {name for name, p in t.net.named_parameters() if not torch.equal(p, middle[name])}
    assert (moved and not moved & (base | words)
            and any("extractor" in name for name in moved) and any(".lora." in name for name in moved))
    assert all(torch.equal(t.base.state_dict()[name.removeprefix("story.unet.")], t.net.state_dict()[name])
               for name in base), "shared weights"


def test_neighbours_on_a_board_of_stage_one_are_of_other_stories():
    t, told = task(own=1.0, drop=0.0), []
    read, t.read = t.read, lambda texts: told.append(texts) or read(texts)
    rows, seed = next(iter(t.batches(0, 0, 1)))
    t.frame_loss(rows, seed, alone=False)
    captions, rows = t.data["train"].captions, rows.tolist()
    assert told[0] == [[captions[rows[b - f]][f] for f in range(4)] for b in range(4)]


def test_full_tuning_moves_the_base_and_scratch_moves_the_text_encoder_too():
    for switches, encoder in (({}, False), ({"base_steps": 0}, True)):
        t = task(**switches)
        steps(t, 0, 3)
        before = {name: p.clone() for name, p in t.net.named_parameters()}
        steps(t, 3, 5)
        moved = {name for name, p in t.net.named_parameters() if not torch.equal(p, before[name])}
        assert "story.unet.conv_in.weight" in moved and any(name.startswith("words.") for name in moved) == encoder


def test_stage_one_of_another_run_is_taken_over(run):
    t, donor = task(base=str(run / "best.pt"), base_steps=0), torch.load(run / "best.pt", weights_only=True)["state"]["average"]
    assert torch.equal(t.average.state_dict()["story.unet.conv_in.weight"], donor["story.unet.conv_in.weight"])
    assert torch.equal(t.net.state_dict()["words.tower.token_embedding.weight"], donor["words.tower.token_embedding.weight"])
    gates = [p for name, p in t.net.named_parameters() if name.endswith("gate")]
    assert gates and all(float(g.detach()) == 0 for g in gates)
    with pytest.raises(ValueError, match="does not fit this run"):
        task(base=str(run / "best.pt"), base_steps=0, widths=(8, 8))


def test_one_story_batch_is_learnt_by_heart():
    t = task(base_steps=0, lr=6e-3, widths=(16, 32), drop=0.0, drop_one=0.0)
    rows, seed = next(iter(t.batches(0, 0, 1)))
    losses = []
    for step in range(40):
        torch.manual_seed(step % 2)
        losses.append(float(t.update((rows, seed), step)["story loss"]))
    first, last = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    assert last < 0.25 * first, f"loss only went from {first:.3f} to {last:.3f}"


@pytest.mark.parametrize("row", Task.ablations)
def test_every_row_of_the_ablation_trains_and_draws(row):
    t = task(**Task.ablations[row])
    assert all(torch.isfinite(x).all() for losses in steps(t, 0, 3) for x in losses.values())
    with torch.no_grad():
        scores = t.evaluate("valid")
    assert 0 <= float(scores["visualise named"]) <= 1


def test_five_frames_lie_on_six_cells_and_the_blank_one_never_counts():
    t = task(frames=5, board_rows=2)
    assert (t.board.rows, t.board.cols, t.cells) == (2, 3, 6)
    real = t.data["test"].frames([0, 1])
    z = t.latents(real)
    assert z.shape == (2, 6, 12, 4, 4) and (z[:, 5] == 0).all() and (t.pictures(z) - real).square().mean() < 0.05
    assert t.mask(torch.ones(1, 5)).tolist() == [[1, 1, 1, 1, 1, 0]]
    drawn = t.draw(real, [t.data["test"].captions[r] for r in (0, 1)], torch.tensor([[1.0, 0, 1, 1, 0]] * 2))
    assert drawn.shape == real.shape and torch.equal(drawn[:, [1, 4]], real[:, [1, 4]])


@pytest.mark.parametrize("switches, sentence", [
    ({"mode": "all"}, "--mode=all is unknown; choose both, frame, story, joint"),
    ({"tasks": ("visualise", "infill")}, "infill is unknown; choose from visualise, continue, complete"),
    ({"size": 20}, "--size=20 must be a multiple of patch x 2"),
    ({"base": "x.pt"}, "add --base_steps=0"), ({"predict": "velocity"}, "--predict=velocity is unknown"),
    ({"data": "codraw"}, "--root for codraw"), ({"sd": "nowhere", "base_steps": 0}, "nowhere/vae.*is missing")])
def test_bad_options_are_answered_with_a_sentence(switches, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        task(**switches)


def test_choosing_rows_of_the_ablation_leaves_the_board_alone():
    """--rows belongs to train.py; a board option of that name would swallow it."""
    shared = set(train.fields(train.Run)) & set(train.fields(Config))
    assert shared == {"seed"}, shared


def test_papers_sizes_are_those_of_stable_diffusion():
    cfg = Config(**paper("sd") | {"sd": "folder"})
    assert cfg.widths == (320, 640, 1280, 1280) and cfg.size == 256 and cfg.predict == "noise"
    with pytest.raises(ValueError, match="there is sd"):
        paper("pororo")


# -- schedule and rivals ----------------------------------------------------------------------------------------------------


def test_the_stretched_schedule_ends_without_signal_and_starts_alike():
    zero, plain_ = alpha_bars(zero=True), alpha_bars()
    assert zero[-1] == 0 and zero[0] == pytest.approx(float(plain_[0])) and (zero.diff() < 0).all()
    assert sampling_times(20, trailing=True)[0] == 999 and sampling_times(20, trailing=True)[-1] > 0
    assert len(set(sampling_times(7, trailing=True))) == 7


def test_guidance_mixes_noise_estimates():
    """One step at guidance 3 equals the step of e_u + 3 (e_c - e_u), by hand from two unguided steps."""
    t = task(base_steps=0)
    story, told = t.net["story"].eval(), [t.data["test"].captions[0]]
    for p in story.unet.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    z0, mask, empty = t.latents(t.data["test"].frames([0])), torch.ones(1, 4), t.empty(1)

    def draw(words, guidance):
        return story.sample(z0, *words, mask, empty, 1, guidance, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        conditional, blank, mixed = draw(t.read(told), 1.0), draw(empty, 1.0), draw(t.read(told), 3.0)
    torch.testing.assert_close(mixed, blank + 3 * (conditional - blank), rtol=1e-3, atol=1e-4)


def test_a_frame_by_frame_model_sees_nothing_of_what_comes_later():
    z0, words, keep = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 5, 6), torch.ones(2, 4, 5, dtype=torch.bool)
    empty = torch.zeros(1, 4, 5, 6), torch.zeros(1, 4, 5, dtype=torch.bool)
    z, w, k = past_only(z0, words, keep, empty, torch.tensor([1, 3]))
    assert torch.equal(z[0, :2], z0[0, :2]) and (z[0, 2:] == 0).all() and (w[0, 2:] == 0).all() and not k[0, 2:].any()
    assert torch.equal(z[1], z0[1]) and torch.equal(w[1], words[1])


def test_frames_in_order_leave_given_ones_and_ignore_the_future():
    t = task(autoregressive=True)
    story = t.net["story"].eval()
    for p in story.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    z0, told = t.latents(t.data["test"].frames([0])), [TOLD]
    mask = torch.tensor([[1.0, 1, 0, 1]])

    def draw(z0, told):
        with torch.no_grad():
            return sample_in_order(story, z0, *t.read(told), mask, t.empty(1), steps=2,
                                   generator=torch.Generator().manual_seed(0))

    out = draw(z0, told)
    changed, other = z0.clone(), [[*TOLD[:3], "It jumps."]]
    changed[:, 2] += 1
    again = draw(changed, other)
    assert torch.equal(out[:, 2], z0[:, 2]) and torch.equal(again[:, :2], out[:, :2]) and not torch.equal(again[:, 3], out[:, 3])


def test_the_story_branch_reads_the_whole_story_and_independent_frames_do_not():
    for switches, reaches in (({}, True), ({"independent": True, "mode": "frame"}, False), ({"independent": True}, False)):
        t = task(base_steps=0, **switches)
        for p in t.net["story"].parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        z, mask, time = t.latents(t.data["test"].frames([0])), torch.ones(1, 4), torch.tensor([500])
        with torch.no_grad():
            a, b = (t.net["story"].denoise(z, time, *t.read([told]), mask) for told in (TOLD, ["Bo jumps.", *TOLD[1:]]))
        assert not torch.equal(a[:, 0], b[:, 0]) and (not torch.equal(a[:, 1:], b[:, 1:])) == reaches


# -- the judge ----------------------------------------------------------------------------------------------------------------


def test_the_judge_praises_true_stories_and_sees_a_wrong_character():
    data, view = stories.load("builtin", split="test", size=32), views.stories(range(24), split="test")
    real, mask, read = data.frames(range(24)), torch.ones(24, 4), reader()
    true, wrong = judge(read, real, view, mask), judge(read, real.roll(1, 0), view, mask)
    assert true["named"] > 0.85 and true["pronoun"] > 0.85 and true["place"] > 0.95 and true["consistency"] > 0.85, true
    assert wrong["named"] < 0.4 and wrong["pronoun"] < 0.4 and wrong["place"] < 0.5, wrong
    level = chance(view)
    assert 1 / 28 < level["pronoun"] < 1 / 7 and 0.05 < level["named"] <= 1 / 8


def test_only_drawn_frames_are_scored_and_consistency_compares_the_same_character():
    reading = {"shape": torch.tensor([[1], [1], [2], [1]]), "colour": torch.tensor([[3], [3], [3], [3]])}
    character = torch.tensor([[[0, -1], [0, -1], [0, -1], [4, -1]]])
    assert consistency(reading, character, torch.ones(1, 4, dtype=torch.bool)) == pytest.approx(1 / 3)
    assert consistency(reading, character, torch.tensor([[True, False, False, False]])) == 0.5
    data, view = stories.load("builtin", split="test", size=32), views.stories(range(8), split="test")
    spoilt, mask = data.frames(range(8)), torch.ones(8, 4)
    spoilt[:, 1], mask[:, 1] = 0, 0
    assert all(float(x) == pytest.approx(float(judge(reader(), data.frames(range(8)), view, mask)[key]), nan_ok=True)
               for key, x in judge(reader(), spoilt, view, mask).items() if key != "consistency")


def test_complete_captions_name_everything_that_is_in_the_frame():
    view = views.stories(range(40))
    for way in range(6):
        for b, told in enumerate(stories.complete(view, way)):
            for f, text in enumerate(told):
                who = [n for n in view["character"][b, f].tolist() if n >= 0]
                place = world.PLACES[world.BACKGROUND[view["place"][b, f]]]
                shapes = [world.SHAPES[view["look"][b, n, 0]] for n in who]
                said = [world.NAMES[n].lower() in text.lower() or shape in text for n, shape in zip(who, shapes, strict=True)]
                assert place in text and all(said)
                assert not {"it", "they"} & set(text.lower().rstrip(".").split())


# -- from the command line ----------------------------------------------------------------------------------------------------


def draw(run, *words):
    sample.main([*words, f"--ckpt={run / 'best.pt'}"])


def test_sentences_become_a_strip_a_gif_and_a_story_to_go_on_with(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(run, *TOLD, "--words", "--out=a/strip.png")
    assert {p.name for p in Path("a").iterdir()} == {"strip.png", "strip.gif", "strip.json", "strip-words.png",
                                                     *(f"strip-{n}.png" for n in range(1, 5))}
    before = [Path(f"a/strip-{n}.png").read_bytes() for n in range(1, 5)]
    draw(run, "--story=a/strip.json", "--edit", "3=Mo walks on the right.", "--out=b.png")
    after = [Path(f"b-{n}.png").read_bytes() for n in range(1, 5)]
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, True, False, True]
    assert json.loads(Path("b.json").read_text())["sentences"][2] == "Mo walks on the right."
    draw(run, *TOLD, "--out=c.png")
    assert Path("c-2.png").read_bytes() == before[1]
    draw(run, *TOLD, "--seed=1", "--steps=3", "--guidance=2", "--out=d.png")
    assert Path("d-2.png").read_bytes() != before[1]
    assert "4 frames, 1 of them drawn" in capsys.readouterr().out


def test_given_frames_stay_and_one_of_another_size_is_squeezed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 30, 3), 200, dtype=np.uint8)).save("known.png")
    draw(run, *TOLD, "--given", "2=known.png", "--out=s.png")
    assert "30 x 40: squeezed to the model's 16 x 16" in capsys.readouterr().out
    assert (np.asarray(Image.open("s-2.png")) == 200).all()


@pytest.mark.parametrize("told", [["Pip walks."], ["Pip walks.", "", "It jumps.", ""], [*TOLD, "It jumps.", "Bo stands."]])
def test_one_sentence_empty_ones_and_longer_stories_have_defined_results(run, told):
    t = sample.restore(run / "best.pt")
    pictures = sample.draw_story(t, told, {}, 0)
    assert pictures.shape == (len(told), 3, 16, 16) and pictures.isfinite().all()
    assert torch.equal(sample.draw_story(t, told, {}, 0), pictures)
    if len(told) > 4:
        assert torch.equal(sample.draw_story(t, told[:4], {}, 0), pictures[:4]), "the first board does not know the later ones"


@pytest.mark.parametrize("words, sentence", [
    ([], "there is no sentence"), (["Pip walks", "--given", "1=k.png"], "all 1 frames are given"),
    (["Pip walks.", "--given", "0=k.png"], "this story has frames 1 to 1"),
    (["Pip walks.", "--given", "k.png"], "write the frame's number"),
    (["Pip walks.", "--given", "1=nothing.png"], "nothing.png"),
    (["Pipp walks."], "has never read the word 'pipp'.*did you mean pip"),
    (["Pip walks.", "--edit", "1=It jumps."], "name its .json with --story"), (["--story=k.json"], "is not the .json of a strip"),
    (["Pip " + "walks " * 40], "the model reads 15 a sentence"), (["--row=5000"], "stories 0 to"),
    (["Pip walks.", "--words"], "write 4 sentences"), (["Pip walks.", "--stps=3"], "did you mean --steps")])
def test_bad_input_of_the_verb_is_one_sentence(run, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save("k.png")
    Path("k.json").write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        draw(run, *words)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"name": "toy", "config": {}})
    with pytest.raises(ValueError, match="holds 'toy', not a model of story"):
        sample.restore(tmp_path / "x.pt")


def test_word_maps_belong_to_their_own_cell(run):
    t = sample.restore(run / "best.pt")
    pictures = sample.draw_story(t, TOLD, {}, 0)
    maps, story = sample.looks(t, pictures, TOLD)
    assert maps.shape == (4, 16, 4, 4) and story.shape == (4, 4, 4, 4)
    heads = t.cfg.heads
    torch.testing.assert_close(maps.sum(1), torch.full((4, 4, 4), float(heads)))
    torch.testing.assert_close(story.sum(1), torch.full((4, 4, 4), float(heads)))
    changed = [*TOLD[:2], "Bo stands on the right.", TOLD[3]]
    t.net["story"].load_state_dict(t.net["story"].state_dict())
    other = sample.looks(t, pictures, changed)[0]
    difference = (other - maps).abs().amax((1, 2, 3))
    assert difference.argmax() == 2


# -- real data ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, folder, frames, cells", [("clevr", "clevr_sv", 4, 4), ("codraw", "codraw", 5, 6)])
def test_real_stories_train_and_are_judged(shared, name, folder, frames, cells, capsys):
    t = task(data=name, root=str(shared / folder), length=12)
    assert (t.frames, t.cells, t.headline) == (frames, cells, "Frechet frame")
    assert name == "clevr" or "are longer than --length=12 and lose their end" in capsys.readouterr().out
    assert all(x.isfinite() for losses in steps(t, 0, 4) for x in losses.values())
    with torch.no_grad():
        scores = t.evaluate("test")
    assert scores["real Frechet frame"] < scores["Frechet frame"] and scores["visualise squared error"] > 0


def test_the_published_classes_are_what_the_task_builds():
    t = task()
    assert isinstance(t.net["story"], StoryImager) and isinstance(t.net["words"], Encoder) and plain(t.cfg)["batch"] == 4


# -- Stable Diffusion's folder ---------------------------------------------------------------------------------------------------


def stable_diffusion(folder, width=64):
    """A folder in the diffusers layout with random weights: narrow, otherwise as published."""
    g = torch.Generator().manual_seed(0)
    unet, vae = UNet(4, (32, 64), (True, False), 1, 8, width, 32), VAE((32, 32, 32, 32), 4, 1, 32)
    layer = {"layer_norm1": width, "layer_norm2": width, "self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width),
             "self_attn.v_proj": (width, width), "self_attn.out_proj": (width, width),
             "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    text = {"embeddings.token_embedding.weight": (MERGES + 514, width), "embeddings.position_embedding.weight": (77, width)}
    for name, shape in {f"encoder.layers.0.{k}": v for k, v in layer.items()}.items() | {("final_layer_norm", width)}:
        text |= {f"{name}.weight": shape if isinstance(shape, tuple) else (shape,),
                 f"{name}.bias": (shape[0] if isinstance(shape, tuple) else shape,)}
    text = {f"text_model.{k}": torch.randn(shape, generator=g) * 0.1 for k, shape in text.items()}
    for part, name, state in (("unet", "diffusion_pytorch_model", unet.state_dict()),
                              ("vae", "diffusion_pytorch_model", vae.state_dict()), ("text_encoder", "model", text)):
        (folder / part).mkdir(parents=True)
        write_safetensors(folder / part / f"{name}.safetensors", state)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", "t h", "th e</w>",
                                                                *(f"x{n} y{n}" for n in range(MERGES - 2))]))
    return unet.state_dict()


def test_stable_diffusion_in_its_layout_takes_the_place_of_stage_one(tmp_path):
    weights = stable_diffusion(tmp_path)
    t = task(**paper("sd") | dict(sd=str(tmp_path), size=32, widths=(32, 64), attention=(True, False), resnets=1, heads=8,
                                  groups=32, width=64, patch=8, channels=4, batch=2, steps=2, depth=1))
    assert torch.equal(t.net["story"].unet.state_dict()["conv_in.weight"], weights["conv_in.weight"])
    words, keep = t.net["words"](["the star walks", ""])
    assert words.shape == (2, 77, 64) and keep.sum(1).tolist()[1] == 2
    ids = t.net["words"].tokeniser(["the"])
    assert ids[0, 2:].unique().tolist() == [t.net["words"].tokeniser.end], "Stable Diffusion pads with end marks"
    before = {name: p.clone() for name, p in t.net.named_parameters()}
    assert all(torch.isfinite(x).all() for losses in steps(t, 0, 2) for x in losses.values())
    moved = {name for name, p in t.net.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith("words.") or name.removeprefix("story.unet.") in weights for name in moved)
    real = t.data["test"].frames([0])
    drawn = t.draw(real, [t.data["test"].captions[0]], torch.tensor([[1.0, 0, 1, 1]]), steps=2, guidance=6.0)
    assert torch.equal(drawn[:, 1], real[:, 1]) and drawn.isfinite().all()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="wants a folder of Stable Diffusion 1.5"):
        task(sd=str(tmp_path), base_steps=0)
