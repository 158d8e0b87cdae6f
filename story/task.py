"""Training and judging StoryImager and its rivals: stage 1 draws panels, stage 2 stories.

    python train.py storyimager                                                   # stories of the built-in world
    python train.py storyimager --data=codraw --root=FOLDER --length=48           # real stories
    python train.py storyimager --paper=sd --sd=FOLDER --data=pororo --root=DIR   # Stable Diffusion 1.5 as stage 1
    python train.py storyimager --ablate --seeds=3                                # every switch and every rival

Stage 1 stands for the pre-trained text-to-image model that the paper starts from, which can draw panels: the same UNet with
its text encoder, on frames that are told completely. Stage 2 trains what the paper adds (LoRA, frame-story attention,
Context-FE) and, because this base is minutes old, the UNet with it; --peft freezes that, as the paper does.
"""
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import parallel, stories, views
from data.batches import batch_rows, generator, seed_from
from data.options import check_ranges, check_words
from data.pictures import gif, panels
from data.reader import reader
from data.report import Peak
from data.vae import Components
from data.vae import from_official as vae_from_official
from data.weights import load_checkpoint, read_state
from story.judge import chance, distances, judge
from story.storyimager import (
    Board,
    ContextExtractor,
    PanelAttention,
    StoryImager,
    draw_masks,
    draw_panels,
    freeze_base,
    load_base,
    masks_of,
    past_only,
    sample_in_order,
    targets,
    tuned_unet,
)
from story.unet import SelfAttention, UNet
from story.words import Published, encoder

TASKS = ("visualise", "continue", "complete")


