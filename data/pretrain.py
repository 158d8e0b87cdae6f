"""python train.py clip: trains what is shipped in data/weights/, the small CLIP and the attribute reader.

Both see the same renders of the built-in world, step by step, and share nothing else. Every batch holds scenes of one to
three objects (half of them with their full caption, half with one that leaves things out), products of the shop with
their titles, and frames of stories with their sentences. `sample` writes the weights into the run's folder; --export
writes them into data/weights/ as well (then put the new numbers and SHA-256 into its README.md).
"""
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from data import clip, parallel, views, world
from data import reader as readers
from data.batches import generator
from data.clip import CLIP, official_names, standard
from data.pictures import grid
from data.text import WordTokenizer
from data.towers import ImageTower, TextTower
from data.weights import write_safetensors

LARGEST_SCALE = math.log(100)        # the temperature's bound in the paper
CANDIDATES = 100                     # captions of one retrieval test: chance is 1 / 100
FRAMES = 4                           # of a story in a batch
PATCHES = ("shape", "texture", "colour")
LOOKALIKES = 8                       # pictures of one colour on one background


@dataclass
class Config:
    """The small CLIP and the attribute reader (defaults: what is shipped)."""

    data: str = "builtin"        # only the built-in world
    root: str = ""               # unused
    seed: int = 0                # random seed
    steps: int = 3000            # optimiser steps of CLIP
    reader_steps: int = 2500     # of these, how many also train the reader
    eval_every: int = 250        # steps between evaluations
    batch: int = 64              # pictures a step: 1/2 scenes, 1/4 lookalikes, 1/8 products, 1/8 story frames
    lr: float = 1.5e-3           # AdamW step size of CLIP, after 100 steps of warm-up, cosine to 0
    reader_lr: float = 3e-3      # AdamW step size of the reader, the same shape over its own steps
    decay: float = 0.05          # weight decay of matrices; none for gains, biases and tables
    width: int = 96              # image tower
    depth: int = 4               # blocks of the image tower
    heads: int = 4               # heads of both towers
    text_width: int = 64         # text tower
    text_depth: int = 2          # blocks of the text tower
    embed: int = 64              # common embedding E
    patch: int = 8               # pixels a side of a patch
    size: int = 64               # pixels a side of a picture
    context: int = 40            # words with start and end
    soft: bool = True            # equal sentences in a batch share their target
    patch_loss: float = 3.0      # first weight of the auxiliary patch loss, which fades to 0 over all steps
    export: bool = False         # also write the weights to data/weights/


def paper(name):
    """OpenAI's sizes are not trained here: their weights are loaded (data.clip.load)."""
    raise ValueError(f"--paper={name}: OpenAI's CLIP is not trained here; load its weights with data.clip.load(path)")


# -- CLIP's objective (Radford et al., Fig. 3) ---------------------------------------------------------------


def soft_targets(texts):
    """Row i spreads its mass evenly over all sentences that equal its own.   N strings -> (N, N), rows add up to 1

    The world repeats short sentences: with one-hot targets a true match would count as a mistake.
    """
    ids = {text: n for n, text in enumerate(texts)}
    same = torch.tensor([ids[text] for text in texts])
    same = (same[:, None] == same).float()
    return same / same.sum(1, keepdim=True)


def contrastive(image, text, logit_scale, targets):
    """Symmetric cross-entropy over a batch.   image, text (N, E) raw, targets (N, N) symmetric -> scalar"""
    logits = logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T      # (N, N)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def patch_labels(masks, scene, grid):
    """What shape, texture and colour each patch shows, -1 where it shows no object.   -> {name: (B, g, g) int64}

    masks (B, O, H, W): a patch belongs to the object that covers most of it, if that is at least a quarter.
    """
    cover, which = F.adaptive_avg_pool2d(masks, grid).max(1)                                 # (B, g, g)
    labels = {}
    for name in PATCHES:
        own = scene[name][:, :, None, None].expand(-1, -1, grid, grid).gather(1, which[:, None])[:, 0]
        labels[name] = torch.where(cover > 0.25, own, -1)
    return labels


# -- what they are trained on --------------------------------------------------------------------------------


