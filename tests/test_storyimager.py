"""StoryImager's board, masks, attention, context and sampler; Stable Diffusion's layout at full size."""
import itertools

import pytest
import torch
from torch.nn import functional as F

from data.vae import VAE, Components
from data.vae import from_official as vae_from_official
from story.storyimager import (
    Board,
    ContextExtractor,
    LoRA,
    PanelAttention,
    Story,
    StoryImager,
    alpha_bars,
    ddim_step,
    draw_masks,
    draw_panels,
    estimates,
    freeze_base,
    load_base,
    masks_of,
    sampling_times,
    targets,
    tuned_unet,
)
from story.unet import SelfAttention, UNet, sinusoid
from story.unet import from_official as unet_from_official

SIZES = dict(channels=4, widths=(16, 32), attention=(True, True), resnets=1, heads=2, context=12, groups=4)
FRAMES, LENGTH = 4, 5


def inputs(batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, FRAMES, 4, 4, 4, generator=g)
    words = torch.randn(batch, FRAMES, LENGTH, 12, generator=g)
    keep = torch.arange(LENGTH).expand(batch, FRAMES, -1) < torch.randint(2, LENGTH + 1, (batch, FRAMES, 1), generator=g)
    return z0, words, keep


def stirred(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.2
    return model


def model(**switches):
    independent = switches.pop("independent", False)
    extractor = ContextExtractor(12, FRAMES, (4, 4, 4), depth=1, heads=2)
    return StoryImager(tuned_unet(rank=2, alpha=2, **SIZES, **switches), extractor, independent=independent).eval()


# -- board and masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols, order", list(itertools.product((1, 2), (2, 3), ("row", "column"))))
def test_cutting_undoes_tiling(rows, cols, order):
    board, cells = Board(rows, cols, order), torch.randn(2, rows * cols, 3, 4, 5)
    assert torch.equal(board.cut(board.tile(cells)), cells)


def test_the_second_frame_lies_below_the_first():
    cells = torch.arange(4.0).view(1, 4, 1, 1, 1)
    assert Board().tile(cells)[0, 0].tolist() == [[0, 2], [1, 3]]
    assert Board(order="row").tile(cells)[0, 0].tolist() == [[0, 1], [2, 3]]


def test_all_fifteen_masks_are_reachable_in_their_groups():
    tasks = masks_of(4)
    assert {task: len(masks) for task, masks in tasks.items()} == {"visualise": 1, "continue": 3, "complete": 11}
    drawn = draw_masks(3000, 4, generator=torch.Generator().manual_seed(0))
    assert len({tuple(m) for m in drawn.tolist()}) == 15 and drawn.sum(1).min() >= 1
    assert abs((drawn.sum(1) == 4).float().mean() - 1 / 3) < 0.04
    assert (draw_masks(20, 4, ("continue",))[:, -1] == 1).all() and masks_of(1).keys() == {"visualise"}
    with pytest.raises(ValueError, match="no mask of 1 frames"):
        draw_masks(2, 1, ("complete",))


def test_given_cells_stay_clean_and_count_for_nothing():
    story, (z0, words, keep) = stirred(model()), inputs()
    mask, seen = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]]), {}
    story.unet.register_forward_pre_hook(lambda _, x: seen.update(board=x[0].clone()))
    story.extractor.to_prior[2].weight.data.zero_(), story.extractor.to_prior[2].bias.data.zero_()
    out = torch.zeros_like(z0, requires_grad=True)
    story.denoise, plain = (lambda *a: (plain(*a), out)[1]), story.denoise
    story.loss(z0, words, keep, mask, torch.tensor([10, 900]), torch.randn_like(z0)).backward()
    given = mask == 0
    assert torch.equal(story.board.cut(seen["board"])[given], z0[given])
    assert (out.grad[given] == 0).all() and (out.grad[~given] != 0).any()


# -- frame-story attention ----------------------------------------------------------------------------------------------------


