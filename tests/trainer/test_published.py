"""Every published number, typed a second time from the papers' tables, and the notes that stand beside them."""

from __future__ import annotations

import pytest

from trainer.benchmarks import BENCHMARKS
from trainer.protocols import PROTOCOLS
from trainer.published import INFERRED, PUBLISHED, beside

Row = dict[str, float]


def pair(abs_rel: float, delta1: float) -> Row:
    return {"abs_rel": abs_rel, "delta1": delta1}


def percent(abs_rel: float, delta1: float) -> Row:
    return {"abs_rel": abs_rel / 100, "delta1": delta1 / 100}


MIDAS, SMALL, BASE, LARGE = "MiDaS 3.1 BEiT-L", "Depth Anything V1-S", "Depth Anything V1-B", "Depth Anything V1-L"
V1_TEACHER, V2_TEACHER = "V1's ViT-L teacher", "V2's ViT-G teacher"
S2, B2, L2, G2 = (f"Depth Anything V2-{size}" for size in "SBLG")
DAD, DAD_MIDAS = "Distill-Any-Depth (V2-L)", "Distill-Any-Depth (MiDaS 3.1)"
# By column, where published.py has rows: a slip of one line or column in either does not repeat in the other.
DIODE = {
    MIDAS: pair(0.075, 0.942), SMALL: pair(0.076, 0.939), BASE: pair(0.069, 0.946), LARGE: pair(0.066, 0.952),
    V1_TEACHER: pair(0.070, 0.945),
    S2: pair(0.073, 0.942), B2: pair(0.068, 0.950), L2: pair(0.066, 0.952), G2: pair(0.065, 0.954),
    V2_TEACHER: pair(0.066, 0.954),
}  # fmt: skip
CELLS: dict[tuple[str, str], dict[str, Row]] = {
    # arXiv 2401.10891, tables 2 and 6; arXiv 2406.09414, table 2
    ("disparity", "kitti"): {
        MIDAS: pair(0.127, 0.850), SMALL: pair(0.080, 0.936), BASE: pair(0.080, 0.939), LARGE: pair(0.076, 0.947),
        V1_TEACHER: pair(0.085, 0.934),
        S2: pair(0.078, 0.936), B2: pair(0.078, 0.939), L2: pair(0.074, 0.946), G2: pair(0.075, 0.948),
        V2_TEACHER: pair(0.075, 0.947),
    },
    ("disparity", "nyu"): {
        MIDAS: pair(0.048, 0.980), SMALL: pair(0.053, 0.972), BASE: pair(0.046, 0.979), LARGE: pair(0.043, 0.981),
        V1_TEACHER: pair(0.053, 0.971),
        S2: pair(0.053, 0.973), B2: pair(0.049, 0.976), L2: pair(0.045, 0.979), G2: pair(0.044, 0.979),
        V2_TEACHER: pair(0.044, 0.979),
    },
    ("disparity", "sintel"): {
        MIDAS: pair(0.587, 0.699), SMALL: pair(0.464, 0.739), BASE: pair(0.432, 0.756), LARGE: pair(0.458, 0.760),
        V1_TEACHER: pair(0.492, 0.748),
        S2: pair(0.500, 0.718), B2: pair(0.495, 0.734), L2: pair(0.487, 0.752), G2: pair(0.506, 0.772),
        V2_TEACHER: pair(0.530, 0.767),
    },
    ("disparity", "ddad"): {
        MIDAS: pair(0.251, 0.766), SMALL: pair(0.247, 0.768), BASE: pair(0.232, 0.786), LARGE: pair(0.230, 0.789),
        V1_TEACHER: pair(0.245, 0.771),
    },
    ("disparity", "eth3d"): {
        MIDAS: pair(0.139, 0.867), SMALL: pair(0.127, 0.885), BASE: pair(0.126, 0.884), LARGE: pair(0.127, 0.882),
        V1_TEACHER: pair(0.134, 0.874),
        S2: pair(0.142, 0.851), B2: pair(0.137, 0.858), L2: pair(0.131, 0.865), G2: pair(0.132, 0.862),
        V2_TEACHER: pair(0.131, 0.865),
    },
    ("disparity", "diode"): DIODE,
    ("disparity", "diode-indoor"): DIODE,
    # MoGe's evaluation, affine-invariant disparity, in per cent
    ("moge", "nyu-moge"): {
        "MiDaS 3.1": percent(4.58, 98.1), LARGE: percent(4.20, 98.4), L2: percent(4.14, 98.3),
        "MoGe-1": percent(3.38, 98.6),
    },
    ("moge", "kitti-moge"): {
        "MiDaS 3.1": percent(6.25, 94.7), LARGE: percent(5.40, 97.0), L2: percent(5.61, 96.7),
        "MoGe-1": percent(4.05, 98.1),
    },
    ("moge", "eth3d-moge"): {
        "MiDaS 3.1": percent(5.77, 96.8), LARGE: percent(4.68, 98.2), L2: percent(4.71, 97.9),
        "MoGe-1": percent(3.11, 98.9),
    },
    ("moge", "ibims-moge"): {
        "MiDaS 3.1": percent(4.73, 97.4), LARGE: percent(4.18, 97.6), L2: percent(3.47, 98.5),
        "MoGe-1": percent(3.23, 98.0),
    },
    ("moge", "gso-moge"): {
        "MiDaS 3.1": percent(1.86, 100), LARGE: percent(1.54, 100), L2: percent(1.24, 100),
        "MoGe-1": percent(0.96, 100),
    },
    ("moge", "sintel-moge"): {
        "MiDaS 3.1": percent(21.3, 73.1), LARGE: percent(20.1, 77.6), L2: percent(21.4, 72.8),
        "MoGe-1": percent(18.4, 79.5),
    },
    ("moge", "ddad-moge"): {
        "MiDaS 3.1": percent(14.5, 82.6), LARGE: percent(12.7, 86.9), L2: percent(13.1, 86.4),
        "MoGe-1": percent(8.99, 91.5),
    },
    ("moge", "diode-moge"): {
        "MiDaS 3.1": percent(6.05, 94.9), LARGE: percent(5.69, 95.7), L2: percent(5.29, 96.1),
        "MoGe-1": percent(3.98, 97.2),
    },
    # arXiv 2502.19204, table 5
    ("marigold-disparity", "nyu"): {DAD: pair(0.043, 0.981), DAD_MIDAS: pair(0.046, 0.985)},
    ("marigold-disparity", "kitti-marigold"): {DAD: pair(0.070, 0.949), DAD_MIDAS: pair(0.063, 0.972)},
    ("marigold-disparity", "diode"): {DAD: pair(0.233, 0.753), DAD_MIDAS: pair(0.142, 0.788)},
    ("marigold-disparity", "scannet"): {DAD: pair(0.043, 0.980), DAD_MIDAS: pair(0.049, 0.980)},
    ("marigold-disparity", "eth3d-marigold"): {DAD: pair(0.054, 0.981), DAD_MIDAS: pair(0.057, 0.976)},
    # ZoeDepth's program: arXiv 2401.10891, tables 3 and 4 and its zero-shot metric table; arXiv 2406.09414, table 4
    ("zoedepth", "nyu"): {
        f"{LARGE}, fine-tuned": pair(0.056, 0.984) | {"delta2": 0.998, "delta3": 1.0, "rmse": 0.206, "log10": 0.024},
        f"{S2}, fine-tuned": pair(0.073, 0.961) | {"rmse": 0.261},
        f"{B2}, fine-tuned": pair(0.063, 0.977) | {"rmse": 0.228},
        f"{L2}, fine-tuned": pair(0.056, 0.984) | {"rmse": 0.206},
    },
    ("zoedepth", "kitti"): {
        f"{LARGE}, fine-tuned": pair(0.046, 0.982)
        | {"delta2": 0.998, "delta3": 1.0, "rmse": 1.896, "rmse_log": 0.069},
        f"{S2}, fine-tuned": pair(0.053, 0.973) | {"rmse": 2.235},
        f"{B2}, fine-tuned": pair(0.048, 0.979) | {"rmse": 1.999},
        f"{L2}, fine-tuned": pair(0.045, 0.983) | {"rmse": 1.861},
    },
    ("zoedepth", "sunrgbd"): {f"{LARGE}, of NYU or KITTI": pair(0.500, 0.660)},
    ("zoedepth", "ibims"): {f"{LARGE}, of NYU or KITTI": pair(0.150, 0.714)},
    ("zoedepth", "hypersim"): {f"{LARGE}, of NYU or KITTI": pair(0.363, 0.361)},
    ("zoedepth", "vkitti2"): {f"{LARGE}, of NYU or KITTI": pair(0.085, 0.913)},
    ("zoedepth", "diode-outdoor-zoedepth"): {f"{LARGE}, of NYU or KITTI": pair(0.794, 0.288)},
    # arXiv 1603.04992, and the README of the released network
    ("metric", "kitti-garg"): {
        "Garg et al. 2016": pair(0.169, 0.740) | {"rmse": 5.104, "delta2": 0.904, "delta3": 0.962},
        "Garg et al., released ResNet50": pair(0.1378, 0.8098) | {"rmse": 4.40, "rmse_log": 0.2335},
    },
    # arXiv 2406.09414, table 2
    ("pairs", "da-2k"): {
        S2: {"accuracy": 0.953}, B2: {"accuracy": 0.970}, L2: {"accuracy": 0.971}, G2: {"accuracy": 0.974},
        V2_TEACHER: {"accuracy": 0.974},
    },
}  # fmt: skip


