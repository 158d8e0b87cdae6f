"""DE-Net's networks against a straight-line reference in the official names, and what its blocks promise."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edit.model import Critic, DCBlock, DEBlock, Generator, SentenceLSTM, from_official, widths

N, E, LEVELS, K = 4, 6, 3, 8                    # base width, sentence width, halvings of a 32 x 32 picture, kernels


def official_dicts(seed=0):
    """Random tensors in the official names and shapes (section 8 of the specification), at toy size."""
    g = torch.Generator().manual_seed(seed)
    sizes, c = {}, widths(N, 4 << LEVELS)

    def pair(name, *shape):
        sizes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def norm(name, width):
        sizes.update({f"{name}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")}
                     | {f"{name}.num_batches_tracked": ()})

    pair("ext", N, 3, 3, 3)
    pair("conv_img.1", 3, N, 3, 3)
    pair("cwp.img_enc.conv1", c[-1], c[-1], 3, 3)
    pair("cwp.img_enc.conv2", E, c[-1], 4, 4)
    for i in (1, 2):
        pair(f"cwp.txt_enc.main.linear{i}", E, E)
        pair(f"cwp.fuse.main.linear{i}", 2 * E, 2 * E)
    pair("cwp.fc.linear1", 4 * E, 4 * E)
    for i in range(LEVELS):
        sizes[f"down{i + 1}.conv.weight"] = (c[i + 1], c[i], 4, 4)
        norm(f"down{i + 1}.bn", c[i + 1])
        a, b, up = c[LEVELS - i], c[LEVELS - i - 1], f"up{i + 1}"
        pair(f"yp{i + 1}.conv", b, a, 3, 3)
        pair(f"{up}.conv", b, a, 3, 3)
        pair(f"{up}.fc.linear2", b, 4 * E)
        for net, out in (("CAFF.fc_gamma", b), ("CAFF.fc_beta", b), ("DCBlk.conv.scales", K * b), ("DCBlk.conv.shifts", K * b)):
            pair(f"{up}.{net}.linear1", E, E)
            pair(f"{up}.{net}.linear2", out, E)
        sizes |= {f"{up}.DCBlk.conv.weight": (K, b, 3, 3), f"{up}.DCBlk.conv.bias": (1, K, 1, 1),
                  f"{up}.DCBlk.conv_weight.weight": (1, K, 3, 3), f"{up}.DCBlk.conv_bias.weight": (1, K, 3, 3)}
    critic = {"block0.conv.weight": (N, 3, 4, 4)}
    for i in range(LEVELS - 1):
        critic[f"block{i + 1}.conv.weight"] = (c[i + 1], c[i], 4, 4)
        critic |= {f"block{i + 1}.batchnorm.{k}": (c[i + 1],) for k in ("weight", "bias", "running_mean", "running_var")}
        critic[f"block{i + 1}.batchnorm.num_batches_tracked"] = ()
    head = {"joint_conv.0.weight": (2 * N, c[LEVELS - 1] + E, 3, 3), "joint_conv.2.weight": (1, 2 * N, 4, 4)}

    def fill(shapes):
        state = {k: torch.randn(s, generator=g) * 0.3 for k, s in shapes.items()}
        return {k: v.abs() + 0.5 if k.endswith("running_var") else torch.tensor(3) if k.endswith("tracked") else v
                for k, v in state.items()}

    return fill(sizes), fill(critic), fill(head)


def reference_editor(s, image, text):
    """One picture, layer by layer, straight from section 2 of the specification."""
    leaky = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    up2 = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    conv = lambda x, name, **kw: F.conv2d(x, s[name + ".weight"], s.get(name + ".bias"), **kw)  # noqa: E731

    def mlp(x, name, act=torch.relu):
        return (act(x @ s[name + ".linear1.weight"].T + s[name + ".linear1.bias"])
                @ s[name + ".linear2.weight"].T + s[name + ".linear2.bias"])

    x, skips = conv(image, "ext", padding=1), []
    for i in range(1, LEVELS + 1):
        skips.append(x)
        x = F.conv2d(x, s[f"down{i}.conv.weight"], stride=2, padding=1)
        stats = [s[f"down{i}.bn.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")]
        x = leaky((x - stats[0]) / (stats[1] + 1e-5).sqrt() * stats[2] + stats[3])
    bottom, m, maps = x, x, []
    for i in range(1, LEVELS + 1):
        m = leaky(conv(up2(m), f"yp{i}.conv", padding=1)) + skips[-i]
        maps.append(m)
    img = conv(leaky(conv(bottom, "cwp.img_enc.conv1", padding=1)), "cwp.img_enc.conv2").flatten(1)
    txt = mlp(text, "cwp.txt_enc.main", leaky)
    a, b = mlp(torch.cat([img, txt], 1), "cwp.fuse.main", leaky).chunk(2, 1)
    t = leaky(torch.cat([a - b, a * b, img, txt], 1) @ s["cwp.fc.linear1.weight"].T + s["cwp.fc.linear1.bias"])
    h = bottom
    for i in range(1, LEVELS + 1):
        up, h = f"up{i}", conv(up2(h), f"up{i}.conv", padding=1)
        channel = leaky(mlp(text, f"{up}.CAFF.fc_gamma")[..., None, None] * h + mlp(text, f"{up}.CAFF.fc_beta")[..., None, None])
        kernel = s[f"{up}.DCBlk.conv.weight"].clone()
        scale, shift = mlp(text, f"{up}.DCBlk.conv.scales")[0], mlp(text, f"{up}.DCBlk.conv.shifts")[0]
        for o in range(K):
            for c in range(kernel.shape[1]):
                kernel[o, c] = kernel[o, c] * scale[o * kernel.shape[1] + c] + shift[o * kernel.shape[1] + c]
        q = F.conv2d(maps[i - 1], kernel, padding=1)
        spatial = leaky(conv(q, f"{up}.DCBlk.conv_weight", padding=1) * h
                        + F.conv2d(q, s[f"{up}.DCBlk.conv_bias.weight"], padding=1))
        w = torch.sigmoid(t @ s[f"{up}.fc.linear2.weight"].T + s[f"{up}.fc.linear2.bias"])[..., None, None]
        h = w * channel + (1 - w) * spatial + skips[-i]
    return torch.tanh(conv(leaky(h), "conv_img.1", padding=1))


def test_official_weights_give_the_official_pictures():
    g, d, c = official_dicts()
    generator, critic = from_official({f"module.{k}": v for k, v in g.items()}, d, c)
    torch.manual_seed(0)
    image, text = torch.rand(3, 3, 32, 32).double() * 2 - 1, torch.randn(3, E).double()
    g = {k: v.double() for k, v in g.items()}                # random weights amplify rounding: compare in float64
    slow = torch.cat([reference_editor(g, image[i : i + 1], text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(generator.double().eval()(image, text), slow, rtol=1e-9, atol=1e-9)
    assert critic.double().eval()(image, text).shape == (3,)


def test_a_wrong_state_dict_is_named_key_by_key():
    g, d, c = official_dicts()
    del g["up2.fc.linear2.bias"]
    with pytest.raises(ValueError, match="the official netG does not fit: 1 missing: up2.fc.linear2.bias; 1 unknown: extra"):
        from_official(g | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing ext.weight"):
        from_official(c)


@pytest.mark.parametrize("base, parameters", [(32, 18_755_667), (64, 51_698_195)])
def test_full_size_has_the_official_number_of_parameters(base, parameters):
    with torch.device("meta"):
        generator, critic = Generator(256, 256, base), Critic(256, 256, base, norm=True)
    assert sum(p.numel() for p in generator.parameters()) + 6 * 8 == parameters       # + the unused (1, 8, 1, 1) biases
    if base == 32:
        assert sum(p.numel() for p in critic.parameters()) == 2_788_736 + 295_936
    assert len([k for k in generator.state_dict()]) + 6 == 210


@pytest.mark.parametrize("size", [8, 32, 64, 256])
def test_the_bottleneck_is_four_by_four(size):
    generator = Generator(size, E, N, E)
    bottom, skips = generator.encoder(torch.zeros(1, 3, size, size))
    assert bottom.shape[2:] == (4, 4) and skips[0].shape[2:] == (size, size)
    for odd in (5, 4, 48):
        with pytest.raises(ValueError, match="4 x a power of two"):
            widths(N, odd)


def test_training_starts_from_a_neutral_block():
    torch.manual_seed(0)
    block, text = DEBlock(6, 5, E, 7), torch.randn(2, E)
    h, skip, m, code = torch.randn(2, 6, 4, 4), torch.zeros(2, 5, 8, 8), torch.randn(2, 5, 8, 8), torch.randn(2, 7)
    _, w, _ = block(h, skip, m, text, code)
    assert (w == 0.5).all()
    kernels = block.query.kernels(text)
    assert torch.equal(kernels[0], block.query.kernel) and torch.equal(kernels[1], block.query.kernel)
    block.fixed = 1.0
    channel = F.leaky_relu(block.conv(F.interpolate(h, scale_factor=2)), 0.2)
    torch.testing.assert_close(block(h, skip, m, text, code)[0], channel)


def perturbed_block():
    block = DCBlock(5, E).double()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def test_the_dynamic_convolution_gives_every_sample_its_own_kernels():
    torch.manual_seed(0)
    block, m, text = perturbed_block(), torch.randn(3, 5, 7, 7).double(), torch.randn(3, E).double()
    weight, shift = block(m, text)
    for i in range(3):
        q = F.conv2d(m[i : i + 1], block.kernels(text)[i], padding=1)
        torch.testing.assert_close(weight[i], block.to_weight(q)[0])
        torch.testing.assert_close(shift[i], block.to_shift(q)[0])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(block(m[order], text[order])[0], weight[order])
    assert not torch.allclose(block.kernels(text)[0], block.kernels(text)[1])
    still = DCBlock(5, E, dynamic=False)
    assert torch.equal(still.kernels(text)[0], still.kernels(text)[1])


def test_the_shift_of_a_kernel_is_a_box_sum():
    torch.manual_seed(0)
    block, m, text = perturbed_block(), torch.randn(1, 5, 7, 7).double(), torch.randn(1, E).double()
    shift = block.shift(text).view(1, K, 5)
    scaled = block.kernels(text)[0] - shift.view(K, 5, 1, 1)
    box = F.conv2d(torch.einsum("bkc,bchw->bkhw", shift, m), torch.ones(K, 1, 3, 3).double(), padding=1, groups=K)
    torch.testing.assert_close(F.conv2d(m, block.kernels(text)[0], padding=1), F.conv2d(m, scaled, padding=1) + box)


@pytest.mark.parametrize("composition, value", [("fixed", 0.5), ("channel", 1.0), ("spatial", 0.0)])
def test_compositions_are_switches(composition, value):
    editor = Generator(16, E, N, E, composition=composition)
    image, text = torch.rand(2, 3, 16, 16), torch.randn(2, E)
    edited, weights, queries = editor(image, text, explain=True)
    assert all((w == value).all() for w in weights) and len(weights) == len(queries) == 2
    assert torch.equal(edited, editor(image, text)), "the editor is deterministic"
    with pytest.raises(ValueError, match=r"16 x 16 pictures, got \(8, 8\)"):
        editor(image[..., :8, :8], text)


def test_the_sentence_reader_ignores_padding():
    torch.manual_seed(0)
    reader, tokens = SentenceLSTM(20, 8, 5).eval(), torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 1]])
    sentence, words = reader(tokens, torch.tensor([3, 5]))
    dirty = tokens.clone()
    dirty[0, 3:] = 11
    assert torch.equal(sentence, reader(dirty, torch.tensor([3, 5]))[0])
    assert sentence.shape == (2, 8) and words.shape == (2, 8, 5)
