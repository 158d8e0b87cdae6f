"""GALIP: Generative Adversarial CLIPs for Text-to-Image Synthesis (Tao, Bao, Tang, Xu, CVPR 2023).

    generator       noise, sentence -> bridge feature -> frozen CLIP-ViT with prompts -> visual concepts
                    bridge + 0.1 concepts -> image generator (deep fusion blocks) -> picture, in one pass
    discriminator   picture -> frozen CLIP-ViT, several depths -> CLIP feature extractor -> quality assessor -> score

The frozen CLIP is an argument of every call, never a part: its weights are neither trained nor saved with the model.
The paper's equation numbers could not be read (UNVERIFIED); names follow its figures. Shape letters: B batch, Z noise,
E sentence width, w CLIP width, g CLIP grid, C channels.
"""
import torch
from torch import nn
from torch.nn import functional as F

from data.weights import check_names
from kernels.pointwise import df_block

SLOPE = 0.2                # of every LeakyReLU
CONCEPT_WEIGHT = 0.1       # Official code: bridge + 0.1 x concepts. Paper: whether it prints the weight is UNVERIFIED
FIRST_SIZE = 8             # picture side after the first generator block


# -- deep fusion (shared with DF-GAN) -------------------------------------------------------------------------------------


def condition_mlp(condition, channels, bias, hidden):
    """One of the two nets behind an affine: starts as the constant `bias`, whatever the condition."""
    hidden = max(hidden, channels)
    net = nn.Sequential(nn.Linear(condition, hidden), nn.ReLU(), nn.Linear(hidden, channels))
    nn.init.zeros_(net[2].weight)
    nn.init.constant_(net[2].bias, bias)
    return net


class Affine(nn.Module):
    """Text-conditioned scale and shift of each channel, the identity at first.   (B, Z + E) -> gamma, beta (B, C)

    hidden  least width of the hidden layers. Official code: as wide as the channels, 0 here; a small generator has so few
            channels that the sentence does not fit through (README.md has the numbers)
    """

    def __init__(self, condition, channels, hidden=0):
        super().__init__()
        self.gamma = condition_mlp(condition, channels, 1.0, hidden)
        self.beta = condition_mlp(condition, channels, 0.0, hidden)

    def forward(self, condition):
        return self.gamma(condition), self.beta(condition)


class DFBlock(nn.Module):
    """Deep fusion: affine, LeakyReLU, affine, LeakyReLU, fused in one kernel.   x (B, C, H, W) -> the same shape"""

    def __init__(self, condition, channels, hidden=0):
        super().__init__()
        self.first, self.second = Affine(condition, channels, hidden), Affine(condition, channels, hidden)

    def forward(self, condition, x):
        return df_block(x, *self.first(condition), *self.second(condition), slope=SLOPE)


# -- generator ------------------------------------------------------------------------------------------------------------


class MBlock(nn.Module):
    """Residual block of the bridge feature predictor at CLIP's grid."""

    def __init__(self, condition, channels, middle, hidden=0):
        super().__init__()
        self.conv1, self.fuse1 = nn.Conv2d(channels, middle, 3, padding=1), DFBlock(condition, middle, hidden)
        self.conv2, self.fuse2 = nn.Conv2d(middle, channels, 3, padding=1), DFBlock(condition, channels, hidden)

    def forward(self, condition, x):
        return x + self.fuse2(condition, self.conv2(self.fuse1(condition, self.conv1(x))))


class BridgePredictor(nn.Module):
    """Bridge feature predictor: an early CLIP token map out of noise and text.   -> (B, w, g, g)

    canvas  spread of what the map starts from where the noise is 0, one number a channel and place. Official code: torch's
            default, 0 here, almost nothing: a place must then be known by the noise, which is new in each picture
    """

    def __init__(self, noise, condition, clip_width, grid, channels=64, middle=32, blocks=4, hidden=0, canvas=0.0):
        super().__init__()
        self.grid = grid
        self.code = nn.Linear(noise, grid * grid * channels)
        if canvas:
            nn.init.normal_(self.code.bias, std=canvas)
        self.blocks = nn.ModuleList(MBlock(condition, channels, middle, hidden) for _ in range(blocks))
        self.out = nn.Conv2d(channels, clip_width, 5, padding=2)

    def forward(self, noise, condition):
        x = self.code(noise).unflatten(1, (-1, self.grid, self.grid))
        for block in self.blocks:
            x = block(condition, x)
        return self.out(x)


