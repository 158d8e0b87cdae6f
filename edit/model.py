"""DE-Net: Dynamic Text-guided Image Editing Adversarial Networks (Tao, Bao, Tang, Wu, Wei, Tian, AAAI 2023).

    source picture --image encoder--> features at every level, skips
    features --semantic decoder--> query maps m (text-free)             the regions that a text can ask for
    bottleneck, sentence --Comp-Pred--> code t                          how to compose the manipulations
    bottleneck --DEBlock x levels--> edited picture
        DEBlock: w * C-Affine(h; sentence) + (1 - w) * S-Affine(h; DCBlock(m; sentence)) + skip,   w from t

The public code holds these networks, but neither losses nor training step nor weights; the paper's equation numbers could
not be read (UNVERIFIED). Names in prose are the paper's; official names appear only in `from_official`.
Shape letters: B batch, E sentence width, n base width, C channels, K kernels of a DCBlock, t composition code.
"""
import torch
from torch import nn
from torch.nn import functional as F

from data import parallel
from data.weights import check_names
from kernels.pointwise import de_combine

SLOPE = 0.2


def widths(base, size):
    """Channels before each halving until 4 x 4: (32, 256) -> 32 64 128 256 256 256 256.   raises ValueError"""
    levels = (size // 4).bit_length() - 1
    if levels < 1 or 4 << levels != size:
        raise ValueError(f"picture side {size}: DE-Net needs 4 x a power of two, such as 32, 64 or 256")
    return [base * min(2**k, 8) for k in range(levels + 1)]


def text_mlp(width_in, width_out, hidden=None):
    """Linear, ReLU, Linear: every net that reads the sentence inside a DEBlock."""
    return nn.Sequential(nn.Linear(width_in, hidden or width_in), nn.ReLU(), nn.Linear(hidden or width_in, width_out))


def start_constant(net, value):
    """Last layer gives `value` whatever the input, so that training starts from a neutral block."""
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.bias, value)


def up_conv(conv, x):
    """conv(nearest x2 (x)) for a 3 x 3 convolution, exactly, with 16 products a source pixel instead of 36.

    Repeating pixels and a 3 x 3 kernel are one transposed convolution with a 4 x 4 kernel whose taps are sums of the
    3 x 3 ones: an output pixel reads only 2 x 2 different source pixels.   (B, C, h, w) -> (B, C', 2h, 2w)
    """
    taps = conv.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    kernel = torch.einsum("ia,jb,ocab->coij", taps, taps, conv.weight)                      # (C, C', 4, 4)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


# -- source side ----------------------------------------------------------------------------------------------------------


class Down(nn.Module):
    """Halve the picture and double the channels.   (B, C, H, W) -> (B, C', H/2, W/2)"""

    def __init__(self, channels_in, channels_out, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=False)
        self.norm = parallel.BatchNorm2d(channels_out) if norm else nn.Identity()

    def forward(self, x):
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class ImageEncoder(nn.Module):
    """Source image encoder.   (B, 3, S, S) -> bottleneck (B, 8n, 4, 4), skips from the finest to the coarsest"""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(Down(a, b) for a, b in zip(channels[:-1], channels[1:], strict=True))

    def forward(self, image):
        x, skips = self.first(image), []
        for down in self.down:
            skips.append(x)
            x = down(x)
        return x, skips


