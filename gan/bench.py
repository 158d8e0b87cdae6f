"""How long a picture takes: this folder's generator beside the same modules in the order of the official code.

    python -m gan.bench                     # the built-in sizes at 64 px and the published ones at 224 px, batch 1 and 16
    python -m gan.bench --sizes=builtin --batches=1,4

Both run in one process on the same random weights and the same device; the best of `repeats` counts. "Official order"
resizes before the first fusion block and the shortcut, convolves the enlarged map, and fuses by plain PyTorch.
"""
import time
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn import functional as F

import kernels
from data.clip import CLIP, freeze
from data.options import options_of, run
from data.towers import ImageTower, TextTower
from gan import model
from gan.task import Config, networks, paper


@dataclass
class Options:
    """Milliseconds a picture of GALIP's generator, random weights."""

    sizes: str = "builtin,paper"     # builtin: 64 px, the Config's defaults; paper: 224 px, --paper=coco
    batches: tuple = (1, 16)         # pictures at once
    repeats: int = 3                 # of each measurement; the best counts
    device: str = "cpu"              # cpu or cuda


CLIPS = {"builtin": lambda: CLIP(ImageTower(64, 4, 4, 8, 8, 64), TextTower(64, 2, 4, 40, 160, 64)),
         "paper": lambda: CLIP(ImageTower(768, 12, 12, 32, 7, 512), TextTower(512, 1, 8, 77, 1000, 512))}   # its text is not used


def official_order(block, condition, x):
    """GBlock.forward as the official code has it: resize first, then fuse and convolve on all pixels."""
    u = F.interpolate(x, size=block.size)
    return block.shortcut(u) + block.conv2(block.fuse2(condition, block.conv1(block.fuse1(condition, u))))


@torch.no_grad()
def milliseconds(generator, clip, batch, repeats, device):
    """Of one picture in a batch of this size, best of `repeats` after one to warm up; CPU time where there is no GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time         # other work on a CPU does not count
    noise, told = (torch.randn(batch, width, device=device) for width in (generator.noise, clip.embed))
    took = []
    for _ in range(repeats + 1):
        began = clock()
        generator(noise, told, clip)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(clock() - began)
    return 1000 * min(took[1:]) / batch


def main(argv):
    options = options_of(argv, Options, "python -m gan.bench")
    device = torch.device(options.device)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; "
          f"{'ms' if device.type == 'cuda' else 'CPU-ms'} a picture\n")
    print("| sizes | batch | official order | this folder | ratio |\n| --- | --- | --- | --- | --- |")
    for sizes in options.sizes.split(","):
        if sizes not in CLIPS:
            raise ValueError(f"--sizes={sizes} is unknown; there are {', '.join(CLIPS)}")
        clip = freeze(CLIPS[sizes]()).to(device)
        generator = networks(Config(**(paper("coco") if sizes == "paper" else {})), clip)[0].to(device)
        for batch in options.batches:
            generator.to(memory_format=torch.contiguous_format)
            with mock.patch.object(model.GBlock, "forward", official_order), kernels.use("reference"):
                theirs = milliseconds(generator, clip, batch, options.repeats, device)
            if device.type == "cpu":
                generator.to(memory_format=torch.channels_last)
            ours = milliseconds(generator, clip, batch, options.repeats, device)
            print(f"| {sizes}, {clip.size} px | {batch} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
