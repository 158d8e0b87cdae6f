"""BeFA: the adapter against the authors' layers, its hosts, attribution against hand-made maps, and bad input."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from data import interactions
from data.batches import generator
from data.weights import save_checkpoint
from gcn import attribution, baselines, befa, fast, mgcn, recommend
from gcn.befa_task import Config, Task, cost_line, ranking_lines

CPU = torch.device("cpu")


def config(**changes):
    return Config(**{"dim": 8, "k": 4, "reg": 0.01, "cl_loss": 0.1, "batch": 32, "lr": 0.01, "pairs": 1} | changes)


def toy(users=20, items=15):
    clicked = torch.rand(users, items, generator=generator(0, 99)) < 0.3
    clicked[:, 0] = True
    features = {m: torch.rand(items, 5 + j, generator=generator(1, j)) for j, m in enumerate(("image", "text"))}
    return torch.nonzero(clicked), features


def build(cfg, *rest):
    return befa.HOSTS[cfg.host](cfg, *rest)


def toy_model(**changes):
    train, features = toy()
    torch.manual_seed(1)
    return build(config(**changes), 20, 15, train, features).eval()


def toy_batch(size=32):
    rng = generator(5)
    return tuple(torch.randint(n, (size,), generator=rng) for n in (20, 15, 15))


# ---- the authors' model ----------------------------------------------------------------------------------------------------


def official_state(width, users=30, items=25, widths=(40, 20), D=64):
    rng = np.random.default_rng(width)
    def table(*shape):
        return torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))

    state = {"user_embedding.weight": table(users, D), "item_id_embedding.weight": table(items, D), "query_common.0.weight":
             table(64, 64), "query_common.0.bias": table(64), "query_common.2.weight": table(1, 64)}
    for name, letter, size in zip(("image", "text"), "vt", widths, strict=True):
        state |= {f"{name}_embedding.weight": table(items, size).abs(), f"{name}_trs.weight": table(D, size),
                  f"{name}_trs.bias": table(D)}
        for n, (rows, columns) in ((0, (width * D, D)), (4, (width * D, width * D)), (7, (D, width * D))):
            state |= {f"BeFA_{letter}.{n}.weight": table(rows, columns), f"BeFA_{letter}.{n}.bias": table(rows)}
    return state


def reference(state, clicks, k):
    """The released model in float64, dense matrices and loops, by the authors' names.   -> F (N, D)"""
    s = {name: x.double().numpy() for name, x in state.items()}
    U, I = (len(s[f"{name}_embedding.weight"]) for name in ("user", "item_id"))
    A = np.zeros((U + I, U + I))
    for u, i in clicks.tolist():
        A[u, U + i] = A[U + i, u] = 1
    degree = np.maximum(A.sum(1), 1)
    A = A / np.sqrt(np.outer(degree, degree))
    H = np.concatenate([s["user_embedding.weight"], s["item_id_embedding.weight"]])
    F, E = (H + A @ H + A @ A @ H) / 3, s["item_id_embedding.weight"]
    for name, letter in (("image", "v"), ("text", "t")):
        def linear(x, n, letter=letter):
            return x @ s[f"BeFA_{letter}.{n}.weight"].T + s[f"BeFA_{letter}.{n}.bias"]

        X = s[f"{name}_embedding.weight"]
        P = X @ s[f"{name}_trs.weight"].T + s[f"{name}_trs.bias"]
        a = np.tanh(np.maximum(linear(P, 0), 0))
        Z = E / (1 + np.exp(-linear(np.maximum(linear(a, 4), 0), 7)))
        S = np.zeros((I, I))
        cosine = X @ X.T / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(X, axis=1))
        for i in range(I):
            best = np.argsort(-cosine[i], kind="stable")[:k]
            S[i, best] = cosine[i, best]
        g = S.sum(1)
        Z = S / np.sqrt(np.outer(g, g)) @ Z
        F = F + np.concatenate([A[:U, U:] @ Z, Z]) / 2
    return F


