"""Published numbers, each under the protocol and benchmark that it was made with, and only ever shown beside those.

The keys are (protocol, benchmark); a number whose protocol its source does not tell has no place here. Where the source
tells the protocol but not the images, the numbers stand under every split that they may be of, and INFERRED says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row: metrics as fractions and metres, as in `depth_metrics`."""

    network: str
    source: str
    values: Mapping[str, float]


_V1 = "arXiv 2401.10891, Table 2"
_V1_TEACHER = "arXiv 2401.10891, Table 6 (all labelled sets)"
_V2 = "arXiv 2406.09414, Table 2"
_BOTH = ("abs_rel", "delta1")

# protocol disparity: cells abs_rel/delta1
_V1_SETS = ("kitti", "nyu", "sintel", "ddad", "eth3d", "diode")
_V1_ROWS = {
    "MiDaS 3.1 BEiT-L": (".127/.850", ".048/.980", ".587/.699", ".251/.766", ".139/.867", ".075/.942"),
    "Depth Anything V1-S": (".080/.936", ".053/.972", ".464/.739", ".247/.768", ".127/.885", ".076/.939"),
    "Depth Anything V1-B": (".080/.939", ".046/.979", ".432/.756", ".232/.786", ".126/.884", ".069/.946"),
    "Depth Anything V1-L": (".076/.947", ".043/.981", ".458/.760", ".230/.789", ".127/.882", ".066/.952"),
}
_V1_TEACHER_ROWS = {
    "V1's ViT-L teacher": (".085/.934", ".053/.971", ".492/.748", ".245/.771", ".134/.874", ".070/.945"),
}
_V2_SETS = ("kitti", "nyu", "sintel", "eth3d", "diode")
_V2_ROWS = {
    "Depth Anything V2-S": (".078/.936", ".053/.973", ".500/.718", ".142/.851", ".073/.942"),
    "Depth Anything V2-B": (".078/.939", ".049/.976", ".495/.734", ".137/.858", ".068/.950"),
    "Depth Anything V2-L": (".074/.946", ".045/.979", ".487/.752", ".131/.865", ".066/.952"),
    "Depth Anything V2-G": (".075/.948", ".044/.979", ".506/.772", ".132/.862", ".065/.954"),
    "V2's ViT-G teacher": (".075/.947", ".044/.979", ".530/.767", ".131/.865", ".066/.954"),
}
# protocol moge: per cent
_MOGE_SETS = ("nyu", "kitti", "eth3d", "ibims", "gso", "sintel", "ddad", "diode")
_MOGE_ROWS = {
    "MiDaS 3.1": (
        "4.58/98.1", "6.25/94.7", "5.77/96.8", "4.73/97.4", "1.86/100", "21.3/73.1", "14.5/82.6", "6.05/94.9",
    ),
    "Depth Anything V1-L": (
        "4.20/98.4", "5.40/97.0", "4.68/98.2", "4.18/97.6", "1.54/100", "20.1/77.6", "12.7/86.9", "5.69/95.7",
    ),
    "Depth Anything V2-L": (
        "4.14/98.3", "5.61/96.7", "4.71/97.9", "3.47/98.5", "1.24/100", "21.4/72.8", "13.1/86.4", "5.29/96.1",
    ),
    "MoGe-1": ("3.38/98.6", "4.05/98.1", "3.11/98.9", "3.23/98.0", ".96/100", "18.4/79.5", "8.99/91.5", "3.98/97.2"),
}  # fmt: skip
# protocol marigold-disparity. The paper's own row of Depth Anything V2 mixes protocols and is left out.
_DAD_SETS = ("nyu", "kitti-marigold", "diode", "scannet", "eth3d-marigold")
_DAD_ROWS = {
    "Distill-Any-Depth (V2-L)": (".043/.981", ".070/.949", ".233/.753", ".043/.980", ".054/.981"),
    "Distill-Any-Depth (MiDaS 3.1)": (".046/.985", ".063/.972", ".142/.788", ".049/.980", ".057/.976"),
}
_V1_ZERO_SHOT = "arXiv 2401.10891, zero-shot metric table"
# protocol zoedepth: fine-tuned on NYU or KITTI, or not at all
_ZOE: dict[str, list[tuple[str, str, dict[str, float]]]] = {
    "nyu": [
        (
            "Depth Anything V1-L, fine-tuned", "arXiv 2401.10891, Table 3",
            {"delta1": 0.984, "delta2": 0.998, "delta3": 1.0, "abs_rel": 0.056, "rmse": 0.206, "log10": 0.024},
        ),
        *(
            (f"Depth Anything V2-{s}, fine-tuned", "arXiv 2406.09414, Table 4", {"delta1": d, "abs_rel": a, "rmse": r})
            for s, d, a, r in (("S", 0.961, 0.073, 0.261), ("B", 0.977, 0.063, 0.228), ("L", 0.984, 0.056, 0.206))
        ),
    ],
    "kitti": [
        (
            "Depth Anything V1-L, fine-tuned", "arXiv 2401.10891, Table 4",
            {"delta1": 0.982, "delta2": 0.998, "delta3": 1.0, "abs_rel": 0.046, "rmse": 1.896, "rmse_log": 0.069},
        ),
        *(
            (f"Depth Anything V2-{s}, fine-tuned", "arXiv 2406.09414, Table 4", {"delta1": d, "abs_rel": a, "rmse": r})
            for s, d, a, r in (("S", 0.973, 0.053, 2.235), ("B", 0.979, 0.048, 1.999), ("L", 0.983, 0.045, 1.861))
        ),
    ],
    **{
        name: [("Depth Anything V1-L, of NYU or KITTI", _V1_ZERO_SHOT, {"abs_rel": a, "delta1": d})]
        for name, a, d in (
            ("sunrgbd", 0.500, 0.660), ("ibims", 0.150, 0.714), ("hypersim", 0.363, 0.361), ("vkitti2", 0.085, 0.913),
            ("diode-outdoor-zoedepth", 0.794, 0.288),
        )
    },
}  # fmt: skip
_GARG = [
    Published(
        "Garg et al. 2016",
        "arXiv 1603.04992",
        {"abs_rel": 0.169, "rmse": 5.104, "delta1": 0.740, "delta2": 0.904, "delta3": 0.962},
    ),
    Published(
        "Garg et al., released ResNet50",
        "Ravi-Garg/Unsupervised_Depth_Estimation, README",
        {"abs_rel": 0.1378, "rmse": 4.40, "rmse_log": 0.2335, "delta1": 0.8098},
    ),
]
_DA2K = {
    "Depth Anything V2-S": 0.953, "Depth Anything V2-B": 0.970, "Depth Anything V2-L": 0.971,
    "Depth Anything V2-G": 0.974, "V2's ViT-G teacher": 0.974,
}  # fmt: skip


