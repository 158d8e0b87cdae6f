"""Features of raw frames: what the small CLIP sees in each, and how they move; kept in a cache by their content.

    appearance (V, N, L, E)   CLIP's embedding of L frames a clip
    motion (V, N, 7)          which way a clip moves, how much, and how much there is in it
    Standard                  turns both into what the network reads, of one width, as the model wants it

Paper: ResNet-101 and 3D ResNeXt-101, 2048 wide (data.frames.load_features reads those); here nothing is downloaded.
"""
import hashlib
import inspect
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import clip as clips
from data.draw import SHAPES
from data.weights import read_safetensors, write_safetensors
from data.world import COLOUR, SIZES

FLOW = 7                                 # numbers that tell the motion of a clip
CONTRAST = 30.0                          # of CLIP's similarities, before they become probabilities of captions
QUIET, EMBEDDING = 0.3, 0.3              # how loud motion is beside appearance, and the embedding beside the words
CHUNK = {"cpu": 64, "cuda": 2048}        # frames that go through CLIP at once: on a CPU they stay in its cache


def flow(frames, coarse=16, noise=1e-4):
    """Motion of clips as Lucas and Kanade see it.   frames (n, F, 3, H, W) -> (n, 7)

    With I_t the difference of neighbouring frames and I_x, I_y the slopes of their mean, summed over colours, frames and pixels:
    the correlation of -I_x and I_t is how much of all change is movement to the right, whatever the colours; its positive and its
    negative part stand apart, and so for y. Then how much changes for the edges there are, if nothing does, and how many edges.
    coarse: pixels a side of what differences are taken of; noise: sums this small come from rounding and compression.
    """
    small = F.adaptive_avg_pool2d(frames.flatten(0, 1), coarse).unflatten(0, frames.shape[:2])
    t = small.diff(dim=1)                                                         # (n, F - 1, 3, h, w)
    mean = F.pad((small[:, 1:] + small[:, :-1]).flatten(0, 1) / 2, (1, 1, 1, 1), mode="replicate").unflatten(0, t.shape[:2])
    x, y = (mean[..., 1:-1, 2:] - mean[..., 1:-1, :-2]) / 2, (mean[..., 2:, 1:-1] - mean[..., :-2, 1:-1]) / 2
    xt, yt, tt, xx, yy = (a.mul(b).mean((1, 2, 3, 4)) for a, b in ((x, t), (y, t), (t, t), (x, x), (y, y)))
    right, down = -xt / ((xx * tt).sqrt() + noise), -yt / ((yy * tt).sqrt() + noise)
    change, edges = (tt / (xx + yy + noise)).sqrt(), xx + yy
    return torch.stack([right.relu(), (-right).relu(), down.relu(), (-down).relu(), change, (-4 * change).exp(),
                        (edges + noise).log()], 1)


def looked(frames, look):
    """Which of a clip's frames CLIP reads.   -> `look` numbers"""
    return np.linspace(0, frames - 1, look).round().astype(int)


@torch.no_grad()
def extract(frames, clip, look=2):
    """Features of V videos.   frames (V, N, F, 3, H, W) in [-1, 1] -> appearance (V, N, look, E), motion (V, N, 7), float16

    look  how many of a clip's F frames CLIP reads, evenly spread from the first to the last
    """
    device, chosen = next(clip.parameters()).device, frames[:, :, looked(frames.shape[2], look)]
    parts = [clip.encode_image(clips.standard(part.to(device), clip.size))[1].cpu()
             for part in chosen.flatten(0, 2).split(CHUNK.get(device.type, 512))]
    motion = torch.cat([flow(part) for part in frames.flatten(0, 1).split(512)])
    return torch.cat(parts).unflatten(0, chosen.shape[:3]).half(), motion.unflatten(0, frames.shape[:2]).half()


@torch.no_grad()
def captions(clip):
    """What CLIP makes of "a large red star" and of every other such thing.   -> (C, E), and which words each has (C, W)"""
    groups = SIZES, tuple(COLOUR), SHAPES
    things = list(product(*groups))
    text = F.normalize(clip.encode_text(clips.small_tokeniser()([f"a {' '.join(thing)}" for thing in things]))[0], dim=1)
    said = torch.tensor([[float(word in thing) for group in groups for word in group] for thing in things])
    return F.normalize(text - text.mean(0), dim=1), said


class Standard(torch.nn.Module):
    """Features as the network reads them.   appearance (V, N, L, E), motion (V, N, M) -> both `width` wide, float32

    Of CLIP's embedding: the probability of each word that a caption of the built-in world may hold, beside the embedding
    itself. An embedding is less the mean embedding, a caption less the mean caption: pictures and texts lie in different places,
    and without this CLIP tells small from large no better than chance. Motion is `flow` beside the clip's mean appearance: like
    features of 3D convolutions it also knows what it is that moves. Each feature has zero mean and unit variance, times its gain.
    Of feature files (bank None): zero mean and unit variance.
    """

    def __init__(self, features, bank=None):
        super().__init__()
        text, said = bank or (torch.zeros(0, 0), torch.zeros(0, 0))
        self.width = said.shape[1] + text.shape[1] + FLOW if bank else features
        self.register_buffer("text", text.clone())
        self.register_buffer("said", said.clone())
        self.register_buffer("centre", torch.zeros(text.shape[1]))
        self.register_buffer("mean", torch.zeros(2, self.width))
        self.register_buffer("scale", torch.ones(2, self.width))

    def read(self, appearance, motion):
        if not len(self.text):
            return appearance.float(), motion.float()
        seen = F.normalize(appearance.float(), dim=3) - self.centre
        words = (CONTRAST * F.normalize(seen, dim=3) @ self.text.T).softmax(3) @ self.said             # (V, N, L, W)
        seen = torch.cat([words, seen], 3)
        return F.pad(seen, (0, motion.shape[2])), torch.cat([seen.mean(2), motion.float()], 2)

    def fit(self, appearance, motion, videos=512):
        """Means and scales from the first training videos."""
        appearance, motion = (x[:videos].to(self.scale.device) for x in (appearance, motion))
        if len(self.text):
            self.centre.copy_(F.normalize(appearance.float(), dim=3).mean((0, 1, 2)))
        for n, x in enumerate(self.read(appearance, motion)):
            x = x.flatten(0, -2)
            self.mean[n] = x.mean(0)
            self.scale[n] = 1 / (x.std(0) + 0.1 * x.std()) if len(x) > 1 else 1.0
        if len(self.text):
            words = self.said.shape[1]
            self.scale[:, words : words + self.text.shape[1]] *= EMBEDDING
            self.scale[1] *= QUIET                          # quiet: the scores start near 1/2, where they learn

    def forward(self, *features):
        return [(x - mean) * scale for x, mean, scale in zip(self.read(*features), self.mean, self.scale, strict=True)]


RECIPE = inspect.getsource(flow) + inspect.getsource(extract)     # a part of every key: other code, other features


def digest(*parts):
    """SHA-256 over arrays, bytes and text, as 24 hex digits: the name of what was computed from them."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.tobytes() if isinstance(part, np.ndarray) else part if isinstance(part, bytes) else str(part).encode()
        sha.update(len(raw).to_bytes(8, "little") + raw)
    return sha.hexdigest()[:24]


def cached(folder, key, make):
    """make() -> {name: tensor}, or what an earlier run left in FOLDER/key.safetensors; "" keeps nothing."""
    path = Path(folder) / f"{key}.safetensors"
    if folder and path.is_file():
        return read_safetensors(path)[0]
    found = make()
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, found)
    return found
