"""CLIP: sizes, names, parity with a slow independent tower, taps and prompts, preparation, weights from elsewhere."""
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data import clip
from data.clip import CLIP, from_official, galip_compat, load, official_names, standard
from data.towers import Block, ImageTower, TextTower
from data.weights import write_safetensors


def tiny(seed=0, width=32, depth=3, heads=2):
    """A random CLIP: 32 x 32 pictures, patch 8, 12 words of context, 20 ids, embedding 24."""
    torch.manual_seed(seed)
    model = CLIP(ImageTower(width, depth, heads, 8, 4, 24), TextTower(width // 2, 2, 2, 12, 20, 24))
    for p in model.parameters():                            # biases and gains too: a fresh LayerNorm hides mistakes
        p.data.add_(0.1 * torch.randn_like(p))
    return clip.freeze(model)


def vit_b_32():
    with torch.device("meta"):
        return CLIP(ImageTower(768, 12, 12, 32, 7, 512), TextTower(512, 12, 8, 77, 49408, 512))


# -- sizes and names -----------------------------------------------------------------------------------------


def test_parameter_totals_of_vit_b_32_are_the_published_ones():
    model = vit_b_32()
    totals = [sum(p.numel() for p in part.parameters()) for part in (model.visual, model.text, model)]
    assert totals == [87_849_216, 63_428_096, 151_277_313]


def test_state_dict_has_the_302_official_entries_and_shapes():
    names = {"positional_embedding": (77, 512), "text_projection": (512, 512), "logit_scale": (),
             "token_embedding.weight": (49408, 512), "ln_final.weight": (512,), "ln_final.bias": (512,),
             "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
             "visual.conv1.weight": (768, 3, 32, 32)}
    names |= {f"visual.ln_{which}.{part}": (768,) for which in ("pre", "post") for part in ("weight", "bias")}
    for prefix, d in (("visual.transformer", 768), ("transformer", 512)):
        for i in range(12):
            b = f"{prefix}.resblocks.{i}."
            names |= {b + "attn.in_proj_weight": (3 * d, d), b + "attn.in_proj_bias": (3 * d,)}
            names |= {b + f"ln_{n}.{part}": (d,) for n in (1, 2) for part in ("weight", "bias")}
            for layer, out, inside in (("attn.out_proj", d, d), ("mlp.c_fc", 4 * d, d), ("mlp.c_proj", d, 4 * d)):
                names |= {f"{b}{layer}.weight": (out, inside), f"{b}{layer}.bias": (out,)}
    ours = {name: tuple(tensor.shape) for name, tensor in official_names(vit_b_32()).items()}
    assert len(names) == 302 and ours == names


def test_sizes_are_inferred_from_the_state_dict():
    model = tiny()
    again = from_official(official_names(model), heads=(2, 2))
    assert (again.size, again.grid, again.width, again.embed, again.context) == (32, 4, 32, 24, 12)
    assert len(again.visual.transformer.resblocks) == 3 and len(again.text.transformer.resblocks) == 2
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs.pop(name)) for name, tensor in model.state_dict().items()) and not theirs
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


# -- parity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_equals_torchs_multihead_attention(causal):
    torch.manual_seed(0)
    block, theirs = Block(64, 4), nn.MultiheadAttention(64, 4, batch_first=True)
    theirs.load_state_dict(block.attn.state_dict())
    x = torch.randn(3, 7, 64)
    mask = torch.full((7, 7), -math.inf).triu(1) if causal else None
    y = F.layer_norm(x, (64,), block.ln_1.weight, block.ln_1.bias)
    h = x + theirs(y, y, y, attn_mask=mask, need_weights=False)[0]
    z = block.mlp.c_fc(F.layer_norm(h, (64,), block.ln_2.weight, block.ln_2.bias))
    h = h + block.mlp.c_proj(z / (1 + (-1.702 * z).exp()))
    assert (block(x, causal) - h).abs().max() < 1e-6