def _pairs_of(
    rows: Mapping[str, Sequence[str]], sets: Sequence[str], source: str, unit: float = 1.0
) -> dict[str, list[Published]]:
    """Benchmark -> rows, from a table of "abs_rel/delta1"."""
    found: dict[str, list[Published]] = {name: [] for name in sets}
    for network, cells in rows.items():
        for name, cell in zip(sets, cells, strict=True):
            values = dict(zip(_BOTH, (round(float(part) * unit, 6) for part in cell.split("/")), strict=True))
            found[name].append(Published(network, source, values))
    return found


def _build() -> dict[tuple[str, str], list[Published]]:
    tables: dict[str, list[dict[str, list[Published]]]] = {
        "disparity": [
            _pairs_of(_V1_ROWS, _V1_SETS, _V1),
            _pairs_of(_V1_TEACHER_ROWS, _V1_SETS, _V1_TEACHER),
            _pairs_of(_V2_ROWS, _V2_SETS, _V2),
        ],
        "moge": [_pairs_of(_MOGE_ROWS, [f"{n}-moge" for n in _MOGE_SETS], "MoGe (arXiv 2410.19115)", unit=0.01)],
        "marigold-disparity": [_pairs_of(_DAD_ROWS, _DAD_SETS, "arXiv 2502.19204, Table 5")],
        "zoedepth": [{name: [Published(*row) for row in rows] for name, rows in _ZOE.items()}],
        "metric": [{"kitti-garg": _GARG}],
        "pairs": [{"da-2k": [Published(network, _V2, {"accuracy": a}) for network, a in _DA2K.items()]}],
    }
    found: dict[tuple[str, str], list[Published]] = {}
    for protocol, parts in tables.items():
        for part in parts:
            for benchmark, rows in part.items():
                found.setdefault((protocol, benchmark), []).extend(rows)
    found["disparity", "diode-indoor"] = list(found["disparity", "diode"])
    return found


PUBLISHED = _build()
_DIODE = (
    "V1 and V2 do not say which images of DIODE their numbers are of. That they are the indoor ones is inferred: who "
    "measured the networks in depth (V2 issue 280) got about .21 on all 771, .072 on the indoor ones (published: .066)."
)
INFERRED: Mapping[tuple[str, str], str] = {("disparity", name): _DIODE for name in ("diode", "diode-indoor")}


def beside(protocol: str, benchmark: str | None) -> list[Published]:
    """What may stand beside a result of this protocol on this benchmark; empty for a dataset of one's own."""
    return PUBLISHED.get((protocol, benchmark or ""), [])