def test_with_a_closed_gate_on_one_cell_it_is_stable_diffusions_unet():
    torch.manual_seed(0)
    base, tuned = UNet(**SIZES).eval(), tuned_unet(rank=2, alpha=2, **SIZES).eval()
    load_base(tuned, base.state_dict())
    z, t, words = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, LENGTH, 12)
    story = Story(words[:, None], torch.randn(2, 3, 12), (1, 1))
    torch.testing.assert_close(tuned(z, t, story), base(z, t, words), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="diffusers layout does not fit: 1 missing: conv_in.bias"):
        load_base(tuned, {k: v for k, v in base.state_dict().items() if k != "conv_in.bias"})


def test_panels_of_the_base_are_the_tuned_model_before_it_has_learnt():
    """On a board of four, too: gate 0, no LoRA, no prior. One panel alone is Stable Diffusion's UNet."""
    torch.manual_seed(0)
    base = UNet(**SIZES, kinds=(SelfAttention, PanelAttention)).eval()
    story, (z0, words, keep) = model(), inputs()
    load_base(story.unet, base.state_dict())
    t = torch.tensor([3, 700])
    torch.testing.assert_close(draw_panels(base, Board(), z0, t, words),
                               story.denoise(z0, t, words, keep, torch.ones(2, FRAMES)), rtol=1e-5, atol=1e-6)
    plain = UNet(**SIZES).eval()
    plain.load_state_dict(base.state_dict())
    torch.testing.assert_close(draw_panels(base, Board(1, 1), z0[:, :1], t, words[:, :1])[:, 0], plain(z0[:, 0], t, words[:, 0]))


def cross(mode="both", out="shared", gate=0.7):
    unet = stirred(tuned_unet(rank=2, alpha=2, mode=mode, out=out, **SIZES))
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.gate.data.fill_(gate)
    return attention.double()