DOUBLE = ((1.0, 1.0, 0.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0))    # 3 taps over doubled pixels, as 4 taps


def doubled(conv, x):
    """conv3x3 of the nearest x2 of x, without making the large copy.   (B, in, h, h) -> (B, out, 2h, 2h)

    Along each axis a 3-wide kernel over doubled pixels meets only two different ones, so its weights can be added first:
    a transposed convolution of 4x4 and stride 2, four products an output pixel instead of nine. Equal up to rounding.
    """
    taps = torch.tensor(DOUBLE, device=x.device, dtype=conv.weight.dtype)
    kernel = torch.einsum("oihw,hy,wx->ioyx", conv.weight.flip(2, 3), taps, taps)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


class GBlock(nn.Module):
    """Upsampling block of the image generator.   (B, in, h, h) -> (B, out, size, size)

    Nearest resizing copies pixels, so it commutes with what acts on pixels one by one: the first fusion block and the
    1x1 shortcut run before it, on fewer pixels, with bit-identical results. Official code: resizes first.
    """

    def __init__(self, condition, channels_in, channels_out, size, hidden=0):
        super().__init__()
        self.size = size
        self.fuse1, self.conv1 = DFBlock(condition, channels_in, hidden), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.fuse2, self.conv2 = DFBlock(condition, channels_out, hidden), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, condition, x):
        y = self.fuse1(condition, x)
        y = doubled(self.conv1, y) if self.size == 2 * x.shape[-1] else self.conv1(F.interpolate(y, size=self.size))
        return F.interpolate(self.shortcut(x), size=self.size) + self.conv2(self.fuse2(condition, y))


def ladder(base, size):
    """Picture sides and channels of the generator blocks: (64, 224) -> 8 16 32 64 128 224 and 512 512 512 512 256 128 64.

    Official code: the nominal 256 gives the channels, and the last side 224 is typed in; here it is grid x patch.
    """
    sizes = []
    while FIRST_SIZE << len(sizes) < size:
        sizes.append(FIRST_SIZE << len(sizes))
    sizes.append(size)
    return sizes, [base * min(2**k, 8) for k in range(len(sizes), -1, -1)]


class Generator(nn.Module):
    """Pictures from noise and sentences in one forward pass.

    noise (B, Z) standard normal, sentence (B, E) CLIP's, not normalised, clip frozen -> (B, 3, S, S), about [-1, 1]
    prompt_layers  0-based CLIP blocks that see one predicted prompt token each
    mapper         False leaves the frozen CLIP out (ablation): the bridge feature is painted directly
    prompts        False keeps the mapper but shows it no prompt
    """

    def __init__(self, clip_width, grid, patch, embed, noise=100, base=64, bridge=(64, 32, 4), prompt_layers=tuple(range(1, 9)),
                 mapper=True, prompts=True, hidden=0, canvas=0.0):
        super().__init__()
        condition = noise + embed
        self.noise, self.mapper, self.prompt_layers = noise, mapper, prompt_layers if prompts else ()
        self.bridge = BridgePredictor(noise, condition, clip_width, grid, *bridge, hidden, canvas)
        self.prompt = nn.Linear(condition, len(prompt_layers) * clip_width)
        self.sizes, channels = ladder(base, grid * patch)
        self.fuse = nn.Conv2d(clip_width, channels[0], 5, padding=2)
        self.blocks = nn.ModuleList(GBlock(condition, a, b, size, hidden)
                                    for a, b, size in zip(channels[:-1], channels[1:], self.sizes, strict=True))
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def concepts(self, bridge, condition, clip):
        """Visual concepts: the frozen CLIP-ViT run on the bridge feature, prompts appended layer by layer."""
        prompts = self.prompt(condition).unflatten(1, (-1, bridge.shape[1]))                       # (B, P, w)
        return clip.map_tokens(bridge, prompts[:, : len(self.prompt_layers)], self.prompt_layers)  # (B, w, g, g)

    def forward(self, noise, sentence, clip):
        condition = torch.cat([noise, sentence], dim=1)                                            # (B, Z + E)
        x = self.bridge(noise, condition)
        if self.mapper:
            x = x + CONCEPT_WEIGHT * self.concepts(x, condition, clip)
        x = self.fuse(x)
        for block in self.blocks:
            x = block(condition, x)
        return self.to_rgb(F.leaky_relu(x, SLOPE))       # Official code: no tanh; clamp when showing or scoring


