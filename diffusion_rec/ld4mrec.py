"""LD4MRec: Simplifying and Powering Diffusion Model for Multimedia Recommendation (Zhu et al., arXiv 2309.15363).

A reconstruction: neither version's full text nor any official code was at hand. Tags say how sure each part is:
[P1] [P2] abstract of version 1, 2   [F] framework figure   [K] formula quoted second hand   [N] reading note of version 2
[D] inherited from DiffRec (SIGIR 2023)   [I] our inference   UNVERIFIED: not confirmed, hence a switch.

A user is a row x_0 of the click matrix. Training corrupts the row and C-Net gives it back; inference is one call on the row
as it is. C-Net begins and ends with a linear map between items and a latent space, so a whole user is d + 1 numbers:
x_hat = table() . encode(user), and a row over all items is never written down (fast.py).
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from data import parallel
from diffusion_rec import diffusion, fast
from diffusion_rec.diffusion import drawn, dropout
from diffusion_rec.lightgcn import item_embeddings
from kernels.graph import Graph, propagate

MOST = 256              # widest content; wider features are reduced by PCA

# -- conditions, precomputed without gradient (section 4) ----------------------------------------------------------------


def normalised(clicks, smooth=0.0):
    """R_hat = D_u^-1/2 R D_i^-1/2 with `smooth` added to every degree.   clicks Graph (U, I) of ones -> Graph (U, I)

    # Paper: raw R or R_hat is not known (UNVERIFIED). With smooth = 0 every connected component of the click graph has the
    # top singular value 1. TikTok has dozens of tiny ones, so its 64 leading directions say little but "which component".
    """
    degree_u, degree_i = (g.counts.float() + smooth for g in (clicks, clicks.T))
    weight = (degree_u[clicks.row_of] * degree_i[clicks.col.long()]).rsqrt()
    return Graph(clicks.ptr, clicks.col, weight, clicks.shape)


def collaborative_signal(graph, k, rounds=12):
    """Truncated SVD R ~ U_k Sigma_k V_k^T of a sparse matrix by subspace iteration [F][K].   -> (I, k) float32

    Returned is V_k / sqrt(Sigma_k), as graph @ it = U_k sqrt(Sigma_k), the users' c_u. Deterministic: a fixed start, and the
    largest entry of each column is positive. Directions beyond the rank (singular value below 1e-4 of the first, or
    k > min(U, I)) are columns of zeros: their rotation would be noise.
    """
    width = min(k + 16, *graph.shape)
    q = torch.randn(graph.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = q.to(graph.device)
    for _ in range(rounds):
        q = torch.linalg.qr(propagate(graph.T, propagate(graph, q)))[0]
    _, sigma, right = torch.linalg.svd(propagate(graph, q), full_matrices=False)
    right = q @ right.T                                                       # (I, width)
    sign = right.gather(0, right.abs().argmax(0)[None])[0].sign()
    there = sigma > 1e-4 * sigma[0].clamp(min=1e-12)
    scaled = right * sign * torch.where(there, sigma, 1.0).rsqrt() * there
    return F.pad(scaled, (0, max(0, k - width)))[:, :k].float()


def collaborative_table(cfg, clicks):
    """c_u is per_user times the sum of a table's rows over the user's clicks.   -> table (I, k), per_user (U, 1)"""
    if cfg.collab == "raw":
        return collaborative_signal(clicks, cfg.svd), torch.ones(clicks.shape[0], 1, device=clicks.device)
    smooth = cfg.smooth if cfg.collab == "svd" else 0.0
    per_item, per_user = ((g.counts + smooth).clamp(min=1).rsqrt()[:, None] for g in (clicks.T, clicks))
    lightgcn = cfg.collab == "lightgcn"
    signal = item_embeddings(cfg, clicks) if lightgcn else collaborative_signal(normalised(clicks, smooth), cfg.svd)
    return per_item * signal, per_user


def content(x, most=MOST):
    """Item content X_m ready for p_u = R_hat X_m.   x (I, d_m) -> (I, min(d_m, most)) float32, rows of length 1

    Columns are standardised and rows get length 1, as image vectors have large norms [I]. Wide features are reduced by PCA.
    """
    x = x.double() - x.double().mean(0)
    if x.shape[1] > most:
        x = x @ torch.linalg.eigh(x.T @ x / len(x))[1][:, -most:]
    return F.normalize(x / x.std(0, correction=0).clamp(min=1e-6), dim=1).float()


# -- C-Net (section 5) -------------------------------------------------------------------------------------------------------


def time_code(t, width):
    """Sinusoidal code of t, cosines then sines, longest period 10000 [F].   t (n,) -> (n, width)"""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


class Denoise(nn.Module):
    """BD, behaviour-denoising block [F]; inner formula UNVERIFIED [I].

    z = SiLU(W1 LN(h) + W_t tau + W_c c_u + b1)        h <- h + W2 dropout(z) + b2
    cond   add: as written;   film: LN(h) is scaled and shifted by a linear map of [tau; c_u];   concat: W1 [LN(h); tau; c_u],
           the same functions as add with one initial scale for all inputs
    """

    def __init__(self, cfg, given):
        super().__init__()
        d, self.cond, self.p = cfg.width, cfg.cond, cfg.dropout
        self.ln = nn.LayerNorm(d)
        self.w1 = nn.Linear(d + given * (cfg.cond == "concat"), d)
        if cfg.cond != "concat":
            self.given = nn.Linear(given, d if cfg.cond == "add" else 2 * d, bias=cfg.cond == "film")
        self.w2 = nn.Linear(d, d)

    def forward(self, h, given):
        x = self.ln(h)
        if self.cond == "film":
            scale, shift = self.given(given).chunk(2, 1)
            z = self.w1(x * (1 + scale) + shift)
        else:
            z = self.w1(x) + self.given(given) if self.cond == "add" else self.w1(torch.cat([x, given], 1))
        return h + self.w2(dropout(F.silu(z), self.p, self.training))


class Guide(nn.Module):
    """BG, behaviour-guidance block [F] ("BI" in one source [K]); inner formula UNVERIFIED [I].

    h <- h + sigmoid(W_g [LN(h); r] + b_g) * (W_r SiLU(r) + b_r)        r: the user's blended modality preference
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.width
        self.ln, self.gate, self.out = nn.LayerNorm(d), nn.Linear(2 * d, d), nn.Linear(d, d)

    def forward(self, h, r):
        return h + torch.sigmoid(self.gate(torch.cat([self.ln(h), r], 1))) * self.out(F.silu(r))