class SemanticDecoder(nn.Module):
    """Parallel, text-free decoder: at every level the maps that DCBlocks query.   -> coarsest to finest"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(channels[-2::-1], channels[:0:-1], strict=True))

    def forward(self, x, skips):
        maps = []
        for conv, skip in zip(self.conv, reversed(skips), strict=True):
            x = F.leaky_relu(up_conv(conv, x), SLOPE) + skip
            maps.append(x)
        return maps


class CompositionPredictor(nn.Module):
    """Comp-Pred: looks at the source and reads the sentence, to say how each level should mix its manipulations.

    bottleneck (B, 8n, 4, 4), sentence (B, E) -> code t (B, 4 width), shared by all DEBlocks
    Official code: difference and product are taken between the halves of the fused vector, not of picture and text.
    """

    def __init__(self, channels, embed, width=256):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(SLOPE),
                                   nn.Conv2d(channels, width, 4))
        self.text = nn.Sequential(nn.Linear(embed, width), nn.LeakyReLU(SLOPE), nn.Linear(width, width))
        self.fuse = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LeakyReLU(SLOPE), nn.Linear(2 * width, 2 * width))
        self.code = nn.Linear(4 * width, 4 * width)

    def forward(self, bottleneck, sentence):
        image, text = self.image(bottleneck).flatten(1), self.text(sentence)
        a, b = self.fuse(torch.cat([image, text], dim=1)).chunk(2, dim=1)
        return F.leaky_relu(self.code(torch.cat([a - b, a * b, image, text], dim=1)), SLOPE)


# -- target side ----------------------------------------------------------------------------------------------------------


class DCBlock(nn.Module):
    """Dynamic text-adaptive convolution: the sentence writes the kernels that query the semantic maps.

    m (B, C, H, W), sentence (B, E) -> weight and shift maps W, S (B, 1, H, W) of the spatial manipulation
    K_b = K * scale + shift, one scale and shift per (kernel, input channel); all samples run in one grouped convolution.
    dynamic=False keeps the static kernels K (ablation).
    """

    def __init__(self, channels, embed, kernels=8, dynamic=True):
        super().__init__()
        self.dynamic = dynamic
        self.kernel = nn.Parameter(torch.empty(kernels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.kernel, a=5**0.5)
        self.scale, self.shift = text_mlp(embed, kernels * channels), text_mlp(embed, kernels * channels)
        start_constant(self.scale[2], 1.0)
        start_constant(self.shift[2], 0.0)
        self.to_weight = nn.Conv2d(kernels, 1, 3, padding=1, bias=False)
        self.to_shift = nn.Conv2d(kernels, 1, 3, padding=1, bias=False)

    def kernels(self, sentence):
        """Per-sample kernels.   (B, E) -> (B, K, C, 3, 3)"""
        if not self.dynamic:
            return self.kernel.expand(len(sentence), -1, -1, -1, -1)
        scale, shift = (net(sentence).unflatten(1, self.kernel.shape[:2])[..., None, None] for net in (self.scale, self.shift))
        return self.kernel * scale + shift

    def forward(self, m, sentence):
        kernels = self.kernels(sentence)
        q = F.conv2d(m.flatten(0, 1)[None], kernels.flatten(0, 1), padding=1, groups=len(m))       # (1, B K, H, W)
        q = q.unflatten(1, kernels.shape[:2])[0]
        both = torch.cat([self.to_weight.weight, self.to_shift.weight])                            # one pass for both maps
        return F.conv2d(q, both, padding=1).split(1, dim=1)


class DEBlock(nn.Module):
    """Dynamic editing block: twice the resolution, two manipulations, composed per channel by predicted weights.

    composition  "dynamic" (the paper), "fixed" (w = 1/2), "channel" (w = 1) or "spatial" (w = 0): ablations
    """

    def __init__(self, channels_in, channels, embed, code, kernels=8, composition="dynamic", dynamic=True):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.gamma, self.beta = text_mlp(embed, channels), text_mlp(embed, channels)       # C-Affine
        start_constant(self.gamma[2], 1.0)
        start_constant(self.beta[2], 0.0)
        self.query = DCBlock(channels, embed, kernels, dynamic)                            # S-Affine
        self.weight = nn.Linear(code, channels)
        start_constant(self.weight, 0.0)                                                   # w = 1/2 at first
        self.fixed = {"dynamic": None, "fixed": 0.5, "channel": 1.0, "spatial": 0.0}[composition]

    def forward(self, h, skip, m, sentence, code):
        h = up_conv(self.conv, h)
        w = torch.sigmoid(self.weight(code))                                               # (B, C)
        if self.fixed is not None:
            w = torch.full_like(w, self.fixed)
        weight, shift = self.query(m, sentence)                                            # (B, 1, H, W) each
        return de_combine(h, skip, self.gamma(sentence), self.beta(sentence), w, weight, shift, slope=SLOPE), w, weight


class Generator(nn.Module):
    """The editor: deterministic, no noise.

    image (B, 3, S, S) in [-1, 1], sentence (B, E) -> edited picture in [-1, 1], and with explain=True also the
    composition weights, [(B, C)] from coarse to fine, and the query maps W, [(B, 1, h, w)]
    """

    def __init__(self, size, embed, base=32, code_width=256, kernels=8, composition="dynamic", dynamic=True, semantic=True):
        super().__init__()
        channels, self.semantic, self.size = widths(base, size), semantic, size
        self.encoder = ImageEncoder(channels)
        self.decoder = SemanticDecoder(channels)
        self.composer = CompositionPredictor(channels[-1], embed, code_width)
        self.blocks = nn.ModuleList(DEBlock(b, a, embed, 4 * code_width, kernels, composition, dynamic)
                                    for a, b in zip(channels[-2::-1], channels[:0:-1], strict=True))
        self.to_rgb = nn.Conv2d(channels[0], 3, 3, padding=1)

    def encode(self, image):
        """What no sentence changes.   -> bottleneck, skips from fine to coarse, query maps from coarse to fine"""
        if image.shape[2:] != (self.size, self.size):
            raise ValueError(f"this editor was built for {self.size} x {self.size} pictures, got {tuple(image.shape[2:])}")
        h, skips = self.encoder(image)
        return h, skips, self.decoder(h, skips) if self.semantic else skips[::-1]    # ablation: queries read the encoder

    def edit(self, encoded, sentence, explain=False):
        """Target decoder: one encoded picture can be edited by several sentences."""
        h, skips, maps = encoded
        code = self.composer(h, sentence)
        weights, queries = [], []
        for block, skip, m in zip(self.blocks, reversed(skips), maps, strict=True):
            h, w, query = block(h, skip, m, sentence, code)
            weights.append(w)
            queries.append(query)
        edited = torch.tanh(self.to_rgb(F.leaky_relu(h, SLOPE)))
        return (edited, weights, queries) if explain else edited

    def forward(self, image, sentence, explain=False):
        return self.edit(self.encode(image), sentence, explain)


# -- discriminator ----------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Is this picture real, and does the sentence describe it?   (B, 3, S, S), (B, E) -> score (B,)

    norm  Official code: batch norm. It couples samples, so a per-sample gradient penalty is not defined; our
          reconstructed objective uses the penalty and leaves the norm out (norm=False, the default).
    """

    def __init__(self, size, embed, base=32, norm=False):
        super().__init__()
        channels = widths(base, size)
        self.first = nn.Conv2d(3, channels[0], 4, 2, 1, bias=False)
        self.down = nn.ModuleList(Down(a, b, norm) for a, b in zip(channels[:-2], channels[1:-1], strict=True))
        self.joint = nn.Conv2d(channels[-2] + embed, 2 * base, 3, padding=1, bias=False)
        self.last = nn.Conv2d(2 * base, 1, 4, bias=False)

    def look(self, image):
        """The trunk: one look at a picture serves every sentence about it.   -> (B, 8n, 4, 4)"""
        x = F.leaky_relu(self.first(image), SLOPE)
        for down in self.down:
            x = down(x)
        return x

    def judge(self, x, sentence):
        """The head.   (B, 8n, 4, 4), (B, E) -> (B,)"""
        tiled = sentence[:, :, None, None].expand(-1, -1, 4, 4)
        return self.last(F.leaky_relu(self.joint(torch.cat([x, tiled], dim=1)), SLOPE)).flatten()

    def forward(self, image, sentence):
        return self.judge(self.look(image), sentence)