def slow_norm(s, v, name):
    normal = (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return normal * s[name + ".weight"] + s[name + ".bias"]


def slow_blocks(s, prefix, x, heads, causal, depth):
    """Blocks with explicit loops over heads and rows, in float64, from the state dict alone.   x (T, w)"""
    outputs = []
    for i in range(depth):
        b = f"{prefix}transformer.resblocks.{i}."
        qkv = slow_norm(s, x, b + "ln_1") @ s[b + "attn.in_proj_weight"].T + s[b + "attn.in_proj_bias"]
        w = x.shape[1]
        d, mixed = w // heads, torch.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, n * w + h * d : n * w + (h + 1) * d] for n in range(3))
            for row in range(len(x)):
                reach = row + 1 if causal else len(x)
                p = (k[:reach] @ q[row] / math.sqrt(d)).exp()
                mixed[row, h * d : (h + 1) * d] = (p / p.sum()) @ v[:reach]
        x = x + mixed @ s[b + "attn.out_proj.weight"].T + s[b + "attn.out_proj.bias"]
        z = slow_norm(s, x, b + "ln_2") @ s[b + "mlp.c_fc.weight"].T + s[b + "mlp.c_fc.bias"]
        x = x + (z * torch.sigmoid(1.702 * z)) @ s[b + "mlp.c_proj.weight"].T + s[b + "mlp.c_proj.bias"]
        outputs.append(x)
    return outputs


def test_both_towers_equal_a_slow_reference():
    model = tiny(1)
    s = {name: t.double() for name, t in official_names(model).items()}
    picture, tokens = torch.randn(1, 3, 32, 32), torch.tensor([[18, 3, 7, 1, 19, 0, 0]])
    patches = picture[0].double().unfold(1, 8, 8).unfold(2, 8, 8)                            # (3, 4, 4, 8, 8)
    rows = [(s["visual.conv1.weight"] * patches[:, r, c]).sum((1, 2, 3)) for r in range(4) for c in range(4)]
    x = torch.stack([s["visual.class_embedding"], *rows]) + s["visual.positional_embedding"]
    outputs = slow_blocks(s, "visual.", slow_norm(s, x, "visual.ln_pre"), 2, False, 3)
    features, embedding = model.encode_image(picture, taps=(2, 0))
    expected = slow_norm(s, outputs[-1][0], "visual.ln_post") @ s["visual.proj"]
    assert torch.allclose(embedding[0].double(), expected, atol=1e-5)
    for n, tap in enumerate((2, 0)):                                                        # in the order asked for
        for r in range(4):
            assert torch.allclose(features[0, n, :, r, 1].double(), outputs[tap][1 + 4 * r + 1], atol=1e-5)
    x = s["token_embedding.weight"][tokens[0]] + s["positional_embedding"][:7]
    words = slow_norm(s, slow_blocks(s, "", x, 2, True, 2)[-1], "ln_final")
    sentence, ours = model.encode_text(tokens)
    assert torch.allclose(ours[0].double(), words, atol=1e-5)
    assert torch.allclose(sentence[0].double(), words[4] @ s["text_projection"], atol=1e-5)


# -- text ----------------------------------------------------------------------------------------------------


def test_what_follows_the_end_of_text_changes_nothing_before_it():
    model = tiny()
    a = torch.tensor([[18, 3, 7, 19, 0, 0, 0, 0, 0, 0, 0, 0]])
    b = torch.tensor([[18, 3, 7, 19, 5, 11, 2, 1, 9, 4, 3, 8]])
    (sentence_a, words_a), (sentence_b, words_b) = model.encode_text(a), model.encode_text(b)
    assert torch.allclose(sentence_a, sentence_b, atol=1e-6)
    assert torch.allclose(words_a[:, :4], words_b[:, :4], atol=1e-6)
    assert not torch.allclose(words_a[:, 4:], words_b[:, 4:], atol=1e-3)
    assert torch.allclose(model.encode_text(a[:, :4])[0], sentence_a, atol=1e-6)           # nor does shorter padding
    c = torch.tensor([[18, 3, 8, 19]])
    assert not torch.allclose(model.encode_text(c)[0], sentence_a, atol=1e-3)


def test_the_sentence_is_the_row_of_the_largest_id():
    model = tiny()
    tokens = torch.tensor([[18, 3, 19, 7, 4], [18, 3, 4, 7, 19]])
    sentence, words = model.encode_text(tokens)
    assert torch.allclose(sentence, torch.stack([words[0, 2], words[1, 4]]) @ model.text.text_projection, atol=1e-6)


def test_ids_of_another_tokeniser_are_refused():
    for tokens in (torch.tensor([[18, 20, 19]]), torch.zeros(1, 13, dtype=torch.long), torch.tensor([[-1, 19]])):
        with pytest.raises(ValueError, match="up to 12 ids below 20"):
            tiny().encode_text(tokens)


# -- taps and prompts ----------------------------------------------------------------------------------------


def test_taps_and_their_order_and_their_absence():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    features, embedding = model.encode_image(x, (0, 1, 2))
    assert features.shape == (2, 3, 32, 4, 4) and embedding.shape == (2, 24)
    none, same = model.encode_image(x)
    assert none.shape == (2, 0, 32, 4, 4) and torch.equal(same, embedding)
    assert torch.equal(model.encode_image(x, (2, 0))[0], features[:, [2, 0]])
    for wrong in ((3,), (-1,), (0, 0)):
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            model.encode_image(x, wrong)
    with pytest.raises(ValueError, match="32 x 32"):
        model.encode_image(torch.randn(1, 3, 64, 64))


def test_tokens_without_prompts_are_the_plain_tower():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    mapped = model.map_tokens(model.visual.conv1(x), torch.empty(2, 0, 32), ())
    assert torch.allclose(mapped, model.encode_image(x, (2,))[0][:, 0], atol=1e-6)


def test_a_prompt_acts_at_its_own_layer_only_and_is_dropped_after_it():
    model, feature, prompts = tiny(), torch.randn(2, 32, 4, 4), torch.randn(2, 2, 32)
    base = model.map_tokens(feature, prompts, (0, 2))
    for k in range(2):
        changed = prompts.clone()
        changed[:, k] = torch.randn(2, 32)                  # adding a constant would vanish in LayerNorm
        assert not torch.allclose(model.map_tokens(feature, changed, (0, 2)), base, atol=1e-3)
    swapped = model.map_tokens(feature, prompts.flip(1), (2, 0))       # the k-th belongs to the k-th layer
    assert torch.allclose(swapped, base, atol=1e-6)
    seen = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[1]))
    model.map_tokens(feature, prompts, (0, 2))
    assert seen == [18, 17, 18]
    with pytest.raises(ValueError, match="2 prompt layers"):
        model.map_tokens(feature, prompts[:, :1], (0, 2))


