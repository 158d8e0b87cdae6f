"""BeFA's analysis: which places of a picture, and which words of a title, agree with an item's behaviour.

    places   V_p (P, d_m)      what the frozen encoder makes of each place (word), scaled as the item's feature is
    content  z_p = T(V_p)      T: the trained host's way from raw content to what it goes on with (befa.content_vector)
    A        s_p = cos(z_p, b_i)                                      b_i: the item's behaviour, by default its ID vector
    B        s = cos(T(mean_p V_p), b_i),  w_c = mean_p ds/dV_pc,  H_p = max(0, sum_c w_c V_pc)          (Grad-CAM)

The paper shows such maps before and after BeFA; its script is not released and the PDF was not at hand, so the formulas are
UNVERIFIED. Where the host multiplies by E_i, cos(E * g, E) > 0 everywhere: maps are compared after min-max, never by level.
Drift and omission as numbers are an addition of this repository, for data whose masks and attributes are known:

    drift     sum of the map outside the product / sum of the map             0 .. 1, even map: 1 - the product's area
    omission  share of the product's pixels where the map is below its mean   0 .. 1
    pointing  share of items whose warmest pixel is on the product            even map: the product's area
    kept(a)   (share of the k nearest items with the same a - chance) / (1 - chance), chance = sum_v p_v^2
"""
import torch
from torch.nn import functional as F

from data import clip
from data.pictures import bars
from data.text import words_of
from data.views import products
from gcn.befa import content_vector
from gcn.mgcn import mean_of_hops
from kernels.attribution import cosine_map, grad_cam, show

ENCODERS = ("stored", "histogram", "random")
COLUMNS = "picture | host without BeFA | with BeFA | nearest items by the encoder | by the adapted feature"    # of a panel
FLAT = 1e-4                                                  # a map that spans less is rounding, not attention
SEEN = ("shape", "colour", "texture")                        # what customers of the built-in shop mind in pictures


# ---- frozen encoders: places and the whole -----------------------------------------------------------------------------


@torch.no_grad()
def look(pictures, encoder="stored"):
    """What a frozen encoder makes of pictures.   (n, 3, H, W) in [-1, 1] -> places (n, g, g, d), whole (n, d), rows of length 1

    stored     the small CLIP: patch tokens after the last norm and projection, and the class token, as the shop's features
    histogram  4 x 4 x 4 colours in each of 8 x 8 cells; the whole is their mean
    random     ReLU of a fixed random map of 8 x 8 patches of raw pixels; the whole is their mean
    """
    if encoder == "stored":
        model = clip.small()
        last, whole = model.encode_image(clip.standard(pictures, model.size), (len(model.visual.transformer.resblocks) - 1,))
        places = model.visual.ln_post(last[:, 0].permute(0, 2, 3, 1)) @ model.visual.proj                # (n, g, g, d)
        return F.normalize(places, dim=3), F.normalize(whole, dim=1)
    cells = F.unfold(pictures, pictures.shape[2] // 8, stride=pictures.shape[2] // 8).unflatten(1, (3, -1))   # (n, 3, s s, 64)
    if encoder == "histogram":
        bins = ((cells + 1) * 2).long().clamp(0, 3)                             # four levels a channel
        bins = (bins * torch.tensor([16, 4, 1])[:, None, None]).sum(1)          # (n, s s, 64)
        places = F.one_hot(bins, 64).float().mean(1)                            # (n, 64, 64)
    else:
        mix = torch.randn(cells[0, :, :, 0].numel(), 64, generator=torch.Generator().manual_seed(0))
        places = (cells.flatten(1, 2).transpose(1, 2) @ mix).relu()             # (n, 64, 64)
    return F.normalize(places, dim=2).unflatten(1, (8, 8)), F.normalize(places.mean(1), dim=1)


@torch.no_grad()
def read(title):
    """What the small CLIP makes of the words of a title.   -> (1, T, w), rows of length 1; T strings"""
    tokens = clip.small_tokeniser()([title])
    tokens = tokens[:, : int((tokens > 0).sum())]
    return F.normalize(clip.small().encode_text(tokens)[1], dim=2), ["(start)", *words_of(title), "(end)"]


def check_catalogue(data, whole, encoder):
    """The pictures at hand must be those that the features were made from.   raises ValueError naming the first that is not"""
    stored = data.features["image"][: len(whole)]
    if stored.shape != whole.shape:
        raise ValueError(f"the image features are {stored.shape[1]} wide and the {encoder} encoder's are {whole.shape[1]}: they "
                         "come from another encoder, so there are no maps for them")
    wrong = (F.cosine_similarity(stored, whole) < 0.999).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"item {int(wrong[0])}: the stored image feature is not what the {encoder} encoder makes of its picture "
                         f"({len(wrong)} of {len(whole)} differ); features and pictures come from different catalogues")


