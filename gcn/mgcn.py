"""MGCN: Multi-View Graph Convolutional Network for Multimedia Recommendation (Yu, Tan, Lu, Bao; MM 2023).

Three ideas, in the order of the paper's method section: (1) purify each modality by behaviour before anything is
propagated, (2) walk the user-item graph and one item-item graph per modality separately, (3) fuse content by what
behaviour prefers, and tie the views together by a contrastive loss. This page is the naive version, every tensor
over all users and items; fast.py computes the same loss and gradients from the rows of a batch.

Equation numbers are the paper's: 1-2 purifier, 3-5 user-item view, 6-9 item-item view, 10 user content,
11-15 fuser, 16 contrastive loss, 17-18 score and BPR, 19 total. (The PDF was not at hand when this was written:
which number belongs to which line inside a group is UNVERIFIED; the formulas are those of the authors' code.)
"""
import torch
from torch import nn
from torch.nn import functional as F

from data.weights import check_names
from kernels.graph import Graph, knn, mix_hops, propagate


def user_item_graph(train, users, items):
    """A_hat = D^-1/2 A D^-1/2 of the training clicks, no self loops, Eq. 3.   train (E, 2) -> Graph (U + I, U + I)"""
    return Graph.bipartite(train[:, 0], train[:, 1], users, items)


def look_alikes(features, k, name="features"):
    """Every item's k nearest items by cosine, the item itself included, and their weights, Eq. 6-7.   -> (I, k), (I, k)

    S_ij = s_ij / sqrt(g_i g_j), g the sum of a row's kept similarities. Built once from the initial features and frozen,
    also when the features train on. raises ValueError for a zero row, or for a degree that is not positive
    """
    zero = torch.nonzero(features.norm(dim=1) == 0).flatten()
    if len(zero):                                             # Official code: divides by zero and goes on with NaN
        raise ValueError(f"{name}: the row of item {int(zero[0])} is all zeros ({len(zero)} such rows), so it has no "
                         "direction and no neighbours; give it the mean of the other rows, as MMRec does")
    neighbours, similarity = knn(features, k)                 # (I, k), (I, k)
    degree = similarity.sum(1)                                # (I,)
    if (degree <= 0).any():
        raise ValueError(f"{name}: item {int((degree <= 0).nonzero()[0])} is opposite to its own neighbours (similarities "
                         f"sum to {degree.min():.3g}), so the graph cannot be normalised; choose a smaller --k")
    # Paper: "symmetric normalisation". The kept edges are directed, and both factors are row sums.
    return neighbours, similarity * (degree[:, None] * degree[neighbours]).rsqrt()


