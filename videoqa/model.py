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

from data import parallel

MFB_WIDTH, MFB_FACTOR = 256, 2           # Official code: fixed, independent of d
DROPOUT, LAST_DROPOUT = 0.15, 0.18       # everywhere; on the last states of an LSTM


class Output(NamedTuple):
    """What a forward pass returns; the maps are what the paper shows as explanation."""

    logits: torch.Tensor          # (B, A)
    consistency: torch.Tensor     # scalar, L_com, mean over cycles
    disparity: torch.Tensor       # scalar, HSIC of both streams per sample, mean over cycles
    words: torch.Tensor           # (T, B, S) attention over words
    scores: torch.Tensor          # (T, 2, B, N) query punishment of appearance, motion
    graph: torch.Tensor           # (T, 2, B, 2, H, N, N) attention of appearance, motion; of their common and own view
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


class PerStream(nn.Module):
    """A linear layer of each stream's own.   (2, B, N, in) -> (2, B, N, out)"""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(2, width_out, width_in)), nn.Parameter(torch.zeros(2, width_out))

    def forward(self, x):
        return torch.baddbmm(self.bias[:, None], x.flatten(1, 2), self.weight.mT).unflatten(1, x.shape[1:3])


class QueryPunishment(nn.Module):
    """Query punishment module: a score in (0, 1) for each clip against the query; irrelevant clips are scaled down.

    Paper: a temperature sqrt(w d) belongs to the module. Official code: stores it and never uses it; nor do we.
    """

    def __init__(self, word_width, width):
        super().__init__()
        self.query = PerStream(word_width, width)

    def forward(self, x, query):
        query = self.query(query[None, :, None].expand(2, -1, -1, -1))[:, :, 0]                        # (2, B, d)
        return torch.sigmoid(torch.einsum("kbnd,kbd->kbn", x, query))                                  # (2, B, N)


