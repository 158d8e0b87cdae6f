"""GALIP's networks against a straight-line reference in the official names, and what its parts promise."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernels
from data.clip import CLIP, ImageTower, TextTower, freeze
from gan.model import (
    Critic,
    Generator,
    PlainCritic,
    clip_similarity,
    critic_from_official,
    generator_from_official,
    gradient_penalty,
    hinge_d,
    ladder,
)

Z, E, W, GRID, PATCH, HEADS, DEPTH, BASE = 5, 7, 16, 4, 8, 2, 4, 3      # a 32 x 32 toy with every module of the real one


def tiny_clip(seed=0):
    torch.manual_seed(seed)
    return freeze(CLIP(ImageTower(W, DEPTH, HEADS, PATCH, GRID, E), TextTower(8, 1, 2, 6, 20, E)))


def toy_generator(**switches):
    return Generator(W, GRID, PATCH, E, Z, BASE, (6, 4, 2), (1, 2), **switches)


def stirred(model, seed=1):
    """Every weight random, so that nothing hides behind a neutral start."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    return model


def official_dicts(seed=0, noise=Z, embed=E, width=W, grid=GRID, patch=PATCH, depth=DEPTH, code=6, hidden=4, blocks=2, prompts=2,
                   sizes=3, base=BASE, taps=3, out=4, joint=5, device="cpu"):
    """Random tensors in the official names and shapes (section 10 of the specification); the defaults are a toy."""
    condition, shapes = noise + embed, {}

    def pair(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def fusion(name, channels):
        for i in (0, 1):
            for net in ("gamma", "beta"):
                pair(f"{name}.affine{i}.fc_{net}.linear1", channels, condition)
                pair(f"{name}.affine{i}.fc_{net}.linear2", channels, channels)

    channels = [base * min(2**k, 8) for k in range(sizes, -1, -1)]
    pair("fc_code", grid * grid * code, noise)
    for i in range(blocks):
        pair(f"mapping.FBlocks.{i}.conv1", hidden, code, 3, 3)
        pair(f"mapping.FBlocks.{i}.conv2", code, hidden, 3, 3)
        fusion(f"mapping.FBlocks.{i}.fuse1", hidden)
        fusion(f"mapping.FBlocks.{i}.fuse2", code)
    pair("mapping.conv_fuse", width, code, 5, 5)
    pair("mapping.conv", channels[0], width, 5, 5)
    pair("mapping.fc_prompt", prompts * width, condition)
    tower = "mapping.CLIP_ViT."
    shapes |= {tower + "class_embedding": (width,), tower + "positional_embedding": (grid * grid + 1, width),
               tower + "conv1.weight": (width, 3, patch, patch)}
    pair(tower + "ln_pre", width)
    for i in range(depth):
        block = f"{tower}transformer.resblocks.{i}."
        shapes |= {block + "attn.in_proj_weight": (3 * width, width), block + "attn.in_proj_bias": (3 * width,)}
        pair(block + "attn.out_proj", width, width)
        pair(block + "mlp.c_fc", 4 * width, width)
        pair(block + "mlp.c_proj", width, 4 * width)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
    shapes[tower + "ln_pre.weight"] = (width,)
    for i, (a, b) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        pair(f"GBlocks.{i}.c1", b, a, 3, 3)
        pair(f"GBlocks.{i}.c2", b, b, 3, 3)
        fusion(f"GBlocks.{i}.fuse1", a)
        fusion(f"GBlocks.{i}.fuse2", b)
        if a != b:
            pair(f"GBlocks.{i}.c_sc", b, a, 1, 1)
    pair("to_rgb.1", 3, channels[-1], 3, 3)
    d = {}
    for i in range(taps - 1):
        d |= {f"DBlocks.{i}.gamma": (1,), f"DBlocks.{i}.beta": (1,), f"DBlocks.{i}.conv_s.weight": (width, width, 1, 1),
              f"DBlocks.{i}.conv_s.bias": (width,)} | {f"DBlocks.{i}.conv_r.{k}.weight": (width, width, 3, 3) for k in (0, 2)}
    d |= {"main.gamma": (1,), "main.conv_r.0.weight": (out, width, 3, 3), "main.conv_r.2.weight": (out, out, 3, 3),
          "main.conv_s.weight": (out, width, 1, 1), "main.conv_s.bias": (out,)}
    c = {"joint_conv.0.weight": (joint, out + embed, 4, 4), "joint_conv.2.weight": (1, joint, grid - 3, grid - 3)}
    if device == "meta":
        return tuple({k: torch.empty(s, device="meta") for k, s in part.items()} for part in (shapes, d, c))
    g = torch.Generator().manual_seed(seed)
    return tuple({k: torch.randn(s, generator=g).double() * 0.25 for k, s in part.items()} for part in (shapes, d, c))


def reference_generator(s, noise, text):
    """One pass, straight from section 3 of the specification: resize first, no shortcuts through the algebra."""
    leaky = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    condition = torch.cat([noise, text], 1)

    def linear(name, x):
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    def fuse(name, x):
        for i in (0, 1):
            nets = (f"{name}.affine{i}.fc_{n}.linear" for n in ("gamma", "beta"))
            gamma, beta = (linear(net + "2", torch.relu(linear(net + "1", condition))) for net in nets)
            x = leaky(gamma[:, :, None, None] * x + beta[:, :, None, None])
        return x

    def conv(name, x, pad):
        return F.conv2d(x, s[name + ".weight"], s[name + ".bias"], padding=pad)

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * s[name + ".weight"] + s[name + ".bias"]

    def block(i, x):
        b = f"mapping.CLIP_ViT.transformer.resblocks.{i}."
        h = norm(b + "ln_1", x)
        q, k, v = (h @ s[b + "attn.in_proj_weight"].T + s[b + "attn.in_proj_bias"]).chunk(3, -1)
        heads = []
        for part in range(HEADS):
            one = slice(part * W // HEADS, (part + 1) * W // HEADS)
            heads.append((q[..., one] @ k[..., one].mT / (W // HEADS) ** 0.5).softmax(-1) @ v[..., one])
        x = x + linear(b + "attn.out_proj", torch.cat(heads, -1))
        h = linear(b + "mlp.c_fc", norm(b + "ln_2", x))
        return x + linear(b + "mlp.c_proj", h * torch.sigmoid(1.702 * h))

    h = linear("fc_code", noise).view(len(noise), -1, GRID, GRID)
    for i in range(2):
        m = f"mapping.FBlocks.{i}"
        h = h + fuse(m + ".fuse2", conv(m + ".conv2", fuse(m + ".fuse1", conv(m + ".conv1", h, 1)), 1))
    bridge = conv("mapping.conv_fuse", h, 2)
    prompts = linear("mapping.fc_prompt", condition).view(len(noise), 2, W)
    tokens = torch.cat([s["mapping.CLIP_ViT.class_embedding"].expand(len(noise), 1, W), bridge.flatten(2).mT], 1)
    tokens = norm("mapping.CLIP_ViT.ln_pre", tokens + s["mapping.CLIP_ViT.positional_embedding"])
    for i in range(DEPTH):
        tokens = block(i, torch.cat([tokens, prompts[:, i - 1 : i]], 1))[:, :-1] if i in (1, 2) else block(i, tokens)
    x = conv("mapping.conv", bridge + 0.1 * tokens[:, 1:].mT.reshape(bridge.shape), 2)
    for i, size in enumerate((8, 16, 32)):
        u = F.interpolate(x, size=(size, size))
        short = conv(f"GBlocks.{i}.c_sc", u, 0) if f"GBlocks.{i}.c_sc.weight" in s else u
        u = fuse(f"GBlocks.{i}.fuse2", conv(f"GBlocks.{i}.c1", fuse(f"GBlocks.{i}.fuse1", u), 1))
        x = short + conv(f"GBlocks.{i}.c2", u, 1)
    return conv("to_rgb.1", leaky(x), 1)


def reference_score(d, c, taps, text):
    leaky = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    conv = lambda name, x: leaky(F.conv2d(x, d[f"{name}.weight"], padding=1))  # noqa: E731
    r = lambda name, x: conv(f"{name}.2", conv(f"{name}.0", x))  # noqa: E731
    x = taps[:, 0]
    for i in (0, 1):
        x = x + d[f"DBlocks.{i}.gamma"] * r(f"DBlocks.{i}.conv_r", x) + d[f"DBlocks.{i}.beta"] * taps[:, i + 1]
    x = F.conv2d(x, d["main.conv_s.weight"], d["main.conv_s.bias"]) + d["main.gamma"] * r("main.conv_r", x)
    x = torch.cat([x, text[:, :, None, None].repeat(1, 1, GRID, GRID)], 1)
    return F.conv2d(leaky(F.conv2d(x, c["joint_conv.0.weight"])), c["joint_conv.2.weight"]).flatten()


def test_official_weights_give_the_official_pictures_and_scores():
    g, d, c = official_dicts()
    generator, tower = generator_from_official({f"module.{k}": v for k, v in g.items()}, patch=PATCH)
    clip = tiny_clip().double()
    clip.visual.load_state_dict(tower, strict=False)
    torch.manual_seed(0)
    noise, text, taps = torch.randn(2, Z).double(), torch.randn(2, E).double(), torch.randn(2, 3, W, GRID, GRID).double()
    critic = critic_from_official(d, c).double()
    g, d, c = ({k: v.float().double() for k, v in part.items()} for part in (g, d, c))       # imported weights are float32
    torch.testing.assert_close(generator.double()(noise, text, clip), reference_generator(g, noise, text), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(critic.score(taps, text), reference_score(d, c, taps, text))


def test_full_size_has_the_official_manifest():
    g, d, c = official_dicts(noise=100, embed=512, width=768, grid=7, patch=32, depth=12, code=64, hidden=32, blocks=4, prompts=8,
                             sizes=6, base=64, out=512, joint=128, device="meta")
    assert (len(g), len(d), len(c)) == (525, 17, 2)
    total = lambda part: sum(v.numel() for v in part.values())  # noqa: E731
    frozen = {k: v for k, v in g.items() if "CLIP_ViT" in k}
    assert (total(g) - total(frozen), total(frozen), total(d), total(c)) == (51_830_211, 87_454_464, 28_706_821, 2_099_200)
    with torch.device("meta"):
        generator, critic = Generator(768, 7, 32, 512), Critic(768, 7, 512)
    assert sum(p.numel() for p in generator.parameters()) == 51_830_211
    assert sum(p.numel() for p in critic.parameters()) == 28_706_821 - 1_181_184 + 2_099_200     # without the dead shortcuts
    assert generator.sizes == [8, 16, 32, 64, 128, 224] and ladder(12, 32) == ([8, 16, 32], [96, 48, 24, 12])


def test_a_wrong_state_dict_is_named_key_by_key():
    g, d, c = official_dicts()
    broken = {k: v for k, v in g.items() if k != "GBlocks.1.c2.bias"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="the official netG does not fit: 1 missing: GBlocks.1.c2.bias; 1 unknown: extra"):
        generator_from_official(broken, PATCH)
    with pytest.raises(ValueError, match="not an official netG: missing fc_code.weight"):
        generator_from_official(d)
    with pytest.raises(ValueError, match=r"1 misshapen: main.conv_s.bias \(9,\) instead of \(4,\)"):
        critic_from_official(d | {"main.conv_s.bias": torch.zeros(9)}, c)


def test_training_starts_neutral():
    torch.manual_seed(0)
    block, x = toy_generator().blocks[0].fuse1, torch.randn(2, 24, 4, 4)
    torch.testing.assert_close(block(torch.randn(2, Z + E), x), F.leaky_relu(F.leaky_relu(x, 0.2), 0.2))
    critic, taps, text = Critic(W, GRID, E, (0, 1, 2), 4, 5), torch.randn(2, 3, W, GRID, GRID), torch.randn(2, E)
    other = taps.clone()
    other[:, 1:] = 9
    assert torch.equal(critic.score(taps, text), critic.score(other, text)), "deeper taps fade in from zero"
    other[:, 0] = 9
    assert not torch.equal(critic.score(taps, text), critic.score(other, text))


def test_what_a_small_generator_starts_with_beyond_the_official_one():
    torch.manual_seed(0)
    official, ours = toy_generator(), toy_generator(hidden=96, canvas=1.0)
    nets = [m for m in ours.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Linear)]
    assert nets and {net[0].out_features for net in nets} == {96}, "no sentence is squeezed"
    assert ours.bridge.code.bias.std() > 0.8 > official.bridge.code.bias.std(), "places differ before any noise"
    x, condition = torch.randn(2, 24, 4, 4), torch.randn(2, Z + E)
    assert torch.equal(ours.blocks[0].fuse1(condition, x), official.blocks[0].fuse1(condition, x)), "both start neutral"


def test_switches_remove_exactly_their_part():
    clip, noise, text = tiny_clip(), torch.randn(2, Z), torch.randn(2, E)
    full = stirred(toy_generator())
    bare, blind = toy_generator(mapper=False), toy_generator(prompts=False)
    for other in (bare, blind):
        other.load_state_dict(full.state_dict())
        assert not torch.allclose(full(noise, text, clip), other(noise, text, clip))
    before = bare(noise, text, clip)
    assert torch.equal(before, bare(noise, text, None)), "without the mapper CLIP is not even looked at"
    full.prompt.weight.data.zero_(), full.prompt.bias.data.zero_()
    assert not torch.allclose(full(noise, text, clip), blind(noise, text, clip)), "a zero prompt is still a token"


def test_gradients_pass_through_the_frozen_tower_and_none_stay_in_it():
    clip, generator = tiny_clip(), stirred(toy_generator())
    picture = generator(torch.randn(2, Z), torch.randn(2, E), clip)
    _, embedding = clip.encode_image(picture)
    (-clip_similarity(embedding, torch.randn(2, E))).backward()
    assert generator.prompt.weight.grad.abs().sum() > 0 and generator.bridge.code.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip.parameters())
    assert not any("clip" in name or "tower" in name for name in generator.state_dict())


def test_the_penalty_is_the_gradient_it_names():
    torch.manual_seed(0)
    critic = stirred(Critic(W, GRID, E, (0, 1), 3, 4)).double()
    taps, text = torch.randn(2, 2, W, GRID, GRID).double().requires_grad_(), torch.randn(2, E).double().requires_grad_()
    one = gradient_penalty(critic.score(taps, text), taps, text, weight=1, power=2)
    steps, h = torch.zeros(()).double(), 1e-5
    for x in (taps, text):
        for i in range(0, x.numel()):
            bump = torch.zeros(x.numel()).double()
            bump[i] = h
            bump = bump.view_as(x)
            a, b = (bump, 0) if x is taps else (0, bump)
            pair = [critic.score(taps + s * a, text + s * b).sum() for s in (1, -1)]
            steps += ((pair[0] - pair[1]) / (2 * h)).detach() ** 2
    assert one.item() == pytest.approx(steps.item() / 2, rel=1e-4)
    printed = gradient_penalty(critic.score(taps, text), taps, text, form="paper")
    assert printed >= gradient_penalty(critic.score(taps, text), taps, text)
    printed.backward()
    assert critic.assess.joint.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="2 pictures and 1 sentences"):
        gradient_penalty(critic.score(taps, text), taps, text[:1])


def test_hinge_on_known_scores():
    real, fake, wrong = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]), torch.tensor([-0.5, -3.0])
    assert hinge_d(real, fake, wrong).item() == pytest.approx(0.25 + 0.5 / 2 + 0.25 / 2)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_the_plain_rival_reads_any_size(size):
    critic = PlainCritic(size, E, 4)
    image, text = torch.randn(2, 3, size, size, requires_grad=True), torch.randn(2, E, requires_grad=True)
    score = critic.score(image, text)
    assert score.shape == (2,) and gradient_penalty(score, image, text).isfinite()


def test_the_fusion_kernel_gives_the_reference_picture_and_gradients(device):
    torch.manual_seed(0)
    clip, model = tiny_clip().to(device), stirred(Generator(W, GRID, PATCH, E, Z, 1, (2, 2, 1), (1, 2))).to(device)
    noise, text, seen = torch.randn(1, Z, device=device), torch.randn(1, E, device=device), []
    for path in ("reference", "triton"):
        model.zero_grad()
        with kernels.use(path):
            picture = model(noise, text, clip)
            picture.square().mean().backward()
        seen.append([picture.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() + 1))


@pytest.mark.parametrize("size", [16, 14])
def test_resizing_late_and_adding_weights_first_change_nothing(size):
    torch.manual_seed(0)
    block = stirred(toy_generator()).double().blocks[1]
    x, condition, block.size = torch.randn(2, block.conv1.in_channels, 8, 8).double(), torch.randn(2, Z + E).double(), size
    u = F.interpolate(x, size=size)
    plain = block.shortcut(u) + block.conv2(block.fuse2(condition, block.conv1(block.fuse1(condition, u))))
    torch.testing.assert_close(block(condition, x), plain, rtol=1e-9, atol=1e-9)
    assert isinstance(block.shortcut, nn.Conv2d)
