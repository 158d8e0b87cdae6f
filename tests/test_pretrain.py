"""What trains the shipped weights, the reader's bookkeeping, and floors under the shipped weights themselves."""
import math
import re

import pytest
import torch
from torch.nn import functional as F

from data import clip, pretrain, views, world
from data import reader as readers
from data.batches import generator
from data.clip import standard
from data.pretrain import Config, Task, claims, contrastive, lookalikes, mixture, recall_at_1, soft_targets, spoil
from data.reader import NO_SHAPE, Reader, accuracy, agree
from data.weights import sha256

WEIGHTS = clip.SMALL.parent
SHIPPED = clip.SMALL.is_file()
FRESH = range(70_000, 70_200)            # rows of the test split that no evaluation of a training run looks at


# -- CLIP's objective ----------------------------------------------------------------------------------------


def test_equal_sentences_share_their_target():
    assert torch.equal(soft_targets(["a", "b", "a", "c"]), torch.tensor(
        [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]]))
    assert torch.equal(soft_targets(list("abcd")), torch.eye(4))


def test_contrastive_loss_on_orthogonal_pairs_has_a_closed_form():
    scale = torch.tensor(5.0).log()
    own = math.log(math.exp(5) + 7) - 5                     # -log softmax of the true pair among eight
    assert contrastive(3 * torch.eye(8), 7 * torch.eye(8), scale, torch.eye(8)).item() == pytest.approx(own, rel=1e-5)
    image, texts = torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 6]], ["a", "b", "c", "d", "e", "f", "g", "g"]
    twice = (6 * (math.log(math.exp(5) + 7) - 5) + 2 * (math.log(2 * math.exp(5) + 6) - 5)) / 8
    assert contrastive(image, image, scale, soft_targets(texts)).item() == pytest.approx(twice, rel=1e-5)


def test_distinct_sentences_give_the_usual_loss_in_both_directions():
    torch.manual_seed(0)
    image, text = torch.randn(6, 5), torch.randn(6, 5)
    logits = 4 * F.cosine_similarity(image[:, None], text[None], dim=-1)
    usual = (-logits.log_softmax(1).diagonal().mean() - logits.log_softmax(0).diagonal().mean()) / 2
    assert torch.allclose(contrastive(image, text, torch.tensor(4.0).log(), torch.eye(6)), usual, atol=1e-6)


def test_recall_at_one_counts_each_direction_within_its_group():
    image = torch.eye(200)
    assert recall_at_1(image, image) == (1.0, 1.0)
    swapped = image[[1, 0, *range(2, 200)]]
    assert recall_at_1(image, swapped) == pytest.approx((0.99, 0.99))
    hub = image.clone()
    hub[1:50] += 3 * image[0]                               # many pictures look like sentence 0; it still finds its own
    there, back = recall_at_1(hub, image)
    assert there == pytest.approx(151 / 200) and back == 1.0


# -- batches -------------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_seed_and_number():
    (a, texts), (b, again), (c, other) = mixture(5, 64, 1), mixture(5, 64, 1), mixture(6, 64, 1)
    assert texts == again and all(torch.equal(a[name], b[name]) for name in a)
    assert texts != other and not torch.equal(a["centre"], c["centre"])


def test_every_kind_of_sentence_fits_the_words_and_the_context():
    words = Task(Config(), torch.device("cpu")).words
    for t in range(9):                                      # the nine kinds of partial captions
        scene, texts = mixture(t, 64, 0)
        assert len(texts) == len(scene["key"]) == 64 and words(texts).shape == (64, 40)
        assert world.render(world.pick(scene, slice(28, 64)))[1].shape == (36, 3, 64, 64)
    tales = views.stories(range(50), frames=6)["sentences"]
    words([text for story in tales for text in story] + views.edits(range(100))["sentence"])


def test_products_and_frames_keep_their_own_sentences():
    scene, texts = mixture(0, 64, 0)
    facts = world.facts(scene)
    for text, fact in zip(texts[1:32:2] + texts[32:48], facts[1:32:2] + facts[32:48], strict=True):
        assert "background" in text and text.count(" and ") == (len(fact["objects"]) > 1)       # all is told
        assert all(o["colour"] in text for o in fact["objects"])
    assert all(text.split()[0] in world.MATERIALS for text in texts[48:56])
    assert all(text.split()[0] in ("It", "They", *world.NAMES) for text in texts[56:])
    assert (scene["size"][48:] == -1).all() and not scene["present"][56:, 2].any()