@pytest.mark.parametrize("width", [1, 4])
def test_official_weights_give_the_official_embeddings_and_loss(width):
    state, clicks = official_state(width), torch.nonzero(torch.rand(30, 25, generator=generator(3)) < 0.25)
    features = {m: state[f"{m}_embedding.weight"] for m in ("image", "text")}
    model = build(Config(host="lattice", width=width, k=5, batch=64), 30, 25, clicks, features).eval()
    model.load_state_dict(befa.from_official(state))
    expected = reference(state, clicks, 5)
    with torch.no_grad():
        F = torch.cat(model()).numpy()
        batch = tuple(torch.randint(n, (64,), generator=generator(7)) for n in (30, 25, 25))
        values = [page.loss(model, batch).item() for page in (mgcn, fast)]
    assert np.abs(F - expected).max() < 1e-5 and np.abs(expected).max() > 0.3
    rows = [expected[batch[0]], expected[30 + batch[1].numpy()], expected[30 + batch[2].numpy()]]
    gap = (rows[0] * (rows[1] - rows[2])).sum(1)
    want = np.log1p(np.exp(-gap)).mean() + model.cfg.reg * 0.5 * sum((x**2).sum() for x in rows) / 64
    assert values == pytest.approx([want, want], abs=1e-5)


def test_official_keys_that_do_not_fit_are_named():
    state = official_state(1)
    del state["BeFA_v.4.bias"]
    state |= {"gate_v.0.bias": torch.zeros(64), "BeFA_t.7.weight": torch.zeros(64, 7)}
    with pytest.raises(ValueError, match=r"missing: BeFA_v\.4\.bias") as error:
        befa.from_official(state)
    assert "gate_v.0.bias" in str(error.value) and "BeFA_t.7.weight (64, 7) instead of (64, 64)" in str(error.value)


@pytest.mark.parametrize("deep", [True, False])
def test_the_partial_export_carries_what_attribution_needs(tmp_path, deep):
    state = official_state(2)
    features = {m: state[f"{m}_embedding.weight"] for m in ("image", "text")}
    model = build(Config(host="lattice", k=5), 30, 25, torch.tensor([[0, 0]]), features).eval()
    model.load_state_dict(befa.from_official(state))
    for m, letter in mgcn.LETTERS.items():
        gate = {k.removeprefix(f"BeFA_{letter}."): x for k, x in state.items() if k.startswith(f"BeFA_{letter}.")}
        gate = gate if deep else {"0.weight": state["query_common.0.weight"], "0.bias": state["query_common.0.bias"]}
        torch.save(gate, tmp_path / f"gate_{letter}_LATTICE_TMALL.pt")
        torch.save({p: state[f"{m}_trs.{p}"] for p in ("weight", "bias")}, tmp_path / f"{m}_trs_LATTICE_TMALL.pt")
    with pytest.raises(FileNotFoundError, match="0 files item_id_embedding"):
        befa.Exported(tmp_path)
    np.save(tmp_path / "item_id_embedding_LATTICE_TMALL.npy", state["item_id_embedding.weight"].numpy())
    small, e = befa.Exported(tmp_path), model.item.weight[:4]
    for m in ("image", "text"):
        x = model.features[m][:4]
        gate = torch.sigmoid(model.project[m](x) @ state["query_common.0.weight"].T + state["query_common.0.bias"])
        want = befa.content_vector(model, m, x, e) if deep else e * gate
        assert torch.allclose(befa.content_vector(small, m, x, e), want, atol=1e-6)
    heat = attribution.attribute(small, "image", torch.rand(2, 6, 40, generator=generator(1)), torch.tensor([3, 8]))
    assert heat.shape == (2, 6) and heat.isfinite().all()


# ---- the adapter -----------------------------------------------------------------------------------------------------------