@dataclass
class Config:
    """StoryImager on stories (defaults: the built-in world; Stable Diffusion's sizes by --paper=sd)."""

    data: str = "builtin"            # builtin, codraw, clevr, pororo, flintstones or hdf5
    root: str = ""                   # folder of the real data
    sd: str = ""                     # folder of Stable Diffusion 1.5 in the diffusers layout: it replaces stage 1
    base: str = ""                   # checkpoint of a run whose stage 1 (text encoder and UNet) is taken over
    seed: int = 0                    # random seed
    steps: int = 3000                # optimiser steps of both stages
    base_steps: int = 1000           # of these, steps of stage 1; 0 without --base or --sd: stage 2 from scratch
    anneal: int = 2000               # steps of stage 2 over which its step size falls to a tenth (cosine)
    eval_every: int = 400            # steps between evaluations
    patience: int = 0                # evaluations without improvement before stopping; 0: never
    batch: int = 16                  # stories in a step
    size: int = 64                   # pixels of a frame's side
    patch: int = 16                  # block of pixels that becomes a latent pixel (SD: its autoencoder, 8)
    channels: int = 128              # principal components of a block that become its channels (SD: 4)
    frames: int = 4                  # builtin: frames of a story
    board_rows: int = 2              # rows of the board
    order: str = "column"            # frames run down the columns (Fig. 2), or row by row
    widths: tuple = (64, 96)         # channels of the UNet's levels (SD: 320, 640, 1280, 1280)
    attention: tuple = (True, True)  # which levels have attention (SD: all but the coarsest)
    resnets: int = 1                 # resnets a level (SD: 2)
    heads: int = 4                   # attention heads at every width (SD: 8)
    groups: int = 8                  # groups of the norms (SD: 32)
    width: int = 64                  # of a word's features (SD: 768)
    text_depth: int = 1              # layers of the text encoder
    text_heads: int = 4              # its attention heads
    length: int = 16                 # words it reads, the start mark included
    tokens: int = 2                  # context tokens a frame, n_c (UNVERIFIED)
    depth: int = 2                   # layers of each of Context-FE's two transformers (UNVERIFIED)
    rank: int = 16                   # of LoRA (UNVERIFIED)
    alpha: float = 16.0              # LoRA adds alpha / rank times B A x
    lora_self: bool = True           # LoRA in self-attention too (UNVERIFIED)
    lora_out: str = "shared"         # output LoRA behind the sum of the branches, or "separate" ones (UNVERIFIED)
    mode: str = "both"               # frame-story attention: both; frame or story alone; joint: one softmax over both
    prior: str = "cell"              # latent prior: a whole cell, a constant a channel, or none
    peft: bool = False               # the paper's tuning: stage 2 trains LoRA and Context-FE only; off: the whole UNet too
    tasks: tuple = TASKS             # tasks whose masks are trained
    independent: bool = False        # rival: frames that never see each other
    autoregressive: bool = False     # rival: frame by frame, each from the frames and sentences before it
    predict: str = "picture"         # the network predicts noise (SD), v or the picture (both: the schedule ends in pure noise)
    noisy: float = 3.0               # stage 2 draws its step as T (1 - u^noisy), u uniform; 1: all alike (the usual way)
    loud: float = 0.5                # channels count in the losses by this power of their size in pixels; 0: alike (as usual)
    lr_base: float = 1.5e-3          # AdamW step size of stage 1
    lr: float = 1e-3                 # AdamW step size of stage 2 (at SD's size: 1e-4)
    ema: float = 0.99                # decay of the averaged weights that draw and are judged
    drop: float = 0.1                # share of stories without captions, for guidance
    drop_one: float = 0.05           # share of captions dropped alone: an empty sentence is left to the context
    own: float = 0.25                # builtin, stage 1: share of frames with the story's sentence, not the complete caption
    sampler: int = 10                # DDIM steps
    guidance: float = 1.0            # classifier-free guidance when judging
    judged: tuple = (128, 128)       # stories judged for validation and for test

    def __post_init__(self):
        check_words(self, mode=("both", "frame", "story", "joint"), prior=("cell", "constant", "none"), order=("column", "row"),
                    lora_out=("shared", "separate"), predict=("noise", "v", "picture"))
        check_ranges(self, noisy=(0.1, 100), loud=(0, 2))
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"--tasks={','.join(self.tasks)}: {', '.join(sorted(unknown))} is unknown; choose from "
                             f"{', '.join(TASKS)}")
        if self.size % (least := self.patch * 2 ** (len(self.widths) - 1)):
            raise ValueError(f"--size={self.size} must be a multiple of patch x 2^(levels - 1) = {least}")
        if (self.sd or self.base) and self.base_steps:
            raise ValueError("--sd and --base bring stage 1 with them; add --base_steps=0")


def paper(name):
    """Sizes of Stable Diffusion 1.5 as overrides, frames of 256 px on a board of 512; the rest UNVERIFIED, ours."""
    if name != "sd":
        raise ValueError(f"--paper={name} is unknown; there is sd")
    return {"size": 256, "patch": 8, "channels": 4, "widths": (320, 640, 1280, 1280), "attention": (True, True, True, False),
            "resnets": 2, "heads": 8, "groups": 32, "width": 768, "length": 77, "predict": "noise", "noisy": 1.0, "loud": 0.0,
            "peft": True, "lr": 1e-4,
            "ema": 0.999, "base_steps": 0, "steps": 20_000, "anneal": 20_000, "eval_every": 2000, "sampler": 50, "guidance": 6.0}


