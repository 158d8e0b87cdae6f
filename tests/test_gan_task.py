"""Training GALIP and drawing with it: the step, resuming, other data, prompts, the authors' checkpoints, bad input."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import parallel, world
from data.clip import CLIP, ImageTower, TextTower, official_names
from data.text import MERGES
from data.weights import load_checkpoint, write_safetensors
from gan import sample
from gan import task as galip
from gan.task import Config, Task, paper
from gan.words import Sentences, fit, table
from tests.test_galip import official_dicts

TINY = {"batch": 4, "noise": 4, "base": 2, "bridge": (4, 4, 1), "channels": 8, "hidden": 8}
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items()]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch, tmp_path):
    """Evaluations of 104 pictures: just enough for 100 candidates."""
    monkeypatch.setattr(galip, "JUDGED", {"valid": 104, "test": 104})
    monkeypatch.chdir(tmp_path)


def tiny(**changes):
    torch.manual_seed(0)
    return Task(Config(**TINY | changes), torch.device("cpu"))


def run(*words, tag="default"):
    train.main(["galip", *FLAGS, f"--tag={tag}", *words])
    return json.loads(Path(f"runs/galip-{tag}/result.json").read_text())


def a_folder(root, count=45, words=("wug", "blick", "dax")):
    """Pictures of one colour each, in words that the small CLIP does not know."""
    root.mkdir()
    for i in range(count):
        Image.new("RGB", (70, 66), (80 * (i % 3), 100, 200)).save(root / f"{i:03}.png")
        (root / f"{i:03}.txt").write_text(f"a {words[i % 3]} number {i}\nthere is a {words[i % 3]}\n")
    return root


# -- the step -----------------------------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart():
    task = tiny(lr_g=3e-3, clip_weight=10.0)
    batch = next(iter(task.batches(0, 0, 1)))
    seen = [float(task.update(batch, step)["clip"]) for step in range(25)]
    assert seen[-1] > seen[0] + 0.15, f"similarity to four sentences only went from {seen[0]:.3f} to {seen[-1]:.3f}"


def test_a_step_paints_once_and_keeps_real_pixels_out_of_the_graph(monkeypatch):
    task, painted, looked = tiny(), [], []
    batch = next(iter(task.batches(0, 0, 1)))
    task.generator.register_forward_hook(lambda *_: painted.append(1))
    look = task.critic.look
    monkeypatch.setattr(task.critic, "look", lambda x, *a, **k: looked.append(torch.is_grad_enabled()) or look(x, *a, **k))
    before = {k: v.clone() for k, v in task.clip.state_dict().items()}
    task.update(batch, 0)
    assert painted == [1] and looked == [False, True]
    assert all(p.grad is None for p in task.clip.parameters())
    assert all(torch.equal(v, before[k]) for k, v in task.clip.state_dict().items())
    assert all(p.requires_grad for p in task.critic.parameters())


def test_the_generators_step_leaves_no_gradient_in_the_critic(monkeypatch):
    task, kept = tiny(), []
    step = task.g_optimiser.step
    monkeypatch.setattr(task.g_optimiser, "step", lambda: (kept.append([p.grad.clone() for p in task.critic.parameters()
                                                                         if p.grad is not None]), step())[1])
    task.update(next(iter(task.batches(0, 0, 1))), 0)
    for a, b in zip(kept[0], [p.grad for p in task.critic.parameters() if p.grad is not None], strict=True):
        assert torch.equal(a, b)


def test_the_average_follows_the_generator():
    task = tiny(ema=0.5)
    old = [p.clone() for p in task.average.parameters()]
    with torch.no_grad():
        for p in task.generator.parameters():
            p += 1
    task.follow(step=1000)
    for a, b, new in zip(old, task.average.parameters(), task.generator.parameters(), strict=True):
        torch.testing.assert_close(b, (a + new) / 2)
    tracked = tiny(ema=0.0)
    tracked.update(next(iter(tracked.batches(0, 0, 1))), 0)
    assert all(torch.equal(a, b) for a, b in zip(tracked.average.parameters(), tracked.generator.parameters(), strict=True))


def test_under_autocast_the_critics_step_stays_in_float32():
    task, kinds = tiny(), []
    task.critic.assess.register_forward_hook(lambda module, inputs, y: kinds.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = task.update(next(iter(task.batches(0, 0, 1))), 0)
    assert kinds[:3] == [torch.float32] * 3 and kinds[3] == torch.bfloat16      # real, fake, mismatched; then the generator's
    assert losses["penalty"].dtype == torch.float32 and all(v.isfinite() for v in losses.values())


@pytest.mark.parametrize("row", list(Task.ablations))
def test_every_row_of_the_ablation_takes_a_step(row):
    task = tiny(**Task.ablations[row])
    losses = task.update(next(iter(task.batches(0, 0, 1))), 0)
    assert all(v.isfinite() for v in losses.values())
    assert (losses["clip"] == 0) == (row in ("w/o CLIP loss", "DF-GAN")) and (losses["penalty"] == 0) == (row == "w/o penalty")


def test_the_gradients_of_two_ranks_average_to_those_of_one_process(monkeypatch):
    task = tiny(lr_g=0.0, lr_d=0.0)

    def gradients():
        torch.manual_seed(7)
        task.update(next(iter(task.batches(0, 5, 6))), 5)
        return [p.grad.clone() for net in (task.critic, task.generator) for p in net.parameters() if p.grad is not None]

    alone, ranks = gradients(), []
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "average_", lambda tensors: None)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        ranks.append(gradients())
    for whole, a, b in zip(alone, *ranks, strict=True):
        torch.testing.assert_close((a + b) / 2, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()) + 1e-8)


def test_batches_depend_on_seed_and_step_alone_and_full_captions_come_first():
    task = tiny(full=0.5)
    whole, late = list(task.batches(3, 0, 3)), list(task.batches(3, 2, 3))
    assert torch.equal(whole[2][0], late[0][0]) and whole[2][1] == late[0][1] and whole[0][1] != whole[1][1]
    pictures, texts = whole[0]
    assert pictures.shape == (4, 3, 64, 64) and all("background" in text for text in texts[:2])


def test_objects_lie_in_the_middle_in_pictures_and_sentences():
    there, strayed = tiny().scenes(range(64)), tiny(stray=1.0).scenes(range(64))
    assert there["centre"].abs().max() == 0 and torch.equal(strayed["centre"], world.scenes(range(64), objects=(1, 1))["centre"])
    told = " ".join(text for k in range(10) for text in world.captions(there, k))
    assert "in the middle" in told and "on the left" not in told and "at the top" not in told


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_in_two_parts_is_the_run_in_one():
    result = run("--steps=18", "--eval_every=18", tag="whole")
    run("--steps=12", "--eval_every=18", tag="parts")
    run("--steps=18", "--eval_every=18", tag="parts")
    a, b = (load_checkpoint(f"runs/galip-{tag}/last.pt")["state"] for tag in ("whole", "parts"))
    for part in ("generator", "critic", "average"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for file in ("samples.png", "beside.png", "samples-000018.png", "curve.png"):
        assert Path("runs/galip-whole", file).exists(), file
    assert result["rivals"]["real pictures, the ceiling"]["attributes"] > 0.85 > 0.5 > result["chance"]["attributes"]
    assert {"attributes", "shape", "R-precision", "Frechet", "CLIP score", "unseen shape"} <= result["metrics"].keys()
    painter = sample.Painter("runs/galip-whole/best.pt")                        # what was saved draws what was judged
    sample.main(["a red star on a black background", "--n=3", "--ckpt=runs/galip-whole/best.pt", "--out=three.png"])
    assert Path("three.png").exists()
    assert painter.paint(painter.noise(2, 0), painter.read(["a red star"] * 2)).shape == (2, 3, 64, 64)


def test_the_judge_tells_right_pictures_from_wrong_ones():
    task = tiny()
    texts, pictures, scene = task.asked("test", 104)
    right, wrong = task.judge(pictures, texts, scene, "test"), task.judge(pictures.roll(1, 0), texts, scene, "test")
    assert right["attributes"] > 0.9 and wrong["attributes"] < 0.4, (right["attributes"], wrong["attributes"])
    assert right["R-precision"] > 0.7 > 0.2 > wrong["R-precision"] and right["CLIP score"] > wrong["CLIP score"] + 0.3
    grey = task.judge(torch.zeros_like(pictures), texts, scene, "test")
    assert grey["shape"] == 0 and grey["Frechet"] > 5 * right["Frechet"]


# -- other data ---------------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_brings_its_own_words(tmp_path):
    root = a_folder(tmp_path / "wugs")
    result = run("--data=folder", f"--root={root}", "--steps=2", "--words_steps=3", "--eval_every=2")
    assert result["headline"] == "Frechet" and "attributes" not in result["metrics"]
    (root / "000.png").rename(root / "moved")                                   # drawing opens no data set
    painter = sample.Painter("runs/galip-default/best.pt")
    assert {"wug", "blick", "dax"} <= set(painter.words.tokeniser.words)
    with pytest.raises(ValueError, match="'striped' in 'a striped wug' is not among"):
        painter.read(["a striped wug"])


def test_fitting_brings_pairs_together_and_keeps_known_words(tmp_path):
    task = tiny(data="folder", root=str(a_folder(tmp_path / "wugs")))
    known = Sentences().to(torch.device("cpu"))
    for word in ("a", "there"):
        old, new = (s.clip.text.token_embedding.weight[s.tokeniser.ids[word]] for s in (known, task.words))
        assert torch.equal(old, new)
    assert table(task.data["train"])[0] == "a" and "7" not in task.words.tokeniser.ids, "rare words are left out"

    def gap():
        rows = range(0, 6)
        shown = task.clip.encode_image(task.prepare(task.data["train"].images(rows)))[1]
        told = task.words(["there is a " + ("wug", "blick", "dax")[int(task.data["train"].names[r]) % 3] for r in rows])
        own = torch.cosine_similarity(shown, told).mean()
        return float((own - torch.cosine_similarity(shown, told.roll(1, 0)).mean()).detach())

    before = gap()
    fit(task.words, task.data["train"], steps=40, seed=0, batch=12, lr=2e-3)
    assert gap() > before + 0.1 and not any(p.requires_grad for p in task.clip.parameters())


def test_a_set_too_small_to_judge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="part of .*wugs holds . picture; judging needs at least 2|fell into the"):
        tiny(data="folder", root=str(a_folder(tmp_path / "wugs", count=8)))
    assert galip.candidates(["a", "a", "b", "c"]) == 3 and galip.candidates(["a"] * 5) == 1


def test_a_corrupt_picture_or_a_missing_sentence_is_named(tmp_path):
    root = a_folder(tmp_path / "wugs")
    (root / "003.txt").unlink()
    with pytest.raises(FileNotFoundError, match="003.txt"):
        tiny(data="folder", root=str(root))
    (root / "003.txt").write_text("a wug\n")
    (root / "004.png").write_bytes(b"not a picture")
    task = tiny(data="folder", root=str(root))
    with pytest.raises(ValueError, match="004.png"):
        for split in task.data.values():
            split.images(range(len(split)))


def test_birds_and_emoji_train_without_special_cases(shared, monkeypatch):
    for name, root in (("noto", "emoji"), ("birds", "birds"), ("birds64", "birds")):
        task = tiny(data=name, root=str(shared / root), words_steps=1)
        losses = task.update(next(iter(task.batches(0, 0, 1))), 0)
        assert all(v.isfinite() for v in losses.values())
        monkeypatch.setattr(galip, "JUDGED", {"valid": 12, "test": 12})
        assert task.evaluate("test")["Frechet"] > 0


# -- drawing ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """An untrained model in the form that train.py saves."""
    torch.manual_seed(0)
    cfg = Config(**TINY)
    task = Task(cfg, torch.device("cpu"))
    path = tmp_path_factory.mktemp("run") / "best.pt"
    state = {k: v.state_dict() for k, v in task.saved.items() if not isinstance(v, torch.optim.Optimizer)}
    torch.save({"name": "galip", "config": train.plain(cfg), "state": state}, path)
    return path


def test_noise_follows_the_seed_and_stays_within_its_truncation(ckpt):
    painter = sample.Painter(ckpt)
    assert torch.equal(painter.noise(5, 3), painter.noise(5, 3)) and not torch.equal(painter.noise(5, 3), painter.noise(5, 4))
    cut = painter.noise(500, 0, truncation=0.5)
    assert cut.abs().max() <= 0.5 and cut.std() > 0.2 and painter.noise(500, 0).abs().max() > 2
    told = painter.read(["a red star"] * 3)
    z = painter.noise(3, 0)
    torch.testing.assert_close(painter.paint(z[1:2], told[1:2]), painter.paint(z, told)[1:2], rtol=1e-4, atol=1e-4)


def test_a_film_strip_starts_and_ends_with_its_sentences_and_noises(ckpt):
    painter = sample.Painter(ckpt)
    options = sample.Options(to="a blue ring on a white background", to_seed=5, frames=4, seed=2)
    pictures, captions = sample.film(painter, "a red star", options)
    for frame, text, seed in ((0, "a red star", 2), (-1, options.to, 5)):
        alone = painter.paint(painter.noise(1, seed), painter.read([text]))[0]
        torch.testing.assert_close(pictures[frame], alone, rtol=1e-4, atol=1e-4)
    assert captions == ["a red star", "", "", options.to]
    steady = sample.around(torch.randn(400), torch.randn(400), 9).norm(dim=1)
    assert steady.std() / steady.mean() < 0.05, "interpolated noise keeps its length"
    sample.main(["a red star", "--to", "a blue ring", f"--ckpt={ckpt}", "--out=film.png"])
    assert Image.open("film.png").width > 500


def test_an_attribute_map_is_high_where_the_words_object_is(ckpt):
    painter, inside, outside = sample.Painter(ckpt), [], []
    scene = world.scenes(range(24), split="test", objects=(1, 1))
    pictures, masks = world.render(scene, 64)
    for b, text in enumerate(world.captions(scene)):
        heat, under = painter.attribute(pictures[b : b + 1], text, world.COLOUR[scene["colour"][b, 0]])
        assert heat.shape == (1, 64, 64) and under.shape == (1, 3, 64, 64)
        mask = masks[b, 0]
        inside.append(float((heat[0] * mask).sum() / mask.sum()))
        outside.append(float((heat[0] * (1 - mask)).sum() / (1 - mask).sum()))
    assert sum(a > b for a, b in zip(inside, outside, strict=True)) >= 23 and sum(inside) > 4 * sum(outside)


@pytest.mark.parametrize("words, sentence", [
    ([""], "an empty sentence"), (["a red sofa"], "'sofa' in 'a red sofa' is not among"), ([], "what shall be drawn"),
    (["red " * 60], "62 tokens"), (["a red star", "--n=0"], "--n=0: ask for at least one"),
    (["a red star", "--attribute=blue"], "--attribute=blue: 'a red star' does not hold that word"),
    (["a red star", "--truncation=-1"], "must not be negative"),
    (["a red star", "--to=a blue ring", "--frames=1"], "at least two"), (["a red star", "--sed=1"], "did you mean --seed")])
def test_a_bad_request_gets_one_sentence(ckpt, words, sentence):
    options = [] if any(w.startswith("--n=") for w in words) else ["--n=1"]
    with pytest.raises(ValueError, match=sentence):
        sample.main([*words, *options, f"--ckpt={ckpt}"])


def test_a_checkpoint_that_is_no_galip_or_of_another_clip_is_refused(ckpt, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png is missing: train first"):
        sample.main(["a red star", "--ckpt=missing.png"])
    other = load_checkpoint(ckpt)
    torch.save(other | {"name": "mvgcn"}, "other.pt")
    with pytest.raises(ValueError, match="holds 'mvgcn', not a run of galip"):
        sample.main(["a red star", "--ckpt=other.pt"])
    other["state"]["words"] = {"sha256": "0" * 64}
    torch.save(other, "other.pt")
    with pytest.raises(ValueError, match="trained with another CLIP; pass the same file with --clip"):
        sample.main(["a red star", "--ckpt=other.pt"])


def openai_like(folder, width=64, patch=8, grid=4, embed=24):
    """A CLIP in OpenAI's names with 64-wide heads, and a vocabulary file of the right length."""
    torch.manual_seed(1)
    clip = CLIP(ImageTower(width, 4, 1, patch, grid, embed), TextTower(64, 1, 1, 77, 49408, embed))
    write_safetensors(folder / "clip.safetensors", official_names(clip))
    symbols = [chr(33 + i) for i in range(94)] + [chr(c) for c in range(161, 256) if c != 173]
    pairs = [f"{a} {b}" for a in symbols for b in symbols + [s + "</w>" for s in symbols]]
    (folder / "merges.txt").write_text("#version\n" + "\n".join(pairs[:MERGES]) + "\n", encoding="utf-8")
    return clip