class Preference(nn.Module):
    """Blend of a user's modalities with personal weights [P2]; form UNVERIFIED [I].

    a_m = softmax_m(q^T tanh(W_a W_m p_um + b_a))        r = sum_m a_m W_m p_um
    """

    def __init__(self, cfg, widths):
        super().__init__()
        self.proj = nn.ModuleDict({m: nn.Linear(w, cfg.width, bias=False) for m, w in widths.items()})
        self.personal = cfg.modality_weights == "personal"
        if self.personal:
            self.hidden, self.q = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, 1, bias=False)

    def forward(self, p):
        """p {modality: (B, d_m)} -> r (B, d)"""
        each = torch.stack([self.proj[m](x) for m, x in p.items()], 1)                        # (B, M, d)
        logits = self.q(torch.tanh(self.hidden(each)))[..., 0] if self.personal else each.new_zeros(each.shape[:2])
        return (logits.softmax(1)[..., None] * each).sum(1)


class Adapter(nn.Sequential):
    """BeFA's adapter (AAAI 2025): content -> a mask in (0, 1) over the item's behaviour vector.   (I, d_m) -> (I, d)"""

    def __init__(self, given, d, p=0.3):
        super().__init__(nn.Linear(given, d), nn.Linear(d, 2 * d), nn.ReLU(), nn.Dropout(p), nn.Tanh(),
                         nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Dropout(p), nn.Linear(2 * d, d), nn.Sigmoid())