def test_linear_is_mgcns_purifier_bit_for_bit():
    train, features = toy()
    torch.manual_seed(1)
    plain = mgcn.MGCN(config(), 20, 15, train, features)
    model = toy_model(adapter="linear")
    names = {f"adapters.{m}.mask.0.{p}": f"gate.{m}.{p}" for m in features for p in ("weight", "bias")}
    model.load_state_dict({k: plain.state_dict()[names.get(k, k)] for k in model.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(model(), plain(), strict=True))


def test_a_host_without_adapter_is_the_host():
    train, features = toy()
    torch.manual_seed(1)
    plain = mgcn.MGCN(config(), 20, 15, train, features)
    assert all(torch.equal(a, b) for a, b in zip(toy_model(adapter="host")(), plain(), strict=True))
    bare = toy_model(adapter="host", host="lattice")
    z = bare.item.weight * bare.project["image"](bare.features["image"])
    assert torch.equal(bare.purify("image"), z)


@pytest.mark.parametrize("host", befa.HOSTS)
def test_weight_zero_equals_the_host_and_both_start_from_one_state(host):
    without, with_, zero = (toy_model(host=host, **kw) for kw in ({"adapter": "host"}, {}, {"adapter_weight": 0.0}))
    assert all(torch.equal(p, with_.state_dict()[n]) for n, p in without.state_dict().items() if n in with_.state_dict())
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(zero(), without(), strict=True))
    assert not torch.allclose(with_()[1], without()[1], atol=1e-4)


def test_only_the_named_modalities_are_adapted():
    model, without = toy_model(adapt=("text",)), toy_model(adapter="host")
    assert torch.equal(model.purify("image"), without.purify("image"))
    assert not torch.allclose(model.purify("text"), without.purify("text"))


def test_parameters_are_those_of_the_specification():
    for width, count in ((1, 12_480), (2, 33_088), (4, 98_880), (8, 328_768)):
        adapter = befa.Adapter(Config(dim=64, width=width))
        assert sum(p.numel() for p in adapter.parameters()) == count


def test_joins_and_the_compact_form_do_what_they_say():
    p, e = torch.randn(6, 8, generator=generator(1)), torch.randn(6, 8, generator=generator(2))
    for join, want in (("product", lambda g: e * g), ("sum", lambda g: e + g), ("content", lambda g: p * g)):
        adapter = befa.Adapter(config(join=join)).eval()
        assert torch.equal(adapter(p, e), want(adapter.mask(p)))
    compact = befa.Adapter(config(adapter="compact")).eval()
    gate, last = compact.mask[0], compact.rebuild[0]
    want = torch.tanh((e * torch.sigmoid(p @ gate.weight.T + gate.bias)) @ last.weight.T + last.bias)
    assert torch.allclose(compact(p, e), want, atol=1e-6)


def test_dropout_drops_in_training_only():
    model = toy_model(dropout=0.5)
    assert torch.equal(model()[1], model()[1])
    model.train()
    assert not torch.equal(model()[1], model()[1])