# -- discriminator ----------------------------------------------------------------------------------------------------------


def residual(channels_in, channels_out):
    """conv, LeakyReLU, conv, LeakyReLU without biases: R of the feature extractor."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.LeakyReLU(SLOPE),
                         nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False), nn.LeakyReLU(SLOPE))


class FeatureExtractor(nn.Module):
    """CLIP feature extractor (netD): walks up the taps, each deeper one through gates.   (B, n, w, g, g) -> (B, C, g, g)

    The gates start at 0: at first the critic is the first tap alone, without a residual.
    """

    def __init__(self, clip_width, taps, out=512):
        super().__init__()
        self.steps = nn.ModuleList(residual(clip_width, clip_width) for _ in range(taps - 1))
        self.gamma = nn.Parameter(torch.zeros(taps))        # of R; the last one belongs to `main`
        self.beta = nn.Parameter(torch.zeros(taps - 1))     # of the deeper taps
        self.main, self.shortcut = residual(clip_width, out), nn.Conv2d(clip_width, out, 1)

    def forward(self, taps):
        x = taps[:, 0]
        for j, step in enumerate(self.steps):
            x = x + self.gamma[j] * step(x) + self.beta[j] * taps[:, j + 1]
        return self.shortcut(x) + self.gamma[-1] * self.main(x)


class QualityAssessor(nn.Module):
    """Quality assessor (netC): is this picture real, and of this sentence?   (B, C, g, g), (B, E) -> score (B,)"""

    def __init__(self, channels, embed, grid, hidden=128):
        super().__init__()
        self.joint = nn.Conv2d(channels + embed, hidden, 4, bias=False)
        self.score = nn.Conv2d(hidden, 1, grid - 3, bias=False)

    def forward(self, x, sentence):
        tiled = sentence[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.score(F.leaky_relu(self.joint(torch.cat([x, tiled], dim=1)), SLOPE)).flatten()


class Critic(nn.Module):
    """GALIP's discriminator. `look` uses the frozen CLIP; `score` is all that is trained, and all the penalty sees."""

    def __init__(self, clip_width, grid, embed, taps=(1, 4, 8), channels=512, hidden=128):
        super().__init__()
        self.taps = taps
        self.extract = FeatureExtractor(clip_width, len(taps), channels)
        self.assess = QualityAssessor(channels, embed, grid, hidden)

    def look(self, image, clip, embed=True):
        """Evidence and CLIP's embedding of pictures in CLIP's range.   -> (B, taps, w, g, g), (B, E)"""
        return clip.encode_image(image, self.taps)

    def score(self, evidence, sentence):
        return self.assess(self.extract(evidence), sentence)