def test_there_are_no_other_tables() -> None:
    assert PUBLISHED.keys() == CELLS.keys()


@pytest.mark.parametrize(("protocol", "benchmark"), CELLS)
def test_every_cell_is_the_published_one(protocol: str, benchmark: str) -> None:
    rows = beside(protocol, benchmark)
    found = {row.network: dict(row.values) for row in rows}
    assert len(found) == len(rows) and found.keys() == CELLS[protocol, benchmark].keys()
    for network, values in CELLS[protocol, benchmark].items():
        assert found[network] == pytest.approx(values, abs=1e-9), network


def test_every_number_is_of_a_known_protocol_and_benchmark_and_names_its_source() -> None:
    for (protocol, benchmark), rows in PUBLISHED.items():
        assert protocol in PROTOCOLS and benchmark in BENCHMARKS
        for row in rows:
            assert row.source
    by_network = {row.network: row.source for row in beside("disparity", "kitti")}
    assert by_network[LARGE] == by_network[MIDAS] == "arXiv 2401.10891, Table 2"
    assert by_network[V1_TEACHER] == "arXiv 2401.10891, Table 6 (all labelled sets)"
    assert by_network[L2] == by_network[V2_TEACHER] == "arXiv 2406.09414, Table 2"
    (zero_shot,) = beside("zoedepth", "sunrgbd")
    assert zero_shot.source == "arXiv 2401.10891, zero-shot metric table"
    assert "1603.04992" in beside("metric", "kitti-garg")[0].source


def test_numbers_stand_beside_nothing_else() -> None:
    assert beside("depth", "nyu") == beside("moge", "nyu") == beside("disparity", "nyu-moge") == []
    assert beside("disparity", "diode-outdoor") == beside("disparity", None) == []


def test_whose_images_are_inferred_has_a_note_and_nothing_else_has() -> None:
    assert set(INFERRED) == {("disparity", "diode"), ("disparity", "diode-indoor")}
    assert INFERRED.keys() <= PUBLISHED.keys()
    assert all("inferred" in note and "issue 280" in note for note in INFERRED.values())