def test_lookalikes_share_colour_and_background_but_never_a_held_out_combination():
    scene = lookalikes(torch.arange(800), 0)
    assert scene["present"].sum() == 800
    for name in ("colour", "background", "pattern"):
        assert (scene[name].view(100, 8, -1) == scene[name].view(100, 8, -1)[:, :1]).all()
        assert len(scene[name][::8].unique()) > 3
    assert not world.HELD_OUT[scene["shape"], scene["colour"], scene["texture"]].any()
    assert min(len(group.unique()) for group in scene["shape"].view(100, 8)) > 1


def test_spoiling_leaves_the_originals_alone_and_marks_what_it_smears():
    scene = mixture(0, 64, 0)[0]
    pictures = world.render(scene)[0]
    before, shape = pictures.clone(), scene["shape"].clone()
    spoilt, truth = spoil(pictures, scene, generator(3))
    assert torch.equal(pictures, before) and torch.equal(scene["shape"], shape)
    smeared = (truth["shape"] == NO_SHAPE).all(1)
    assert 4 < smeared.sum() < 30 and (truth["texture"][smeared] == -1).all()
    assert torch.equal(truth["shape"][~smeared], shape[~smeared]) and torch.equal(truth["colour"], scene["colour"])
    moved = (F.avg_pool2d(spoilt, 2) - F.avg_pool2d(before, 2)).abs().mean((1, 2, 3))
    assert moved[smeared].median() > moved[~smeared].median() and spoilt.isfinite().all()


def test_claims_name_every_value_and_the_true_one_is_the_caption_of_the_world():
    scene = world.scenes(range(40), objects=(1, 1))
    for fact in world.facts(scene):
        thing = fact["objects"][0]
        for attribute, values in world.VALUES.items():
            assert len(set(claims(fact, attribute))) == len(values)
        true = claims(fact, "colour")[world.COLOUR.index(thing["colour"])]
        assert true == f"the {thing['shape']} is {thing['colour']}"
        assert claims(fact, "shape")[0] == f"the {thing['colour']} shape is a circle"
        assert claims(fact, "pattern")[1] == f"a shape on a shaded {fact['background']} background"


# -- the reader ----------------------------------------------------------------------------------------------


def perfect(scene):
    """The reading that a faultless reader would give of a scene."""
    return {name: scene[name].clone() for name in scene} | {"score": scene["present"].float()}


def test_a_perfect_reading_agrees_in_any_order_of_its_objects():
    scene = world.scenes(range(60))
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        reading = {name: x[:, order] if x.ndim > 1 else x for name, x in perfect(scene).items()}
        for where in (True, False):
            right = agree(reading, scene, where)
            assert all(torch.equal(right[name], scene["present"]) for name in ("found", *readers.OBJECT))
            assert right["background"].all() and right["count"].all()
            assert set(accuracy(reading, scene, where).values()) == {1.0}


def test_one_wrong_colour_counts_once_and_a_missed_object_fails_everything():
    scene = world.scenes(range(60), objects=(2, 2))
    reading = perfect(scene)
    reading["colour"][0, 1] = (reading["colour"][0, 1] + 1) % 8
    reading["present"][1, 0] = False
    right = agree(reading, scene)
    assert right["colour"][0].tolist() == [True, False] and right["shape"][0].all()
    assert not any(right[name][1, 0] for name in ("found", *readers.OBJECT)) and not right["count"][1]
    assert accuracy(reading, scene)["colour"] == pytest.approx(118 / 120)
    assert accuracy(reading, scene)["shape"] == pytest.approx(119 / 120)


def test_places_matter_only_when_asked():
    scene = world.scenes(range(60), objects=(1, 1))
    reading = perfect(scene)
    reading["centre"] = -reading["centre"]
    far = (2 * scene["centre"]).norm(dim=-1) > readers.NEAR
    assert far.sum() > 20
    assert torch.equal(agree(reading, scene)["found"], ~far) and agree(reading, scene, where=False)["shape"].all()


