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
