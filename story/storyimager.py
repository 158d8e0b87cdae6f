"""StoryImager: one storyboard diffusion model that visualises, continues and completes (Tao et al., ECCV 2024).

    captions --frozen text encoder--> words W --Context-FE (sees the mask)--> latent prior P, global context G
    frames on one board: z_t = m * noised(z0) + (1 - m) * z0,   m = 1: to be drawn, 0: given
    UNet(z_t + P) with frame-story cross-attention: each cell reads its own caption, the board reads G
    a step of the sampler moves the cells to be drawn, given cells stay as they are

No official code or weights exist; this is built from the paper's abstract and figures. Choices the figures leave open are
marked UNVERIFIED and are options. Shape letters: B stories, F frames, L words, K story tokens, D text width, c h w latent cell.
"""
import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data.weights import check_names
from kernels.attention import frame_story_attention
from story.unet import CrossAttention, SelfAttention, UNet

# -- the board (Fig. 2) ---------------------------------------------------------------------------------------------------


class Board(NamedTuple):
    """Cells of a storyboard. Paper: frames run down the first column, then the second (Fig. 2): order="column"."""

    rows: int = 2
    cols: int = 2
    order: str = "column"

    def frames(self):
        """Frame index of every cell, row by row."""
        index = torch.arange(self.rows * self.cols)
        return index.view(self.cols, self.rows).T.flatten() if self.order == "column" else index

    def tile(self, cells):
        """Put frames on the board.   (B, F, c, h, w) -> (B, c, rows h, cols w)"""
        grid = cells[:, self.frames()].unflatten(1, (self.rows, self.cols))               # (B, R, C, c, h, w)
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def cut(self, board):
        """The way back.   (B, c, rows h, cols w) -> (B, F, c, h, w)"""
        grid = board.unflatten(3, (self.cols, -1)).unflatten(2, (self.rows, -1))           # (B, c, R, h, C, w)
        cells = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return cells[:, self.frames().argsort()]


# -- target frame masking (Fig. 2) ----------------------------------------------------------------------------------------


def masks_of(frames):
    """Every mask by task, 1 = to be drawn: {"visualise": (1, F), "continue": (F - 1, F), "complete": the rest}."""
    every = [[(n >> i) & 1 for i in range(frames)] for n in range(1, 2**frames)]
    tasks = {"visualise": [], "continue": [], "complete": []}
    for mask in every:
        given = mask.index(1)
        kind = "visualise" if all(mask) else "continue" if given and all(mask[given:]) else "complete"
        tasks[kind].append(mask)
    return {task: torch.tensor(masks, dtype=torch.float32) for task, masks in tasks.items() if masks}


def draw_masks(count, frames, tasks=("visualise", "continue", "complete"), generator=None):
    """One mask a story: the task uniformly, then a mask of it uniformly (UNVERIFIED).   -> (count, F)"""
    groups = [group for task, group in masks_of(frames).items() if task in tasks]
    if not groups:
        raise ValueError(f"no mask of {frames} frames belongs to the tasks {tasks}")
    task = torch.randint(len(groups), (count,), generator=generator)
    which = torch.rand(count, generator=generator)
    return torch.stack([groups[k][int(u * len(groups[k]))] for k, u in zip(task.tolist(), which.tolist(), strict=True)])


