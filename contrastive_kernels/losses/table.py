"""The table of losses: one row each, from which come what the package exports, the tests of all
losses, and the small benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import reference
from .cacr import CACR, CCT, CACRViews, cacr, cacr_views, cct
from .cases import (
    Benchmark,
    Case,
    Row,
    chunks,
    counts,
    features,
    frozen,
    ids,
    mask,
    number,
    permutations,
    queue,
    same,
    view,
)
from .clip import CLIPLoss, SigLIPLoss, clip_loss, siglip_loss
from .clip_distill import CLIPDistill, clip_distill
from .cpc import CPC, cpc
from .gist import GIST, gist
from .info_nce import EqCo, InfoNCE, eqco, info_nce
from .koleo import KoLeo, koleo
from .late_interaction import (
    LateInteraction,
    LateInteractionDistill,
    late_interaction,
    late_interaction_distill,
)
from .mnrl import DIRECTIONS, MNRL, mnrl
from .nce import NCE, nce
from .nt_xent import DCL, HCL, Debiased, NTXent, dcl, debiased, hcl, nt_xent
from .rince import RINCE, rince
from .sup_con import SupCon, sup_con
from .triplet import Triplet, triplet
from .whitening import INTL, WMSE, intl, w_mse

__all__ = [
    "CACR",
    "CCT",
    "CPC",
    "DCL",
    "GIST",
    "HCL",
    "INTL",
    "MNRL",
    "NCE",
    "RINCE",
    "WMSE",
    "CACRViews",
    "CLIPDistill",
    "CLIPLoss",
    "Debiased",
    "EqCo",
    "InfoNCE",
    "KoLeo",
    "LateInteraction",
    "LateInteractionDistill",
    "NTXent",
    "SigLIPLoss",
    "SupCon",
    "Triplet",
    "cacr",
    "cacr_views",
    "cct",
    "clip_distill",
    "clip_loss",
    "cpc",
    "dcl",
    "debiased",
    "eqco",
    "gist",
    "hcl",
    "info_nce",
    "intl",
    "koleo",
    "late_interaction",
    "late_interaction_distill",
    "mnrl",
    "nce",
    "nt_xent",
    "rince",
    "siglip_loss",
    "sup_con",
    "triplet",
    "w_mse",
]

PAIR = {"query": features("N D"), "key": view("query")}
NEGATIVES = {"negatives": features("M D")}
OWN = {"negatives": features("N K D")}
MASKED = OWN | {"negatives_mask": mask()}
RAGGED = {"negatives": features("R D"), "negatives_per_query": counts()}
ROWS, MORE = (5, 7, 5, 9, 9, 2, 5), (5, 5, 1, 2, 9)
OTHER = (5, 7, 0, 9, 1, 1, 7)  # differ from ROWS four times, and equal them three times
ROW_IDS = ids("N", ROWS)
SAME_IDS = {"exclude_rows": ROW_IDS, "exclude_columns": same("exclude_rows")}
OTHER_IDS = {"exclude_rows": ROW_IDS, "exclude_columns": ids("N", OTHER)}
IDS_OF_BOTH = {"exclude_rows": ROW_IDS, "exclude_columns": ids("N+M", OTHER, MORE)}
TEMPERATURE = {"temperature": 0.1}
BATCHED = ("reference", "auto")  # torch, where there are no kernels

NESTED = {"dims": (3, 5, 2), "weights": (1.0, 0.5, 2.0)}  # in any order
FUSED = ("reference", "cpu")  # of prefixes; Triton and ranks have a call for each, which one shows

INFO_NCE_CASES = {
    "info_nce": Case(PAIR, benchmark=Benchmark(TEMPERATURE)),
    "info_nce two rows": Case(PAIR, {"temperature": 1.0}, {"N": 2, "D": 3}, grouped=False),
    "info_nce symmetric": Case(
        PAIR,
        {"symmetric": True},
        {"N": 13, "D": 11},
        temperatures=True,
        benchmark=Benchmark(TEMPERATURE | {"symmetric": True}),
    ),
    "info_nce scale": Case(PAIR | {"scale": number(3.0)}, {"symmetric": True}),
    "info_nce dot": Case(PAIR, {"normalize": False, "temperature": 1.0}),
    "info_nce shared": Case(PAIR | NEGATIVES, temperatures=True),
    "info_nce shared one row": Case(PAIR | NEGATIVES, {}, {"N": 1, "M": 3}, grouped=False),
    "info_nce frozen": Case(
        PAIR | {"negatives": queue()},
        {"alpha": 100.0},
        compiled=True,
        benchmark=Benchmark(TEMPERATURE),
    ),
    "info_nce chunks": Case(PAIR | {"negatives": chunks()}),
    "info_nce own": Case(PAIR | OWN, temperatures=True),
    "info_nce own bias": Case(PAIR | OWN | {"key_bias": features("K")}),
    "info_nce both": Case(PAIR | NEGATIVES, {"in_batch": True}, {"M": 3}, temperatures=True),
    "info_nce both symmetric margin": Case(
        PAIR | NEGATIVES, {"in_batch": True, "symmetric": True, "alpha": 50.0}, {"M": 3}
    ),
    "info_nce both, own": Case(PAIR | OWN, {"in_batch": True}, compiled=True),
    "info_nce both, own margin": Case(PAIR | OWN, {"in_batch": True, "alpha": 3.0}),
    "info_nce masked": Case(PAIR | MASKED, temperatures=True, compiled=True),
    "info_nce masked margin": Case(PAIR | MASKED, {"in_batch": True, "alpha": 3.0}),
    "info_nce masked bias": Case(PAIR | MASKED | {"key_bias": features("K")}),
    "info_nce ragged": Case(PAIR | RAGGED, temperatures=True, compiled=True),
    "info_nce ragged margin": Case(PAIR | RAGGED, {"in_batch": True, "alpha": 3.0}),
    "info_nce ragged bias": Case(
        PAIR | RAGGED | {"scale": number(3.0), "key_bias": features("N+R")},
        {"in_batch": True, "symmetric": True},
    ),
    "info_nce bias": Case(PAIR | {"key_bias": features("N")}, {"symmetric": True}),
    "info_nce both bias": Case(
        PAIR | NEGATIVES | {"key_bias": features("N+M")}, {"in_batch": True}, {"M": 3}
    ),
    "info_nce both bias margin": Case(
        PAIR | NEGATIVES | {"key_bias": features("N+M")}, {"in_batch": True, "alpha": 30.0}
    ),
    "info_nce shared bias": Case(PAIR | NEGATIVES | {"key_bias": features("M")}, {}, {"M": 3}),
    "info_nce exclude": Case(PAIR | SAME_IDS, {"symmetric": True}),
    "info_nce exclude same margin": Case(PAIR | SAME_IDS, {"symmetric": True, "alpha": 9.0}),
    "info_nce exclude off the diagonal": Case(PAIR | OTHER_IDS, {"symmetric": True}),
    "info_nce exclude margin": Case(
        PAIR | OTHER_IDS,
        {"symmetric": True, "alpha": 100.0},
        slack=64 * 25,  # lse - positive, times alpha / K
    ),
    "info_nce exclude small margin": Case(PAIR | OTHER_IDS, {"symmetric": True, "alpha": 0.5}),
    "info_nce exclude shared": Case(
        PAIR | NEGATIVES | {"exclude_rows": ROW_IDS, "exclude_columns": ids("M", MORE)},
        {"alpha": 9.0},
        {"M": 5},
    ),
    "info_nce exclude both": Case(
        PAIR | NEGATIVES | IDS_OF_BOTH, {"in_batch": True, "alpha": 9.0}, {"M": 5}
    ),
    "info_nce exclude all": Case(
        PAIR | NEGATIVES | {"exclude_rows": ROW_IDS, "exclude_columns": ids("N+M", ROWS, (7,))},
        {"in_batch": True, "alpha": 9.0},
        {"M": 2},
    ),
    "info_nce sharded": Case(
        PAIR | NEGATIVES | {"key_bias": features("N+M")} | IDS_OF_BOTH,
        {"in_batch": True, "alpha": 30.0},
        sharded=True,
    ),
    "info_nce nested": Case(
        PAIR | OTHER_IDS | {"key_bias": features("N"), "scale": number(3.0)},
        NESTED | {"symmetric": True},
        grouped=False,
        backends=FUSED,
    ),
    "info_nce nested negatives": Case(
        PAIR | NEGATIVES, {"dims": (4, 2)}, grouped=False, backends=FUSED
    ),
}
EQCO_CASES = {
    "eqco": Case(PAIR, benchmark=Benchmark({"alpha": 65536.0, "temperature": 0.2})),
    "eqco shared": Case(PAIR | NEGATIVES, temperatures=True),
    "eqco small margin": Case(PAIR, {"alpha": 16.0}),
    "eqco masked": Case(PAIR | MASKED, {"alpha": 64.0}),
    "eqco ragged": Case(PAIR | RAGGED, {"alpha": 64.0}),
    "eqco sharded": Case(PAIR | NEGATIVES, {"alpha": 64.0}, sharded=True),
}

IMAGES_AND_TEXTS = {"image_features": features("N D"), "text_features": view("image_features")}
CLIP = IMAGES_AND_TEXTS | {"logit_scale": number(14.0)}
SIGLIP = IMAGES_AND_TEXTS | {"logit_scale": number(10.0), "logit_bias": number(-10.0)}
TEACHER = {
    "teacher_image_features": features("N G"),
    "teacher_text_features": features("N G"),
    "teacher_logit_scale": number(5.0),
}

DOCUMENTS = {"query": features("N D"), "documents": features("2N D")}
MORE_DOCUMENTS = DOCUMENTS | {"documents": features("3N D")}
ONE_DOCUMENT = DOCUMENTS | {"documents": view("query")}
EVERY_DIRECTION = {"directions": DIRECTIONS}
HARDER = {"hardness_mode": "all_negatives", "hardness_strength": 5.0}
MNRL_CASES = {
    "mnrl": Case(DOCUMENTS | {"scale": number(3.0)}, EVERY_DIRECTION),
    "mnrl defaults": Case(MORE_DOCUMENTS),
    "mnrl masked": Case(MORE_DOCUMENTS | {"negatives_mask": mask("N 2")}, EVERY_DIRECTION | HARDER),
    "mnrl masked documents": Case(MORE_DOCUMENTS | {"negatives_mask": mask("N 2")}),
    "mnrl one document": Case(ONE_DOCUMENT, EVERY_DIRECTION, compiled=True),
    "mnrl one document, harder": Case(ONE_DOCUMENT, EVERY_DIRECTION | HARDER, compiled=True),
    "mnrl per direction": Case(
        MORE_DOCUMENTS,
        {
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
            "hardness_mode": "hard_negatives",
            "hardness_strength": 5.0,
            "scale": 4.0,
        },
    ),
    "mnrl harder": Case(
        MORE_DOCUMENTS | {"scale": number(3.0)}, EVERY_DIRECTION | HARDER, compiled=True
    ),
    "mnrl nested": Case(
        MORE_DOCUMENTS | {"scale": number(3.0)}, NESTED | EVERY_DIRECTION, compiled=True
    ),
    "mnrl nested, harder": Case(
        MORE_DOCUMENTS, {"dims": (5, 2)} | HARDER, grouped=False, backends=FUSED
    ),
}

GUIDED = {
    "anchor": features("N D"),
    "positive": view("anchor"),
    "anchor_guide": frozen("N G"),
    "positive_guide": frozen("N G"),
}
GUIDED_OWN = {"anchor": features("N D"), "positive": view("anchor")}
GUIDED_NEGATIVES = NEGATIVES | {"negatives_guide": frozen("M G")}
GIST_CASES = {
    "gist": Case(GUIDED | GUIDED_NEGATIVES),
    "gist without negatives": Case(GUIDED, {"temperature": 0.5, "margin": 0.1}),
    "gist scale": Case(GUIDED | GUIDED_NEGATIVES | {"scale": number(5.0)}, {"margin": 0.2}),
    "gist sharded": Case(
        GUIDED | GUIDED_NEGATIVES,
        {"temperature": 0.2, "margin_strategy": "relative", "margin": -0.1},
        sharded=True,
    ),
    "gist own guide": Case(
        GUIDED_OWN | NEGATIVES, {"temperature": 0.5, "margin": -0.1}, {"D": 7}, sharded=True
    ),
    "gist nested": Case(
        GUIDED | GUIDED_NEGATIVES, NESTED | {"temperature": 0.2}, grouped=False, backends=FUSED
    ),
}

TOKENS = {"queries": features("N T D"), "documents": features("N S D")}
SEVERAL = TOKENS | {"documents": features("N K S D")}
LATE_CASES = {
    "late_interaction": Case(TOKENS, {}, {"S": 4}),
    "late_interaction negatives": Case(SEVERAL, {"symmetric": True}, {"K": 2}),
    "late_interaction masked": Case(
        SEVERAL | {"query_mask": mask("N T"), "scale": number(3.0)}, {"symmetric": True}
    ),
    "late_interaction smooth": Case(TOKENS, {"max_temperature": 0.3, "normalize": False}),
}
TAUGHT = SEVERAL | {"teacher_scores": features("N K")}
LATE_DISTILL_CASES = {
    "late_interaction_distill": Case(TAUGHT),
    "late_interaction_distill rescaled": Case(
        TAUGHT | {"query_mask": mask("N T")},
        {"normalize_scores": True, "temperature": 0.5, "teacher_temperature": 2.0},
        grouped=False,
    ),
    "late_interaction_distill margins": Case(
        TAUGHT, {"objective": "margin_mse", "max_temperature": 0.5}
    ),
}

VIEWS = {"z1": features("N D"), "z2": view("z1")}
DEBIASED = {"temperature": 0.5, "tau_plus": 0.1}
NT_XENT_CASES = {
    "nt_xent": Case(VIEWS, benchmark=Benchmark(TEMPERATURE)),
    "nt_xent two rows": Case(VIEWS, {"temperature": 0.5}, {"N": 2}, grouped=False),
    "nt_xent scale": Case(VIEWS | {"scale": number(3.0)}),
    "nt_xent negative scale": Case(VIEWS, {"scale": -2.0}),
    "nt_xent nested": Case(VIEWS, NESTED, temperatures=True, grouped=False, backends=FUSED),
}
DCL_CASES = {
    "dcl": Case(VIEWS, benchmark=Benchmark(TEMPERATURE)),
    "dcl scale": Case(VIEWS | {"scale": number(3.0)}),
    "dcl weight": Case(VIEWS | {"weight": features("2N")}),
    "dclw": Case(
        VIEWS, {"sigma": 0.5}, compiled=True, benchmark=Benchmark(TEMPERATURE | {"sigma": 0.5})
    ),
    "dclw scale": Case(VIEWS | {"scale": number(3.0)}, {"sigma": 0.5}),
}
HCL_CASES = {
    "hcl": Case(VIEWS, benchmark=Benchmark(DEBIASED | {"beta": 1.0})),
    "hcl hard": Case(VIEWS, {"beta": 2.5, "temperature": 0.2}, {"N": 13}),
    "hcl clamped": Case(VIEWS, {"tau_plus": 0.9}),
}
SEQUENCES = {"predictions": features("N T S D"), "targets": features("N T D")}
LABELS = ids("N", (0, 1, 0, 2, 0, 1, 3))
LABELLED = {"features": features("N D"), "labels": LABELS}
SUP_CON_CASES = {
    "sup_con": Case(
        LABELLED, benchmark=Benchmark(TEMPERATURE, inputs={"labels": ids("N", tuple(range(100)))})
    ),
    "sup_con views": Case(
        {"features": features("N V D"), "labels": LABELS},
        {"base_temperature": 0.1},
        {"V": 2},
        compiled=True,
    ),
    "sup_con lonely": Case(LABELLED, {"temperature": 0.5}, {"N": 2}, grouped=False),
}
TRIPLET_CASES = {
    "triplet": Case(
        LABELLED, benchmark=Benchmark({}, inputs={"labels": ids("N", tuple(range(100)))})
    ),
    "triplet soft": Case(LABELLED, {"margin": None, "distance": "squared_euclidean"}),
    "triplet cosine": Case(LABELLED, {"distance": "cosine"}, grouped=False),
    "triplet on the plane": Case(LABELLED, {"normalize": False, "margin": 1.0}, grouped=False),
    "triplet semihard": Case(LABELLED, {"mining": "semihard"}, compiled=True),
    "triplet semihard on the plane": Case(
        LABELLED,
        {"mining": "semihard", "distance": "squared_euclidean", "normalize": False, "margin": 1.0},
        {"N": 13},
        grouped=False,
    ),
}

NCE_CASES = {
    "nce": Case(
        PAIR | {"negatives": queue()},
        {"num_data": 1000, "Z": 3e4},
        benchmark=Benchmark({"temperature": 0.07, "num_data": 50_000, "Z": 1.1e5}),
    ),
    "nce estimated": Case(PAIR | {"negatives": queue()}, {"num_data": 1000}, compiled=True),
    "nce learned": Case(PAIR | NEGATIVES, {"num_data": 1000}),
    "nce warm": Case(PAIR | NEGATIVES, {"num_data": 100, "temperature": 0.5}),
    "nce own": Case(PAIR | OWN, {"num_data": 1000, "temperature": 0.5}),
    "nce own Z": Case(PAIR | OWN, {"num_data": 50, "Z": 7.0}),
    "nce masked": Case(PAIR | MASKED, {"num_data": 1000, "temperature": 0.5}),
    "nce masked Z": Case(PAIR | MASKED, {"num_data": 50, "Z": 7.0}),
    "nce ragged": Case(PAIR | RAGGED, {"num_data": 1000, "temperature": 0.5}),
    "nce ragged Z": Case(PAIR | RAGGED, {"num_data": 50, "Z": 7.0}),
    "nce Z": Case(PAIR | NEGATIVES, {"num_data": 1000, "Z": 3e4}, temperatures=True),
}

QUERY = {"query": features("N D")}
POSITIVE = QUERY | {"positives": view("query")}
POSITIVES = QUERY | {"positives": view("query", "N K D")}
CACR_CASES = {
    "cacr": Case(POSITIVES, benchmark=Benchmark({}, {"K": 4})),
    "cacr one positive": Case(POSITIVE, {"alpha": 0.5, "beta": 2.0}),
    "cacr negatives": Case(POSITIVES | NEGATIVES),
    "cacr chunks": Case(POSITIVES | {"negatives": chunks()}, {"alpha": 0.5}),
    "cacr sharded": Case(POSITIVE | NEGATIVES, sharded=True),
    "cacr one row": Case(POSITIVES | NEGATIVES, {}, {"N": 1}, grouped=False),
    "cacr detached": Case(POSITIVES, {"detach_weights": True}),
    "cacr on the plane": Case(POSITIVES | NEGATIVES, {"normalize": False}),
    "cacr one positive on the plane": Case(POSITIVE, {"normalize": False}),
    "cacr on the plane, detached": Case(POSITIVES, {"normalize": False, "detach_weights": True}),
    "cacr rbf": Case(POSITIVES, {"cost": "rbf"}, coupled=True),
    "cacr rbf one positive": Case(POSITIVE, {"cost": "rbf"}, coupled=True),
    "cacr rbf negatives": Case(POSITIVE | NEGATIVES, {"cost": "rbf"}, coupled=True, compiled=True),
    "cacr rbf detached": Case(
        POSITIVES | NEGATIVES,
        {"cost": "rbf", "detach_weights": True, "rbf_t": 0.7},
        coupled=True,
    ),
    "cacr rbf on the plane": Case(
        POSITIVES, {"cost": "rbf", "detach_weights": True, "normalize": False}, coupled=True
    ),
}
SAMPLES = {"views": features("V N D")}
CACR_VIEWS_CASES = {
    "cacr_views": Case(SAMPLES, benchmark=Benchmark({}, {"V": 3})),
    "cacr_views four": Case(SAMPLES, {}, {"V": 4}),
    "cacr_views two": Case(SAMPLES, {}, {"V": 2}),
    "cacr_views detached": Case(SAMPLES, {"detach_weights": True}),
    "cacr_views rbf": Case(SAMPLES, {"cost": "rbf"}, coupled=True),
}
CCT_CASES = {
    "cct": Case(POSITIVES, benchmark=Benchmark({}, {"K": 1})),
    "cct temperatures": Case(POSITIVES, {"t_pos": 2.0, "t_neg": 0.9}),
    "cct one positive": Case(POSITIVE, {"t_pos": 2.0, "t_neg": 0.9}, compiled=True),
}

PERMUTED = SAMPLES | {"permutations": permutations()}
W_MSE_CASES = {
    "w_mse": Case(
        PERMUTED,
        {"group_size": 6},
        {"N": 12, "D": 3},
        unit=6,
        benchmark=Benchmark({"group_size": 256}, {"V": 2, "P": 1}),
    ),
    "w_mse plain": Case(
        PERMUTED,
        {"group_size": 12, "normalize": False, "eps": 0.1},
        {"D": 3, "V": 2, "P": 1},
        unit=12,
    ),
    "w_mse zca": Case(
        PERMUTED,
        {"group_size": 6, "method": "zca"},
        {"N": 12, "D": 3, "V": 2, "P": 2},
        unit=6,
    ),
    "w_mse newton": Case(
        PERMUTED,
        {"group_size": 12, "method": "newton_schulz"},
        {"D": 3, "V": 2, "P": 1},
        unit=12,
    ),
}
INTL_CASES = {
    "intl": Case(SAMPLES, {}, {"N": 16, "D": 37, "V": 2}),
    "intl four views": Case(SAMPLES, {"lam": 0.3, "iterations": 7}, {"N": 5, "D": 9, "V": 4}),
    "intl more samples than features": Case(SAMPLES, {"lam": 0.05}, {"N": 12}),
    "intl few features": Case(SAMPLES, {"lam": 0.1}, {"N": 12, "D": 3}),
    "intl features": Case(SAMPLES, {"axis": 1}, {"N": 40, "D": 11}, compiled=True),
    "intl few of the features": Case(SAMPLES, {"axis": 1, "lam": 0.1}, {"N": 12}),
    "intl more features than samples": Case(
        SAMPLES, {"axis": 1, "lam": 0.0}, {"N": 6, "D": 13, "V": 2}
    ),
}

LOSSES = (
    Row(info_nce, InfoNCE, INFO_NCE_CASES, two_views=("query", "key")),
    Row(eqco, EqCo, EQCO_CASES, two_views=("query", "key")),
    Row(
        rince,
        RINCE,
        {
            # a small q: at low temperatures exp(q s) does not fit float16
            "rince": Case(PAIR, {"q": 0.1}, benchmark=Benchmark(TEMPERATURE)),
            "rince defaults": Case(PAIR),
            "rince scale": Case(PAIR | {"scale": number(3.0)}, {"q": 1.0, "lam": 0.1}),
            "rince shared": Case(PAIR | NEGATIVES, {"q": 0.1}, temperatures=True),
            "rince chunks": Case(PAIR | {"negatives": chunks()}),
            "rince own": Case(PAIR | OWN),
            "rince masked": Case(PAIR | MASKED),
            "rince ragged": Case(PAIR | RAGGED),
        },
        two_views=("query", "key"),
    ),
    Row(
        clip_loss,
        CLIPLoss,
        {
            "clip_loss": Case(CLIP, {}, {"N": 13}, benchmark=Benchmark()),
            "clip_loss nested": Case(
                CLIP, NESTED | {"normalize": False}, grouped=False, backends=FUSED
            ),
        },
        two_views=("image_features", "text_features"),
    ),
    Row(
        siglip_loss,
        SigLIPLoss,
        {
            "siglip_loss": Case(SIGLIP, {}, {"N": 13}, benchmark=Benchmark()),
            "siglip_loss one row": Case(SIGLIP, {}, {"N": 1}, grouped=False),
            "siglip_loss nested": Case(SIGLIP, NESTED, grouped=False, backends=FUSED),
        },
        two_views=("image_features", "text_features"),
        alone=True,
    ),
    Row(
        clip_distill,
        CLIPDistill,
        {
            "clip_distill": Case(CLIP | TEACHER),
            "clip_distill on the plane": Case(CLIP | TEACHER, {"normalize": False}),
        },
        exchanges=("gather",),
        two_views=("image_features", "text_features"),
        backends=BATCHED,
    ),
    Row(mnrl, MNRL, MNRL_CASES),
    Row(
        gist,
        GIST,
        GIST_CASES,
        exchanges=("gather",),
        two_views=("anchor", "positive"),
        alone=True,
    ),
    Row(late_interaction, LateInteraction, LATE_CASES, exchanges=("gather",)),
    Row(
        late_interaction_distill,
        LateInteractionDistill,
        LATE_DISTILL_CASES,
        exchanges=(),
        alone=True,
    ),
    Row(nt_xent, NTXent, NT_XENT_CASES, rows="2N", two_views=("z1", "z2")),
    Row(
        cpc,
        CPC,
        {
            "cpc": Case(SEQUENCES),
            "cpc sequences": Case(SEQUENCES, {"negatives_from": "sequences"}),
            "cpc times": Case(SEQUENCES, {"negatives_from": "times"}, {"T": 5}),
            "cpc one sequence": Case(SEQUENCES, {}, {"N": 1}, grouped=False),
            "cpc far": Case(SEQUENCES, {"normalize": True, "temperature": 0.1}, {"T": 2, "S": 4}),
            "cpc scale": Case(SEQUENCES | {"scale": number(0.5)}),
        },
        alone=True,
    ),
    Row(sup_con, SupCon, SUP_CON_CASES),
    Row(dcl, DCL, DCL_CASES, rows="2N", two_views=("z1", "z2")),
    Row(
        debiased,
        Debiased,
        {
            "debiased": Case(VIEWS, benchmark=Benchmark(DEBIASED)),
            "debiased clamped": Case(VIEWS, {"tau_plus": 0.6}),
            "debiased without prior": Case(VIEWS, {"tau_plus": 0.0}),
        },
        rows="2N",
        two_views=("z1", "z2"),
    ),
    Row(hcl, HCL, HCL_CASES, rows="2N", two_views=("z1", "z2")),
    Row(cacr, CACR, CACR_CASES),
    Row(cacr_views, CACRViews, CACR_VIEWS_CASES),
    Row(cct, CCT, CCT_CASES),
    Row(w_mse, WMSE, W_MSE_CASES, exchanges=(), backends=("reference", "cpu")),
    Row(intl, INTL, INTL_CASES, exchanges=(), backends=("reference", "cpu")),
    Row(
        koleo,
        KoLeo,
        {
            "koleo": Case({"features": features("N D")}, benchmark=Benchmark()),
            "koleo two rows": Case(
                {"features": features("N D")}, {"eps": 0.1}, {"N": 2}, grouped=False
            ),
        },
        exchanges=(),
        backends=BATCHED,
    ),
    Row(triplet, Triplet, TRIPLET_CASES, exchanges=(), backends=BATCHED),
    Row(nce, NCE, NCE_CASES, exchanges=(), two_views=("query", "key"), alone=True),
)
CASES = {name: (row, case) for row in LOSSES for name, case in row.cases.items()}


def definition(row: Row) -> Callable[..., Tensor]:
    """The loss from its paper's formula."""
    return getattr(reference, row.name)
