"""Pictures <-> latents: Stable Diffusion's autoencoder in the diffusers layout, and a linear stand-in for small pictures.

    encode   (B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8), unit variance          decode   the way back
    `Components` has the same two calls and is fitted in a second: principal components of blocks of pixels.
"""
import torch
from torch import nn
from torch.nn import functional as F

from data.weights import load_checked

LATENT_SCALE = 0.18215     # 1 / standard deviation of the autoencoder's latents: unit variance in
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def norm(width, groups):
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv(width_in, width_out):
    return nn.Conv2d(width_in, width_out, 3, padding=1)


class Resnet(nn.Module):
    """GroupNorm, SiLU, conv, twice, + input."""

    def __init__(self, width_in, width_out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in, groups), conv(width_in, width_out)
        self.norm2, self.conv2 = norm(width_out, groups), conv(width_out, width_out)
        if width_in != width_out:
            self.conv_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """One head over all pixels of the coarsest level; every projection has a bias."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = norm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT                                                # (B, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).mT.unflatten(2, x.shape[2:])


class Middle(nn.Module):
    """Resnet, attention, resnet, at the coarsest level."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    """conv 3x3, stride 2, padded on the right and at the bottom only."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Nearest x 2, then conv 3x3."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Level(nn.Module):
    """Resnets of one level, then resampling unless it is the last."""

    def __init__(self, width_in, width, resnets, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width_in if i == 0 else width, width, groups) for i in range(resnets))
        if down:
            self.downsamplers = nn.ModuleList([Down(width)])
        if up:
            self.upsamplers = nn.ModuleList([Up(width)])

    def forward(self, x):
        for part in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = part(x)
        return x


class Encoder(nn.Module):
    """Pictures to mean and log-variance of their latents.   (B, 3, H, W) -> (B, 2 c, h, w)"""

    def __init__(self, widths, latent, resnets, groups):
        super().__init__()
        self.conv_in = conv(3, widths[0])
        self.down_blocks = nn.ModuleList(Level(widths[max(i - 1, 0)], w, resnets, groups, down=i < len(widths) - 1)
                                         for i, w in enumerate(widths))
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out, self.conv_out = norm(widths[-1], groups), conv(widths[-1], 2 * latent)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pictures; one more resnet a level than the encoder.   (B, c, h, w) -> (B, 3, H, W)"""

    def __init__(self, widths, latent, resnets, groups):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = conv(latent, widths[0])
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(Level(widths[max(i - 1, 0)], w, resnets + 1, groups, up=i < len(widths) - 1)
                                       for i, w in enumerate(widths))
        self.conv_norm_out, self.conv_out = norm(widths[-1], groups), conv(widths[-1], 3)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Stable Diffusion's autoencoder; sizes as arguments so that a test can build a narrow one."""

    def __init__(self, widths=(128, 256, 512, 512), latent=4, resnets=2, groups=32):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, latent, resnets, groups), Decoder(widths, latent, resnets, groups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def encode(self, image, sample=False):
        """Mean of the posterior, or with sample=True a draw from it.   (B, 3, H, W) in [-1, 1] -> (B, c, H/8, W/8)"""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        if sample:
            mean = mean + torch.randn_like(mean) * (log_variance.clamp(-30, 20) / 2).exp()
        return LATENT_SCALE * mean

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z / LATENT_SCALE))


class Components(nn.Module):
    """The best linear autoencoder: blocks of pixels as their first principal components, each of unit variance.

    pictures (N, 3, H, W) to fit it to: it stands in where no published autoencoder is at hand.   raises ValueError
    Unit variance is what diffusion wants, and it makes detail as loud as background: most blocks hold no object, so
    all components but the first few are about objects.
    """

    def __init__(self, pictures, block=8, channels=32):
        super().__init__()
        if channels > 3 * block**2:
            raise ValueError(f"a block of {block} x {block} pixels has {3 * block**2} numbers, so no {channels} components")
        self.block = block
        x = F.pixel_unshuffle(pictures, block).transpose(0, 1).flatten(1).double()           # (3 block^2, blocks)
        variance, basis = torch.linalg.eigh(torch.cov(x))                                  # smallest first
        self.register_buffer("mean", x.mean(1).float())
        self.register_buffer("basis", basis.flip(1)[:, :channels].float())
        self.register_buffer("scale", variance.flip(0)[:channels].clamp(min=1e-6).sqrt().float())

    def encode(self, image, sample=False):
        x = F.pixel_unshuffle(image, self.block).movedim(1, -1) - self.mean
        return (x @ self.basis / self.scale).movedim(-1, 1)

    def decode(self, z):
        x = (z.movedim(1, -1) * self.scale) @ self.basis.T + self.mean
        return F.pixel_shuffle(x.movedim(-1, 1), self.block)


def from_official(state_dict, groups=32):
    """VAE with the weights of a diffusers state dict; sizes are read from it, older attention names are accepted.

    raises ValueError listing what does not fit
    """
    state = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in OLD_NAMES:
            name = ".".join([*parts[:-2], OLD_NAMES[parts[-2]], parts[-1]])
        in_attention = "attentions" in parts and value.dim() == 4        # 1x1 convolutions of the older layout
        state[name] = value[:, :, 0, 0] if in_attention else value
    levels = len({k.split(".")[2] for k in state if k.startswith("encoder.down_blocks.")})
    try:
        widths = tuple(len(state[f"encoder.down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(levels))
        resnets = len({k.split(".")[4] for k in state if k.startswith("encoder.down_blocks.0.resnets.")})
        model = VAE(widths, len(state["post_quant_conv.bias"]), resnets, groups)
    except (KeyError, TypeError):
        raise ValueError("not a diffusers autoencoder: encoder.down_blocks or post_quant_conv is missing") from None
    return load_checked(model, state, "the diffusers autoencoder")