def slow_attention(attention, x, story, size, mode="both", out="shared"):
    """Cut into cells, two softmaxes head by head, paste, add."""
    (rows, cols), heads = story.cells, attention.heads
    project = lambda linear, lora, y: y @ linear.weight.T + lora.scale * (y @ lora.down.weight.T) @ lora.up.weight.T  # noqa: E731
    height, width = size[0] // rows, size[1] // cols

    def attend(q, k, v):
        parts = [(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c
                 for a, b, c in zip(*(y.chunk(heads, -1) for y in (q, k, v)), strict=True)]
        return torch.cat(parts, -1)

    f, s = attention.frame, attention.story
    q, qs = project(attention.to_q, f["q"], x), project(attention.to_q, s["q"], x)
    ks, vs = project(attention.to_k, s["k"], story.context), project(attention.to_v, s["v"], story.context)
    board_q, frame = q.view(len(x), *size, -1), torch.zeros_like(q).view(len(x), *size, -1)
    for cell in range(rows * cols):
        r, c = divmod(cell, cols)
        place = (slice(None), slice(r * height, (r + 1) * height), slice(c * width, (c + 1) * width))
        k, v = project(attention.to_k, f["k"], story.words[:, cell]), project(attention.to_v, f["v"], story.words[:, cell])
        if mode == "joint":
            k, v = torch.cat([k, ks], 1), torch.cat([v, vs], 1)
        frame[place] = attend(board_q[place].flatten(1, 2), k, v).view(len(x), height, width, -1)
    a, b = frame.flatten(1, 2), attention.gate * attend(qs, ks, vs)
    a, b = (a, b) if mode == "both" else (a * 0, b) if mode == "story" else (a, b * 0)
    y = (a + b) @ attention.to_out[0].weight.T + attention.to_out[0].bias
    low = lambda lora, z: lora.scale * (z @ lora.down.weight.T) @ lora.up.weight.T  # noqa: E731
    return y + (low(f["o"], a) + low(s["o"], b) if out == "separate" else low(f["o"], a + b))


@pytest.mark.parametrize("mode, out", [("both", "shared"), ("both", "separate"), ("frame", "shared"), ("story", "shared"),
                                       ("joint", "shared")])
def test_frame_story_attention_equals_cutting_and_pasting(mode, out):
    torch.manual_seed(0)
    attention = cross(mode, out, gate=1.0 if mode == "story" else 0.7)
    x, story = torch.randn(2, 24, 32).double(), Story(torch.randn(2, 4, LENGTH, 12).double(),
                                                      torch.randn(2, 3, 12).double(), (2, 2))
    torch.testing.assert_close(attention(x, story, (4, 6)), slow_attention(attention, x, story, (4, 6), mode, out))


def test_a_caption_reaches_only_its_own_cell_through_the_frame_branch():
    torch.manual_seed(0)
    attention, x, words = cross(gate=0.0), torch.randn(1, 16, 32).double(), torch.randn(1, 4, LENGTH, 12).double()
    before = attention(x, Story(words, torch.randn(1, 3, 12).double(), (2, 2)), (4, 4)).view(4, 4, -1)
    words[:, 3] += 1
    after = attention(x, Story(words, torch.randn(1, 3, 12).double(), (2, 2)), (4, 4)).view(4, 4, -1)
    changed = (before != after).any(-1)
    assert changed[2:, 2:].all() and changed.sum() == 4


# -- context ---------------------------------------------------------------------------------------------------------------------


def test_context_follows_the_wiring_of_the_figure():
    extractor, (_, words, keep) = ContextExtractor(12, FRAMES, (4, 4, 4), heads=2).eval(), inputs()
    mask = torch.ones(2, FRAMES)
    prior, context = extractor(words, keep, mask)
    assert (prior == 0).all() and prior.shape == (2, FRAMES, 4, 4, 4) and context.shape == (2, 2 * FRAMES, 12)
    torch.nn.init.normal_(extractor.to_prior[2].weight)
    prior, context = extractor(words, keep, mask)
    dirty = torch.where(keep[..., None], words, 99.0)
    torch.testing.assert_close(extractor(dirty, keep, mask)[0], prior)
    changed = words.clone()
    changed[:, 2, 0] += 1
    other, elsewhere = extractor(changed, keep, mask)
    same = (other == prior).flatten(2).all(2).all(0)
    assert same.tolist() == [True, True, False, True] and not torch.allclose(elsewhere, context)
    given = extractor(words, keep, torch.tensor([[1.0, 0, 1, 1]] * 2))[0]
    assert (given == prior).flatten(2).all(2).all(0).tolist() == [True, False, True, True]


def test_independent_frames_never_see_each_other():
    story, (z0, words, keep) = stirred(model(mode="frame", independent=True)), inputs()
    mask, t = torch.ones(2, FRAMES), torch.tensor([500, 500])
    before, moved = story.denoise(z0, t, words, keep, mask), z0.clone()
    moved[:, 1] += 1
    changed = (story.denoise(moved, t, words, keep, mask) - before).abs().amax((2, 3, 4)) > 1e-5
    assert changed.all(0).tolist() == [False, True, False, False]
    board = stirred(model(mode="frame"))
    spread = (board.denoise(moved, t, words, keep, mask) - board.denoise(z0, t, words, keep, mask)).abs().amax((2, 3, 4)) > 1e-5
    assert spread.all()


# -- diffusion -------------------------------------------------------------------------------------------------------------------


def test_the_schedule_has_stable_diffusions_values():
    a = alpha_bars()
    for step, value in ((0, 0.99915), (249, 0.675432), (499, 0.277670), (749, 0.0566235), (999, 0.00466010)):
        assert float(a[step]) == pytest.approx(value, rel=2e-6)
    assert sampling_times(50)[0] == 981 and sampling_times(50)[-1] == 1 and len(sampling_times(1000)) == 1000
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        sampling_times(0)


def test_ddim_recovers_the_picture_from_the_true_noise():
    torch.manual_seed(0)
    z0, noise, a = torch.randn(2, 3).double(), torch.randn(2, 3).double(), alpha_bars()
    z = a[999].sqrt() * z0 + (1 - a[999]).sqrt() * noise
    for t in range(999, 0, -1):
        z = ddim_step((z - (1 - a[t]).sqrt() * noise) / a[t].sqrt(), noise, a[t], a[t - 1])
    torch.testing.assert_close(z, a[0].sqrt() * z0 + (1 - a[0]).sqrt() * noise, rtol=1e-8, atol=1e-8)
    z = a[500].sqrt() * z0 + (1 - a[500]).sqrt() * noise
    for predict in ("noise", "v", "picture"):
        for found, true in zip(estimates(targets(z0, noise, a[500], predict), z, a[500], predict), (z0, noise), strict=True):
            torch.testing.assert_close(found, true)


def test_given_frames_come_back_untouched():
    story, (z0, words, keep) = stirred(model()), inputs()
    mask = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])
    draw = lambda seed: story.sample(z0, words, keep, mask, (words * 0, keep), 4, 3.0,  # noqa: E731
                                     generator=torch.Generator().manual_seed(seed))
    out = draw(0)
    assert torch.equal(out[mask == 0], z0[mask == 0]) and torch.equal(out, draw(0))
    assert not torch.equal(out[0, 1], draw(1)[0, 1]) and out.isfinite().all()