def test_assignment_without_places_is_the_best_of_all():
    torch.manual_seed(0)
    scene = world.scenes(range(80), objects=(3, 3))
    reading = perfect(scene) | {name: torch.randint(0, 3, (80, 3)) for name in readers.OBJECT}
    scene |= {name: torch.randint(0, 3, (80, 3)) for name in readers.OBJECT}
    right = agree(reading, scene, where=False)
    ours = sum(right[name].sum(1) for name in readers.OBJECT)
    for b in range(80):                                     # slow: every assignment by hand
        best = max(sum(int(reading[a][b, p[o]] == scene[a][b, o]) for o in range(3) for a in readers.OBJECT)
                   for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))
        assert ours[b] == best


def test_a_reading_has_the_largest_object_first_and_takes_any_size():
    torch.manual_seed(0)
    model = Reader().eval()
    for size in (32, 64, 96):
        reading = model(torch.rand(5, 3, size, size) * 2 - 1)
        shapes = {name: tuple(reading[name].shape) for name in ("centre", "shape", "background")}
        assert shapes == {"centre": (5, 3, 2), "shape": (5, 3), "background": (5,)}
    objects = {name: torch.zeros(1, n, 16, 16) for name, n in readers.OBJECT.items()}
    ground = {name: torch.zeros(1, n) for name, n in readers.GROUND.items()}
    model.logits = lambda x: (F.avg_pool2d(x, 4)[:, 0] * 9, F.avg_pool2d(x, 4)[:, 1], objects, ground)
    x = torch.full((1, 3, 64, 64), -1.0)
    x[0, :2, 8:12, 20:24] = torch.tensor([1.0, 0.2])[:, None, None]       # bright but small: cell (2, 5)
    x[0, :2, 40:44, 60:64] = torch.tensor([0.9, 0.8])[:, None, None]      # large: cell (10, 15)
    reading = model(x)
    assert reading["present"].tolist() == [[True, True, False]]
    assert reading["centre"][0, 0].tolist() == pytest.approx([15.5 / 8 - 1, 10.5 / 8 - 1])
    assert reading["centre"][0, 1].tolist() == pytest.approx([5.5 / 8 - 1, 2.5 / 8 - 1])


# -- training ------------------------------------------------------------------------------------------------


def test_both_networks_learn_within_thirty_steps():
    torch.manual_seed(0)
    task = Task(Config(batch=32, steps=400, reader_steps=400), torch.device("cpu"))
    losses = [task.update(batch, t + 60) for t, batch in enumerate(task.batches(0, 0, 30))]   # past most of the warm-up
    for name in ("clip", "reader"):
        values = [float(x[name]) for x in losses]
        first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
        assert last < {"clip": 0.93, "reader": 0.75}[name] * first, f"{name} only went from {first:.2f} to {last:.2f}"


def test_the_reader_rests_after_its_own_steps():
    task = Task(Config(batch=32, reader_steps=3), torch.device("cpu"))
    batch = next(task.batches(0, 0, 1))
    before = task.reader.what.weight.clone()
    assert task.update(batch, 3).keys() == {"clip", "patches"} and torch.equal(task.reader.what.weight, before)
    assert task.update(batch, 2).keys() == {"clip", "patches", "reader"} and not torch.equal(task.reader.what.weight, before)


def test_sample_writes_weights_that_load_again(tmp_path, monkeypatch):
    torch.manual_seed(0)
    task = Task(Config(width=32, depth=2, text_width=32, embed=16), torch.device("cpu"))
    task.sample(tmp_path)
    monkeypatch.setattr(clip, "SMALL", tmp_path / "clip-small.safetensors")
    monkeypatch.setattr(readers, "SHIPPED", tmp_path / "reader.safetensors")
    again, x = clip.small(), torch.randn(2, 3, 64, 64)
    assert F.cosine_similarity(again.encode_image(x)[1], task.clip.encode_image(x)[1]).min() > 0.999
    assert clip.small_tokeniser().words == task.words.words and (tmp_path / "retrieved.png").exists()
    task.reader.eval()
    assert (readers.reader().features(x) - task.reader.features(x)).abs().max() < 0.02