@pytest.mark.parametrize(("host", "adapter"), [("mgcn", "befa"), ("mgcn", "host"), ("lattice", "befa"), ("lattice", "host")])
def test_fast_page_has_the_naive_loss_and_every_gradient(host, adapter):
    model = toy_model(host=host, adapter=adapter, dropout=0.0).double()
    grads = []
    for page in (mgcn, fast):
        model.zero_grad()
        value = page.loss(model, toy_batch())
        value.backward()
        grads.append({"loss": value.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("adapters" in n for n in grads[0]) == (adapter == "befa")
    assert all(torch.allclose(g, grads[1][n], rtol=1e-9, atol=1e-12) for n, g in grads[0].items())


# ---- attribution -----------------------------------------------------------------------------------------------------------


def hand_made():
    """A host whose projection is the identity of two dimensions: maps can be checked on paper."""
    model = toy_model(dim=2, host="vbpr", adapter="host")
    with torch.no_grad():
        model.project["image"] = torch.nn.Linear(2, 2, bias=False)
        model.project["image"].weight.copy_(torch.eye(2))
        model.item.weight[3] = torch.tensor([2.0, 0.0])
    return model, torch.tensor([[[1.0, 0], [0, 1], [1, 1], [-3, 0]]])


def test_location_similarity_on_a_two_by_two_grid():
    model, V = hand_made()
    want = torch.tensor([[1, 0, math.sqrt(0.5), -1]])
    assert torch.allclose(attribution.attribute(model, "image", V, [3]), want, atol=1e-6)
    assert torch.allclose(attribution.attribute(model, "image", 7 * V, [3]), want, atol=1e-6)


def test_gradient_weights_are_finite_differences_of_the_similarity():
    model, V = hand_made()
    V, b, step, w = V.double(), model.item.weight[3].detach().double(), 1e-6, []
    def s(x):
        return torch.nn.functional.cosine_similarity(x.mean(1), b[None]).item()

    for c in range(2):
        lifted = V.clone()
        lifted[..., c] += step                                # all places together: the sum of slopes, P times their mean
        w.append((s(lifted) - s(V)) / step)
    want = (V @ torch.tensor(w, dtype=torch.float64)).relu()
    heat = attribution.attribute(model, "image", V.float(), [3], variant="B")
    assert heat.max() > 0.1 and torch.allclose(heat.double(), want, atol=1e-4)


def test_a_mask_that_ignores_content_gives_flat_maps():
    model = toy_model()
    with torch.no_grad():
        model.adapters["image"].mask[-2].weight.zero_()
    V = torch.rand(3, 9, 5, generator=generator(4))
    for variant in "AB":
        assert not attribution.attribute(model, "image", V, [0, 1, 2], variant=variant).any()
    scores = attribution.score_maps(torch.zeros(2, 4, 4), torch.ones(2, 4, 4))
    assert scores["drift"].isnan().all() and (scores["flat"] == 1).all()


def test_drift_and_omission_on_maps_drawn_by_hand():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2] = 1
    on, off, half = mask.clone(), 1 - mask, mask.clone()
    half[0, 0] = 0                                            # looks at half of the product and nowhere else
    for heat, drift, omission, pointing in ((on, 0, 0, 1), (off, 1, 1, 0), (half, 0, 0.5, 1)):
        scores = attribution.score_maps(heat, mask)
        assert [scores[k].item() for k in ("drift", "omission", "pointing")] == [drift, omission, pointing]


def test_kept_is_one_for_clusters_and_nothing_for_noise():
    label = torch.arange(90) % 3
    clusters = torch.nn.functional.one_hot(label, 3) + 0.01 * torch.randn(90, 3, generator=generator(1))
    noise = torch.randn(90, 8, generator=generator(2))
    assert attribution.kept(clusters, label) == pytest.approx(1) and abs(attribution.kept(noise, label)) < 0.1


@pytest.mark.parametrize("encoder", attribution.ENCODERS)
def test_encoders_see_places_and_the_whole(encoder):
    pictures = interactions.load("builtin").pictures([0, 1, 2])
    places, whole = attribution.look(pictures, encoder)
    assert places.shape[:3] == (3, 8, 8) and whole.shape == (3, places.shape[3])
    assert torch.allclose(whole.norm(dim=1), torch.ones(3), atol=1e-5) and places.isfinite().all()


# ---- training, comparing, exploring ------------------------------------------------------------------------------------------


def small_task(data=None, **changes):
    return Task(config(**{"dim": 16, "batch": 256} | changes), CPU, data)


def steps(task, start, stop):
    for t, batch in enumerate(task.batches(0, start, stop), start):
        torch.manual_seed(t)
        loss = task.update(batch, t)["loss"]
    return loss


@pytest.mark.parametrize("host", befa.HOSTS)
def test_one_batch_is_learnt_by_heart(host):
    torch.manual_seed(0)
    task = small_task(host=host, reg=0.0, cl=False, batch=64, dropout=0.0, lr=0.02)
    batch = next(iter(task.batches(0, 0, 1)))
    losses = [float(task.update(batch, 0)["loss"]) for _ in range(150)]
    assert losses[-1] < 0.05 * losses[0], f"loss only went from {losses[0]:.3f} to {losses[-1]:.3f}"


def test_twelve_steps_equal_eight_then_four():
    torch.manual_seed(0)
    whole = small_task()
    steps(whole, 0, 12)
    torch.manual_seed(0)
    first = small_task()
    steps(first, 0, 8)
    second = small_task()
    for key, part in second.saved.items():
        part.load_state_dict(first.saved[key].state_dict())
    steps(second, 8, 12)
    assert all(torch.equal(x, second.model.state_dict()[name]) for name, x in whole.model.state_dict().items())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("befa")
    task = small_task(steps=20, eval_every=10)
    steps(task, 0, 20)
    task.evaluate("test")
    task.sample(folder)
    save_checkpoint(folder / "best.pt", {"name": "befa", "config": dataclasses.asdict(task.cfg),
                                         "state": {k: task.saved[k].state_dict() for k in ("model", "catalogue")}})
    return task, folder


def test_a_run_compares_pairs_and_draws(run_folder):
    task, folder = run_folder
    text = (folder / "pairs.md").read_text()
    assert "mgcn without and with BeFA, 1 paired seeds" in text and "image: background" in text
    assert {"attribution.png", "words.png", "attribution.csv", "host.pt"} <= {p.name for p in folder.iterdir()}
    assert len((folder / "attribution.csv").read_text().splitlines()) == 601
    assert task.next.startswith("python -m gcn.recommend --item ")
    assert task.twins()[0][0].cfg.adapter == "host" and set(task.rivals()) == {"popularity", "mgcn without BeFA"}
    assert "adapters 0." in cost_line(task.twins()) and len(ranking_lines(task.twins())) == 6


def test_an_item_is_explored(run_folder, capsys):
    _, folder = run_folder
    recommend.main(["--item=7", "--why", f"--ckpt={folder / 'best.pt'}", "--behaviour=graph", "--variant=B"])
    out = capsys.readouterr().out
    assert "without: cos" in out and out.count("adapted: #") == 3
    assert (folder / "item-7.png").exists() and (folder / "item-7-words.png").exists()


def test_exploring_says_what_is_wrong(run_folder, tmp_path):
    task, folder = run_folder
    best = f"--ckpt={folder / 'best.pt'}"
    with pytest.raises(ValueError, match="there is no item 600: ids run from 0 to 599"):
        recommend.main(["--item=600", "--why", best])
    with pytest.raises(ValueError, match="pass one of the two"):
        recommend.main(["--item=6", "--user=3", "--why", best])
    (tmp_path / "best.pt").write_bytes((folder / "best.pt").read_bytes())
    with pytest.raises(FileNotFoundError, match="host.pt is missing"):
        recommend.main(["--item=6", "--why", f"--ckpt={tmp_path / 'best.pt'}"])
    swapped = dataclasses.replace(task.data, features={m: x.roll(1, 0) for m, x in task.data.features.items()})
    with pytest.raises(ValueError, match="image features are those of another catalogue: 600 of 600 items differ"):
        recommend.restore(folder / "best.pt", data=swapped)
    with pytest.raises(ValueError, match="item 0: the stored image feature is not what the stored encoder makes"):
        attribution.Explorer(swapped)
    with pytest.raises(ValueError, match="has no pictures, only their features"):
        attribution.Explorer(dataclasses.replace(task.data, pictures=None))
    with pytest.raises(ValueError, match="choose id, or graph"):
        attribution.behaviour_of(toy_model(host="vbpr"), [0], "graph")


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"host": "bm3"}, "--host=bm3 is unknown; choose mgcn"), ({"adapter": "lora"}, "--adapter=lora"),
    ({"join": "concat"}, "--join="),
    ({"depth": 0}, "--depth=0"), ({"dropout": 1.0}, "--dropout=1.0"), ({"encoder": "vgg"}, "--encoder=vgg is unknown"),
    ({"modalities": ("none",)}, "--modalities=none leaves none"),
    ({"adapt": ("audio",)}, "--adapt=audio: there is no such modality")])
def test_a_wrong_option_is_answered_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_task(**changes)


def test_rivals_share_one_loss():
    """VBPR and LightGCN with content take baselines.loss: BPR and the regulariser of what is ranked."""
    model, batch = toy_model(host="lightgcn"), toy_batch()
    users, items = (x.detach() for x in model())
    u, p, n = users[batch[0]], items[batch[1]], items[batch[2]]
    want = -torch.nn.functional.logsigmoid((u * (p - n)).sum(1)).mean() + 0.01 * 0.5 * (u**2 + p**2 + n**2).sum() / 32
    assert baselines.loss(model, batch).item() == pytest.approx(want.item(), abs=1e-6)