class LD4MRec(nn.Module):
    """C-Net and everything around it.   x_hat[u, i] = encode(u) . table()[i]

    loss(users)      one training loss for a global batch of user ids
    encode(users)    (n, d + 1) latent users by the chosen inference;   table() (I, d + 1) latent items
    """

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.cfg, self.users, self.items = cfg, users, items
        self.clicks = Graph.from_edges(train[:, 0], train[:, 1], (users, items))               # R, rows are x_0
        width = {m: cfg.width if cfg.befa else min(x.shape[1], MOST) for m, x in features.items()}
        self.modalities = width if cfg.guide_modality else {}                                  # {m: width of p_um}
        self.conditions(features)
        betas, abar = diffusion.schedule(cfg.T, cfg.scale, cfg.low, cfg.high, cfg.first_beta)
        a, b = diffusion.posterior(betas, abar)
        for name, x in {"betas": betas, "abar": abar, "variance": 1 - abar, "to_clean": a, "to_state": b,
                        "snr": diffusion.snr_weight(abar)}.items():    # from float64: 1 - float32(abar) has 3 digits left
            self.register_buffer(name, x.float())                                              # abar[0] = 1, variance[0] = 0
        self.times = diffusion.TimeSampler(cfg.T, cfg.t_sampling == "importance")              # t ~ Importance({1..T}) [F]
        self.table_in, self.bias_in = nn.Parameter(torch.empty(items, cfg.width)), nn.Parameter(torch.zeros(cfg.width))
        self.network()
        self.table_out, self.bias_out = nn.Parameter(torch.empty(items, cfg.width)), nn.Parameter(torch.zeros(items))
        for weight in (p for name, p in self.named_parameters() if p.dim() == 2):
            nn.init.xavier_normal_(weight)                                                     # [D]
        for block in (m for m in self.modules() if isinstance(m, Denoise | Guide)):            # blocks start as the identity
            nn.init.zeros_((block.w2 if isinstance(block, Denoise) else block.out).weight)
        if cfg.soft_target == "neighbour":
            self.pattern, self.score = diffusion.neighbour_scores(self.clicks, cfg.neighbours)

    def conditions(self, features):
        """Item tables whose sums over a user's clicks are c_u and p_um (Sec. 4), side by side; no gradient."""
        cfg, clicks, tables = self.cfg, self.clicks, []
        if cfg.guide_modality and not features:
            raise ValueError("modality guidance needs content features; without any pass --guide_modality=false")
        if cfg.guide_collab:
            table, per_user = collaborative_table(cfg, clicks)
            tables.append(table)
            self.register_buffer("per_user_c", per_user)
        if self.modalities:
            self.register_buffer("per_item", clicks.T.counts.clamp(min=1).rsqrt()[:, None])
            self.register_buffer("per_user", clicks.counts.clamp(min=1).rsqrt()[:, None])
            for m, x in features.items():
                self.register_buffer(f"content_{m}", content(x))
                tables += [] if cfg.befa else [self.per_item * self.get_buffer(f"content_{m}")]
        self.register_buffer("guides", torch.cat(tables, 1) if tables else torch.zeros(self.items, 0))    # (I, k + sum d_m)

    def guidance(self, rows, users):
        """c_u = R_hat V / sqrt(Sigma) and p_um = R_hat X_m, Sec. 4.   rows Graph (B, I) -> c (B, k) or None, p {m: (B, d_m)}"""
        cfg, tables = self.cfg, self.guides
        if cfg.befa:                                         # X_m is rebuilt every step: E_i * mask(X_m)
            rebuilt = [self.per_item * self.table_in * self.befa[m](self.get_buffer(f"content_{m}")) for m in self.modalities]
            tables = torch.cat([tables, *rebuilt], 1)
        sums = propagate(rows, tables)
        c = sums[:, : cfg.svd] * self.per_user_c[users] if cfg.guide_collab else None
        if not self.modalities:
            return c, {}
        parts = (self.per_user[users] * sums[:, cfg.svd * cfg.guide_collab :]).split(list(self.modalities.values()), 1)
        return c, dict(zip(self.modalities, parts, strict=True))

    def network(self):
        """FC -> BD -> BG -> BD -> BG -> FC [F] between the two tables."""
        cfg, guided = self.cfg, self.cfg.guide_modality
        d = cfg.time_width
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))                 # tau(t)
        self.t_in = nn.Parameter(torch.zeros(d))                                               # delta of tau_in [K]
        if cfg.befa and guided:
            self.befa = nn.ModuleDict({m: Adapter(self.get_buffer(f"content_{m}").shape[1], cfg.width) for m in self.modalities})
        if guided:
            self.attn = Preference(cfg, self.modalities)
        single = cfg.width * (cfg.order == "single" and guided)
        given = d + cfg.svd * cfg.guide_collab + single
        self.bd = nn.ModuleList(Denoise(cfg, given) for _ in range(cfg.layers))
        self.bg = nn.ModuleList(Guide(cfg) for _ in range(cfg.layers if guided and not single else 0))

    def tau(self, t):
        """Time representation.   t (n,) int -> (n, d_t)"""
        return self.time(time_code(t, self.cfg.time_width))

    def tau_in(self, n):
        """Learnable input time of forward-free inference: tau(0) + delta [K]; how it is trained is UNVERIFIED."""
        return self.tau(torch.zeros(1, device=self.t_in.device)).expand(n, -1) + self.t_in

    def forward(self, entered, tau, guidance):
        """C-Net between the tables.   entered (B, d) = W_in^T x, tau (B, d_t), guidance as above -> h (B, d)"""
        (c, p), h, order = guidance, entered + self.bias_in, self.cfg.order
        r = self.attn(p) if p else None                                                        # (B, d)
        given = torch.cat([x for x in (tau, c, r if order == "single" else None) if x is not None], 1)
        for level, denoise in enumerate(self.bd):
            if self.bg and order == "BGBD":
                h = self.bg[level](h, r)
            h = denoise(h, given)
            if self.bg and order == "BDBG":
                h = self.bg[level](h, r)
        return h

    # -- training (sections 3 and 7) --

    def enter(self, rows, abar, noise, z=None):
        """W_in^T x_t for x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, Sec. 3.   rows Graph (B, I), abar, noise (B,) -> (B, d)

        Dropout and normalisation act on the clicks before the noise, which keeps every shortcut exact; with acts_on = state
        they act on x_t as in DiffRec, and x_t is written out.
        """
        cfg, table = self.cfg, self.table_in
        if cfg.acts_on == "clicks" and cfg.normalise:
            rows = fast.unit_rows(rows)
        if cfg.noise == "latent":
            z = drawn(torch.randn, *abar.shape, cfg.width, device=abar.device) if z is None else z
            eps = fast.latent_noise(table, z) if noise.any() else 0
            return abar.sqrt()[:, None] * propagate(rows, table) + noise.sqrt()[:, None] * eps
        eps = drawn(torch.randn, *rows.shape, device=abar.device)
        return self.enter_state(abar.sqrt()[:, None] * rows.dense() + noise.sqrt()[:, None] * eps)

    def enter_state(self, x):
        """W_in^T x for a dense state x_t (B, I)."""
        if self.cfg.acts_on == "state":
            x = F.normalize(x, dim=1) if self.cfg.normalise else x
            x = dropout(x, self.cfg.dropout_in, self.training)
        return x @ self.table_in

    def loss(self, users):
        """E_t,eps w_t || f_S(x_0) - C-Net(x_t, tau(t), c_u, p_u) ||^2, Sec. 7.   users: the global batch (B,) -> scalar

        A share rho of the users is fed x_0 as it is with tau_in, because that is what inference will do [I].
        """
        cfg, mine = self.cfg, parallel.shard(users)
        rows, n = self.clicks.rows(mine), len(mine)
        clean = drawn(torch.rand, n, device=users.device) < cfg.rho
        t, weight = self.times.draw(n)
        abar, noise = torch.where(clean, 1.0, self.abar[t]), torch.where(clean, 0.0, self.variance[t])
        shown = rows
        if cfg.acts_on == "clicks" and cfg.dropout_in:
            shown = fast.drop_clicks(rows, cfg.dropout_in, diffusion.drawn_for_entries(self.clicks, users))
        tau = torch.where(clean[:, None], self.tau_in(n), self.tau(t))
        guidance = self.guidance(rows if cfg.guides_see == "whole" else shown, mine)
        h = self(self.enter(shown, abar, noise), tau, guidance).float()
        target = self.target(users, mine)
        error = self.reconstruction(h, target)                                                 # (B,)
        self.times.record(t, error, ~clean)
        weight = weight * self.snr[t - 1] if cfg.weighting == "snr" else weight
        return (torch.where(clean, 1.0, weight) * error).mean()

    def target(self, users, mine):
        """f_S(x_0), drawn for the global batch `users`, for this process's rows `mine`."""
        cfg, neighbour = self.cfg, self.cfg.soft_target == "neighbour"
        graph = self.pattern if neighbour else self.clicks
        rows = graph.rows(mine)
        share = drawn(torch.rand, len(mine), device=users.device)
        each = diffusion.drawn_for_entries(graph, users) if cfg.soft_target == "positive_only" else None
        score = self.score[rows.entries] if neighbour else None
        return diffusion.soft_target(cfg.soft_target, cfg.p, cfg.gamma, rows, share, each, score)

    def reconstruction(self, h, target):
        """|| f_S - x_hat ||^2 of every user, or the cross-entropy between them.   h (B, d) -> (B,)"""
        cfg = self.cfg
        if cfg.objective == "ce":
            return fast.cross_entropy(h, self.table_out, self.bias_out, target)
        squared = fast.reconstruction if cfg.loss == "closed" else fast.reconstruction_naive
        return squared(h, self.table_out, self.bias_out, target, cfg.click_weight)

    # -- inference (section 6) --

    def table(self):
        return torch.cat([self.table_out, self.bias_out[:, None]], 1)                          # (I, d + 1)

    def encode(self, users, inference=None, steps=None, rows=None):
        """Users in the items' latent space.   users (n,) -> (n, d + 1); rows Graph (n, I): other clicks than theirs

        forward_free   C-Net(x_0, tau_in): no noise, one call [P2][K]
        one_step       C-Net(x_t, tau(t)) at t = corrupt (at least 1): version 1
        chain          corrupt to t = corrupt (0: not at all), then `steps` reverse steps down to t = 1, as DiffRec [D]
        """
        cfg, rows, n = self.cfg, rows or self.clicks.rows(users), len(users)
        inference, steps = inference or cfg.inference, steps or cfg.T
        t = {"forward_free": 0, "one_step": max(1, cfg.corrupt), "chain": cfg.corrupt}[inference]
        abar, noise = self.abar[t].expand(n), self.variance[t].expand(n)
        if inference == "chain" and (cfg.acts_on == "state" or cfg.noise == "dense"):
            return self.leave(self.chain_naive(rows, abar, noise, users, steps))
        guidance = self.guidance(rows, users)
        entered = self.enter(rows, abar, noise, self.still_noise(users) if t else None)
        if inference == "chain":
            return self.leave(self.chain(entered, guidance, steps))
        return self.leave(self(entered, self.tau(torch.full_like(users, t)) if t else self.tau_in(n), guidance))

    def chain(self, entered, guidance, steps):
        """Reverse chain followed in the latent space: W_in^T x_hat = (W_in^T V) h + W_in^T b, so a step costs d^2, not I d."""
        again, shift = self.table_out.T @ self.table_in, self.bias_out @ self.table_in         # (d, d), (d,)
        for t in range(steps, 0, -1):
            h = self(entered, self.tau(torch.full((len(entered),), t, device=entered.device)), guidance)
            entered = self.to_clean[t - 1] * (h @ again + shift) + self.to_state[t - 1] * entered
        return h

    def chain_naive(self, rows, abar, noise, users, steps):
        """The same on states (n, I): x_{t-1} = a_t x_hat + b_t x_t."""
        x = abar.sqrt()[:, None] * rows.dense()
        if noise.any():
            rng = torch.Generator().manual_seed(self.cfg.seed)
            x = x + noise.sqrt()[:, None] * torch.randn(rows.shape, generator=rng).to(x.device)
        for t in range(steps, 0, -1):
            h = self(self.enter_state(x), self.tau(torch.full_like(users, t)), self.guidance(rows, users))
            x = self.to_clean[t - 1] * (h @ self.table_out.T + self.bias_out) + self.to_state[t - 1] * x
        return h

    def still_noise(self, users):
        """The same noise for a user whenever and with whomever it is asked for.   -> (n, d)"""
        rng = torch.Generator().manual_seed(self.cfg.seed)
        return torch.randn(self.users, self.cfg.width, generator=rng).to(users.device)[users]

    def leave(self, h):
        return F.pad(h.float(), (0, 1), value=1.0)                                             # times the item's bias
