"""What LD4MRec argues against, under the same protocol and behind the same three calls: loss, encode, table.

DiffRec        unconditional chain (Wang et al., SIGIR 2023): noise, a one-layer network, many reverse steps
Autoencoder    the same network without diffusion: one clean pass (denoising by dropout alone)
Popularity     most clicked first, the same list for everybody
"""
import torch
from torch import nn

from diffusion_rec.ld4mrec import LD4MRec


class DiffRec(LD4MRec):
    """Chain over the whole behaviour vector without conditions; x_0 is predicted by one hidden layer.

    x_hat = V tanh(W_in^T x_t + W_t code(t) + b) + bias. Both ends are linear, so LD4MRec's noise, loss and chain fit as they
    are; --noise=dense --acts_on=state is the official code's own arithmetic, dropout and normalisation on x_t.
    """

    def conditions(self, features):
        self.modalities = {}

    def network(self):
        d = self.cfg.time_width
        self.time = nn.Linear(d, d)                          # the official code's emb_layer
        self.t_in = nn.Parameter(torch.zeros(d))
        self.given = nn.Linear(d, self.cfg.width, bias=False)

    def guidance(self, rows, users):
        return None

    def forward(self, entered, tau, guidance):
        return torch.tanh(entered + self.bias_in + self.given(tau))


class Autoencoder(DiffRec):
    """Denoising autoencoder: with rho = 1 nothing is corrupted, and time is not an input."""

    def forward(self, entered, tau, guidance):
        return torch.tanh(entered + self.bias_in)


class Popularity(nn.Module):
    """Most clicked first, the same list for everybody."""

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.register_buffer("count", torch.bincount(train[:, 1], minlength=items)[:, None].float())

    def encode(self, users, inference=None, steps=None):
        return torch.ones(len(users), 1, device=users.device)

    def table(self):
        return self.count
