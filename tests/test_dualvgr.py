"""DualVGR against a straight-line reference in the official names, and the properties its parts promise."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from videoqa.model import DualVGR, DynamicQuery, GraphAttention, consistency, hsic
from videoqa.official import from_official

D, W, V, A, FEATURES, HEADS, T = 32, 12, 15, 9, 10, 4, 3


def official_dict(seed=0):
    """Random tensors in the official names and shapes (section 10 of the specification), at toy size."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"linguistic_input_unit.encoder_embed.weight": (V, W), "visual_motion_input_unit.weight": (D, FEATURES),
             "visual_motion_input_unit.bias": (D,)}
    for name, width in (("linguistic_input_unit.concatRNN.rnn", W), ("linguistic_input_unit.encoder", W),
                        ("visual_appearance_input_unit.encoder", FEATURES)):
        for way in ("", "_reverse"):
            sizes |= {f"{name}.weight_ih_l0{way}": (2 * D, width), f"{name}.weight_hh_l0{way}": (2 * D, D // 2),
                      f"{name}.bias_ih_l0{way}": (2 * D,), f"{name}.bias_hh_l0{way}": (2 * D,)}
    for t in range(T):
        unit = "visual_input_unit."
        sizes |= {f"{unit}queryAttn.{t}.feat_enhance.weight": (D, D), f"{unit}queryAttn.{t}.feat_enhance.bias": (D,),
                  f"{unit}queryAttn.{t}.fc.weight": (1, D), f"{unit}queryAttn.{t}.fc.bias": (1,)}
        for stream in ("appear", "motion"):
            sizes |= {f"{unit}queryPunish_{stream}.{t}.query_weight.weight": (D, W),
                      f"{unit}queryPunish_{stream}.{t}.query_weight.bias": (D,)}
        for graph in ("appearance_GCN", "motion_GCN", "acGCN", "mcGCN"):
            for h in range(HEADS):
                head = f"{unit}{graph}.{t}.attention_{h}"
                sizes |= {f"{head}.W.weight": (D // HEADS, D), f"{head}.W.bias": (D // HEADS,),
                          f"{head}.a.weight": (1, 2 * D // HEADS), f"{head}.a.bias": (1,)}
        for stream in ("appearance", "motion"):
            view = f"{unit}attention_{stream}.{t}.project"
            sizes |= {f"{view}.0.weight": (D, D), f"{view}.0.bias": (D,), f"{view}.2.weight": (1, D)}
    for i in (0, 1):
        fusion = f"visual_input_unit.visualfusion.linear{i}"
        sizes |= {f"{fusion}.weight": (512, D), f"{fusion}.bias": (512,)}
    sizes |= {"visual_input_unit.visualfusion.linear_out.weight": (D, 256),
              "visual_input_unit.visualfusion.linear_out.bias": (D,), "feature_aggregation.v_proj.weight": (D, D),
              "feature_aggregation.attn.weight": (1, D), "feature_aggregation.attn.bias": (1,),
              "output_unit.question_proj.weight": (D, D), "output_unit.question_proj.bias": (D,),
              "output_unit.classifier.1.weight": (D, 2 * D), "output_unit.classifier.1.bias": (D,),
              "output_unit.classifier.5.weight": (A, D), "output_unit.classifier.5.bias": (A,)}
    sizes |= {f"output_unit.classifier.3.{k}": (D,) for k in ("weight", "bias", "running_mean", "running_var")}
    state = {k: torch.randn(s, generator=g) * 0.4 for k, s in sizes.items()}
    state["output_unit.classifier.3.running_var"] = state["output_unit.classifier.3.running_var"].abs() + 0.5
    state["output_unit.classifier.3.num_batches_tracked"] = torch.tensor(7)
    return state


def reference_lstm(state, name, x):
    """One sample, gate by gate.   x (S, in) -> every step (S, D), last states (D,)"""
    outs = []
    for way in ("", "_reverse"):
        h = c = torch.zeros(D // 2)
        steps = []
        for row in (x if not way else x.flip(0)):
            gates = (state[f"{name}.weight_ih_l0{way}"] @ row + state[f"{name}.bias_ih_l0{way}"]
                     + state[f"{name}.weight_hh_l0{way}"] @ h + state[f"{name}.bias_hh_l0{way}"])
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        outs.append((torch.stack(steps if not way else steps[::-1]), h))
    return torch.cat([outs[0][0], outs[1][0]], 1), torch.cat([outs[0][1], outs[1][1]])


def reference(state, tokens, length, appearance, motion, padded):
    """One question, loops and pair tensors, straight from the specification.   -> logits, L_com, HSIC"""
    def linear(name, x):
        return x @ state[name + ".weight"].T + state.get(name + ".bias", 0)

    unit, words = "visual_input_unit.", torch.tanh(state["linguistic_input_unit.encoder_embed.weight"][tokens[:length]])
    context, _ = reference_lstm(state, "linguistic_input_unit.concatRNN.rnn", words)
    _, sentence = reference_lstm(state, "linguistic_input_unit.encoder", words)
    context = torch.cat([context, torch.zeros(padded - length, D)])
    words = torch.cat([words, torch.zeros(padded - length, W)])
    encoder = "visual_appearance_input_unit.encoder"
    x = {"appear": torch.stack([reference_lstm(state, encoder, torch.tanh(c))[1] for c in appearance]),
         "motion": linear("visual_motion_input_unit", motion)}
    com, dis = [], []
    for t in range(T):
        g = linear(f"{unit}queryAttn.{t}.feat_enhance", context)
        g = g / g.norm(dim=1, keepdim=True)
        p = linear(f"{unit}queryAttn.{t}.fc", g)[:, 0].softmax(0) * (torch.arange(padded) < length)
        p = p / (p.sum() + 1e-5)
        query = (p[:, None] * words).sum(0)
        views = {}
        for stream, own, common, view in (("appear", "appearance_GCN", "acGCN", "appearance"),
                                          ("motion", "motion_GCN", "mcGCN", "motion")):
            score = torch.sigmoid(x[stream] @ linear(f"{unit}queryPunish_{stream}.{t}.query_weight", query))
            z = {}
            for kind, graph in (("own", own), ("common", common)):
                heads = []
                for h in range(HEADS):
                    head = f"{unit}{graph}.{t}.attention_{h}"
                    u, n = linear(head + ".W", x[stream]), len(motion)
                    pairs = torch.stack([torch.stack([torch.cat([u[i], u[j]]) for j in range(n)]) for i in range(n)])
                    e = F.leaky_relu(linear(head + ".a", pairs)[..., 0], 0.01).softmax(1)
                    heads.append(F.elu(e @ (score[:, None] * u)))
                z[kind] = torch.cat(heads, 1)
            both = torch.stack([z["common"], z["own"]], 1)
            project = f"{unit}attention_{view}.{t}.project"
            a = torch.tanh(linear(f"{project}.0", both)) @ state[f"{project}.2.weight"].T
            x[stream] = x[stream] + (a.softmax(1) * both).sum(1)
            views[stream] = z
        grams = []
        for stream in ("appear", "motion"):
            e = views[stream]["common"] - views[stream]["common"].mean(0)
            e = e / e.norm(dim=1, keepdim=True)
            grams.append(e @ e.T)
        com.append(((grams[0] - grams[1]) ** 2).mean())
        r = torch.eye(len(motion)) - 1 / len(motion)
        dis.append(sum(torch.trace(r @ z["own"] @ z["own"].T @ r @ z["common"] @ z["common"].T) for z in views.values()))
    fused = F.elu(linear(f"{unit}visualfusion.linear0", x["appear"])) * F.elu(linear(f"{unit}visualfusion.linear1", x["motion"]))
    y = F.elu(linear(f"{unit}visualfusion.linear_out", fused.reshape(-1, 256, 2).sum(2)))
    a = linear("feature_aggregation.attn", F.elu(y @ state["feature_aggregation.v_proj.weight"].T)).softmax(0)
    hidden = F.elu(linear("output_unit.classifier.1", torch.cat([(a * y).sum(0), linear("output_unit.question_proj", sentence)])))
    norm = {k: state[f"output_unit.classifier.3.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
    hidden = (hidden - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return linear("output_unit.classifier.5", hidden), torch.stack(com).mean(), torch.stack(dis).mean()


def inputs(seed=1, n=5):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 2, 5])
    tokens = torch.randint(1, V, (3, 7), generator=g) * (torch.arange(7) < lengths[:, None])
    return tokens, lengths, torch.randn(3, n, 4, FEATURES, generator=g), torch.randn(3, n, FEATURES, generator=g)


def test_official_weights_give_the_official_outputs():
    state, (tokens, lengths, appearance, motion) = official_dict(), inputs()
    out = from_official(state).eval()(tokens, lengths, appearance, motion)
    slow = [reference(state, tokens[i], lengths[i], appearance[i], motion[i], 7) for i in range(3)]
    torch.testing.assert_close(out.logits, torch.stack([s[0] for s in slow]), rtol=3e-5, atol=1e-5)   # logits of about 10
    torch.testing.assert_close(out.consistency, torch.stack([s[1] for s in slow]).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.disparity, torch.stack([s[2] for s in slow]).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cycles", [1, 2])
def test_full_size_has_the_published_number_of_parameters(cycles):
    with torch.device("meta"):
        model = DualVGR(vocabulary=100, answers=50, cycles=cycles)
    assert sum(p.numel() for p in model.parameters()) == 16_613_633 + 4_604_945 * cycles + 300 * 100 + 769 * 50


def test_a_wrong_state_dict_is_named_key_by_key():
    state = official_dict()
    del state["output_unit.question_proj.bias"]
    with pytest.raises(ValueError, match="1 missing: output_unit.question_proj.bias; 1 unknown: extra"):
        from_official(state | {"extra": torch.zeros(1)})
    state = official_dict() | {"output_unit.question_proj.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"question_proj.bias \(5,\) instead of \(32,\)"):
        from_official(state)


def test_padding_changes_nothing():
    model, (tokens, lengths, appearance, motion) = from_official(official_dict()).eval(), inputs()
    dirty = torch.where(tokens == 0, 3, tokens)
    clean = model(tokens, lengths, appearance, motion).logits
    assert torch.equal(clean, model(dirty, lengths, appearance, motion).logits)
    longer = model(F.pad(tokens, (0, 6)), lengths, appearance, motion).logits
    torch.testing.assert_close(clean, longer, rtol=0, atol=1e-2)     # softmax over padding, renormalised with 1e-5


def test_the_order_of_clips_is_invisible():
    model, (tokens, lengths, appearance, motion) = from_official(official_dict()).eval(), inputs()
    order = torch.tensor([3, 1, 4, 0, 2])
    a, b = model(tokens, lengths, appearance, motion), model(tokens, lengths, appearance[:, order], motion[:, order])
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(a.scores[..., order], b.scores)


def test_a_punished_clip_is_heard_by_nobody_but_itself():
    torch.manual_seed(0)
    unit, x = GraphAttention(16, 2).eval(), torch.randn(2, 1, 4, 16)
    for p in unit.parameters():
        nn.init.normal_(p)
    score = torch.ones(2, 1, 4)
    score[:, 0, 2] = 0
    out, attention = unit(x, score)                          # clip 2 still takes part in the logits ...
    u = unit.project(x).unflatten(3, (4, 8))                 # two views of two heads
    kept = torch.einsum("sbhij,sbjhk->sbihk", attention.flatten(2, 3)[..., [0, 1, 3]], u[:, :, [0, 1, 3]])
    torch.testing.assert_close(out.flatten(3), F.elu(kept).flatten(3))   # ... but its value never enters


def test_pair_logits_have_the_same_gradients():
    torch.manual_seed(0)
    unit = GraphAttention(8, 2).double().eval()
    for p in unit.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 2, 3, 8, dtype=torch.double, requires_grad=True)
    score = torch.rand(2, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: unit(x, s)[0], (x, score))


def test_consistency_and_hsic_on_known_cases():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 5, 6).double()
    assert consistency(a, a) == 0
    torch.testing.assert_close(consistency(a, b), consistency(a + torch.randn(2, 1, 6), b))
    assert (hsic(a, b) >= 0).all()
    torch.testing.assert_close(hsic(a, torch.ones_like(b)), torch.zeros(2).double(), atol=1e-10, rtol=0)
    r = torch.eye(5).double() - 1 / 5
    slow = torch.stack([torch.trace(r @ x @ x.T @ r @ y @ y.T) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(hsic(a, b), slow)


def test_switches_remove_exactly_their_part():
    tokens, lengths, appearance, motion = inputs()
    sizes = dict(vocabulary=V, answers=A, features=FEATURES, width=D, word_width=W, heads=HEADS)
    out = DualVGR(**sizes, punish=False).eval()(tokens, lengths, appearance, motion)
    assert (out.scores == 1).all()
    blind = DualVGR(**sizes, streams="appearance").eval()
    assert torch.equal(blind(tokens, lengths, appearance, motion).logits, blind(tokens, lengths, appearance, motion * 9).logits)
    single = DualVGR(**sizes, views=1).eval()(tokens, lengths, appearance, motion)
    assert (single.views == 1).all() and single.graph.shape[3] == 1
    with pytest.raises(ValueError, match="cycles=0"):
        DualVGR(**sizes, cycles=0)


def test_a_query_without_words_is_zero_and_finite():
    query = DynamicQuery(D)
    c, attention = query(torch.randn(1, 4, W), torch.randn(1, 4, D), torch.zeros(1, 4, dtype=torch.bool))
    assert (c == 0).all() and (attention == 0).all()
