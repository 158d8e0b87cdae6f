"""The denoiser: Stable Diffusion 1.5's UNet, every size an argument, its modules under the names of the diffusers layout.

    z_t, t, context -> noise (or v) of the same shape as z_t
    down: resnet, attention, resnet, attention, halve   ...   middle   ...   up: the mirror image, skips concatenated

The small one of the built-in data and the published one are the same code. `Context` is whatever the cross-attention
reads: the plain `CrossAttention` here reads one sequence of words, StoryImager's replaces it (storyimager.py).
Shape letters: B batch, C channels, H W latent pixels, L words, D context width.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from data.weights import load_checked


def sinusoid(t, width):
    """Timestep embedding: cosines first, then sines, f_k = 10000^(-k / (width/2)).   t (B,) -> (B, width) float32"""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoid, Linear, SiLU, Linear.   t (B,) -> (B, 4 width)"""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, t):
        return self.linear_2(F.silu(self.linear_1(sinusoid(t, self.width).to(self.linear_1.weight.dtype))))


class Resnet(nn.Module):
    """GroupNorm, SiLU, conv, + time, GroupNorm, SiLU, conv, + input."""

    def __init__(self, channels_in, channels_out, time, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels_in, eps=1e-5), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, channels_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels_out, eps=1e-5), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """The four projections of multi-head attention; `to_out.0` alone has a bias."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split(self, x):
        """(..., width) -> (..., heads, head width), a view."""
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, q, k, v):
        """Heads stay the last axis but one, as the projections leave them.   (B, Q, H, d), (B, K, H, d) -> (B, Q, H, d)"""
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class SelfAttention(Attention):
    """Every position of the whole board looks at every other: here frames see each other."""

    def forward(self, x):
        q, k, v = (self.split(linear(x)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](self.attend(q, k, v).flatten(2))


class CrossAttention(Attention):
    """Pixels look at the words of one caption.   x (B, H W, C), context (B, L, D)

    Stable Diffusion never masks padding words, nor do we.
    """

    def forward(self, x, context, size):
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context))
        return self.to_out[0](self.attend(q, k, v).flatten(2))


class GEGLU(nn.Module):
    """value * GELU(gate), both from one product."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after its LayerNorm and around a residual."""

    def __init__(self, width, context, heads, kinds):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), kinds[0](width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), kinds[1](width, context, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x, context, size):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, size)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Attention over the pixels of a feature map.   (B, C, H, W) -> the same"""

    def __init__(self, width, context, heads, groups, kinds):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads, kinds)])

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT                                       # (B, H W, C)
        for block in self.transformer_blocks:
            h = block(h, context, x.shape[2:])
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """conv 3x3 with stride 2, or nearest x 2 and then conv 3x3."""

    def __init__(self, channels, down):
        super().__init__()
        self.conv, self.down = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=1), down

    def forward(self, x, size=None):
        return self.conv(x if self.down else F.interpolate(x, size=size))


class Block(nn.Module):
    """One level: resnets, each followed by attention where the level has it, then resampling where it has it."""

    def __init__(self, pairs, time, context, heads, groups, attention, kinds, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(a, b, time, groups) for a, b in pairs)
        if attention:
            self.attentions = nn.ModuleList(Transformer(b, context, heads, groups, kinds) for _, b in pairs)
        if down:
            self.downsamplers = nn.ModuleList([Resample(pairs[-1][1], down=True)])
        if up:
            self.upsamplers = nn.ModuleList([Resample(pairs[-1][1], down=False)])

    def step(self, i, x, time, context):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """resnet, attention, resnet at the coarsest level."""

    def __init__(self, width, time, context, heads, groups, kinds):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width, width, time, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(width, context, heads, groups, kinds)])

    def forward(self, x, time, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UNet(nn.Module):
    """Stable Diffusion's denoiser.   z (B, c, H, W), t (B,), context -> (B, c, H, W)

    widths     channels of each level; attention says which levels have it (SD: all but the coarsest)
    heads      number of heads at every width: SD 1.5's config calls it `attention_head_dim: 8`
    kinds      classes of self- and cross-attention; StoryImager passes its tuned and frame-story forms
    """

    def __init__(self, channels=4, widths=(320, 640, 1280, 1280), attention=(True, True, True, False), resnets=2, heads=8,
                 context=768, groups=32, kinds=(SelfAttention, CrossAttention)):
        super().__init__()
        if any(w % groups or w % heads for w in widths) or len(attention) != len(widths):
            raise ValueError(f"widths {widths} must be multiples of groups={groups} and heads={heads}, one attention flag each")
        time, common = 4 * widths[0], {"context": context, "heads": heads, "groups": groups, "kinds": kinds}
        self.conv_in, self.time_embedding = nn.Conv2d(channels, widths[0], 3, padding=1), TimeEmbedding(widths[0])
        self.down_blocks, self.up_blocks, skips, x = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            pairs = [(x if i == 0 else width, width) for i in range(resnets)]
            self.down_blocks.append(Block(pairs, time, **common, attention=attention[level], down=not last))
            skips += [width] * (resnets + (not last))
            x = width
        self.mid_block = Middle(x, time, **common)
        for level, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(resnets + 1):
                pairs.append((x + skips.pop(), width))
                x = width
            self.up_blocks.append(Block(pairs, time, **common, attention=attention[level], up=level > 0))
        self.conv_norm_out = nn.GroupNorm(groups, x, eps=1e-5)
        self.conv_out = nn.Conv2d(x, channels, 3, padding=1)

    def forward(self, z, t, context):
        time, x = self.time_embedding(t), self.conv_in(z)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.step(i, x, time, context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.step(i, torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, size=skips[-1].shape[2:])       # odd sides come back exactly
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def from_official(state_dict, heads=8, groups=32):
    """UNet with the weights of a diffusers state dict; its sizes are read from the names and shapes.

    heads, groups   what no tensor tells; Stable Diffusion 1.5's by default
    raises          ValueError listing what is missing, unknown or misshapen. The single-file layout (model.diffusion_model...)
                    is not read: save it in the diffusers layout first
    """
    def count(prefix):
        return len({name[len(prefix):].split(".")[0] for name in state_dict if name.startswith(prefix)})

    levels = count("down_blocks.")
    try:
        widths = tuple(len(state_dict[f"down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(levels))
        attention = tuple(count(f"down_blocks.{i}.attentions.") > 0 for i in range(levels))
        context = state_dict["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        channels = state_dict["conv_in.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"not a diffusers UNet: {error.args[0]} is missing") from None
    model = UNet(channels, widths, attention, count("down_blocks.0.resnets."), heads, context, groups)
    return load_checked(model, state_dict, "the UNet in the diffusers layout")