def test_frozen_towers_let_gradients_through():
    model = tiny()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    feature, prompts = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 1, 32, requires_grad=True)
    (model.encode_image(x)[1].square().sum() + model.map_tokens(feature, prompts, (1,)).square().sum()).backward()
    assert all(t.grad.abs().sum() > 0 for t in (x, feature, prompts))
    assert all(p.grad is None for p in model.parameters())


def test_a_half_precision_tower_agrees_and_keeps_the_callers_type():
    model, x, tokens = tiny(), torch.randn(4, 3, 32, 32), torch.tensor([[18, 3, 19]])
    image, text = model.encode_image(x, (1,)), model.encode_text(tokens)[0]
    model.to(torch.bfloat16)                                # float16 needs a GPU for speed; the policy is the same
    half = model.encode_image(x, (1,))
    assert half[0].dtype == half[1].dtype == torch.float32
    assert F.cosine_similarity(half[1], image[1]).min() > 0.999
    assert F.cosine_similarity(model.encode_text(tokens)[0], text).min() > 0.999


# -- preparation ---------------------------------------------------------------------------------------------


def test_standard_and_galip_compat_on_a_pixel_by_hand():
    pictures = torch.full((1, 3, 8, 8), 0.5)                                              # 0.75 in [0, 1]
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for c, (mean, std) in enumerate(zip(means, stds, strict=True)):
        assert standard(pictures, 8)[0, c, 3, 3].item() == pytest.approx((0.75 - mean) / std, abs=1e-5)
        assert galip_compat(pictures, 8)[0, c, 3, 3].item() == pytest.approx((0.875 - mean) / std, abs=1e-5)


