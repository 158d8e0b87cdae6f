"""The loss of mgcn.py and all its gradients, from less work. Same mathematics, no approximation: --exact=full switches back.

What a batch of B clicks needs of the N = U + I nodes is a few thousand rows, and each line below says whose work it saves:
1. rows       the last hop, the users' content and the fuser are computed for the batch's rows only
2. one walk   the modalities are columns of one tensor (I, M, D): one gather serves all of them
3. purifier   two linear layers without anything between them are one: sigmoid(X (W2 W1)^T + (W2 b1 + b2))
4. fuser      closed form, forward and backward, instead of thirty element-wise steps on the tape
5. InfoNCE    a user who occurs n times in a batch is one row with weight n; one product, exp in place, two products back
Tests compare every gradient with the naive page. What the graph-wide passes that remain cost: see README.
"""
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gcn.mgcn import fusion_scales
from kernels.graph import Graph, propagate

BLOCK = 256          # anchors at a time: 256 rows of exponentials stay in a core's cache


class _MeanHops(torch.autograd.Function):
    """Rows of the mean of A^0 x .. A^L x, Horner's rule: the last hop is walked for these rows alone.

    Backward: the same polynomial of A^T, applied to the gradient scattered over all nodes.
    """

    @staticmethod
    def forward(ctx, graph, x, rows, hops):
        ctx.graph, ctx.hops = graph, hops
        ctx.save_for_backward(rows)
        h = x
        for _ in range(hops - 1):
            h = propagate(graph, h).add_(x)
        y = x[rows] if hops == 0 else propagate(graph.rows(rows), h).add_(x[rows])
        return y.div_(hops + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        full = dy.new_zeros(ctx.graph.shape[1], dy.shape[1]).index_copy_(0, rows, dy / (ctx.hops + 1))
        h = full
        for _ in range(ctx.hops):
            h = propagate(ctx.graph.T, h).add_(full)
        return None, h, None, None


class _Purify(torch.autograd.Function):
    """Z_m = E_i * sigmoid(X_m W_m^T + w_m) of every modality, side by side.   -> (I, M, D)

    E (I, D), w (M, D), then M features (I, d_m), then M weights (D, d_m)
    """

    @staticmethod
    def forward(ctx, E, w, *rest):
        M = len(w)
        G = E.new_empty(len(E), M, E.shape[1])
        for m in range(M):
            torch.addmm(w[m], rest[m], rest[M + m].T, out=G[:, m])
        ctx.save_for_backward(E, G.sigmoid_(), *rest)
        return E[:, None] * G

    @staticmethod
    @once_differentiable
    def backward(ctx, dZ):
        E, G, *rest = ctx.saved_tensors
        M = G.shape[1]
        dP = torch.ops.aten.sigmoid_backward(dZ * E[:, None], G)                # (I, M, D) before the sigmoid
        dX = [dP[:, m] @ rest[M + m] if ctx.needs_input_grad[2 + m] else None for m in range(M)]
        dW = [dP[:, m].T @ rest[m] for m in range(M)]
        return (dZ * G).sum(1), dP.sum(0), *dX, *dW


class _Fuse(torch.autograd.Function):
    """The fuser, Eq. 11-15, in closed form.   C (n, D), E (n, M, D) -> M (n, D)

    l_m = q . tanh(E_m W + w),  a = softmax(l),  G_m = sigmoid(C V_m^T + v_m),  s = sum_m G_m
    M   = a0 E_s + b0 sum_m G_m (E_m - E_s)  =  sum_m c_m E_m   with  c_m = a_m (a0 - b0 s) + b0 G_m
    Backward, g = dM:  dE_m = c_m g,  h_m = g E_m,  dG_m = b0 (h_m - sum_k a_k h_k),  da_m = sum_j (h_m (a0 - b0 s))_j
    """

    @staticmethod
    def forward(ctx, C, E, W, w, q, V, v, scales):
        n, M, D = E.shape
        a0, b0 = scales
        # tanh y = 2 sigmoid(2 y) - 1, six times cheaper on a CPU; the constant is the same for all m: softmax drops it.
        T = torch.addmm(w, E.view(n * M, D), W.T).mul_(2).sigmoid_()            # (nM, D)
        a = (T @ q.T).mul_(2).view(n, M).softmax(1)                             # (n, M)
        G = torch.addmm(v, C, V.T).sigmoid_().view(n, M, D)                     # (n, M, D)  V (MD, D): all gates at once
        rest = G.sum(1).mul_(-b0).add_(a0)                                      # (n, D)     a0 - b0 s
        c = torch.addcmul(b0 * G, a[:, :, None], rest[:, None])                 # (n, M, D)
        ctx.save_for_backward(C, E, W, q, V, T, a, G, rest, c)
        ctx.b0 = b0
        return (c * E).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        C, E, W, q, V, T, a, G, rest, c = ctx.saved_tensors
        n, M, D = E.shape
        h = g[:, None] * E                                                      # (n, M, D)
        da = (h * rest[:, None]).sum(2)                                         # (n, M)
        dG = (h - (a[:, :, None] * h).sum(1, keepdim=True)).mul_(ctx.b0)        # (n, M, D)
        dG = torch.ops.aten.sigmoid_backward(dG, G).view(n, M * D)              # before the sigmoid
        dl = (a * (da - (a * da).sum(1, keepdim=True))).view(n * M, 1)          # (nM, 1)
        dT = torch.ops.aten.sigmoid_backward(dl * (4 * q), T)                   # before the tanh
        dE = torch.addmm((c * g[:, None]).view(n * M, D), dT, W).view(n, M, D)
        return dG @ V, dE, dT.T @ E.view(n * M, D), dT.sum(0), 2 * dl.T @ T, dG.T @ C, dG.sum(0), None


class _InfoNCE(torch.autograd.Function):
    """sum_r w_r [ log sum_c n_c exp(a_r . b_c / tau) - a_r . b_r / tau ], unit rows (R, D): Eq. 16 without duplicates.

    w_r is the share of anchor r in the batch, n_c how often candidate c occurs. The loss is linear in its own gradient,
    so da and db are made while a block of exponentials is still in the cache, and no R x R matrix is kept.
    Cosines are at most 1: exp(cos / tau) needs no search for the largest logit; tau >= 0.03 keeps it within 1e+-15.
    """

    @staticmethod
    def forward(ctx, a, b, w, n, tau):
        value, da, db = -(w * (a * b).sum(1)).sum() / tau, torch.empty_like(a), torch.zeros_like(b)
        weighted, logit = n[:, None] * b, (b / tau).T.contiguous()              # (R, D), (D, R)
        block = a.new_empty(min(BLOCK, len(a)), len(b))       # one for all: fresh memory costs more than the product
        for r in range(0, len(a), BLOCK):
            mine = slice(r, r + BLOCK)
            p = torch.mm(a[mine], logit, out=block[: len(a) - r]).exp_()        # (BLOCK, R)
            total = p @ n                                                       # (BLOCK,)  sum_c n_c p_rc
            value += (w[mine] * total.log()).sum()
            torch.div(p @ weighted, total[:, None], out=da[mine])               # mean candidate of each anchor
            db.addmm_(p.T, (w[mine] / total)[:, None] * a[mine])
        ctx.save_for_backward((w / tau)[:, None] * (da - b), (n[:, None] * db - w[:, None] * a) / tau)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        da, db = ctx.saved_tensors
        return g * da, g * db, None, None, None


def stacked_graphs(model):
    """The graphs as the fast path walks them, built once.   -> [R_hat; identity] (N, I), S of all modalities (I M, I M)"""
    if not hasattr(model, "stacked"):
        (user, item), users, items, M = model.train_edges.T, model.users, model.items, len(model.modalities)
        own, degree = torch.arange(items, device=user.device), torch.bincount(user, minlength=users).double()
        weight = (degree[user] * torch.bincount(item, minlength=items)[item]).rsqrt().float()
        content = Graph.from_edges(torch.cat([user, own + users]), torch.cat([item, own]), (users + items, items),
                                   torch.cat([weight, torch.ones(items, device=user.device)]))
        views = list(model.look_alikes.values())              # row i M + m of (I, M, D) is item i, modality m
        row = [(own * M + m)[:, None].expand_as(near).flatten() for m, (near, _) in enumerate(views)]
        col = [(near * M + m).flatten() for m, (near, _) in enumerate(views)]
        looks = [Graph.from_edges(torch.cat(row), torch.cat(col), (items * M, items * M),
                                  torch.cat([w.flatten() for _, w in views]))] if views else [None]
        model.stacked = content, *looks
    return model.stacked


def purify(model):
    """Eq. 1-2 of all modalities, two linear layers as one; a model with its own purifier (an adapter) keeps it.   -> (I, M, D)"""
    if not model.cfg.purify or getattr(model, "adapters", None):
        return torch.stack([model.purify(m) for m in model.modalities], 1)
    pairs = [(model.project[m], model.gate[m]) for m in model.modalities]
    bias = torch.stack([gate.weight @ project.bias + gate.bias for project, gate in pairs])
    return _Purify.apply(model.item.weight, bias, *(model.features[m] for m in model.modalities),
                         *(gate.weight @ project.weight for project, gate in pairs))


def views(model, rows):
    """Rows of C and M.   rows (n,) nodes without repeats -> (n, D), (n, D)"""
    cfg, M = model.cfg, len(model.modalities)
    nodes = torch.cat([model.user.weight, model.item.weight])
    behaviour = _MeanHops.apply(model.ui, nodes, rows, cfg.ui_layers)
    if not M:
        return behaviour, torch.zeros_like(behaviour)
    content, looks = stacked_graphs(model)
    x = purify(model)                                         # (I, M, D)
    for _ in range(cfg.item_layers if cfg.item_view else 0):
        x = propagate(looks, x.reshape(-1, cfg.dim))
    x = propagate(content.rows(rows), x.reshape(model.items, -1)).view(len(rows), M, cfg.dim)
    if cfg.fuser != "baf" or M == 1:                          # the rivals of the fuser are cheap: the naive page's lines
        return behaviour, model.fuse(behaviour, x.unbind(1))
    first, _, last = model.query
    gates = [model.preference[m] for m in model.modalities]
    return behaviour, _Fuse.apply(behaviour, x, first.weight, first.bias, last.weight, torch.cat([g.weight for g in gates]),
                                  torch.cat([g.bias for g in gates]), fusion_scales(cfg.fusion, M))


def loss(model, batch, local=slice(None)):
    """Same value and gradients as mgcn.loss(model, batch, local)."""
    cfg = model.cfg
    if cfg.tau < 0.03 and cfg.cl:
        raise ValueError(f"--tau={cfg.tau} is too small for the fast contrastive loss; add --exact=full")
    nodes = torch.stack([batch[0], batch[1] + model.users, batch[2] + model.users])             # (3, B)
    rows, place = torch.unique(nodes, return_inverse=True)    # (n,) nodes, (3, B) where each is among the rows
    behaviour, content = views(model, rows)
    final, mine = behaviour + content, place[:, local]
    user, positive, negative = F.embedding(mine, final)       # (B', D) each
    total = -F.logsigmoid((user * (positive - negative)).sum(1)).mean()
    weight = torch.bincount(mine.flatten(), minlength=len(rows)) / mine.shape[1]
    total = total + cfg.reg * 0.5 * (final.square().sum(1) * weight).sum()
    for side in (1, 0) if cfg.cl and model.modalities else ():                                  # positives, users
        count = torch.bincount(place[side], minlength=len(rows))
        there = count.nonzero()[:, 0]
        share = torch.bincount(mine[side], minlength=len(rows))[there] / mine.shape[1]
        a, b = F.normalize(content[there], dim=1), F.normalize(behaviour[there], dim=1)
        total = total + cfg.cl_loss * _InfoNCE.apply(a, b, share, count[there].to(a.dtype), cfg.tau)
    return total