def mixture(t, size, seed):
    """Batch t: scenes and lookalikes with captions, products with titles, frames with sentences.   -> scene, N texts

    Sizes of products and characters are not words of the world's grammar: -1, which the reader's loss leaves out.
    """
    eighth = size // 8
    rows = torch.arange(t * size, (t + 1) * size) % world.ROWS
    scene = world.scenes(rows[: 4 * eighth], seed)
    texts = [full if n % 2 else part for n, (full, part) in enumerate(
        zip(world.captions(scene), world.captions(scene, 1 + t % 9), strict=True))]
    twins = lookalikes(rows[4 * eighth : 6 * eighth], seed)
    shop = views.products(rows[:eighth], seed)
    tales = views.stories(rows[: eighth // FRAMES], seed, frames=FRAMES, looks="story")
    for part in (shop["scene"], tales["scene"]):
        part["size"] = torch.full_like(part["size"], -1)
    texts += world.captions(twins) + shop["titles"] + list(itertools.chain(*tales["sentences"]))
    parts = scene, twins, shop["scene"], tales["scene"]
    return {name: torch.cat([widen(part[name], name) for part in parts]) for name in scene}, texts


def lookalikes(rows, seed):
    """Pictures of one object in groups of LOOKALIKES that share colour and background.   -> scene

    Among random scenes colours and backgrounds tell pictures apart, so a young CLIP learns nothing else for thousands of
    steps: shape and texture stay at chance. Within such a group nothing else is left to learn.
    """
    scene = world.scenes(rows, seed, objects=(1, 1))
    leader = torch.arange(len(rows)) // LOOKALIKES * LOOKALIKES
    scene |= {name: scene[name][leader] for name in ("colour", "background", "pattern")}
    kept = world.HELD_OUT[scene["shape"], scene["colour"], scene["texture"]]          # never twice with one shape
    scene["texture"] = (scene["texture"] + kept) % len(world.TEXTURES)                # and colour: the next is free
    return scene


def widen(value, name, slots=3):
    """Pad the objects' dimension of a scene's entry to three slots; what is added is absent."""
    missing = slots - value.shape[1] if value.ndim > 1 else 0
    if not missing:
        return value
    absent = value[:, :1].expand(-1, missing, *value.shape[2:]) * (name != "present")
    return torch.cat([value, absent], 1)


def spoil(pictures, scene, rng):
    """Teach the reader doubt: noise on every picture, and one in four smeared beyond recognition.

    A judge that has only seen perfect renders calls any blob a star. Smeared objects keep their place and colour;
    their shape is NO_SHAPE and their texture is not told.   -> pictures, scene (copies)
    """
    n, size = len(pictures), pictures.shape[-1]
    noise = torch.randn(pictures.shape, generator=rng) * torch.rand(n, 1, 1, 1, generator=rng) * 0.15
    smeared = torch.rand(n, generator=rng) < 0.25
    field = torch.randn(n, 2, 11, 11, generator=rng).to(pictures.device)                     # one push every 6 pixels
    push = F.interpolate(field, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1) * 0.09
    still = torch.eye(2, 3, device=pictures.device).expand(n, 2, 3)
    still = F.affine_grid(still, pictures.shape, align_corners=False)
    pushed = F.grid_sample(pictures, still + push, padding_mode="border", align_corners=False)
    small = F.interpolate(pushed, (size // 3, size // 3), mode="area")
    blurred = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    pushed[::2] = blurred[::2]                               # half of them: blur alone must not be the sign of a blob
    smeared = smeared.to(pictures.device)
    scene = scene | {"shape": torch.where(smeared[:, None], readers.NO_SHAPE, scene["shape"]),
                     "texture": torch.where(smeared[:, None], -1, scene["texture"])}
    return torch.where(smeared[:, None, None, None], pushed, pictures) + noise.to(pictures.device), scene


# -- how good they are ---------------------------------------------------------------------------------------


def recall_at_1(image, text):
    """Retrieval among CANDIDATES, averaged over groups.   (N, E) each -> picture to text, text to picture"""
    n = len(image) // CANDIDATES * CANDIDATES
    image, text = (F.normalize(x[:n], dim=1).unflatten(0, (-1, CANDIDATES)) for x in (image, text))
    similarity = image @ text.transpose(1, 2)                                                # (groups, 100, 100)
    own = torch.arange(CANDIDATES, device=image.device)
    return tuple(float((similarity.argmax(d) == own).float().mean()) for d in (2, 1))


def claims(fact, attribute):
    """One sentence for every value of an attribute, as the grammar says it: "the star is red", "the star is blue"."""
    plain = itertools.repeat(0)                                            # no synonyms
    if attribute == "background":
        return [f"the background is {world.alias(plain, value)}" for value in world.VALUES[attribute]]
    if attribute == "pattern":
        return ["a shape " + world.ground(plain, fact | {attribute: value}, True) for value in world.VALUES[attribute]]
    thing = fact["objects"][0]
    return [world.is_now(plain, thing | {attribute: value}, attribute) for value in world.VALUES[attribute]]


class Task:
    headline, better = "R@1", "higher"
    ablations = {"full": {}, "one-hot targets": {"soft": False},
                 "w/o patch loss": {"patch_loss": 0.0}}
    table = ["R@1", "R@1 unseen", "zero-shot shape", "zero-shot texture"]

    def __init__(self, cfg, device):
        if cfg.batch % 32 or cfg.size != readers.SIDE:
            raise ValueError(f"--batch={cfg.batch} must be a multiple of 32, --size={cfg.size} must be {readers.SIDE}")
        self.cfg, self.device = cfg, device
        self.words = WordTokenizer(list(world.WORDS), cfg.context)
        image = ImageTower(cfg.width, cfg.depth, cfg.heads, cfg.patch, cfg.size // cfg.patch, cfg.embed)
        text = TextTower(cfg.text_width, cfg.text_depth, cfg.heads, cfg.context, self.words.size, cfg.embed)
        self.clip = CLIP(image, text).to(device)
        self.reader = readers.Reader().to(device)
        self.patch_head = nn.Conv2d(cfg.width, sum(len(world.VALUES[name]) for name in PATCHES), 1).to(device)
        matrices = {n: p for n, p in self.clip.named_parameters() if p.ndim > 1 and "embedding" not in n}
        others = [p for n, p in self.clip.named_parameters() if n not in matrices] + list(self.patch_head.parameters())
        groups = [{"params": list(matrices.values())}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), eps=1e-6, weight_decay=cfg.decay)
        self.reader_optimiser = torch.optim.AdamW(self.reader.parameters(), lr=cfg.reader_lr, weight_decay=0.02)
        self.saved = {"clip": self.clip, "reader": self.reader, "patch_head": self.patch_head, "optimiser": self.optimiser,
                      "reader_optimiser": self.reader_optimiser}
        self.chance = {f"R@1{how}": 1 / CANDIDATES for how in ("", " picture to text", " text to picture", " unseen")}
        for name, values in world.VALUES.items():
            self.chance |= {f"zero-shot {name}": 1 / len(values), f"reader {name}": 1 / len(values)}
        self.next = "python train.py galip"

    def batches(self, seed, start, stop):
        for t in range(start, stop):
            scene, texts = mixture(t, self.cfg.batch, seed)
            yield world.to(scene, self.device), texts

    def update(self, batch, step):
        """One step of both. Every rank computes the whole batch: all pairs are each other's negatives."""
        scene, texts = batch
        pictures, masks = world.render(scene, self.cfg.size)
        losses = {}
        if step < self.cfg.reader_steps:
            self.reader.train()
            spoilt, truth = spoil(pictures, scene, generator(self.cfg.seed, step))
            self.schedule(self.reader_optimiser, self.cfg.reader_lr, step, self.cfg.reader_steps)
            losses["reader"] = readers.loss(self.reader, spoilt, truth)
            parallel.descend(self.reader_optimiser, losses["reader"])
        self.schedule(self.optimiser, self.cfg.lr, step, self.cfg.steps)
        targets = soft_targets(texts) if self.cfg.soft else torch.eye(len(texts))
        patches, image = self.clip.encode_image(standard(pictures, self.cfg.size), (self.cfg.depth - 1,))
        losses["clip"] = contrastive(image, self.sentences(texts), self.clip.logit_scale, targets.to(self.device))
        fade = self.cfg.patch_loss * (1 - step / self.cfg.steps)
        if fade:
            losses["patches"] = self.read_patches(patches[:, 0], patch_labels(masks, scene, self.clip.grid))
        parallel.descend(self.optimiser, losses["clip"] + fade * losses.get("patches", 0), clip=1.0)
        self.clip.logit_scale.data.clamp_(max=LARGEST_SCALE)
        return {name: value.detach() for name, value in losses.items()}

    def read_patches(self, patches, labels):
        """Auxiliary loss: what each patch token (B, w, g, g) shows, by a linear map that is thrown away.   -> scalar"""
        logits = self.patch_head(patches).split([len(world.VALUES[name]) for name in PATCHES], 1)
        return sum(F.cross_entropy(y, labels[name], ignore_index=-1) for y, name in zip(logits, PATCHES, strict=True))

    def schedule(self, optimiser, lr, step, steps):
        """Linear warm-up over 100 steps, then a cosine to 0."""
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / 100, (1 + math.cos(math.pi * step / steps)) / 2)

    def sentences(self, texts):
        """(N, E): padding is cut off, which changes nothing behind a causal mask."""
        tokens = self.words(texts)
        return self.clip.encode_text(tokens[:, : int((tokens > 0).sum(1).max())].to(self.device))[0]

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, split):
        """R@1 with full captions among 100, zero-shot attributes of single objects, the reader on fresh renders."""
        n = 2000 if split == "test" else 500
        metrics = {}
        for name, which in (("", split), (" unseen", "unseen")):
            scene = world.scenes(range(n), split=which)
            image = self.embed(scene)
            there, back = recall_at_1(image, self.in_parts(self.sentences, world.captions(scene)))
            metrics[f"R@1{name}"] = (there + back) / 2
            if not name:
                metrics |= {"R@1 picture to text": there, "R@1 text to picture": back}
            scene = world.scenes(range(n), split=which, objects=(1, 1))
            metrics |= {f"zero-shot{name} {a}": self.zero_shot(scene, a) for a in world.VALUES}
            metrics |= {f"reader{name} {a}": x for a, x in self.read(world.scenes(range(n), split=which)).items()}
        return metrics

    def in_parts(self, f, values, size=250):
        return torch.cat([f(values[i : i + size]) for i in range(0, len(values), size)])

    def embed(self, scene):
        return self.in_parts(lambda x: self.clip.encode_image(standard(x, self.cfg.size).to(self.device))[1],
                             world.render(scene, self.cfg.size)[0])

    def zero_shot(self, scene, attribute):
        """Share of pictures whose most similar claim about an attribute is the true one."""
        options = [claims(fact, attribute) for fact in world.facts(scene)]
        distinct = sorted({text for row in options for text in row})
        text = F.normalize(self.in_parts(self.sentences, distinct), dim=1)
        which = torch.tensor([[distinct.index(text) for text in row] for row in options])
        similarity = torch.einsum("be,bve->bv", self.embed(scene), text[which])
        truth = scene[attribute][:, 0] if scene[attribute].ndim > 1 else scene[attribute]
        return float((similarity.argmax(1).cpu() == truth).float().mean())

    def read(self, scene):
        """The reader's accuracy on clean renders; an object that it does not find counts as wrong."""
        self.reader.eval()
        pictures = world.render(scene, self.cfg.size)[0].to(self.device)
        readings = [self.reader(part) for part in pictures.split(250)]
        reading = {name: torch.cat([r[name] for r in readings]).cpu() for name in readings[0]}
        return readers.accuracy(reading, scene)

    # -- what it leaves behind -------------------------------------------------------------------------------

    def sample(self, folder):
        """The weights as float16 safetensors, and test pictures over the caption that CLIP finds for each."""
        clip_half = {name: tensor.half() for name, tensor in official_names(self.clip).items()}
        about = {"image_heads": self.cfg.heads, "text_heads": self.cfg.heads, "words": " ".join(self.words.words)}
        reader_half = {name: t.half() if t.is_floating_point() else t for name, t in self.reader.state_dict().items()}
        for place in [folder] + [clip.SMALL.parent] * self.cfg.export:
            write_safetensors(place / clip.SMALL.name, clip_half, about)
            write_safetensors(place / readers.SHIPPED.name, reader_half)
        scene = world.scenes(range(CANDIDATES), split="test")
        with torch.no_grad():
            texts = world.captions(scene)
            similarity = F.normalize(self.embed(scene), dim=1) @ F.normalize(self.sentences(texts), dim=1).T
        found = similarity.argmax(1).tolist()
        notes = [("" if f == n else "WRONG: ") + texts[f] for n, f in enumerate(found)]
        grid(folder / "retrieved.png", world.render(scene, 128)[0][:24], notes[:24], columns=6,
             title=f"the most similar of {CANDIDATES} captions")