@pytest.mark.parametrize("options, message", [({"batch": 40}, "multiple of 32"), ({"size": 32}, "must be 64")])
def test_impossible_options_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Task(Config(**options), torch.device("cpu"))
    with pytest.raises(ValueError, match="data.clip.load"):
        pretrain.paper("vit-b-32")


# -- what is shipped -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHIPPED, reason="no weights are shipped yet: python train.py clip makes them")
def test_shipped_weights_are_small_and_are_those_of_the_readme():
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert [f.name for f in files] == ["clip-small.safetensors", "reader.safetensors"]
    assert sum(f.stat().st_size for f in files) <= 6 * 2**20
    text = (WEIGHTS / "README.md").read_text()
    for file in files:
        found = re.search(rf"{re.escape(file.name)}.*{sha256(file)}", text)
        assert found, f"data/weights/README.md has another SHA-256 of {file.name}"


@pytest.mark.skipif(not SHIPPED, reason="no weights are shipped yet: python train.py clip makes them")
def test_the_shipped_word_table_is_the_worlds():
    """If it fails the grammar has new words: train again with  python train.py clip --fresh --export"""
    assert clip.small_tokeniser().words == list(world.WORDS)


@pytest.mark.skipif(not SHIPPED, reason="no weights are shipped yet: python train.py clip makes them")
def test_shipped_clip_retrieves_among_a_hundred():
    """Floor 0.6, chance 0.01; data/weights/README.md has what was measured."""
    model, words = clip.small(), clip.small_tokeniser()
    scene = world.scenes(FRESH, split="test")
    with torch.no_grad():
        image = model.encode_image(standard(world.render(scene)[0], model.size))[1]
        text = model.encode_text(words(world.captions(scene)))[0]
    there, back = recall_at_1(image, text)
    assert there > 0.6 and back > 0.6, f"R@1 {there:.2f} and {back:.2f}: has the renderer changed? train again"


@pytest.mark.skipif(not SHIPPED, reason="no weights are shipped yet: python train.py clip makes them")
def test_shipped_reader_reads_fresh_renders():
    """Floor 0.95 on 200 fresh pictures, about 400 objects (the full test split is held to 0.97 in the slow test)."""
    scene = world.scenes(FRESH, split="test")
    right = accuracy(readers.reader()(world.render(scene)[0]), scene)
    assert min(right.values()) > 0.95, f"{right}: has the renderer changed? train again"


@pytest.mark.skipif(not SHIPPED, reason="no weights are shipped yet: python train.py clip makes them")
def test_shipped_reader_calls_smears_no_shape():
    scene = world.scenes(FRESH, split="test", objects=(1, 1))
    spoilt, truth = spoil(world.render(scene)[0], scene, generator(9))
    smeared = (truth["shape"][:, 0] == NO_SHAPE).nonzero()[:, 0]
    reading = readers.reader()(spoilt[smeared])
    assert (reading["shape"][:, 0] == NO_SHAPE).float().mean() > 0.8


@pytest.mark.slow
def test_shipped_reader_reaches_97_percent_on_the_test_split_and_on_every_view():
    """Only the texture of small things among three falls below, in combinations never trained on (0.937) and in clutter."""
    model = readers.reader()
    for split, most, texture in (("test", 1, 0.97), ("test", 3, 0.97), ("unseen", 1, 0.97), ("unseen", 3, 0.92)):
        scene = world.scenes(range(80_000, 82_000), split=split, objects=(1, most))
        right = accuracy(model(world.render(scene)[0]), scene)
        assert right.pop("texture") >= texture and min(right.values()) >= 0.97, f"{split}, up to {most}: {right}"
    scene = views.stories(range(300), split="test")["scene"]
    right = accuracy(model(world.render(scene)[0]), scene)
    assert min(right[name] for name in ("found", "shape", "colour", "texture", "background")) >= 0.97, right
    scene = views.products(range(600), split="test")["scene"]
    right = agree(model(world.render(scene)[0]), scene)                               # slot 0: the product, not the clutter
    assert min(float(right[name][:, 0].float().mean()) for name in ("found", "shape", "colour", "texture")) >= 0.97