# ---- maps --------------------------------------------------------------------------------------------------------------


def behaviour_of(model, items, kind="id"):
    """b_i of some items: their ID vectors, or what the click graph makes of these.   -> (n, D)"""
    if kind == "id":
        return model.item.weight[items]
    if kind != "graph" or model.user.weight.shape[1] != model.item.weight.shape[1]:
        raise ValueError(f"--behaviour={kind}: choose id, or graph (not for vbpr, which walks no graph)")
    nodes = mean_of_hops(model.ui, torch.cat([model.user.weight, model.item.weight]), model.cfg.ui_layers)
    return nodes[model.users + items]


def attribute(model, m, places, items, behaviour="id", variant="A", stage="content"):
    """Agreement of each place with behaviour.   places (n, P, d_m) -> heat (n, P), raw; 0 where it is FLAT all over

    stage   content: T is all the host does, adapter included.   projection: T is X W + b alone (the paper's "before")
    """
    if variant not in ("A", "B") or stage not in ("content", "projection"):
        raise ValueError(f"variant={variant}, stage={stage}: choose A or B, and content or projection")
    own, b = model.item.weight[items].detach(), behaviour_of(model, items, behaviour).detach()

    def to_content(x):                                        # (n, .., d_m) -> (n, .., D)
        e = own if x.dim() == 2 else own[:, None].expand(-1, x.shape[1], -1)
        return content_vector(model, m, x, e) if stage == "content" else model.project[m](x)

    if variant == "A":
        with torch.no_grad():
            heat = cosine_map(to_content(places).contiguous(), b)
    else:
        with torch.enable_grad():
            v = places.detach().clone().requires_grad_()
            score = F.cosine_similarity(to_content(v.mean(1)), b)               # (n,)
            (slope,) = torch.autograd.grad(score.sum(), v)                      # each place has 1 / P of the mean's slope
        heat = grad_cam(places.mT[..., None].contiguous(), slope.mT[..., None].contiguous())[..., 0] * places.shape[1]
    return heat * (heat.amax(1, keepdim=True) - heat.amin(1, keepdim=True) > FLAT)


def score_maps(maps, masks):
    """Drift, omission and pointing of maps against product masks.   (n, H, W) in [0, 1], (n, H, W) -> {name: (n,)}

    A map that is the same everywhere looks at nothing in particular: its scores are NaN, and "flat" is 1.
    """
    inside, heat, area = (masks > 0.5).flatten(1), maps.flatten(1), (masks > 0.5).float().mean((1, 2))
    flat = heat.amax(1) == heat.amin(1)                                         # (n,)
    below = (heat < heat.mean(1, keepdim=True)) & inside
    scores = {"drift": (heat * ~inside).sum(1) / heat.sum(1), "omission": below.sum(1) / inside.sum(1).clamp(min=1),
              "pointing": inside.gather(1, heat.argmax(1, keepdim=True))[:, 0].float()}
    return {name: x.masked_fill(flat, torch.nan) for name, x in scores.items()} | {"flat": flat.float(), "area": area}


# ---- neighbours --------------------------------------------------------------------------------------------------------


def nearest(x, k=10):
    """The k nearest other rows by cosine.   (I, d) -> (I, k)"""
    x = F.normalize(x.detach(), dim=1)
    return (x @ x.T).fill_diagonal_(-2).topk(k, 1).indices


def kept(x, label, rows=None, k=10):
    """How far neighbours share an attribute: 0 as strangers do, 1 always.   x (I, d), label (I,), rows: (I,) bool -> float"""
    same = (label[nearest(x, k)] == label[:, None]).float().mean(1)
    chance = label.bincount().float().div(len(label)).square().sum()
    return float(((same if rows is None else same[rows]).mean() - chance) / (1 - chance))