# -- text encoder -------------------------------------------------------------------------------------------------------------


class SentenceLSTM(nn.Module):
    """The original text encoder (DAMSM): bidirectional LSTM over word vectors, frozen.   tokens (B, T), lengths (B,)

    -> sentence (B, E), words (B, E, T). The small CLIP's sentence vector is the default on built-in data.
    """

    def __init__(self, vocabulary, embed=256, word_width=300):
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, word_width)
        self.rnn = nn.LSTM(word_width, embed // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens, lengths):
        words = F.dropout(self.encoder(tokens), 0.5, self.training)
        packed = nn.utils.rnn.pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        steps, (last, _) = self.rnn(packed)
        steps = nn.utils.rnn.pad_packed_sequence(steps, batch_first=True, total_length=tokens.shape[1])[0]
        return torch.cat([last[0], last[1]], dim=1), steps.mT


# -- official weights -----------------------------------------------------------------------------------------------------------


def _pair(ours, theirs):
    return {f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")}


def _norm(ours, theirs):
    return {f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def generator_names(levels):
    """{our key: official netG key}."""
    names = _pair("encoder.first", "ext") | _pair("to_rgb", "conv_img.1") | _pair("composer.code", "cwp.fc.linear1")
    for ours, theirs in (("composer.image.0", "cwp.img_enc.conv1"), ("composer.image.2", "cwp.img_enc.conv2")):
        names |= _pair(ours, theirs)
    for part, theirs in (("text", "txt_enc"), ("fuse", "fuse")):
        for layer in (1, 2):
            names |= _pair(f"composer.{part}.{2 * layer - 2}", f"cwp.{theirs}.main.linear{layer}")
    for i in range(levels):
        up = f"up{i + 1}"
        names[f"encoder.down.{i}.conv.weight"] = f"down{i + 1}.conv.weight"
        names |= _norm(f"encoder.down.{i}.norm", f"down{i + 1}.bn")
        names |= _pair(f"decoder.conv.{i}", f"yp{i + 1}.conv") | _pair(f"blocks.{i}.conv", f"{up}.conv")
        names |= _pair(f"blocks.{i}.weight", f"{up}.fc.linear2")
        for ours, theirs in (("gamma", "CAFF.fc_gamma"), ("beta", "CAFF.fc_beta"), ("query.scale", "DCBlk.conv.scales"),
                             ("query.shift", "DCBlk.conv.shifts")):
            for layer in (1, 2):
                names |= _pair(f"blocks.{i}.{ours}.{2 * layer - 2}", f"{up}.{theirs}.linear{layer}")
        names |= {f"blocks.{i}.query.kernel": f"{up}.DCBlk.conv.weight",
                  f"blocks.{i}.query.to_weight.weight": f"{up}.DCBlk.conv_weight.weight",
                  f"blocks.{i}.query.to_shift.weight": f"{up}.DCBlk.conv_bias.weight"}
    return names


def critic_names(levels):
    """{our key: official netD or netC key}."""
    names = {"first.weight": "block0.conv.weight", "joint.weight": "joint_conv.0.weight", "last.weight": "joint_conv.2.weight"}
    for i in range(levels - 1):
        names[f"down.{i}.conv.weight"] = f"block{i + 1}.conv.weight"
        names |= _norm(f"down.{i}.norm", f"block{i + 1}.batchnorm")
    return names


def _load(model, names, state, where, ignored=()):
    """Copy an official state dict under our names.   raises ValueError listing what does not fit"""
    state = {k.removeprefix("module."): v for k, v in state.items() if not k.endswith(tuple(ignored))}
    check_names({names[k]: p.shape for k, p in model.state_dict().items()}, state, where)
    model.load_state_dict({k: state[v] for k, v in names.items()})
    return model


def from_official(net_g, net_d=None, net_c=None):
    """Editor (and critic) with official weights; sizes are read from the tensors.   -> Generator, Critic or None

    Official code: the dynamic convolution's own bias is never used; it may be there and is left out.
    """
    net_g = {k.removeprefix("module."): v for k, v in net_g.items()}
    if "ext.weight" not in net_g or "cwp.txt_enc.main.linear1.weight" not in net_g:
        raise ValueError("not an official DE-Net netG: missing ext.weight or cwp.txt_enc.main.linear1.weight")
    levels, base = sum(k.endswith(".bn.weight") for k in net_g), len(net_g["ext.weight"])
    width, embed = net_g["cwp.txt_enc.main.linear1.weight"].shape
    generator = Generator(4 << levels, embed, base, width, len(net_g["up1.DCBlk.conv.weight"]))
    _load(generator, generator_names(levels), net_g, "the official netG", ["DCBlk.conv.bias"])
    if net_d is None or net_c is None:
        return generator, None
    critic = Critic(4 << levels, embed, base, norm=True)
    return generator, _load(critic, critic_names(levels), net_d | net_c, "the official netD and netC")