class DownBlock(nn.Module):
    """Halve the picture: conv4x4 of stride 2, conv3x3, gated, beside an averaged shortcut (DF-GAN; its gate starts at 0)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.residual = nn.Sequential(nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False), nn.LeakyReLU(SLOPE),
                                      nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False), nn.LeakyReLU(SLOPE))
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return F.avg_pool2d(self.shortcut(x), 2) + self.gamma * self.residual(x)


class PlainCritic(nn.Module):
    """The rival: DF-GAN's discriminator on pixels, no CLIP. Same calls as `Critic`; here the evidence is the picture."""

    def __init__(self, size, embed, base=64):
        super().__init__()
        depth = (size // 4).bit_length() - 1                       # halvings until 4 x 4
        channels = [base * min(2**k, 8) for k in range(depth + 1)]
        self.first = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList(map(DownBlock, channels[:-1], channels[1:]))
        self.joint = nn.Conv2d(channels[-1] + embed, 2 * base, 3, padding=1, bias=False)
        self.last = nn.Conv2d(2 * base, 1, 4, bias=False)

    def look(self, image, clip, embed=True):
        return image, clip.encode_image(image)[1] if embed else None

    def extract(self, evidence):
        x = self.first(evidence)
        for block in self.down:
            x = block(x)
        return F.adaptive_avg_pool2d(x, 4)                         # sides that are no power of two

    def assess(self, x, sentence):
        tiled = sentence[:, :, None, None].expand(-1, -1, 4, 4)
        return self.last(F.leaky_relu(self.joint(torch.cat([x, tiled], dim=1)), SLOPE)).flatten()

    def score(self, evidence, sentence):
        return self.assess(self.extract(evidence), sentence)


# -- losses -------------------------------------------------------------------------------------------------------------------


def hinge_d(real, fake, mismatched):
    """Matching-aware hinge loss of the critic: real pairs up, fake pairs and real pictures with a wrong sentence down."""
    return F.relu(1 - real).mean() + (F.relu(1 + fake).mean() + F.relu(1 + mismatched).mean()) / 2


def gradient_penalty(score, evidence, sentence, weight=2.0, power=6, form="code"):
    """Matching-aware gradient penalty: keep the critic flat around real, matching pairs.

    score     (B,) of real pairs, computed from `evidence` and `sentence`, both of which require grad
    evidence  (B, ...) CLIP features (or pixels for the plain critic); sentence (B, E)
    form      Official code: k E[(|d_evidence|^2 + |d_sentence|^2)^(p/2)], one norm of both gradients, followed.
              Paper: k E[(|d_evidence| + |d_sentence|)^p], never smaller.
    returns   scalar >= 0 in float32, also under autocast: the sixth power overflows half precision
    """
    if len(evidence) != len(sentence):
        raise ValueError(f"{len(evidence)} pictures and {len(sentence)} sentences: they must be pairs")
    gradients = torch.autograd.grad(score.float().sum(), (evidence, sentence), create_graph=True)
    a, b = (g.float().flatten(1).norm(dim=1) for g in gradients)
    norm = a + b if form == "paper" else (a.square() + b.square() + 1e-24).sqrt()     # 1e-24: finite slope at zero
    return weight * norm.pow(power).mean()


def clip_similarity(image_embedding, sentence):
    """Mean cosine of pictures and sentences in CLIP's space: the generator's second reward, and the 'CLIP score'."""
    return F.cosine_similarity(image_embedding, sentence, dim=1).mean()


# -- official weights -----------------------------------------------------------------------------------------------------------


def _fusion(ours, theirs):
    """{our key: official key} of one DFBlock."""
    return {f"{ours}.{affine}.{net}.{2 * layer - 2}.{p}": f"{theirs}.affine{i}.fc_{net}.linear{layer}.{p}"
            for i, affine in enumerate(("first", "second")) for net in ("gamma", "beta")
            for layer in (1, 2) for p in ("weight", "bias")}


def _conv(ours, theirs):
    return {f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")}


def _count(state, start):
    """How many blocks are numbered after `start`."""
    return len({k.removeprefix(start).split(".")[0] for k in state if k.startswith(start)})


def generator_names(state):
    """{our key: official netG key}."""
    names = _conv("bridge.code", "fc_code") | _conv("bridge.out", "mapping.conv_fuse") | _conv("prompt", "mapping.fc_prompt")
    names |= _conv("fuse", "mapping.conv") | _conv("to_rgb", "to_rgb.1")
    for ours, theirs, conv in (("bridge.blocks", "mapping.FBlocks", "conv"), ("blocks", "GBlocks", "c")):
        for i in range(_count(state, f"{theirs}.")):
            for j in (1, 2):
                names |= _conv(f"{ours}.{i}.conv{j}", f"{theirs}.{i}.{conv}{j}")
                names |= _fusion(f"{ours}.{i}.fuse{j}", f"{theirs}.{i}.fuse{j}")
            if f"{theirs}.{i}.c_sc.weight" in state:
                names |= _conv(f"{ours}.{i}.shortcut", f"{theirs}.{i}.c_sc")
    return names


def _load(model, names, state, ignored, where):
    """Copy state into model under `names`; a number may be stored as (1,).   raises ValueError listing what does not fit"""
    ours = model.state_dict()
    shapes = {theirs: ours[name].shape for name, theirs in names.items() if name in ours}
    state = {k: v.float().view(shapes[k]) if k in shapes and v.numel() == shapes[k].numel() else v
             for k, v in state.items() if k in shapes or not ignored(k)}
    check_names(shapes, state, where)
    if ours.keys() != names.keys():                          # such as a block whose shortcut was expected
        raise ValueError(f"{where} does not fit: it has no {', '.join(sorted(ours.keys() ^ names.keys())[:6])}")
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return model


def strip_module(state):
    """Names without the `module.` that data-parallel training puts in front."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def generator_from_official(net_g, patch=32):
    """Generator with the authors' netG. Its private copy of the CLIP image tower is returned beside it, not kept.

    -> generator, {tower key: tensor}; pass the frozen CLIP whose tower holds those weights when calling
    """
    state = strip_module(net_g)
    tower = {k.removeprefix("mapping.CLIP_ViT."): v for k, v in state.items() if k.startswith("mapping.CLIP_ViT.")}
    try:
        noise, condition = state["fc_code.weight"].shape[1], state["mapping.fc_prompt.weight"].shape[1]
        clip_width, channels = state["mapping.conv_fuse.weight"].shape[:2]
        hidden, grid = state["mapping.FBlocks.0.conv1.weight"].shape[0], int((len(tower["positional_embedding"]) - 1) ** 0.5)
        base, prompts = state["to_rgb.1.weight"].shape[1], len(state["mapping.fc_prompt.bias"]) // clip_width
    except KeyError as error:
        raise ValueError(f"not an official netG: missing {error.args[0]}") from None
    bridge = channels, hidden, _count(state, "mapping.FBlocks.")
    model = Generator(clip_width, grid, patch, condition - noise, noise, base, bridge, tuple(range(1, prompts + 1)))
    return _load(model, generator_names(state), state, lambda k: k.startswith("mapping.CLIP_ViT."),
                 "the official netG"), tower


def critic_from_official(net_d, net_c, taps=(1, 4, 8)):
    """Critic with the authors' netD and netC; netD's `conv_s` of the inner blocks is dead there and left out."""
    d, c = strip_module(net_d), strip_module(net_c)
    try:
        hidden, joint = c["joint_conv.0.weight"].shape[:2]
        channels, clip_width = d["main.conv_s.weight"].shape[:2]
        grid = c["joint_conv.2.weight"].shape[-1] + 3
        steps = _count(d, "DBlocks.")
        d["gamma"] = torch.cat([*(d[f"DBlocks.{i}.gamma"] for i in range(steps)), d["main.gamma"]])
        d["beta"] = torch.cat([d[f"DBlocks.{i}.beta"] for i in range(steps)])
    except KeyError as error:
        raise ValueError(f"not an official netD and netC: missing {error.args[0]}") from None
    names = {"extract.gamma": "gamma", "extract.beta": "beta", "assess.joint.weight": "joint_conv.0.weight",
             "assess.score.weight": "joint_conv.2.weight"} | _conv("extract.shortcut", "main.conv_s")
    for layer in (0, 2):
        names[f"extract.main.{layer}.weight"] = f"main.conv_r.{layer}.weight"
        names |= {f"extract.steps.{i}.{layer}.weight": f"DBlocks.{i}.conv_r.{layer}.weight" for i in range(steps)}
    model = Critic(clip_width, grid, joint - channels, taps[: steps + 1], channels, hidden)
    dead = lambda k: k.endswith((".gamma", ".beta")) or (k.startswith("DBlocks.") and ".conv_s." in k)  # noqa: E731
    return _load(model, names, d | c, dead, "the official netD and netC")