class MGCN(nn.Module):
    """Purify each modality by behaviour, propagate it in its own view, fuse by preference, rank by dot product.

    forward() -> users (U, D), items (I, D).   score(u, i) = users[u] . items[i], Eq. 17

    cfg       see task.Config
    train     (E, 2) training clicks, the only edges of any graph
    features  {modality: (I, d_m) float32}, any number of modalities, none included
    """

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.cfg, self.users, self.items, self.modalities = cfg, users, items, tuple(features)
        self.user = nn.Embedding(users, cfg.dim)              # E_u, Sec. 3.1
        self.item = nn.Embedding(items, cfg.dim)              # E_i
        nn.init.xavier_uniform_(self.user.weight)
        nn.init.xavier_uniform_(self.item.weight)
        # Paper: features are inputs. Official code: they are trainable tables that start from the inputs; followed.
        self.features = nn.ParameterDict({m: nn.Parameter(x.clone(), cfg.train_features) for m, x in features.items()})

        def linears(width=None):
            return nn.ModuleDict({m: nn.Linear(width or x.shape[1], cfg.dim) for m, x in features.items()})

        self.project = linears()                              # Eq. 1
        if cfg.purify:
            self.gate = linears(cfg.dim)                      # Eq. 2
        if cfg.fuser in ("baf", "shared_only") and len(features) > 1:
            self.query = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.Tanh(), nn.Linear(cfg.dim, 1, bias=False))  # Eq. 11
        if cfg.fuser == "baf":
            self.preference = linears(cfg.dim)                # Eq. 14
        if cfg.fuser == "concat" and features:
            self.mixer = nn.Linear(len(features) * cfg.dim, cfg.dim)
        # Graphs are constants of the data, not part of the state: to(device) and checkpoints do not see them.
        self.train_edges, view = train, features if cfg.item_view else {}
        self.look_alikes = {m: look_alikes(x.to(train.device), cfg.k, m) for m, x in view.items()}
        self.ui = user_item_graph(train, users, items)                          # A_hat (N, N), .R is R_hat (U, I)
        self.ii = {m: Graph.from_knn(*edges) for m, edges in self.look_alikes.items()}          # S_m (I, I)

    def forward(self):
        behaviour, content = self.views()
        return (behaviour + content).split([self.users, self.items])           # Eq. 15: F = C + M

    def views(self):
        """Behaviour view C and fused content M.   -> (N, D), (N, D), N = U + I nodes, users first"""
        behaviour = self.user_item_view()
        if not self.modalities:
            return behaviour, torch.zeros_like(behaviour)
        return behaviour, self.fuse(behaviour, self.content())

    def content(self):
        """E_m of every modality, users first.   -> M x (N, D)"""
        return [self.with_users(self.item_item_view(m, self.purify(m))) for m in self.modalities]

    def purify(self, m):
        """Behaviour-guided purifier, Eq. 1-2: Z_m = E_i * sigmoid(P_m W2 + b2), P_m = X_m W1 + b1.   -> (I, D)"""
        projected = self.project[m](self.features[m])                           # (I, D)    P_m
        if not self.cfg.purify:
            return projected
        # Paper: "content is purified by behaviour". In the algebra the item's ID vector is gated by content: raw
        # content never enters the sum, it only decides how much of each ID dimension walks on.
        return self.item.weight * torch.sigmoid(self.gate[m](projected))        # (I, D)    Z_m

    def user_item_view(self):
        """Mean of layers 0..L of parameter-free propagation (LightGCN), Eq. 3-5.   -> C (N, D)"""
        nodes = torch.cat([self.user.weight, self.item.weight])                 # (N, D)    H_0
        return mean_of_hops(self.ui, nodes, self.cfg.ui_layers)

    def item_item_view(self, m, purified, hops=None):
        """Propagate purified content among look-alikes, no activation, Eq. 8-9.   (I, D) -> (I, D); hops: L_ii"""
        hops = self.cfg.item_layers if hops is None else hops
        for _ in range(hops if self.cfg.item_view else 0):
            purified = propagate(self.ii[m], purified)
        return purified

    def with_users(self, items):
        """Users inherit content from the items they clicked, Eq. 10: E_m = [R_hat Z_m; Z_m].   (I, D) -> (N, D)"""
        return torch.cat([propagate(self.ui.R, items), items])

    def attention(self, content):
        """How much of the shared part each modality gives, a softmax per node, Eq. 11-12.   M x (N, D) -> (N, M)"""
        return torch.cat([self.query(x) for x in content], dim=1).softmax(1)

    def fuse(self, behaviour, content):
        """Behaviour-aware fuser, Eq. 13-15.   behaviour (N, D), content M x (N, D) -> fused content (N, D)"""
        if self.cfg.fuser == "mean":
            return torch.stack(content).mean(0)
        if self.cfg.fuser == "concat":
            return self.mixer(torch.cat(content, dim=1))
        if len(content) == 1:                                 # E_s = E_m: only the preference is left (authors, issue 6)
            m, x = self.modalities[0], content[0]
            return torch.sigmoid(self.preference[m](behaviour)) * x if self.cfg.fuser == "baf" else x
        attention = self.attention(content)                                     # (N, M)    a_m
        shared = sum(attention[:, k, None] * x for k, x in enumerate(content))  # (N, D)    E_s
        specific = torch.zeros_like(shared)
        if self.cfg.fuser == "baf":
            gates = [torch.sigmoid(self.preference[m](behaviour)) for m in self.modalities]     # M x (N, D)    G_m
            specific = sum(g * (x - shared) for g, x in zip(gates, content, strict=True))
        a, b = fusion_scales(self.cfg.fusion, len(content))
        return a * shared + b * specific


def mean_of_hops(graph, nodes, hops):
    """Mean of A^0 x .. A^L x, L = hops.   (N, D) -> (N, D)"""
    return mix_hops(graph, nodes, [1 / (hops + 1)] * (hops + 1))


def fusion_scales(fusion, modalities):
    """Scales (a, b) of M = a E_s + b sum_m G_m * (E_m - E_s), Eq. 15, for `modalities` modalities.

    Paper: a = 1, b = 1 / M. Official code: everything is divided by M + 1; followed by default (--fusion=code).
    """
    return (1.0, 1 / modalities) if fusion == "paper" else (1 / (modalities + 1), 1 / (modalities + 1))