def test_the_authors_checkpoint_draws_with_the_same_command(tmp_path):
    clip = openai_like(tmp_path)
    g, d, c = official_dicts(noise=5, embed=24, width=64, grid=4, depth=4, sizes=3, base=3)
    g = {f"module.{k}": (v * 0.1).float() for k, v in g.items()}
    torch.save({"model": {"netG": g, "netD": d, "netC": c}, "epoch": 7}, "authors.pth")
    flags = ["--ckpt=authors.pth", "--clip=clip.safetensors", "--vocabulary=merges.txt", "--n=2"]
    sample.main(["Zebras! A herd of them.", *flags, "--out=zebras.png"])
    assert Path("zebras.png").exists()
    painter = sample.Painter("authors.pth", "clip.safetensors", "merges.txt")
    assert painter.paint(painter.noise(2, 0), painter.read(["a", "b!"])).shape == (2, 3, 32, 32)
    ids = painter.words.ids(["a!", "a much longer one"])
    assert (ids.max(1).values == 49407).all(), "the end mark survives trimming, '!' has id 0"
    tower = painter.words.clip.visual.state_dict()["class_embedding"]
    assert torch.equal(tower, g["module.mapping.CLIP_ViT.class_embedding"])
    assert not torch.equal(tower, clip.visual.class_embedding)
    with pytest.raises(ValueError, match="not an official netG"):
        torch.save({"model": {"netG": {k: v for k, v in g.items() if "to_rgb" not in k}}}, "broken.pth")
        sample.main(["zebras", "--ckpt=broken.pth", *flags[1:]])