class Task:
    """StoryImager on one data set; see the contract in train.py."""

    headline, better = "visualise pronoun", "higher"
    table = ("visualise named", "visualise pronoun", "continue pronoun", "complete pronoun", "visualise consistency")
    ablations = {
        "full": {}, "w/o story branch": {"mode": "frame"}, "w/o Context-FE": {"mode": "frame", "prior": "none"},
        "joint softmax": {"mode": "joint"}, "w/o frame branch": {"mode": "story"},
        "frame by frame": {"autoregressive": True}, "independent frames": {"independent": True, "mode": "frame"},
        "visualise only": {"tasks": ("visualise",)}, "continue only": {"tasks": ("continue",)},
        "complete only": {"tasks": ("complete",)}, "LoRA only": {"peft": True, "lr": 2e-3},
    }

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.data = {split: stories.load(cfg.data, cfg.root, split, cfg.size, frames=cfg.frames)
                     for split in ("train", "valid", "test")}
        self.builtin = cfg.data == "builtin"
        self.frames = len(self.data["train"].captions[0])                     # F of the data
        self.board = Board(cfg.board_rows, math.ceil(self.frames / cfg.board_rows), cfg.order)
        self.cells = self.board.rows * self.board.cols                        # F and, if F does not fill it, blank cells
        self.build()
        self.reader = reader().to(device)
        if self.builtin:
            view = self.view("test", range(cfg.judged[1]))
            self.chance = {f"{task} {key}": x for task in TASKS for key, x in chance(view).items()}
            self.next = ('python -m story.sample "Pip the red star walks in the snow." "It meets Mo." "They jump." '
                         '"It stands on the left."')
        else:
            self.headline, self.better, self.chance = "Frechet frame", "lower", {}
            cut, told = self.net["words"].cut(self.data["train"].captions), len(self.data["train"]) * self.frames
            if cut and parallel.rank() == 0:
                print(f"{cut:,} of {told:,} captions are longer than --length={cfg.length} and lose their end")
            self.next = f"python -m story.sample --ckpt=runs/storyimager-default/best.pt --root={cfg.root} --row=0"

    def build(self):
        """Networks and optimisers. `base` and `story.unet` share the weights that Stable Diffusion has a name for."""
        cfg = self.cfg
        sizes = {name: getattr(cfg, name) for name in ("channels", "widths", "attention", "resnets", "heads", "groups")}
        sizes["context"] = cfg.width
        cell = cfg.channels, cfg.size // cfg.patch, cfg.size // cfg.patch
        extractor = ContextExtractor(cfg.width, self.cells, cell, cfg.tokens, cfg.depth, cfg.text_heads, cfg.prior)
        unet = tuned_unet(cfg.rank, cfg.alpha, cfg.mode, cfg.lora_out, cfg.lora_self, **sizes)
        self.base = share(UNet(**sizes, kinds=(SelfAttention, PanelAttention)), unet).to(self.device)     # pays for no LoRA
        story = StoryImager(unet, extractor, self.board, cfg.predict, cfg.independent)
        if cfg.sd:
            vae = vae_from_official(read_state(part_of(cfg.sd, "vae"))[0]).eval().requires_grad_(False)
            load_base(unet, read_state(part_of(cfg.sd, "unet"))[0])
            words = Published(cfg.sd)
        else:
            words = encoder(self.data["train"], cfg)
            some = self.data["train"].frames(range(min(256, len(self.data["train"]))))
            vae = Components(some.flatten(0, 1), cfg.patch, cfg.channels)
        self.net = nn.ModuleDict({"vae": vae, "words": words, "story": story}).to(self.device)
        if cfg.base:
            self.take_over(cfg.base)
        self.average = copy.deepcopy(self.net).requires_grad_(False)          # draws and is judged
        self.stage = None
        self.enter(2)
        learnt = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        gates = [p for name, p in learnt.items() if name.endswith(".gate")]      # one number each, with a long way from 0
        rest = [p for name, p in learnt.items() if not name.endswith(".gate")]
        self.optimiser = torch.optim.AdamW([{"params": rest, "scale": 1.0}] + [{"params": gates, "scale": 10.0}] * bool(gates),
                                           cfg.lr, weight_decay=0.01, fused=True)
        self.saved = {"net": self.net, "average": self.average, "optimiser": self.optimiser}
        if cfg.base_steps:
            self.enter(1)
            learnt = [p for p in self.net.parameters() if p.requires_grad]
            self.base_optimiser = torch.optim.AdamW(learnt, cfg.lr_base, weight_decay=0.01, fused=True)
            self.saved["base_optimiser"] = self.base_optimiser

    def enter(self, stage):
        """Which weights learn: the plain UNet and the text encoder, or (they being frozen) LoRA, gates and Context-FE."""
        if stage == self.stage:
            return
        self.stage = stage
        words, story = self.net["words"], self.net["story"]
        words.requires_grad_(stage == 1 or not (self.cfg.base_steps or self.cfg.base or self.cfg.sd))
        story.requires_grad_(stage == 2)
        if stage == 1:
            self.base.requires_grad_(True)
        elif self.cfg.peft and (self.cfg.base_steps or self.cfg.base or self.cfg.sd):
            freeze_base(story.unet)
        for module in story.modules():                                        # a gate that a mode does not use stays 1
            if getattr(module, "mode", "both") != "both" and hasattr(module, "gate"):
                module.gate.requires_grad_(False)

    def take_over(self, path):
        """Stage 1 of another run: its autoencoder, averaged text encoder and UNet.   raises ValueError where it does not fit"""
        state = load_checkpoint(path)["state"].get("average", {})
        vae, words = ({k.removeprefix(part): v for k, v in state.items() if k.startswith(part)} for part in ("vae.", "words."))
        ours = set(self.base.state_dict())
        unet = {k.removeprefix("story.unet."): v for k, v in state.items() if k.removeprefix("story.unet.") in ours}
        try:
            self.net["vae"].load_state_dict(vae)
            self.net["words"].load_state_dict(words)
            self.base.load_state_dict(unet)
        except RuntimeError as error:
            raise ValueError(f"--base={path} does not fit this run: {' '.join(str(error).split())[:200]}") from None

    # -- data ------------------------------------------------------------------------------------------------------------

    def view(self, split, rows):
        """Who is where in stories of the built-in world."""
        return views.stories(list(rows), 0, split, self.cfg.frames)

    def latents(self, frames, sample=False):
        """Frames to latents, each frame alone: given cells cannot carry traces of the others; blank cells fill the board.

        (B, F, 3, H, W) -> (B, cells, c, h, w)
        """
        z = self.average["vae"].encode(frames.flatten(0, 1).to(self.device), sample).unflatten(0, frames.shape[:2])
        return F.pad(z, (0, 0, 0, 0, 0, 0, 0, self.cells - self.frames))

    def pictures(self, z):
        """The way back, blank cells dropped.   (B, cells, c, h, w) -> (B, F, 3, H, W) in [-1, 1]"""
        z = z[:, : self.frames]
        return self.average["vae"].decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]).clamp(-1, 1)

    def weight(self):
        """How much a latent channel counts in the losses, 1 on average.   -> (c, 1, 1); (1, 1, 1) for a published autoencoder"""
        scale = getattr(self.average["vae"], "scale", torch.ones(1, device=self.device)) ** self.cfg.loud
        return (scale / scale.mean())[:, None, None]

    def read(self, told, net=None):
        """B lists of F sentences -> words (B, cells, L, D), keep (B, cells, L)"""
        texts = [text for story in told for text in [*story, *[""] * (self.cells - len(story))]]
        words, keep = (net or self.net)["words"](texts)
        return words.unflatten(0, (len(told), -1)), keep.unflatten(0, (len(told), -1))

    def empty(self, batch, net=None):
        """Captions of a story that nobody told."""
        return self.read([[""] * self.frames] * batch, net)

    def mask(self, mask):
        """(B, F) -> (B, cells): blank cells count as given."""
        return F.pad(mask, (0, self.cells - mask.shape[1])).to(self.device)

    def batches(self, seed, start, stop):
        """Rows of global batch t and the seed of its pictures; every rank draws the same."""
        for t in range(start, stop):
            yield batch_rows(len(self.data["train"]), self.cfg.batch, seed, t), seed_from(seed, t, 1)

    # -- one step --------------------------------------------------------------------------------------------------------

    def update(self, batch, step):
        cfg, (rows, seed) = self.cfg, batch
        stage = 1 if step < cfg.base_steps else 2
        if step == cfg.base_steps and step:                                    # stage 2 starts from the averaged weights
            self.net.load_state_dict(self.average.state_dict())
        self.enter(stage)
        loss = self.frame_loss(rows, seed, alone=step % 4 == 0) if stage == 1 else self.story_loss(rows, seed)
        optimiser = self.base_optimiser if stage == 1 else self.optimiser
        at = step if stage == 1 else step - cfg.base_steps
        fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, at / (cfg.base_steps if stage == 1 else cfg.anneal)))
        for group in optimiser.param_groups:
            group["lr"] = (cfg.lr_base if stage == 1 else cfg.lr) * min(1.0, (at + 1) / 50) * fall * group.get("scale", 1.0)
        parallel.descend(optimiser, loss, clip=1.0)
        decay = min(cfg.ema, (at + 1) / (at + 10))
        pairs = [(mean, p) for mean, p in zip(self.average.parameters(), self.net.parameters(), strict=True) if p.requires_grad]
        torch._foreach_lerp_([mean for mean, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)
        return {"frame loss" if stage == 1 else "story loss": loss.detach()}

    def frame_loss(self, rows, seed, alone):
        """Stage 1: denoise unrelated frames, alone or as panels of one board, from complete captions, some from their story's."""
        cfg, story, batch = self.cfg, self.net["story"], len(rows)
        # Every rank draws the numbers of the whole batch and keeps its own.
        t = torch.randint(len(story.alpha_bar), (batch, self.frames), device=self.device)
        noise = torch.randn(batch, self.cells, *story.extractor.cell, device=self.device)
        own, drop = torch.rand(2, batch, self.frames)
        # Neighbours on a board are of different stories: there is no context to learn.
        mixed = torch.stack([rows.roll(f) for f in range(self.frames)], 1)
        frames = self.data["train"].frames(rows.tolist(), seed)
        frames = torch.stack([frames[:, f].roll(f, 0) for f in range(self.frames)], 1)
        t, noise, own, drop, mixed, frames = (parallel.shard(x) for x in (t, noise, own, drop, mixed, frames))
        plain = self.data["train"].captions
        whole = self.data["train"].extra.get("complete", plain)
        told = [["" if d < cfg.drop else (plain if o < cfg.own else whole)[row][f]
                 for f, (row, o, d) in enumerate(zip(*each, strict=True))]
                for each in zip(mixed.tolist(), own.tolist(), drop.tolist(), strict=True)]
        z0, words = self.latents(frames, sample=True), self.read(told)[0]
        t = t if alone else t[:, :1].expand_as(t)                              # one for a board
        a = F.pad(story.alpha_bar[t], (0, self.cells - self.frames), value=1.0)[..., None, None, None]
        z = a.sqrt() * z0 + (1 - a).sqrt() * noise
        if alone:
            out = draw_panels(self.base, Board(1, 1), z.flatten(0, 1)[:, None], F.pad(t, (0, self.cells - self.frames)).flatten(),
                              words.flatten(0, 1)[:, None]).view_as(z)
        else:
            out = draw_panels(self.base, self.board, z, t[:, 0], words)
        error = (out - targets(z0, noise, a, cfg.predict)).square() * self.weight()
        return error[:, : self.frames].mean()

    def story_loss(self, rows, seed):
        """Stage 2: denoise the frames that a random task asks for, on one board with the given ones."""
        cfg, story, batch = self.cfg, self.net["story"], len(rows)
        # Who "it" is can be read from a frame until nearly all of it is noise: only the last steps ask the context.
        steps = len(story.alpha_bar)
        t = (steps * (1 - torch.rand(batch, device=self.device) ** cfg.noisy)).long().clamp(max=steps - 1)
        noise = torch.randn(batch, self.cells, *story.extractor.cell, device=self.device)
        if cfg.autoregressive:
            last = torch.randint(self.frames, (batch,))
            mask = F.one_hot(last, self.frames).float()
        else:
            mask = draw_masks(batch, self.frames, cfg.tasks)
        drop = torch.rand(batch, 1) < cfg.drop
        drop = (drop | (torch.rand(batch, self.frames) < cfg.drop_one)).tolist()
        cells = mask.sum() / parallel.world()
        t, noise, mask, drop, mine = (parallel.shard(x) for x in (t, noise, mask, drop, rows.tolist()))
        data = self.data["train"]
        told = [["" if gone else text for text, gone in zip(data.captions[row], away, strict=True)]
                for row, away in zip(mine, drop, strict=True)]
        z0, (words, keep) = self.latents(data.frames(mine, seed), sample=True), self.read(told)
        if cfg.autoregressive:
            z0, words, keep = past_only(z0, words, keep, self.empty(1), parallel.shard(last).to(self.device))
        return story.loss(z0, words, keep, self.mask(mask), t, noise, self.weight(), cells)

    # -- judging ---------------------------------------------------------------------------------------------------------

    def draw(self, frames, told, mask, seed=0, **settings):
        """Draw the frames where mask = 1.   frames (B, F, 3, H, W), B lists of F sentences, mask (B, F) -> (B, F, 3, H, W)"""
        net, cfg = self.average.eval(), self.cfg
        settings = {"steps": cfg.sampler, "guidance": cfg.guidance} | settings
        z0, (words, keep), empty = self.latents(frames), self.read(told, net), self.empty(len(told), net)
        sample = sample_in_order if cfg.autoregressive else StoryImager.sample
        g = generator(seed, 5, device=self.device)
        drawn = self.pictures(sample(net["story"], z0, words, keep, self.mask(mask), empty, generator=g, **settings))
        return torch.where(mask[:, :, None, None, None].to(self.device) > 0, drawn, frames.to(self.device))

    def drawn(self, split, rows, task):
        """Stories of a split drawn for a task; its masks take turns.   -> drawn, real (N, F, 3, H, W), mask (N, F)"""
        masks = masks_of(self.frames)[task]
        mask = masks[torch.arange(len(rows)) % len(masks)]
        data, done = self.data[split], []
        real = data.frames(rows)
        for part in torch.arange(len(rows)).split(32):
            done.append(self.draw(real[part], [data.captions[rows[i]] for i in part.tolist()], mask[part], seed=int(part[0])))
        return torch.cat(done), real, mask

    @torch.no_grad()
    def evaluate(self, split):
        """Validation: visualisation. Test: each task, Frechet distances, and what the reader reads in real frames."""
        count = min(self.cfg.judged[split == "test"], len(self.data[split]))
        rows, scores = list(range(count)), {}
        if not self.builtin and split == "valid":
            drawn, real, _ = self.drawn(split, rows, "visualise")
            return distances(self.reader, drawn, real.to(self.device))
        for task in TASKS if split == "test" else TASKS[:1]:
            drawn, real, mask = self.drawn(split, rows, task)
            if task == "visualise" and split == "test":
                others = self.data["train"].frames(range(count)).to(self.device)
                scores |= distances(self.reader, drawn, others)
                scores |= {f"real {k}": v for k, v in distances(self.reader, real.to(self.device), others).items()}
            if self.builtin:
                view = self.view(split, rows)
                scores |= {f"{task} {k}": v for k, v in judge(self.reader, drawn, view, mask).items()}
            else:
                error = (drawn.cpu() - real)[mask > 0].square().mean()
                scores[f"{task} squared error"] = error
        if self.builtin and split == "test":
            scores |= {f"real {k}": v for k, v in judge(self.reader, real.to(self.device), view, torch.ones_like(mask)).items()}
        return scores

    # -- what a person looks at ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """stories.png (held-out stories, each task), seeds.png, steps.gif; prints the cost of a story both ways."""
        data, rows = self.data["test"], list(range(6))
        real, told = data.frames(rows), [data.captions[row] for row in rows]
        F_ = self.frames
        masks = {"visualise": [1] * F_, "continue": [0] + [1] * (F_ - 1), "complete": [0] + [1] * (F_ - 2) + [0]}
        drawn = {task: self.draw(real, told, torch.tensor([mask] * 6).float()).cpu() for task, mask in masks.items()}
        lines = []
        for i in range(4):
            blocks = [list(zip(real[i], told[i], strict=True))] + [
                [(x if m else outlined(x), f"{task}: {'drawn' if m else 'given'}")
                 for x, m in zip(drawn[task][i], mask, strict=True)]
                for task, mask in masks.items()]
            lines += [blocks[0] + blocks[1], blocks[2] + blocks[3]]
        panels(folder / "stories.png", lines, 96,
               "held-out stories, two lines each: the true frames with their sentences and all frames drawn; "
               "continued from the first frame, and filled in between the first and the last (given frames outlined)")
        mask = torch.ones(1, F_)
        rows = [[(x, f"seed {seed}") for x in self.draw(real[:1], told[:1], mask, seed).cpu()[0]] for seed in range(3)]
        panels(folder / "seeds.png", [[(x, text) for x, text in zip(real[0], told[0], strict=True)], *rows], 128,
               "one story from three seeds under the true frames")
        seen = []
        if not self.cfg.autoregressive:
            self.draw(real[:1], told[:1], mask, seen=seen)
            blank = (0, 0, 0, 0, 0, 0, 0, self.cells - F_)
            gif(folder / "steps.gif", [self.board.tile(F.pad(self.pictures(z), blank))[0] for z in seen])
        print(self.cost(real[:4], told[:4]))

    def cost(self, real, told):
        """CPU-seconds, multiply-adds and memory of one story: whole board at once against frame after frame."""
        net, mask = self.average.eval(), torch.ones(len(real), self.frames)
        z0, (words, keep), empty = self.latents(real), self.read(told, net), self.empty(len(told), net)
        parts = []
        for name, sample in (("whole board", StoryImager.sample), ("frame by frame", sample_in_order)):
            with FlopCounterMode(display=False) as counter, Peak() as peak:
                sample(net["story"], z0[:1], words[:1], keep[:1], self.mask(mask)[:1], [x[:1] for x in empty], steps=1)
            began = time.process_time()
            sample(net["story"], z0, words, keep, self.mask(mask), empty, steps=self.cfg.sampler)
            seconds = (time.process_time() - began) / len(real)
            parts.append(f"{name} {seconds:.3f} CPU-s, {counter.get_total_flops() * self.cfg.sampler / 1e9:.2f} GFLOP, "
                         f"{peak.bytes / 2**20:.2f} MiB")
        return f"cost of a story, {self.cfg.sampler} steps at the same {self.cfg.size} px a frame: " + "; ".join(parts)


def share(base, tuned):
    """Give `tuned` the very parameters of `base` where both have one of a name.   -> base"""
    for name, p in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(tuned.get_submodule(owner), leaf, p)
    return base


def part_of(folder, part):
    """Weights of a part of a diffusers folder.   raises FileNotFoundError naming what was looked for"""
    names = [Path(folder) / part / f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin")]
    for path in names:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{names[0]} is missing: --sd wants a folder of Stable Diffusion 1.5 in the diffusers layout")


def outlined(frame, edge=1):
    """A given frame gets a yellow edge, a pixel wide.   (3, H, W)"""
    frame, yellow = frame.clone(), torch.tensor([1.0, 0.7, -0.8])[:, None, None]
    frame[:, :edge], frame[:, -edge:], frame[..., :edge], frame[..., -edge:] = (yellow,) * 4
    return frame