# -- tuning and Stable Diffusion's layout ----------------------------------------------------------------------------------------


def test_lora_starts_at_zero_and_merges():
    torch.manual_seed(0)
    linear, lora, x = torch.nn.Linear(8, 6), LoRA(8, 6, 2, 4), torch.randn(3, 8)
    assert (lora(x) == 0).all()
    torch.nn.init.normal_(lora.up.weight)
    merged = linear.weight + lora.scale * lora.up.weight @ lora.down.weight
    torch.testing.assert_close(linear(x) + lora(x), F.linear(x, merged, linear.bias))


def test_only_the_tuned_part_learns():
    story, (z0, words, keep) = model(), inputs()
    freeze_base(story.unet)
    story.loss(z0, words, keep, torch.ones(2, FRAMES), torch.tensor([10, 900]), torch.randn_like(z0)).backward()
    for name, p in story.unet.named_parameters():
        tuned = any(part in name for part in (".lora.", ".frame.", ".story.")) or name.endswith(".gate")
        assert p.requires_grad == tuned and (tuned or p.grad is None), name


def test_full_size_has_stable_diffusions_tensors():
    with torch.device("meta"):
        unet, vae = UNet(), VAE()
        tuned = tuned_unet(rank=3, alpha=3, out="separate", lora_self=False)
    count = lambda m: (len(m.state_dict()), sum(p.numel() for p in m.parameters()))  # noqa: E731
    assert count(unet) == (686, 859_520_964) and count(vae) == (248, 83_653_863)
    lora = sum(p.numel() for name, p in tuned.named_parameters() if ".frame." in name or ".story." in name)
    assert lora == 198_912 * 3
    shapes = {k: tuple(v.shape) for k, v in unet.state_dict().items()}
    assert shapes["up_blocks.1.resnets.2.conv1.weight"] == (1280, 1920, 3, 3)
    assert shapes["down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert shapes["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"] == (10240, 1280)
    assert vae.state_dict()["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"].shape == (256, 512, 1, 1)


def test_time_is_cosines_then_sines():
    row = sinusoid(torch.tensor([7]), 8)[0]
    assert row[0] == pytest.approx(torch.tensor(7.0).cos().item()) and row[4] == pytest.approx(torch.tensor(7.0).sin().item())
    assert row[5] == pytest.approx(torch.tensor(7.0 * 10_000**-0.25).sin().item(), abs=1e-5)


def test_the_autoencoder_reads_older_names_and_names_what_is_wrong():
    torch.manual_seed(0)
    vae = VAE((8, 16), latent=2, resnets=1, groups=4).eval()
    old = {}
    for name, value in vae.state_dict().items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new}." in name:
                name, value = name.replace(new, before), value[:, :, None, None] if value.dim() == 2 else value
        old[name] = value
    image = torch.randn(1, 3, 8, 8)
    again = vae_from_official(old, groups=4).eval()
    assert torch.equal(vae.decode(vae.encode(image)), again.decode(again.encode(image)))
    with pytest.raises(ValueError, match="quant_conv.bias"):
        vae_from_official({k: v for k, v in vae.state_dict().items() if k != "quant_conv.bias"}, groups=4)