def test_standard_resizes_the_short_side_and_crops_the_middle():
    pictures = torch.zeros(1, 3, 16, 48)
    pictures[..., 16:32] = 1.0                                                            # the middle square
    prepared = standard(pictures, 16)
    assert prepared.shape == (1, 3, 16, 16) and torch.equal(prepared, standard(torch.ones(1, 3, 16, 16), 16))
    assert standard(torch.zeros(2, 3, 31, 17), 8).shape == (2, 3, 8, 8)


def test_standard_agrees_with_pillow():
    from PIL import Image

    torch.manual_seed(0)
    small = torch.randint(64, 192, (3, 12, 12), dtype=torch.uint8)
    big = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((50, 50), Image.Resampling.BICUBIC)
    reduced = big.resize((20, 20), Image.Resampling.BICUBIC)
    picture, theirs = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(*image.size, 3).permute(2, 0, 1)
                       / 255 for image in (big, reduced))
    ours = standard(picture[None] * 2 - 1, 20)[0]
    assert (ours - clip.normalise(theirs)).abs().max() < 1.5 / 255 / 0.26     # 8-bit rounding, in units of std


# -- weights from elsewhere ----------------------------------------------------------------------------------


def hugging_face(model, text_only=False, prefix="text_model."):
    """Official names -> Hugging Face's, written from the table in the paper notes, independent of the loader."""
    theirs = {}
    for name, t in official_names(model).items():
        side, inner = ("vision_model.", name[7:]) if name.startswith("visual.") else (prefix, name)
        for ours, new in (("transformer.resblocks", "encoder.layers"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                          (".ln_1", ".layer_norm1"), (".ln_2", ".layer_norm2"), ("attn.out", "self_attn.out"),
                          ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm")):
            inner = inner.replace(ours, new)
        fixed = {"class_embedding": "class_embedding", "positional_embedding": "position_embedding.weight",
                 "conv1.weight": "patch_embedding.weight", "token_embedding.weight": "token_embedding.weight"}
        inner = "embeddings." + fixed[inner] if inner in fixed else inner
        if "in_proj" in inner:
            stem, kind = inner.split("attn.in_proj_")
            for part, third in zip("qkv", t.chunk(3), strict=True):
                theirs[f"{side}{stem}self_attn.{part}_proj.{kind}"] = third.clone()
        elif name in ("visual.proj", "text_projection"):
            theirs["visual_projection.weight" if name[0] == "v" else "text_projection.weight"] = t.T.clone()
        else:
            theirs["logit_scale" if name == "logit_scale" else side + inner] = t
    if text_only:
        theirs = {n: t for n, t in theirs.items() if not n.startswith(("vis", "logit_scale", "text_projection"))}
    theirs[prefix + "embeddings.position_ids"] = torch.arange(12)[None]
    return theirs


def test_hugging_face_layout_gives_the_same_outputs(tmp_path):
    model, x, tokens = tiny(), torch.randn(2, 3, 32, 32), torch.tensor([[18, 3, 19]])
    write_safetensors(tmp_path / "model.safetensors", hugging_face(model))
    again = load(tmp_path, heads=(2, 2))                                                 # a folder, as downloaded
    assert torch.equal(again.encode_image(x)[1], model.encode_image(x)[1])
    assert torch.equal(again.encode_text(tokens)[0], model.encode_text(tokens)[0])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_lone_text_encoder_loads_without_projection(tmp_path, prefix):
    model, tokens = tiny(), torch.tensor([[18, 3, 19]])
    torch.save(hugging_face(model, text_only=True, prefix=prefix), tmp_path / "pytorch_model.bin")
    text = load(tmp_path, heads=(None, 2))
    assert isinstance(text, TextTower) and len(text.state_dict()) == 2 * 12 + 4
    sentence, words = text(tokens)
    assert sentence is None and torch.equal(words, model.encode_text(tokens)[1])


def test_plain_state_dicts_load_and_half_becomes_float32(tmp_path):
    state = {k: v.half() for k, v in official_names(tiny(width=128, heads=2)).items()}
    state |= {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state, tmp_path / "clip.pt")
    model = load(tmp_path / "clip.pt", heads=(None, 2))
    assert model.visual.transformer.resblocks[0].attn.heads == 2                         # 128 / 64
    assert all(p.dtype == torch.float32 for p in model.parameters()) and len(model.sha256) == 64


def test_a_torchscript_archive_loads_only_when_trusted(tmp_path):
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.visual, self.transformer = model.visual, model.text.transformer
            self.token_embedding, self.ln_final = model.text.token_embedding, model.text.ln_final
            self.positional_embedding, self.logit_scale = model.text.positional_embedding, model.logit_scale
            self.text_projection = model.text.text_projection

        def forward(self, x):
            return self.visual.ln_post(x) + self.logit_scale

    model = tiny()
    torch.jit.trace(Holder(model), torch.randn(1, 32)).save(str(tmp_path / "ViT.pt"))
    with pytest.raises(ValueError, match="is a program.*trust=True"):
        load(tmp_path / "ViT.pt", heads=(2, 2))
    state = clip.read_torchscript(tmp_path / "ViT.pt", trust=True)
    assert state.keys() <= official_names(model).keys()
    assert torch.equal(state["visual.conv1.weight"], model.visual.conv1.weight)


def test_bad_files_get_a_sentence(tmp_path):
    good, path = official_names(tiny()), tmp_path / "clip.safetensors"
    cases = [
        ({k: v for k, v in good.items() if k != "visual.ln_pre.bias"}, "1 missing: visual.ln_pre.bias"),
        (good | {"visual.extra": torch.zeros(1)}, "1 unknown: visual.extra"),
        (good | {"visual.ln_post.weight": torch.zeros(31)}, r"visual.ln_post.weight \(31,\) instead of \(32,\)"),
        (good | {"visual.positional_embedding": torch.zeros(18, 32)}, r"positional_embedding \(18, 32\) instead of \(17, 32\)"),
        (good | {"text_projection": torch.zeros(15, 24)}, r"text_projection \(15, 24\) instead of \(16, 24\)"),
        ({"visual.conv1.weight": torch.zeros(64, 3, 8, 8)}, "not a CLIP with a vision transformer"),
        ({"layer1.0.conv1.weight": torch.zeros(64, 3, 8, 8)}, "not a CLIP with a vision transformer"),
    ]
    for state, message in cases:
        write_safetensors(path, state)
        with pytest.raises(ValueError, match=message):
            load(path, heads=(2, 2))
    write_safetensors(path, good)
    with pytest.raises(ValueError, match="how many heads the text tower"):
        load(path)
    with pytest.raises(ValueError, match="3 heads do not divide"):
        load(path, heads=(3, 2))
    for about in ({"image_heads": "two", "text_heads": 2}, {"image_heads": 2}):
        write_safetensors(path, good, about)
        with pytest.raises(ValueError, match="does not say how many heads its towers have"):
            load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the file was cut"):
        load(path, heads=(2, 2))
    with pytest.raises(FileNotFoundError, match="is missing"):
        load(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="not a Hugging Face folder"):
        load(tmp_path)
    broken = hugging_face(tiny())
    del broken["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match="needs q_proj, k_proj and v_proj, found q, v"):
        from_official(broken, (2, 2))


def test_the_released_weights_if_the_user_has_them():
    """Set SEPTET_CLIP to ViT-B-32.pt and SEPTET_CLIP_VOCABULARY to bpe_simple_vocab_16e6.txt.gz."""
    from data.text import BytePairs, read_merges

    weights, vocabulary = os.environ.get("SEPTET_CLIP"), os.environ.get("SEPTET_CLIP_VOCABULARY")
    if not (weights and vocabulary):
        pytest.skip("needs OpenAI's ViT-B-32.pt and vocabulary: set SEPTET_CLIP and SEPTET_CLIP_VOCABULARY")
    model, tokens = load(Path(weights)), BytePairs(read_merges(vocabulary))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    picture = torch.where((x**2 + y**2 < 0.3)[None, None], torch.tensor([1.0, -1, -1])[:, None, None], torch.ones(1))
    colours, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle")
    captions = [f"a {c} {s}" for s in shapes for c in colours]
    image = model.encode_image(standard(picture))[1]
    scores = F.cosine_similarity(image, model.encode_text(tokens(captions))[0])
    assert scores.argmax() == 0 and scores.isfinite().all()
