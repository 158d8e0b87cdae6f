"""Features of raw frames: what the small CLIP sees in each, and how they move; kept in a cache by their content.

    appearance (V, N, L, D)   of L frames a clip: CLIP's embedding beside the mean and the maximum of its patches
    motion (V, N, D)          structure tensors of all frame differences on a 4 x 4 grid, beside the mean and the change of
                              CLIP's embedding: like features of 3D convolutions they also hold what it is that moves

Paper: ResNet-101 and 3D ResNeXt-101, 2048 wide (data.frames.load_features reads those); here nothing is downloaded.
Both streams are padded with zeros to one width D, as the model wants it.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import clip as clips
from data.weights import read_safetensors, write_safetensors

CELLS, COARSE = 4, 16                    # grid of the motion features; pixels a side of what differences are taken of
FLOW = 6 * CELLS**2                      # numbers that tell the motion of a clip
MOTION_GAIN, FLOW_GAIN = 0.3, 0.4        # how loud motion is beside appearance, and flow beside what moves
NOISE = 1e-3                             # sums this small come from rounding and compression
CHUNK = {"cpu": 64, "cuda": 2048}        # frames that go through CLIP at once: on a CPU they stay in its cache


def flow(frames):
    """Motion of clips as Lucas and Kanade see it.   frames (n, F, 3, H, W) -> (n, 6 * 4 * 4)

    With I_t the difference of neighbouring frames and I_x, I_y the slopes of their mean, a cell of the grid keeps the sums
    of I_x I_t, I_y I_t, I_t^2, I_x^2, I_y^2, I_x I_y over colours, frames and pixels. -I_x I_t is positive where things
    move right, whatever their colour; I_t^2 tells turning from rest. Signed square roots, linear below NOISE, tame their range.
    """
    small = F.adaptive_avg_pool2d(frames.flatten(0, 1), COARSE).unflatten(0, frames.shape[:2])
    t = small.diff(dim=1)                                                         # (n, F - 1, 3, h, w)
    mean = F.pad((small[:, 1:] + small[:, :-1]).flatten(0, 1) / 2, (1, 1, 1, 1), mode="replicate").unflatten(0, t.shape[:2])
    x, y = (mean[..., 1:-1, 2:] - mean[..., 1:-1, :-2]) / 2, (mean[..., 2:, 1:-1] - mean[..., :-2, 1:-1]) / 2
    sums = torch.stack([a.mul(b).mean((1, 2)) for a, b in ((x, t), (y, t), (t, t), (x, x), (y, y), (x, y))], 1)
    cells = F.adaptive_avg_pool2d(sums, CELLS).flatten(1)                         # (n, 96)
    return cells / (cells.abs() + NOISE).sqrt()


def looked(frames, look):
    """Which of a clip's frames CLIP reads.   -> `look` numbers"""
    return np.linspace(0, frames - 1, look).round().astype(int)


@torch.no_grad()
def extract(frames, clip, look=2):
    """Features of V videos.   frames (V, N, F, 3, H, W) in [-1, 1] -> appearance (V, N, look, D), motion (V, N, D), float16

    look  how many of a clip's F frames CLIP reads, evenly spread from the first to the last
    """
    device, last = next(clip.parameters()).device, (len(clip.visual.transformer.resblocks) - 1,)
    chosen = frames[:, :, looked(frames.shape[2], look)]
    parts = []
    for part in chosen.flatten(0, 2).split(CHUNK.get(device.type, 512)):
        maps, embedding = clip.encode_image(clips.standard(part.to(device), clip.size), taps=last)
        patches = maps[:, 0].flatten(2)                                           # (n, w, g g)
        parts.append(torch.cat([embedding, patches.mean(2), patches.amax(2)], 1).cpu())
    appearance = torch.cat(parts).unflatten(0, chosen.shape[:3])
    moves = torch.cat([flow(part) for part in frames.flatten(0, 1).split(512)]).unflatten(0, frames.shape[:2])
    seen = appearance[..., : clip.embed]
    motion = torch.cat([moves, seen.mean(2), seen[:, :, -1] - seen[:, :, 0]], 2)
    width = max(appearance.shape[-1], motion.shape[-1])
    appearance, motion = (F.pad(x, (0, width - x.shape[-1])) for x in (appearance, motion))
    return appearance.half(), motion.half()


@torch.no_grad()
def word_table(clip):
    """What the small CLIP's text tower makes of "a WORD", for every word it knows.   -> (W, E), of length 1"""
    tokens = clips.small_tokeniser()
    return F.normalize(clip.encode_text(tokens([f"a {word}" for word in tokens.words]))[0], dim=1)


class Standard(torch.nn.Module):
    """Features as the network reads them.   appearance (V, N, L, D), motion (V, N, D) -> both `width` wide, float32

    Of CLIP's features: how much better a frame matches each word than the video's frames do on average (nothing where it
    matches worse), so that a clip shows what sets it apart and what is alike everywhere, such as a background, drops out; for
    motion its mean over the clip beside the flow, which is also taken relative to the video. Each feature to unit variance.
    Of feature files (table None): zero mean and unit variance.
    """

    def __init__(self, features, table=None):
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 0) if table is None else table.clone())
        self.width = features if table is None else len(table) + FLOW
        self.register_buffer("mean", torch.zeros(2, self.width))
        self.register_buffer("scale", torch.ones(2, self.width))

    def read(self, appearance, motion):
        if not len(self.table):
            return appearance.float(), motion.float()
        seen = F.normalize(appearance[..., : self.table.shape[1]].float(), dim=3)
        match = ((seen - seen.mean((1, 2), keepdim=True)) @ self.table.T).relu()          # (V, N, L, W)
        moves = motion[..., :FLOW].float()
        return F.pad(match, (0, FLOW)), torch.cat([match.mean(2), moves - moves.mean(1, keepdim=True)], 2)

    def fit(self, appearance, motion, videos=512):
        """Means and scales from the first training videos."""
        for n, x in enumerate(self.read(appearance[:videos].to(self.scale.device), motion[:videos].to(self.scale.device))):
            x = x.flatten(0, -2)
            self.scale[n] = 1 / (x.std(0) + 0.1 * x.std()) if len(x) > 1 else 1.0
            self.mean[n] = 0.0 if len(self.table) else x.mean(0)
        if len(self.table):                                # small motion: its scores start near 1/2, where they learn
            self.scale[1] *= MOTION_GAIN
            self.scale[1, len(self.table) :] *= FLOW_GAIN

    def forward(self, *features):
        return [(x - mean) * scale for x, mean, scale in zip(self.read(*features), self.mean, self.scale, strict=True)]


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
