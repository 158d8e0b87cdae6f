"""DualVGR: Dual-Visual Graph Reasoning for Video Question Answering (Wang, Bao, Xu, IEEE TMM 2021).

    question --biLSTM--> words, sentence            (question encoder)
    frames ---biLSTM--> X_A     motion --> X_M      (visual encoders, N clips each)
    T cycles:   query c_t <- words                  (dynamic query per cycle)
                s_A, s_M <- c_t                     (query punishment: one score per clip and stream)
                four graph attentions, own and common view of each stream, values scaled by the scores
                view attention, residual            (X_A, X_M of the next cycle)
    X_A, X_M --MFB--> clips --attention--> video;  video, sentence --> answer

The paper's equation numbers were not available; sections of this file follow its figures (unit, overview) in order.
Shape letters: B batch, S words, N clips, F frames a clip, d module width, H heads, A answers.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

MFB_WIDTH, MFB_FACTOR = 256, 2           # Official code: fixed, independent of d
DROPOUT, LAST_DROPOUT = 0.15, 0.18       # everywhere; on the last states of an LSTM


class Output(NamedTuple):
    """What a forward pass returns; the maps are what the paper shows as explanation."""

    logits: torch.Tensor          # (B, A)
    consistency: torch.Tensor     # scalar, L_com, mean over cycles
    disparity: torch.Tensor       # scalar, HSIC of both streams per sample, mean over cycles
    words: torch.Tensor           # (T, B, S) attention over words
    scores: torch.Tensor          # (T, 2, B, N) query punishment of appearance, motion
    graph: torch.Tensor           # (T, 4, B, H, N, N) attention: appearance own, common, motion own, common
    views: torch.Tensor           # (T, 2, B, N) weight of the common view in appearance, motion
    readout: torch.Tensor         # (B, N) weight of each clip in the pooled video


# -- question encoder ---------------------------------------------------------------------------------------------------


class BiLSTM(nn.Module):
    """One bidirectional layer over sequences of any lengths.   (B, S, in) -> every step (B, S, d), last states (B, d)

    The way back reads each sequence turned around within its own length, so that padding comes last both ways and two
    dense LSTMs do what a packed one would, without its hundred small operations a step and without asking a GPU for lengths.
    """

    def __init__(self, width_in, width):
        super().__init__()
        self.ahead, self.back = (nn.LSTM(width_in, width // 2, batch_first=True) for _ in range(2))

    def forward(self, x, lengths=None):
        t = torch.arange(x.shape[1], device=x.device)
        lengths = x.new_full((len(x),), x.shape[1], dtype=torch.long) if lengths is None else lengths
        inside, last = t < lengths[:, None], (lengths - 1).clamp(min=0)[:, None]                # (B, S), (B, 1)
        turn = torch.where(inside, last - t, t)[..., None]                                      # its own inverse
        ahead, back = self.ahead(x)[0], self.back(x.gather(1, turn.expand_as(x)))[0]            # (B, S, d/2)
        ends = [y.gather(1, last[..., None].expand(-1, 1, y.shape[2]))[:, 0] for y in (ahead, back)]
        steps = torch.cat([ahead, back.gather(1, turn.expand_as(back))], 2) * inside[..., None]  # zeros on padding
        return steps, torch.cat(ends, 1)


class QuestionEncoder(nn.Module):
    """Word vectors, their context, and the sentence.   tokens (B, S) int, 0 = padding; lengths (B,)

    The cycles read words and context; the sentence goes only to the answer decoder, from a second LSTM of its own.
    """

    def __init__(self, vocabulary, word_width, width, dropout=1.0):
        super().__init__()
        self.drop, self.drop_last = nn.Dropout(DROPOUT * dropout), nn.Dropout(LAST_DROPOUT * dropout)
        self.embed = nn.Embedding(vocabulary, word_width)
        self.context = BiLSTM(word_width, width)
        self.sentence = BiLSTM(word_width, width)

    def forward(self, tokens, lengths):
        words = torch.tanh(self.drop(self.embed(tokens)))                                # (B, S, w)
        sentence = self.drop_last(self.sentence(words, lengths)[1])
        return words, self.context(words, lengths)[0], sentence                                 # (B, S, d), (B, d)


# -- one reasoning cycle ------------------------------------------------------------------------------------------------


class DynamicQuery(nn.Module):
    """The query of one cycle: an attended mean of the word vectors.   -> c_t (B, w), attention (B, S)"""

    def __init__(self, width):
        super().__init__()
        self.enhance, self.score = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, words, context, mask):
        # Official code: softmax over padding too, then mask and renormalise with 1e-5; kept for parity.
        attention = self.score(F.normalize(self.enhance(context), dim=2))[..., 0].softmax(1) * mask    # (B, S)
        attention = attention / (attention.sum(1, keepdim=True) + 1e-5)
        return torch.einsum("bs,bsw->bw", attention, words), attention


class QueryPunishment(nn.Module):
    """Query punishment module: a score in (0, 1) for each clip against the query; irrelevant clips are scaled down.

    Paper: a temperature sqrt(w d) belongs to the module. Official code: stores it and never uses it; nor do we.
    """

    def __init__(self, word_width, width):
        super().__init__()
        self.query = nn.Linear(word_width, width)

    def forward(self, x, query):
        return torch.sigmoid(torch.einsum("bnd,bd->bn", x, self.query(query)))                         # (B, N)


class GraphAttention(nn.Module):
    """Graph attention over the complete graph of clips; the punishment scales the values, not the logits.

    e_ij = LeakyReLU(a1 . U_i + a2 . U_j + b): two numbers per clip stand for the official code's (N, N, 2 d/H) tensor
    of pairs, with identical values.   x (B, N, d), score (B, N) -> (B, N, d), attention (B, H, N, N)
    """

    def __init__(self, width, heads, dropout=1.0):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(DROPOUT * dropout)
        self.project = nn.Linear(width, width)                             # U of all heads
        self.receiver = nn.Parameter(torch.empty(heads, width // heads))   # a1
        self.sender = nn.Parameter(torch.empty(heads, width // heads))     # a2
        self.bias = nn.Parameter(torch.zeros(heads))                       # b

    def forward(self, x, score):
        u = self.project(self.drop(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)          # (B, H, N, d/H)
        to = (u * self.receiver[:, None]).sum(3) + self.bias[:, None]                          # (B, H, N)
        of = (u * self.sender[:, None]).sum(3)
        attention = F.leaky_relu(to[..., :, None] + of[..., None, :], 0.01).softmax(3)         # (B, H, N, N)
        out = F.elu(self.drop(attention) @ (score[:, None, :, None] * u))                      # (B, H, N, d/H)
        return self.drop(out.transpose(1, 2).flatten(2)), attention


class SelfAttention(GraphAttention):
    """The rival of graph attention: logits are scaled dot products of two projections, all else is the same."""

    def __init__(self, width, heads, dropout=1.0):
        super().__init__(width, heads, dropout)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        del self.receiver, self.sender, self.bias

    def forward(self, x, score):
        x = self.drop(x)
        u, q, k = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.project, self.query, self.key))
        attention = (q @ k.mT / u.shape[3] ** 0.5).softmax(3)
        out = F.elu(self.drop(attention) @ (score[:, None, :, None] * u))
        return self.drop(out.transpose(1, 2).flatten(2)), attention


class ViewAttention(nn.Module):
    """Fuse the common and the own view of one stream, clip by clip.   -> (B, N, d), weights (B, N, 2)"""

    def __init__(self, width):
        super().__init__()
        self.enhance, self.score = nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def forward(self, common, own):
        views = torch.stack([common, own], dim=2)                                                       # (B, N, 2, d)
        weights = self.score(torch.tanh(self.enhance(views))).softmax(2)                                # (B, N, 2, 1)
        return (weights * views).sum(2), weights[..., 0]


class ReasoningUnit(nn.Module):
    """One cycle: query, punishment, multi-view graph attention, view fusion and residual for both streams.

    views  "both" (the paper), "own" or "common": the graphs that are kept
    """

    def __init__(self, word_width, width, heads, punish=True, views="both", share_common=False, graph="gat", dropout=1.0):
        super().__init__()
        graph = {"gat": GraphAttention, "attention": SelfAttention}[graph]
        self.punish, self.views = punish, views
        self.query = DynamicQuery(width)
        self.punishment = nn.ModuleList(QueryPunishment(word_width, width) for _ in range(2))
        self.own = nn.ModuleList(graph(width, heads, dropout) for _ in range(2))           # AIG, MIG in the figure
        # Paper: the figure's AMC and MAC suggest one correlated graph. Official code: separate weights (confirmed).
        common = [graph(width, heads, dropout) for _ in range(2)]
        self.common = nn.ModuleList([common[0]] * 2 if share_common else common)
        self.fuse = nn.ModuleList(ViewAttention(width) for _ in range(2))

    def forward(self, streams, words, context, mask, evidence=None):
        query, attention = self.query(words, context, mask)
        scores, graphs, weights, fused, commons = [], [], [], [], []
        for x, punishment, own, common, fuse in zip(streams, self.punishment, self.own, self.common, self.fuse, strict=True):
            score = evidence if evidence is not None else punishment(x, query) if self.punish else x.new_ones(x.shape[:2])
            (z_own, graph_own), (z_common, graph_common) = own(x, score), common(x, score)
            z, weight = fuse(z_common, z_own)
            if self.views != "both":
                z = z_own if self.views == "own" else z_common
            scores.append(score)
            graphs += [graph_own, graph_common]
            weights.append(weight[..., 0])
            fused.append(x + z)
            commons.append((z_own, z_common))
        return fused, commons, (attention, torch.stack(scores), torch.stack(graphs), torch.stack(weights))


# -- fusion, readout, answer --------------------------------------------------------------------------------------------


class MFB(nn.Module):
    """Multimodal factorised bilinear fusion of the two streams, clip by clip.   -> (B, N, d)"""

    def __init__(self, width, inner=MFB_WIDTH):
        super().__init__()
        self.appearance = nn.Linear(width, inner * MFB_FACTOR)
        self.motion = nn.Linear(width, inner * MFB_FACTOR)
        self.out = nn.Linear(inner, width)

    def forward(self, appearance, motion):
        product = F.elu(self.appearance(appearance)) * F.elu(self.motion(motion))
        return F.elu(self.out(product.unflatten(2, (-1, MFB_FACTOR)).sum(3)))


class Readout(nn.Module):
    """Attention pooling over clips; it does not see the question.   (B, N, d) -> (B, d), weights (B, N)"""

    def __init__(self, width, dropout=1.0):
        super().__init__()
        self.drop = nn.Dropout(DROPOUT * dropout)
        self.project, self.score = nn.Linear(width, width, bias=False), nn.Linear(width, 1)

    def forward(self, x):
        x = self.drop(x)
        weights = self.score(F.elu(self.project(x)))[..., 0].softmax(1)
        return torch.einsum("bn,bnd->bd", weights, x), weights


class AnswerDecoder(nn.Module):
    """Video and question to answer logits.   video, sentence (B, d) -> (B, A)"""

    def __init__(self, width, answers, dropout=1.0):
        super().__init__()
        self.drop = nn.Dropout(DROPOUT * dropout)
        self.question = nn.Linear(width, width)
        self.hidden, self.norm, self.out = nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.Linear(width, answers)

    def forward(self, video, sentence):
        x = self.drop(torch.cat([video, self.question(sentence)], dim=1))
        x = self.drop(self.norm(F.elu(self.hidden(x))))
        return self.out(x)


class DualVGR(nn.Module):
    """Answer logits for a question about a clip sequence, with the maps that explain them.

    vocabulary, answers  sizes including the two special entries of each
    features             width of appearance and motion features, equal
    streams              "both", "appearance" or "motion": a missing stream is fed zeros
    graph                "gat" (the paper) or "attention", plain self-attention with the same punished values
    mfb, dropout         width of the fusion (256 in the official code); factor on every dropout rate (1: the paper's)
    """

    def __init__(self, vocabulary, answers, features=2048, width=768, word_width=300, heads=4, cycles=2, punish=True,
                 views="both", streams="both", share_common=False, graph="gat", mfb=MFB_WIDTH, dropout=1.0):
        super().__init__()
        if cycles < 1 or width % (2 * heads):
            raise ValueError(f"cycles={cycles} must be at least 1 and width={width} a multiple of 2 x heads={heads}")
        self.streams = streams
        self.drop, self.drop_last = nn.Dropout(DROPOUT * dropout), nn.Dropout(LAST_DROPOUT * dropout)
        self.question = QuestionEncoder(vocabulary, word_width, width, dropout)
        self.appearance = BiLSTM(features, width)
        self.motion = nn.Linear(features, width)
        self.units = nn.ModuleList(ReasoningUnit(word_width, width, heads, punish, views, share_common, graph, dropout)
                                   for _ in range(cycles))
        self.fusion = MFB(width, mfb)
        self.readout = Readout(width, dropout)
        self.decoder = AnswerDecoder(width, answers, dropout)
        self.reset()

    def reset(self):
        """Official code: Xavier-uniform for every matrix (LSTM gates as one matrix), zero biases, words in U(-1, 1)."""
        for name, p in self.named_parameters():
            if name == "question.embed.weight":
                nn.init.uniform_(p, -1, 1)
            elif name.endswith(("receiver", "sender")):     # halves of one (1, 2 d/H) matrix per head
                bound = (6 / (2 * p.shape[1] + 1)) ** 0.5
                nn.init.uniform_(p, -bound, bound)
            elif p.dim() > 1:
                nn.init.xavier_uniform_(p)
            elif "norm" not in name:
                nn.init.zeros_(p)

    def encode_appearance(self, frames):
        """Frames of each clip to one vector.   (B, N, F, features) -> X_A (B, N, d)"""
        x = torch.tanh(self.drop(frames)).flatten(0, 1)                                       # (B N, F, features)
        return self.drop_last(self.appearance(x)[1]).unflatten(0, frames.shape[:2])

    def forward(self, tokens, lengths, appearance, motion, video=None, evidence=None):
        """tokens (B, S) int, lengths (B,), appearance (V, N, F, features), motion (V, N, features) -> Output

        video (B,) says which of the V videos a question is about, so that each is encoded once; None: one each.
        evidence (B, N) stands in for every punishment score: what the model would do if it knew where to look.
        """
        words, context, sentence = self.question(tokens, lengths)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        streams = [self.encode_appearance(appearance * (self.streams != "motion")),
                   self.motion(motion * (self.streams != "appearance"))]
        if video is not None:
            streams = [x[video] for x in streams]
        cycles, losses = [], []
        for unit in self.units:
            streams, commons, maps = unit(streams, words, context, mask, evidence)
            cycles.append(maps)
            losses.append((consistency(commons[0][1], commons[1][1]),
                           sum(hsic(own, common) for own, common in commons).mean()))
        video, readout = self.readout(self.fusion(*streams))
        maps = [torch.stack(parts) for parts in zip(*cycles, strict=True)]
        com, dis = (torch.stack(parts).mean() for parts in zip(*losses, strict=True))
        return Output(self.decoder(video, sentence), com, dis, *maps, readout)


class QuestionOnly(nn.Module):
    """The rival that never looks: the same question encoder and decoder, and a video of zeros. Honest chance level."""

    def __init__(self, vocabulary, answers, width=768, word_width=300, dropout=1.0):
        super().__init__()
        self.question = QuestionEncoder(vocabulary, word_width, width, dropout)
        self.decoder = AnswerDecoder(width, answers, dropout)
        DualVGR.reset(self)

    def forward(self, tokens, lengths, *_, **__):
        sentence = self.question(tokens, lengths)[2]
        nothing = sentence.new_zeros(())
        return Output(self.decoder(torch.zeros_like(sentence), sentence), nothing, nothing, *[None] * 5)


# -- losses -------------------------------------------------------------------------------------------------------------


def consistency(a, b):
    """L_com: the common views of the two streams should relate clips alike.   a, b (B, N, d) -> scalar

    Mean squared difference of the Gram matrices of centred, l2-normalised clip vectors.
    """
    a, b = (F.normalize(x - x.mean(1, keepdim=True), dim=2) for x in (a, b))
    return (a @ a.mT - b @ b.mT).square().mean()


def hsic(a, b):
    """Hilbert-Schmidt independence of two views with linear kernels, per sample.   a, b (B, N, d) -> (B,) >= 0

    tr(R K_a R K_b), R = I - 11^T / N. Official code: sums over the batch, so its beta is ours / batch size.
    """
    a = a - a.mean(1, keepdim=True)                                        # R K_a R from centred rows
    return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))


# -- official weights ---------------------------------------------------------------------------------------------------


def official_names(cycles, heads):
    """{our name: official name, or the list of official names stacked along dim 0}."""
    names = {"question.embed.weight": "linguistic_input_unit.encoder_embed.weight"}
    rnns = {"question.context": "linguistic_input_unit.concatRNN.rnn", "question.sentence": "linguistic_input_unit.encoder",
            "appearance": "visual_appearance_input_unit.encoder"}
    for ours, theirs in rnns.items():
        for kind in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            names |= {f"{ours}.ahead.{kind}": f"{theirs}.{kind}", f"{ours}.back.{kind}": f"{theirs}.{kind}_reverse"}
    linear = {"motion": "visual_motion_input_unit", "fusion.appearance": "visual_input_unit.visualfusion.linear0",
              "fusion.motion": "visual_input_unit.visualfusion.linear1", "fusion.out": "visual_input_unit.visualfusion.linear_out",
              "readout.score": "feature_aggregation.attn", "decoder.question": "output_unit.question_proj",
              "decoder.hidden": "output_unit.classifier.1", "decoder.norm": "output_unit.classifier.3",
              "decoder.out": "output_unit.classifier.5"}
    for t in range(cycles):
        linear |= {f"units.{t}.query.enhance": f"visual_input_unit.queryAttn.{t}.feat_enhance",
                   f"units.{t}.query.score": f"visual_input_unit.queryAttn.{t}.fc"}
        for i, (stream, own, common) in enumerate((("appear", "appearance_GCN", "acGCN"), ("motion", "motion_GCN", "mcGCN"))):
            linear[f"units.{t}.punishment.{i}.query"] = f"visual_input_unit.queryPunish_{stream}.{t}.query_weight"
            view = f"visual_input_unit.attention_{('appearance', 'motion')[i]}.{t}.project"
            linear[f"units.{t}.fuse.{i}.enhance"] = f"{view}.0"
            names[f"units.{t}.fuse.{i}.score.weight"] = f"{view}.2.weight"
            for kind, theirs in (("own", own), ("common", common)):
                per_head = [f"visual_input_unit.{theirs}.{t}.attention_{h}" for h in range(heads)]
                for part in ("weight", "bias"):
                    names[f"units.{t}.{kind}.{i}.project.{part}"] = [f"{head}.W.{part}" for head in per_head]
                for part in ("receiver", "sender"):
                    names[f"units.{t}.{kind}.{i}.{part}"] = [f"{head}.a.weight" for head in per_head]
                names[f"units.{t}.{kind}.{i}.bias"] = [f"{head}.a.bias" for head in per_head]
    for ours, theirs in linear.items():
        names |= {f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}
    names["readout.project.weight"] = "feature_aggregation.v_proj.weight"
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        names[f"decoder.norm.{buffer}"] = f"output_unit.classifier.3.{buffer}"
    return names


def from_official(state_dict):
    """DualVGR with the weights of the authors' `state_dict`; every size is read from it.

    raises ValueError that lists missing, unknown or misshapen keys
    """
    key = "visual_input_unit.queryAttn."
    cycles = 1 + max((int(k[len(key):].split(".")[0]) for k in state_dict if k.startswith(key)), default=0)
    heads = 1 + max((int(k.split("attention_")[1].split(".")[0]) for k in state_dict if ".acGCN.0.attention_" in k), default=0)
    names = official_names(cycles, heads)
    wanted = {name for part in names.values() for name in (part if isinstance(part, list) else [part])}
    missing, unknown = sorted(wanted - state_dict.keys()), sorted(state_dict.keys() - wanted)
    if missing or unknown:
        raise ValueError(f"not an official DualVGR state dict: missing {missing[:5] or 'nothing'}, unknown {unknown[:5] or 'nothing'}")
    vocabulary, word_width = state_dict["linguistic_input_unit.encoder_embed.weight"].shape
    width, features = state_dict["visual_motion_input_unit.weight"].shape
    answers = len(state_dict["output_unit.classifier.5.bias"])
    model = DualVGR(vocabulary, answers, features, width, word_width, heads, cycles)
    ours = {}
    for name, official in names.items():
        parts = [state_dict[k] for k in (official if isinstance(official, list) else [official])]
        if name.endswith((".receiver", ".sender")):         # a = [a1, a2]: first half receives, second half sends
            half = parts[0].shape[1] // 2
            parts = [p[:, :half] if name.endswith("receiver") else p[:, half:] for p in parts]
        ours[name] = torch.cat(parts) if isinstance(official, list) else parts[0]
    wrong = [f"{names[k]} {tuple(ours[k].shape)}, expected {tuple(p.shape)}" for k, p in model.state_dict().items() if ours[k].shape != p.shape]
    if wrong:
        raise ValueError("misshapen keys: " + "; ".join(wrong[:5]))
    model.load_state_dict(ours)
    return model