@torch.no_grad()
def features_table(model, data, seed):
    """kept(a) of each modality's raw features and of what the host makes of them.   -> {(modality, space): {attribute: kept}}

    image: the three planted attributes, and the background, for which nobody buys (drift). text: the planted attributes that
    the title tells, and those it leaves out (omission).
    """
    attributes, told = data.truth["attributes"], data.truth["told"]
    background, table = products(range(data.items), seed)["scene"]["background"], {}
    for m in model.modalities:
        for space, x in (("encoder", data.features[m]), ("host", model.purify(m).cpu())):
            if m == "image":
                row = {"planted": sum(kept(x, attributes[a]) for a in SEEN) / 3, "background": kept(x, background)}
            else:
                row = {"told": sum(kept(x, attributes[a], told[a]) for a in SEEN) / 3,
                       "left out": sum(kept(x, attributes[a], ~told[a]) for a in SEEN) / 3}
            table[m, space] = row
    return table


# ---- what a person looks at ----------------------------------------------------------------------------------------------


class Explorer:
    """Maps, scores and neighbours of the items of one catalogue, for a host without and with the adapter."""

    def __init__(self, data, encoder="stored"):
        if data.pictures is None or "image" not in data.features:
            what = "no pictures, only their features" if data.pictures is None else "no image features in this run"
            raise ValueError(f"attribution draws over pictures, and {data.source} has {what}; try the built-in shop, "
                             "--data=builtin with --modalities=image,text")
        self.data, self.everything = data, torch.arange(data.items)
        self.pictures = data.pictures(self.everything)
        self.places, whole = look(self.pictures, encoder)                       # (I, g, g, d), (I, d)
        check_catalogue(data, whole, encoder)
        masks = data.truth.get("masks")
        self.masks = masks(self.everything)[:, 0] if masks else None            # (I, H, W)

    def maps(self, model, items=None, **how):
        """-> maps (n, H, W) in [0, 1], pictures under their maps (n, 3, H, W)"""
        items = self.everything if items is None else torch.as_tensor(items)
        heat = attribute(model, "image", self.places[items].flatten(1, 2), items, **how)
        return show(heat.unflatten(1, self.places.shape[1:3]), self.pictures[items])

    def scores(self, model, **how):
        """Drift, omission, pointing of every item.   -> {name: (I,)}"""
        return score_maps(self.maps(model, **how)[0], self.masks)

    @torch.no_grad()
    def row(self, item, before, after, count=3, **how):
        """One line of the panel: picture | before | after | nearest by the encoder | nearest in the adapted space."""
        cells = [(self.pictures[item], self.data.name(item))]
        for label, model in (("without", before), ("with BeFA", after)):
            heat, over = self.maps(model, [item], **how)
            whole = content_vector(model, "image", self.data.features["image"][[item]], model.item.weight[[item]])
            text = f"{label}: cos {float(F.cosine_similarity(whole, model.item.weight[[item]])):.2f}"
            if self.masks is not None:
                s = score_maps(heat, self.masks[[item]])
                text += ", flat map" if s["flat"] else f", drift {float(s['drift']):.2f}, omission {float(s['omission']):.2f}"
            cells.append((over[0], text))
        for label, space in (("encoder", self.data.features["image"]), ("adapted", after.purify("image"))):
            near = nearest(space, count)[item].tolist()
            cosine = F.cosine_similarity(space[[item]], space[near])
            cells += [(self.pictures[i], f"{label}: #{i}, {c:.2f}") for i, c in zip(near, cosine.tolist(), strict=True)]
        return cells


def draw_words(path, data, item, before, after, **how):
    """Bars: how far each word of an item's title agrees with its behaviour, without and with the adapter."""
    vectors, words = read(data.titles[item])
    heats = [attribute(model, "text", vectors, torch.tensor([item]), **how)[0].tolist() for model in (before, after)]
    bars(path, {f"{n}. {word}, {label}": s for n, (word, *pair) in enumerate(zip(words, *heats, strict=False))
                for label, s in zip(("without", "with BeFA"), pair, strict=True)},
         f"agreement of words with behaviour: {data.name(item)}")
