"""The authors' weights in this DualVGR: their names, and the matrices that are kept as one here.

Official code: every graph, head and stream has modules of its own. Here the two streams of a layer, and the heads and views of
a graph, are one tensor, so an entry of ours is made of one or of many entries of theirs.
"""
import torch

from data.weights import check_names
from videoqa.model import DualVGR


def official_names(cycles, heads):
    """{our name: official name, a list of them stacked along dim 0, or a pair of either, one for each stream}."""
    unit, streams = "visual_input_unit.", (("appear", "appearance", "acGCN"), ("motion", "motion", "mcGCN"))
    names = {"question.embed.weight": "linguistic_input_unit.encoder_embed.weight",
             "readout.project.weight": "feature_aggregation.v_proj.weight"}
    rnns = {"question.context": "linguistic_input_unit.concatRNN.rnn", "question.sentence": "linguistic_input_unit.encoder",
            "appearance": "visual_appearance_input_unit.encoder"}
    for ours, theirs in rnns.items():
        for kind in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            names |= {f"{ours}.ahead.{kind}": f"{theirs}.{kind}", f"{ours}.back.{kind}": f"{theirs}.{kind}_reverse"}
    linear = {"motion": "visual_motion_input_unit", "fusion.out": f"{unit}visualfusion.linear_out",
              "fusion.streams": (f"{unit}visualfusion.linear0", f"{unit}visualfusion.linear1"),
              "readout.score": "feature_aggregation.attn", "decoder.question": "output_unit.question_proj",
              "decoder.hidden": "output_unit.classifier.1", "decoder.norm": "output_unit.classifier.3",
              "decoder.out": "output_unit.classifier.5"}
    for t in range(cycles):
        graphs = tuple([f"{unit}{graph}.{t}.attention_{h}" for graph in (common, f"{own}_GCN") for h in range(heads)]
                       for _, own, common in streams)
        linear |= {f"units.{t}.query.enhance": f"{unit}queryAttn.{t}.feat_enhance",
                   f"units.{t}.query.score": f"{unit}queryAttn.{t}.fc",
                   f"units.{t}.punishment.query": tuple(f"{unit}queryPunish_{short}.{t}.query_weight" for short, *_ in streams),
                   f"units.{t}.graph.project": tuple([f"{head}.W" for head in own] for own in graphs),
                   f"units.{t}.fuse.enhance": tuple(f"{unit}attention_{own}.{t}.project.0" for _, own, _ in streams)}
        names[f"units.{t}.fuse.score"] = tuple(f"{unit}attention_{own}.{t}.project.2.weight" for _, own, _ in streams)
        for part, theirs in (("receiver", "weight"), ("sender", "weight"), ("bias", "bias")):
            names[f"units.{t}.graph.{part}"] = tuple([f"{head}.a.{theirs}" for head in own] for own in graphs)
    for ours, theirs in linear.items():
        names |= {f"{ours}.{part}": each(theirs, lambda name, part=part: f"{name}.{part}") for part in ("weight", "bias")}
    counts = ("running_mean", "running_var", "num_batches_tracked")
    return names | {f"decoder.norm.{x}": f"output_unit.classifier.3.{x}" for x in counts}


def each(entry, f):
    """f of every name in a name, a list, or a pair of either."""
    return f(entry) if isinstance(entry, str) else type(entry)(each(part, f) for part in entry)


def from_official(state_dict):
    """DualVGR with the weights of the authors' `state_dict`; every size is read from it.

    raises ValueError that lists missing, unknown or misshapen keys
    """
    key = "visual_input_unit.queryAttn."
    cycles = 1 + max((int(k[len(key):].split(".")[0]) for k in state_dict if k.startswith(key)), default=0)
    heads = 1 + max((int(k.split("attention_")[1].split(".")[0]) for k in state_dict if ".acGCN.0.attention_" in k), default=0)
    names, wanted = official_names(cycles, heads), set()
    each(tuple(names.values()), wanted.add)
    where = "the official DualVGR state dict"
    check_names({name: state_dict[name].shape if name in state_dict else () for name in wanted}, state_dict, where)
    vocabulary, word_width = state_dict["linguistic_input_unit.encoder_embed.weight"].shape
    width, features = state_dict["visual_motion_input_unit.weight"].shape
    answers = len(state_dict["output_unit.classifier.5.bias"])
    model = DualVGR(vocabulary, answers, features, width, word_width, heads, cycles)

    def join(entry, half):
        if isinstance(entry, str):                          # a = [a1, a2]: the first half receives, the second sends
            found = state_dict[entry]
            return found if half is None else found.chunk(2, 1)[half]
        return (torch.cat if isinstance(entry, list) else torch.stack)([join(part, half) for part in entry])

    ours, wrong = {}, []
    for name, p in model.state_dict().items():
        try:
            ours[name] = join(names[name], {"receiver": 0, "sender": 1}.get(name.rpartition(".")[2]))
            shape = tuple(ours[name].shape)
        except RuntimeError:
            shape = "of several shapes"
        if shape != tuple(p.shape):
            wrong.append(f"{names[name]} {shape} instead of {tuple(p.shape)}")
    if wrong:
        raise ValueError(f"{where} does not fit: {len(wrong)} misshapen: {', '.join(wrong[:6])}")
    model.load_state_dict(ours)
    return model