# ---- losses ----------------------------------------------------------------------------------------------------------


def bpr(positive, negative):
    """Bayesian personalised ranking, Eq. 18: -mean log sigmoid(positive - negative).   scores (B,) -> scalar

    Paper: a sum over triples. Official code: the mean, followed (the sum would scale the step with the batch).
    """
    return -F.logsigmoid(positive - negative).mean()


def info_nce(anchors, candidates, tau, first=0):
    """Contrastive loss, Eq. 16.   anchors (B', D), candidates (B, D) -> scalar

    Candidate first + r is the positive of anchor r, every other row of candidates is a negative; cosine / tau.
    Paper: the denominator runs over all users (or items), with an index typo that pairs v with v.
    Official code: over the batch, one direction, duplicates kept: a user twice in a batch is their own negative.
    """
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / tau               # (B', B)
    return F.cross_entropy(logits, torch.arange(first, first + len(anchors), device=logits.device))


def half_square(*tables):
    """0.5 sum |rows|^2 / B of the final embeddings in a batch: the official regulariser.   each (B, D) -> scalar

    Paper: the norm of all parameters. Official code: these rows only, divided by the configured batch size.
    """
    return 0.5 * sum(x.square().sum() for x in tables) / len(tables[0])


def loss(model, batch, local=slice(None)):
    """Total loss of a batch, Eq. 19: BPR + reg |F|^2 + cl_loss (NCE of items + NCE of users).

    batch  users, positives, negatives (B,) each;  local: the rows whose share this process computes
    """
    cfg, (behaviour, content) = model.cfg, model.views()
    user, positive, negative = batch[0], batch[1] + model.users, batch[2] + model.users         # nodes of the graph
    final = behaviour + content
    f_user, f_positive, f_negative = (final[nodes[local]] for nodes in (user, positive, negative))
    total = bpr((f_user * f_positive).sum(1), (f_user * f_negative).sum(1))
    total = total + cfg.reg * half_square(f_user, f_positive, f_negative)
    if cfg.cl and model.modalities:
        first = local.start or 0
        total = total + cfg.cl_loss * sum(                    # content anchors against behaviour candidates
            info_nce(content[nodes[local]], behaviour[nodes], cfg.tau, first) for nodes in (positive, user))
    return total


# ---- the authors' weights ----------------------------------------------------------------------------------------------

LETTERS = {"image": "v", "text": "t"}                        # modality -> the letter in the authors' names


def from_official(state):
    """State dict of the official MGCN -> state dict of this one, with the modalities image and text.

    MGCN(...).load_state_dict(from_official(state)). Graphs are not in it: they are rebuilt from the data.
    raises ValueError that lists missing, unknown and misshapen entries by name
    """
    names, D = official_tables(state)
    names |= linear("query_common.0", "query.0", D, D) | {"query_common.2.weight": ("query.2.weight", (1, D))}
    for m, letter in LETTERS.items():
        names |= linear(f"gate_{letter}.0", f"gate.{m}", D, D) | linear(f"gate_{m}_prefer.0", f"preference.{m}", D, D)
    return renamed(names, state, "the official MGCN state dict")


def official_tables(state):
    """What the authors' MGCN and BeFA share: ID tables, features, projections.   -> {their name: (our name, shape)}, D"""
    users, D = size(state, "user_embedding.weight")
    items = size(state, "item_id_embedding.weight")[0]
    names = {"user_embedding.weight": ("user.weight", (users, D)), "item_id_embedding.weight": ("item.weight", (items, D))}
    for m in LETTERS:
        width = size(state, f"{m}_embedding.weight")[1]
        names |= {f"{m}_embedding.weight": (f"features.{m}", (items, width))} | linear(f"{m}_trs", f"project.{m}", D, width)
    return names, D


def linear(theirs, ours, rows, columns):
    """Names and shapes of a linear layer."""
    return {f"{theirs}.weight": (f"{ours}.weight", (rows, columns)), f"{theirs}.bias": (f"{ours}.bias", (rows,))}


def size(state, name):
    """Rows and columns of a matrix; zeros where it is missing, so that the check names it."""
    return tuple(state[name].shape) if name in state and state[name].dim() == 2 else (0, 0)


def renamed(names, state, where):
    """{their name: (our name, shape)} and their state dict -> ours.   raises ValueError listing what does not fit"""
    check_names({theirs: shape for theirs, (_, shape) in names.items()}, state, where)
    return {ours: state[theirs] for theirs, (ours, _) in names.items()}