class GraphAttention(nn.Module):
    """Graph attention over the complete graph of clips; the punishment scales the values, not the logits.

    Every view of a stream (common, own) is a graph of its own, with `heads` heads; all read the same clips.
    e_ij = LeakyReLU(a1 . U_i + a2 . U_j + b): two numbers per clip stand for the official code's (N, N, 2 d/H) tensor
    of pairs, with identical values.   x (2, B, N, d), score (2, B, N) -> (2, B, N, V, d), attention (2, B, V, H, N, N)
    """

    def __init__(self, width, heads, views=2, dropout=1.0):
        super().__init__()
        self.views, self.every, self.drop = views, views * heads, nn.Dropout(DROPOUT * dropout)
        self.project = PerStream(width, views * width)                              # U of all views and heads
        self.receiver = nn.Parameter(torch.empty(2, self.every, width // heads))    # a1
        self.sender = nn.Parameter(torch.empty(2, self.every, width // heads))      # a2
        self.bias = nn.Parameter(torch.zeros(2, self.every))                        # b

    def forward(self, x, score):
        x = self.drop(x)
        u = self.heads_of(self.project(x))                                                       # (2, B, VH, N, d/H)
        attention = self.logits(x, u).softmax(4)                                                 # (2, B, VH, N, N)
        out = F.elu(self.drop(attention) @ (score[:, :, None, :, None] * u))
        return self.drop(out.transpose(2, 3).unflatten(3, (self.views, -1)).flatten(4)), attention.unflatten(2, (self.views, -1))

    def heads_of(self, x):
        return x.unflatten(3, (self.every, -1)).transpose(2, 3)

    def logits(self, x, u):
        to, of = ((u * a[:, None, :, None]).sum(4) for a in (self.receiver, self.sender))
        return F.leaky_relu((to + self.bias[:, None, :, None])[..., None] + of[..., None, :], 0.01)


class SelfAttention(GraphAttention):
    """The rival of graph attention: logits are scaled dot products of two projections, all else is the same."""

    def __init__(self, width, heads, views=2, dropout=1.0):
        super().__init__(width, heads, views, dropout)
        self.query, self.key = PerStream(width, views * width), PerStream(width, views * width)
        del self.receiver, self.sender, self.bias

    def logits(self, x, u):
        return self.heads_of(self.query(x)) @ self.heads_of(self.key(x)).mT / u.shape[4] ** 0.5


class ViewAttention(nn.Module):
    """Fuse the views of a stream, clip by clip.   (2, B, N, V, d) -> (2, B, N, d), weights (2, B, N, V)"""

    def __init__(self, width):
        super().__init__()
        self.enhance, self.score = PerStream(width, width), nn.Parameter(torch.empty(2, 1, width))

    def forward(self, views):
        hidden = torch.tanh(self.enhance(views.flatten(2, 3))).unflatten(2, views.shape[2:4])
        weights = (hidden * self.score[:, None, None]).sum(4).softmax(3)
        return (weights[..., None] * views).sum(3), weights


class ReasoningUnit(nn.Module):
    """One cycle: query, punishment, multi-view graph attention, view fusion and residual, for both streams at once.

    Paper: the figure's AMC and MAC suggest one correlated graph. Official code: every graph sees one stream, with weights of
    its own (confirmed by the author); only the loss and the query tie the streams.
    """

    def __init__(self, word_width, width, heads, punish=True, views=2, graph="gat", dropout=1.0):
        super().__init__()
        self.punish = punish
        self.query = DynamicQuery(width)
        self.punishment = QueryPunishment(word_width, width)
        self.graph = {"gat": GraphAttention, "attention": SelfAttention}[graph](width, heads, views, dropout)
        self.fuse = ViewAttention(width)

    def forward(self, x, words, context, mask, evidence=None):
        query, attention = self.query(words, context, mask)
        score = self.punishment(x, query) if self.punish else x.new_ones(x.shape[:3])
        score = score if evidence is None else evidence.expand_as(score)
        views, graph = self.graph(x, score)
        z, weights = self.fuse(views)
        return x + z, views, (attention, score, graph, weights[..., 0])


# -- fusion, readout, answer --------------------------------------------------------------------------------------------


class MFB(nn.Module):
    """Multimodal factorised bilinear fusion of the two streams, clip by clip.   (2, B, N, d) -> (B, N, d)"""

    def __init__(self, width, inner=MFB_WIDTH):
        super().__init__()
        self.streams, self.out = PerStream(width, inner * MFB_FACTOR), nn.Linear(inner, width)

    def forward(self, x):
        appearance, motion = F.elu(self.streams(x))
        return F.elu(self.out((appearance * motion).unflatten(2, (-1, MFB_FACTOR)).sum(3)))


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
        self.hidden, self.norm, self.out = nn.Linear(2 * width, width), parallel.BatchNorm1d(width), nn.Linear(width, answers)

    def forward(self, video, sentence):
        x = self.drop(torch.cat([video, self.question(sentence)], dim=1))
        x = self.drop(self.norm(F.elu(self.hidden(x))))
        return self.out(x)


class DualVGR(nn.Module):
    """Answer logits for a question about a clip sequence, with the maps that explain them.

    vocabulary, answers  sizes including the two special entries of each
    features             width of appearance and motion features, equal
    views                2: a common and an own graph in each stream (the paper); 1: a single graph
    streams              "both", "appearance" or "motion": a missing stream is fed zeros
    graph                "gat" (the paper) or "attention", plain self-attention with the same punished values
    mfb, dropout         width of the fusion (256 in the official code); factor on every dropout rate (1: the paper's)
    """

    def __init__(self, vocabulary, answers, features=2048, width=768, word_width=300, heads=4, cycles=2, punish=True,
                 views=2, streams="both", graph="gat", mfb=MFB_WIDTH, dropout=1.0):
        super().__init__()
        if cycles < 1 or width % (2 * heads):
            raise ValueError(f"cycles={cycles} must be at least 1 and width={width} a multiple of 2 x heads={heads}")
        self.streams = streams
        self.drop, self.drop_last = nn.Dropout(DROPOUT * dropout), nn.Dropout(LAST_DROPOUT * dropout)
        self.question = QuestionEncoder(vocabulary, word_width, width, dropout)
        self.appearance = BiLSTM(features, width)
        self.motion = nn.Linear(features, width)
        self.units = nn.ModuleList(ReasoningUnit(word_width, width, heads, punish, views, graph, dropout) for _ in range(cycles))
        self.fusion = MFB(width, mfb)
        self.readout = Readout(width, dropout)
        self.decoder = AnswerDecoder(width, answers, dropout)
        initialise(self, heads)

    def encode(self, appearance, motion):
        """Both streams, one vector a clip.   (V, N, F, features), (V, N, features) -> X (2, V, N, d)"""
        frames = torch.tanh(self.drop(appearance * (self.streams != "motion"))).flatten(0, 1)           # (V N, F, features)
        seen = self.drop_last(self.appearance(frames)[1]).unflatten(0, motion.shape[:2])
        return torch.stack([seen, self.motion(motion * (self.streams != "appearance"))])

    def forward(self, tokens, lengths, appearance, motion, video=None, evidence=None):
        """tokens (B, S) int, lengths (B,), appearance (V, N, F, features), motion (V, N, features) -> Output

        video (B,) says which of the V videos a question is about, so that each is encoded once; None: one each.
        evidence (B, N) stands in for every punishment score: what the model would do if it knew where to look.
        """
        words, context, sentence = self.question(tokens, lengths)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        x = self.encode(appearance, motion)
        x = x if video is None else x[:, video]
        maps, common, apart = [], [], []
        for unit in self.units:
            x, views, found = unit(x, words, context, mask, evidence)
            maps.append(found)
            common.append(consistency(*views[:, :, :, 0]))
            apart.append(hsic(views[..., 0, :], views[..., -1, :]).sum(0).mean())
        pooled, readout = self.readout(self.fusion(x))
        maps = [torch.stack(parts) for parts in zip(*maps, strict=True)]
        return Output(self.decoder(pooled, sentence), torch.stack(common).mean(), torch.stack(apart).mean(), *maps, readout)


class QuestionOnly(nn.Module):
    """The rival that never looks: the same question encoder and decoder, and a video of zeros. Honest chance level."""

    def __init__(self, vocabulary, answers, width=768, word_width=300, dropout=1.0):
        super().__init__()
        self.question = QuestionEncoder(vocabulary, word_width, width, dropout)
        self.decoder = AnswerDecoder(width, answers, dropout)
        initialise(self)

    def forward(self, tokens, lengths, *_, **__):
        sentence = self.question(tokens, lengths)[2]
        nothing = sentence.new_zeros(())
        return Output(self.decoder(torch.zeros_like(sentence), sentence), nothing, nothing, *[None] * 5)


def initialise(model, heads=1):
    """Official code: Xavier-uniform for every matrix (LSTM gates as one matrix), zero biases, words in U(-1, 1)."""
    for name, p in model.named_parameters():
        if name == "question.embed.weight":
            nn.init.uniform_(p, -1, 1)
        elif name.endswith(("receiver", "sender")):     # halves of one (1, 2 d/H) matrix per head
            bound = (6 / (2 * p.shape[2] + 1)) ** 0.5
            nn.init.uniform_(p, -bound, bound)
        elif "graph." in name and p.dim() == 3:         # a matrix per head
            for head in p.unflatten(1, (-1, p.shape[2] // heads)).flatten(0, 1):
                nn.init.xavier_uniform_(head)
        elif p.dim() > 1:
            for matrix in p if p.dim() == 3 else [p]:
                nn.init.xavier_uniform_(matrix)
        elif "norm" not in name:
            nn.init.zeros_(p)


# -- losses -------------------------------------------------------------------------------------------------------------


def consistency(a, b):
    """L_com: the common views of the two streams should relate clips alike.   a, b (B, N, d) -> scalar

    Mean squared difference of the Gram matrices of centred, l2-normalised clip vectors.
    """
    a, b = (F.normalize(x - x.mean(1, keepdim=True), dim=2) for x in (a, b))
    return (a @ a.mT - b @ b.mT).square().mean()


def hsic(a, b):
    """Hilbert-Schmidt independence of two views with linear kernels, per sample.   a, b (..., N, d) -> (...) >= 0

    tr(R K_a R K_b), R = I - 11^T / N. Official code: sums over the batch, so its beta is ours / batch size.
    """
    a = a - a.mean(-2, keepdim=True)                                       # R K_a R from centred rows
    return ((a @ a.mT) * (b @ b.mT)).sum((-2, -1))