# -- configurations -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, sentence", [
    ({"batch": 1}, "at least 2 pictures"), ({"critic": "dcgan"}, "--critic=dcgan is unknown"),
    ({"objects": 4}, "choose 1 to 3"), ({"objects": 2}, "add --stray=1"),
    ({"taps": (0, 9)}, r"--taps=\(0, 9\): this CLIP has blocks 0 to 3"), ({"prompt_layers": ()}, "name at least one"),
    ({"clip": "nowhere.pt"}, "nowhere.pt")])
def test_a_bad_configuration_gets_one_sentence(changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        tiny(**changes)


def test_published_sizes_are_the_papers():
    for name in ("birds", "coco"):
        cfg = Config(**paper(name))
        clip = CLIP.__new__(CLIP)
        torch.nn.Module.__init__(clip)
        with torch.device("meta"):
            clip.visual = ImageTower(768, 12, 12, 32, 7, 512)
            clip.width, clip.grid, clip.embed, clip.size = 768, 7, 512, 224
            painter, critic = galip.networks(cfg, clip)
        assert sum(p.numel() for p in painter.parameters()) == 51_830_211 and critic.taps == (1, 4, 8)
    with pytest.raises(ValueError, match="--paper=faces is unknown; there are birds, coco"):
        paper("faces")