def test_all_components_lose_nothing_and_the_first_ones_the_least():
    g = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(64, 3, 4, 4, generator=g), (16, 16), mode="bilinear")
    whole = Components(images, 4, 48)
    torch.testing.assert_close(whole.decode(whole.encode(images)), images, rtol=1e-3, atol=1e-3)
    errors = []
    for channels in (4, 8, 16):
        part = Components(images, 4, channels)
        z = part.encode(images)
        assert z.shape == (64, channels, 4, 4)
        torch.testing.assert_close(z.transpose(0, 1).flatten(1).cov(), torch.eye(channels), rtol=1e-2, atol=1e-2)
        errors.append(float((part.decode(z) - images).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="has 48 numbers, so no 49 components"):
        Components(images, 4, 49)


# -- Stable Diffusion's numbers, against a reference written from the layout alone -----------------------------------------------


def random_state(model, seed):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g) * (0.3 if v.dim() > 1 else 0.2) + (("norm" in k) and k.endswith("weight"))
            for k, v in model.state_dict().items()}


class Slow:
    """Layers by name from a state dict, in straight lines."""

    def __init__(self, state, heads, groups, eps):
        self.s, self.heads, self.groups, self.eps = state, heads, groups, eps

    def linear(self, name, x):
        return x @ self.s[f"{name}.weight"].T + self.s.get(f"{name}.bias", 0)

    def conv(self, name, x, **how):
        w = self.s[f"{name}.weight"]
        return F.conv2d(x, w, self.s[f"{name}.bias"], **{"padding": w.shape[-1] // 2} | how)

    def group(self, name, x, eps):
        y = x.view(len(x), self.groups, -1)
        y = ((y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + eps).sqrt()).view_as(x)
        return y * self.s[f"{name}.weight"][:, None, None] + self.s[f"{name}.bias"][:, None, None]

    def layer(self, name, x):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def attention(self, name, x, context, heads):
        out = []
        q, k, v = self.linear(f"{name}.to_q", x), self.linear(f"{name}.to_k", context), self.linear(f"{name}.to_v", context)
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            out.append(torch.softmax(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5, -1) @ c)
        return self.linear(f"{name}.to_out.0", torch.cat(out, -1))

    def resnet(self, name, x, time=None):
        silu = lambda y: y * torch.sigmoid(y)  # noqa: E731
        h = self.conv(f"{name}.conv1", silu(self.group(f"{name}.norm1", x, self.eps)))
        if time is not None:
            h = h + self.linear(f"{name}.time_emb_proj", silu(time))[:, :, None, None]
        h = self.conv(f"{name}.conv2", silu(self.group(f"{name}.norm2", h, self.eps)))
        return h + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.s else x)

    def transformer(self, name, x, words):
        b, c, height, width = x.shape
        h = self.conv(f"{name}.proj_in", self.group(f"{name}.norm", x, 1e-6)).reshape(b, c, -1).transpose(1, 2)
        block = f"{name}.transformer_blocks.0"
        y = self.layer(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", y, y, self.heads)
        h = h + self.attention(f"{block}.attn2", self.layer(f"{block}.norm2", h), words, self.heads)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer(f"{block}.norm3", h)).chunk(2, -1)
        h = h + self.linear(f"{block}.ff.net.2", value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)))
        return x + self.conv(f"{name}.proj_out", h.transpose(1, 2).reshape(b, c, height, width))

    def unet(self, z, t, words, levels=2, resnets=2):
        silu, width = (lambda y: y * torch.sigmoid(y)), len(self.s["conv_in.bias"])
        f = torch.tensor([10_000 ** (-k / (width // 2)) for k in range(width // 2)], dtype=z.dtype)
        time = torch.cat([torch.cos(t[:, None] * f), torch.sin(t[:, None] * f)], 1)
        time = self.linear("time_embedding.linear_2", silu(self.linear("time_embedding.linear_1", time)))
        x = self.conv("conv_in", z)
        stack = [x]

        def step(name, i, x):
            x = self.resnet(f"{name}.resnets.{i}", x, time)
            return self.transformer(f"{name}.attentions.{i}", x, words) if f"{name}.attentions.{i}.norm.weight" in self.s else x

        for level in range(levels):
            for i in range(resnets):
                x = step(f"down_blocks.{level}", i, x)
                stack.append(x)
            if level < levels - 1:
                x = self.conv(f"down_blocks.{level}.downsamplers.0.conv", x, stride=2)
                stack.append(x)
        x = self.resnet("mid_block.resnets.0", x, time)
        x = self.resnet("mid_block.resnets.1", self.transformer("mid_block.attentions.0", x, words), time)
        for level in range(levels):
            for i in range(resnets + 1):
                x = step(f"up_blocks.{level}", i, torch.cat([x, stack.pop()], 1))
            if level < levels - 1:
                x = self.conv(f"up_blocks.{level}.upsamplers.0.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv("conv_out", silu(self.group("conv_norm_out", x, 1e-5)))

    def vae_middle(self, name, x):
        x = self.resnet(f"{name}.resnets.0", x)
        b, c, height, width = x.shape
        h = self.group(f"{name}.attentions.0.group_norm", x, self.eps).reshape(b, c, -1).transpose(1, 2)
        x = x + self.attention(f"{name}.attentions.0", h, h, 1).transpose(1, 2).reshape(b, c, height, width)
        return self.resnet(f"{name}.resnets.1", x)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x)
        for name in ("encoder.down_blocks.0", "encoder.down_blocks.1"):
            for i in range(2):
                x = self.resnet(f"{name}.resnets.{i}", x)
            if f"{name}.downsamplers.0.conv.weight" in self.s:
                x = self.conv(f"{name}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.group("encoder.conv_norm_out", self.vae_middle("encoder.mid_block", x), self.eps)
        x = self.conv("quant_conv", self.conv("encoder.conv_out", x * torch.sigmoid(x)))
        return 0.18215 * x[:, : x.shape[1] // 2]

    def decode(self, z):
        x = self.vae_middle("decoder.mid_block", self.conv("decoder.conv_in", self.conv("post_quant_conv", z / 0.18215)))
        for name in ("decoder.up_blocks.0", "decoder.up_blocks.1"):
            for i in range(3):
                x = self.resnet(f"{name}.resnets.{i}", x)
            if f"{name}.upsamplers.0.conv.weight" in self.s:
                x = self.conv(f"{name}.upsamplers.0.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        x = self.group("decoder.conv_norm_out", x, self.eps)
        return self.conv("decoder.conv_out", x * torch.sigmoid(x))


@pytest.mark.parametrize("attention", [(True, False), (True, True)])
def test_the_unet_computes_what_stable_diffusions_layout_says(attention):
    """Two levels, two resnets each, random official names: an independent straight-line forward agrees to 1e-5."""
    state = random_state(UNet(4, (8, 16), attention, 2, 2, 12, 4), 0)
    model = unet_from_official(state, heads=2, groups=4).eval().double()
    double = {k: v.double() for k, v in state.items()}
    z, t, words = torch.randn(2, 4, 8, 12).double(), torch.tensor([3, 801]), torch.randn(2, LENGTH, 12).double()
    with torch.no_grad():
        ours, slow = model(z, t, words), Slow(double, 2, 4, 1e-5).unet(z, t, words)
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))
    with pytest.raises(ValueError, match="diffusers layout does not fit: 1 missing: conv_out.bias"):
        unet_from_official({k: v for k, v in state.items() if k != "conv_out.bias"}, heads=2, groups=4)
    with pytest.raises(ValueError, match="not a diffusers UNet"):
        unet_from_official({f"model.diffusion_model.{k}": v for k, v in state.items()})


def test_the_autoencoder_computes_what_its_layout_says():
    state = random_state(VAE((8, 16), latent=2, resnets=2, groups=4), 1)
    model, double = vae_from_official(state, groups=4).eval().double(), {k: v.double() for k, v in state.items()}
    slow, image = Slow(double, 1, 4, 1e-6), torch.randn(2, 3, 8, 12).double()
    with torch.no_grad():
        torch.testing.assert_close(model.encode(image), slow.encode(image), rtol=1e-5, atol=1e-5)
        z = torch.randn(2, 2, 4, 6).double()
        torch.testing.assert_close(model.decode(z), slow.decode(z), rtol=1e-5, atol=1e-5)