# -- parameter-efficient tuning (Fig. 3) ------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Low-rank update of a frozen Linear: x -> (alpha / r) B A x, zero at first.   Rank and alpha: UNVERIFIED"""

    def __init__(self, width_in, width_out, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        self.down, self.up = nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.scale * self.up(self.down(x))


def lora_set(width, context, rank, alpha, parts):
    """{"q": LoRA, ...} for the projections named in `parts`, e.g. "qkvo"."""
    return nn.ModuleDict({p: LoRA(context if p in "kv" else width, width, rank, alpha) for p in parts})


class TunedSelfAttention(SelfAttention):
    """The board's self-attention with one LoRA set: here frames talk to each other and learn the panel layout."""

    def __init__(self, width, context, heads, rank, alpha):
        super().__init__(width, context, heads)
        self.lora = lora_set(width, width, rank, alpha, "qkvo")

    def forward(self, x):
        q, k, v = (self.split(linear(x) + self.lora[p](x))
                   for p, linear in zip("qkv", (self.to_q, self.to_k, self.to_v), strict=True))
        y = self.attend(q, k, v).flatten(2)
        return self.to_out[0](y) + self.lora["o"](y)


class Story(NamedTuple):
    """What frame-story cross-attention reads."""

    words: torch.Tensor       # (B, F, L, D), in the order of the board's cells, row by row
    context: torch.Tensor     # (B, K, D), global context G; PanelAttention does not read it
    cells: tuple              # rows, cols of the board


class FrameStoryAttention(CrossAttention):
    """Frame-story cross-attention (Fig. 3): A_f (own caption, cell by cell) + gate * A_s (global context, whole board).

    Two softmaxes in one pass of `frame_story_attention`; frozen projections, LoRA "frame" and LoRA "story".
    mode  "both" (the paper), "frame", "story", or "joint": one softmax over [own words; G] (ablations)
    out   "shared": one output projection after the mix, so that one kernel does it all. "separate": a LoRA of its own
          behind each branch, two attentions. UNVERIFIED which the paper means
    The gate starts at 0: at step 0 the model is the pre-trained one (ours; the figure shows a plain plus).
    """

    def __init__(self, width, context, heads, rank, alpha, mode="both", out="shared"):
        super().__init__(width, context, heads)
        self.mode, self.out = mode, out
        self.frame = lora_set(width, context, rank, alpha, "qkvo")
        self.story = lora_set(width, context, rank, alpha, "qkvo" if out == "separate" else "qkv")
        self.gate = nn.Parameter(torch.zeros(()) if mode == "both" else torch.ones(()), requires_grad=mode == "both")

    def project(self, x, context, lora):
        """Queries from pixels, keys and values from text, each with its low-rank update."""
        return (self.split(self.to_q(x) + lora["q"](x)), self.split(self.to_k(context) + lora["k"](context)),
                self.split(self.to_v(context) + lora["v"](context)))

    def forward(self, x, story, size):
        q, kf, vf = self.project(x, story.words, self.frame)                                # (B, H W, h, d), (B, F, L, h, d)
        qs, ks, vs = self.project(x, story.context, self.story)                             # (B, K, h, d)
        one, zero = torch.ones_like(self.gate), torch.zeros_like(self.gate)
        look = functools.partial(frame_story_attention, cells=story.cells, board=tuple(size))
        if self.mode == "joint":                                                            # G joins every caption
            kf, vf = (torch.cat([a, b[:, None].expand(-1, a.shape[1], -1, -1, -1)], dim=2) for a, b in ((kf, ks), (vf, vs)))
        frame = self.mode != "story"
        if self.mode == "both" and self.out == "separate":
            a = look(q, kf, vf, ks, vs, zero).flatten(2)
            s = self.gate * (look(q, kf, vf, ks, vs, one, q_story=qs).flatten(2) - look(q, kf, vf, ks, vs, zero).flatten(2))
            return self.to_out[0](a + s) + self.frame["o"](a) + self.story["o"](s)
        if not frame:                                                                       # story branch alone
            y = self.attend(qs, ks, vs).flatten(2)
        else:
            y = look(q, kf, vf, ks, vs, self.gate if self.mode == "both" else zero, q_story=qs).flatten(2)
        return self.to_out[0](y) + self.frame["o"](y)


class PanelAttention(CrossAttention):
    """Plain cross-attention, cell by cell: frame-story attention before its LoRA and its gate have learnt anything."""

    def forward(self, x, story, size):
        rows, cols = story.cells
        cells = x.unflatten(1, (rows, size[0] // rows, cols, size[1] // cols)).transpose(2, 3)         # (B, r, c, h, w, C)
        y = super().forward(cells.flatten(3, 4).flatten(0, 2), story.words.flatten(0, 1), size)
        return y.view_as(cells).transpose(2, 3).flatten(1, 4)


def draw_panels(unet, board, z, t, words):
    """Output of a UNet with PanelAttention: panels on one board, each with a caption.   z (B, F, c, h, w) -> the same"""
    return board.cut(unet(board.tile(z), t, Story(words[:, board.frames()], None, (board.rows, board.cols))))


# -- contextual feature extractor (Fig. 4) ------------------------------------------------------------------------------------


class ContextExtractor(nn.Module):
    """Context-FE: what a caption says about its frame (latent prior P) and about the story (global context G).

    words (B, F, L, D), keep (B, F, L) bool, mask (B, F) 1 = to be drawn -> P (B, F, c, h, w), G (B, F n, D)
    Sizes and depth UNVERIFIED. The mask enters by choosing one of two prior queries: a cell to draw, or a given one.
    prior  "cell": a whole latent cell; "constant": one number a channel; "none": no prior (ablation)
    """

    def __init__(self, width, frames, cell, tokens=2, depth=2, heads=8, prior="cell"):
        super().__init__()
        def encoder():
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

        self.cell, self.prior, self.tokens = tuple(cell), prior, tokens
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.prior_queries = nn.Parameter(0.02 * torch.randn(2, width))                     # given, to be drawn
        self.position = nn.Parameter(0.02 * torch.randn(frames, width))                     # pronouns need the order
        self.frame, self.story = encoder(), encoder()
        size = self.cell if prior == "cell" else (self.cell[0], 1, 1)
        self.to_prior = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, size[0] * size[1] * size[2]),
                                      nn.Unflatten(1, size))
        nn.init.zeros_(self.to_prior[2].weight)                                             # step 0 is the base model
        nn.init.zeros_(self.to_prior[2].bias)

    def forward(self, words, keep, mask):
        batch, frames = words.shape[:2]
        context = (self.queries + self.position[:frames, None]).expand(batch, -1, -1, -1)   # (B, F, n, D)
        prior = (self.prior_queries[mask.long()] + self.position[:frames])[:, :, None]      # (B, F, 1, D)
        x = torch.cat([words, context, prior], dim=2).flatten(0, 1)
        ignore = F.pad(~keep.flatten(0, 1), (0, self.tokens + 1), value=False)
        x = self.frame(x, src_key_padding_mask=ignore)[:, words.shape[2]:].unflatten(0, (batch, frames))
        p = self.to_prior(x[:, :, -1].flatten(0, 1)).expand(-1, *self.cell).unflatten(0, (batch, frames))
        return p * (self.prior != "none"), self.story(x[:, :, :-1].flatten(1, 2))


# -- diffusion ------------------------------------------------------------------------------------------------------------------


def alpha_bars(steps=1000, start=0.00085, end=0.012, zero=False):
    """Stable Diffusion's "scaled linear" schedule: beta from start to end, linear in its root.   -> (steps,) float64

    zero   stretch the roots so that the last step holds no signal (Lin et al. 2024, "Common diffusion noise schedules
           and sample steps are flawed"): on the published one the mean of a frame survives the last step, and a model
           that reads the background there cannot draw one from pure noise
    """
    root = (1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()).cumprod(0).sqrt()
    if zero:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square()


def targets(z0, noise, alpha_bar, predict):
    """What the network learns to say: the noise, v = a noise - s z0 (Salimans & Ho 2022), or the picture."""
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z0
    return {"noise": noise, "v": v, "picture": z0}[predict]


def estimates(output, z, alpha_bar, predict):
    """The network's output as an estimate of the picture and of the noise in z.   -> z0, noise"""
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if predict == "noise":
        return (z - s * output) / a, output
    return (output, (z - a * output) / s) if predict == "picture" else (a * z - s * output, s * z + a * output)


def ddim_step(z0, noise, alpha_bar, alpha_bar_next, eta=0.0, fresh=None):
    """One DDIM step towards less noise; eta = 1 with `fresh` noise is the ancestral sampler."""
    sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).clamp(min=0).sqrt()
    z = alpha_bar_next.sqrt() * z0 + (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * noise
    return z + sigma * fresh if eta else z


def sampling_times(steps, total=1000, trailing=False):
    """From noisy to clean. Leading spacing with offset 1, as Stable Diffusion's DDIM; trailing begins at the very last
    step, which a schedule without signal at its end wants.   -> list of int"""
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps: choose 1 to {total}")
    if trailing:
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    return [min(i * (total // steps) + 1, total - 1) for i in range(steps)][::-1]


class StoryImager(nn.Module):
    """The storyboard model around a UNet and a Context-FE; the text encoder and the autoencoder stay outside, frozen.

    predict            "noise" (Stable Diffusion); "v" or "picture" on a schedule whose last step holds no signal
    independent=True   folds the cells into the batch before anything else: frames that never see each other (the rival)
    """

    def __init__(self, unet, extractor, board=Board(), predict="noise", independent=False):  # noqa: B008
        super().__init__()
        self.unet, self.extractor = unet, extractor
        self.board, self.predict, self.independent = board, predict, independent
        self.register_buffer("alpha_bar", alpha_bars(zero=predict != "noise").float(), persistent=False)

    def denoise(self, z, t, words, keep, mask):
        """Network output for noisy cells.   z (B, F, c, h, w), t (B,) -> (B, F, c, h, w)"""
        if self.independent and z.shape[1] > 1:
            alone = (x.flatten(0, 1)[:, None] for x in (z, words, keep, mask))
            z_alone, *rest = alone
            return self.denoise(z_alone, t.repeat_interleave(z.shape[1]), *rest).view_as(z)
        board = self.board if z.shape[1] > 1 else Board(1, 1)
        prior, context = self.extractor(words, keep, mask)
        story = Story(words[:, board.frames()], context, (board.rows, board.cols))
        return board.cut(self.unet(board.tile(z + prior), t, story))

    def loss(self, z0, words, keep, mask, t, noise, weight=1.0, cells=None):
        """Mean squared error on the cells to be drawn; given cells hold no noise and count for nothing.   -> scalar

        weight  (c, 1, 1) or a number: how much each channel counts
        cells   how many cells to divide by, if not those of this mask: a shard divides by its part of the whole batch's
        """
        a = self.alpha_bar[t].view(-1, 1, 1, 1, 1)
        m = mask[:, :, None, None, None]
        z = m * (a.sqrt() * z0 + (1 - a).sqrt() * noise) + (1 - m) * z0
        error = (self.denoise(z, t, words, keep, mask) - targets(z0, noise, a, self.predict)).square() * m * weight
        return error.sum() / ((mask.sum() if cells is None else cells) * z0[0, 0].numel())

    @torch.no_grad()
    def sample(self, z0, words, keep, mask, empty=None, steps=50, guidance=1.0, eta=0.0, generator=None, seen=None):
        """Draw the cells where mask = 1 around the given ones.   -> (B, F, c, h, w), given cells bit for bit as in z0

        empty  (words, keep) of empty captions, for classifier-free guidance: noise_u + guidance * (noise_c - noise_u)
        seen   a list that collects the estimated pictures of every step
        """
        m = mask[:, :, None, None, None]
        draw = functools.partial(torch.randn, z0.shape, generator=generator, device=z0.device)
        z, times = draw(), sampling_times(steps, len(self.alpha_bar), self.predict != "noise")
        for i, time in enumerate(times):
            a = self.alpha_bar[time]
            a_next = self.alpha_bar[times[i + 1]] if i + 1 < len(times) else self.alpha_bar[0]
            z_in, t = torch.where(m > 0, z, z0), torch.full((len(z),), time, device=z.device)
            out = self.denoise(z_in, t, words, keep, mask)
            if empty is not None and guidance != 1:
                # Mixing outputs mixes their noise estimates: noise, v and picture are linear in each other at a given z.
                out = torch.lerp(self.denoise(z_in, t, *empty, mask), out, guidance)
            picture, noise = estimates(out, z_in, a, self.predict)
            z = ddim_step(picture, noise, a, a_next, eta, draw() if eta else None)
            if seen is not None:
                seen.append(torch.where(m > 0, picture, z0))
        return torch.where(m > 0, z, z0)


def past_only(z0, words, keep, empty, frame):
    """What a frame-by-frame model sees when it draws `frame` (B,): what comes after it is blank.   -> z0, words, keep"""
    later = torch.arange(z0.shape[1], device=z0.device) > frame[:, None]                    # (B, F)
    return (z0.masked_fill(later[:, :, None, None, None], 0), torch.where(later[:, :, None, None], empty[0], words),
            torch.where(later[:, :, None], empty[1], keep))


def sample_in_order(story, z0, words, keep, mask, empty, **settings):
    """The autoregressive rival: one frame after the other, each from what came before it; F samplings instead of one."""
    for f in range(z0.shape[1]):
        now = mask * (torch.arange(z0.shape[1], device=z0.device) == f)
        if now.any():
            seen = past_only(z0, words, keep, empty, torch.full((len(z0),), f, device=z0.device))
            drawn = story.sample(*seen, now, empty, **settings)
            z0 = torch.where(now[:, :, None, None, None] > 0, drawn, z0)
    return z0


ADDED = (".lora.", ".frame.", ".story.")       # in the names of what stage 2 adds to the base, beside its gates


def tuned_unet(rank=16, alpha=16, mode="both", out="shared", lora_self=True, **sizes):
    """A UNet whose cross-attentions are frame-story attentions; base weights load under their own names."""
    tuned = functools.partial(TunedSelfAttention, rank=rank, alpha=alpha) if lora_self else SelfAttention
    return UNet(**sizes, kinds=(tuned, functools.partial(FrameStoryAttention, rank=rank, alpha=alpha, mode=mode, out=out)))


def freeze_base(unet):
    """Train only LoRA sets and gates: everything under a name of Stable Diffusion is frozen."""
    for name, p in unet.named_parameters():
        added = any(part in name for part in ADDED)
        p.requires_grad_(added or (name.endswith(".gate") and p.requires_grad))


def load_base(unet, state_dict):
    """Stable Diffusion (or single-frame) weights into a tuned UNet.   raises ValueError listing what does not fit"""
    ours = unet.state_dict()
    base = {k: p.shape for k, p in ours.items() if not any(part in k for part in ADDED) and not k.endswith(".gate")}
    check_names(base, state_dict, "the UNet in the diffusers layout")
    unet.load_state_dict(state_dict, strict=False)
    return unet
