"""Pseudo-labelling of whole shards, in this process: what is written, for which images, and how exactly."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster import storage
from cluster.background import Background
from cluster.claims import Claims
from cluster.lease_actor import Worker
from cluster.leased_worker import Grip, LeaseLost
from cluster.leases import Lease
from dataio.codec import decode_png16, label_code
from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.label_check import verify
from dataio.label_codec import fingerprint
from dataio.labels import LabelSample, LabelStore, LedgerEntry, plan_digest
from dataio.loader import Loader
from dataio.quarantine import OF_THE_TARGET
from dataio.spec import DataSpec, RoleNeeds, RoleSpec
from tests.dataio.fakes import jpeg, smooth, unlabelled, write_dataset
from trainer.config import ConfigError, parse_config
from trainer.config_label import LabelConfig
from trainer.inference import Predictor, agreement, usual_shapes
from trainer.label_retry import Retrier
from trainer.label_worker import Labeller, batch_size, in_order, in_places
from trainer.labelling import describe, run_labelling
from trainer.plan_label import passes as plan_passes

SIZES = [(48, 56), (70, 90), (48, 56), (56, 48), (70, 90), (48, 56), (90, 40)]
INPUT = 28
BAD = {"k003": "bad_image", "k005": "bad_image", "k009": "missing_image"}


def samples(count: int = 12) -> dict[str, dict[str, bytes]]:
    found = {f"k{i:03d}": unlabelled(i, *SIZES[i % len(SIZES)]) for i in range(count)}
    found["k003"] = {"jpg": found["k003"]["jpg"][:-400]}  # its header is whole: only decoding tells
    found["k005"] = {"jpg": b"no image"}
    found["k009"] = {"txt": b"no image either"}
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_network(tmp_path_factory.mktemp("teacher") / "weights", 3)


def save_network(folder: Path, seed: int, preset: str = "tiny") -> str:
    from model import DepthAnything

    torch.manual_seed(seed)
    DepthAnything.from_preset(preset).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    items = list(samples().items())
    folder = tmp_path_factory.mktemp("data") / "photos"
    return write_dataset(folder, [dict(items[:8]), dict(items[8:])], with_depth=False)


def config_of(dataset: str, weights: str, **changes: Any) -> LabelConfig:
    values = {"dataset": dataset, "weights": weights, "input_size": INPUT, "batch": 4, "flip": True, "quality": "flip"}
    return parse_config(LabelConfig, values | changes)


def grip(stem: str, ask: Callable[[float], bool] = lambda progress: True) -> Grip:
    worker = Worker(owner="0badcafe", node="n", host="h", pid=1, device="test")
    return Grip(Lease(item=stem, token=7, owner=worker.owner), worker, ask, 60.0)


@contextlib.contextmanager
def labeller(config: LabelConfig, store: LabelStore, make: type[Labeller] = Labeller, *more: Any) -> Iterator[Labeller]:
    made = make(config.model_dump(mode="json"), store.path, "0badcafe", Dataset.open(config.dataset), *more)
    try:
        yield made
    finally:
        made.close()


def label(config: LabelConfig, folder: Path) -> tuple[LabelStore, list[LedgerEntry]]:
    opened = Dataset.open(config.dataset)
    store = LabelStore.create(str(folder), describe(config, opened))
    with labeller(config, store) as worker:
        for shard in opened.shards:
            worker.process(shard.stem, grip(shard.stem))
    return store, list(store.entries())


def read(store: LabelStore, stems: list[str]) -> dict[str, dict[str, bytes]]:
    """key -> members, in the order of the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for stem in stems:
        with tarfile.open(store.tar(stem)) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def labels(
    dataset: str, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LabelStore, list[LedgerEntry]]:
    return label(config_of(dataset, weights), tmp_path_factory.mktemp("labels") / "first")


def disparity(members: Mapping[str, bytes]) -> np.ndarray:
    return decode_png16(members["disparity.png"], label_code(json.loads(members["json"])))


def test_keys_and_order_are_the_source_s_and_failures_are_named(
    dataset: str, labels: tuple[LabelStore, list[LedgerEntry]]
) -> None:
    store, entries = labels
    found = read(store, ["000000", "000001"])
    assert list(found) == list(samples())
    assert [entry.samples for entry in entries] == [8, 4]
    failures = {key: reason for entry in entries for reason, keys in entry.failures.items() for key in keys}
    assert failures == BAD
    for key, members in found.items():
        assert ("disparity.png" in members) == (key not in BAD)
        assert json.loads(members["json"]).get("failure") == BAD.get(key)
    store.complete_for(Dataset.open(dataset))


def rounding_only(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> bool:
    """At most one step of the code apart."""
    a_HW, b_HW = disparity(a), disparity(b)
    return bool(np.abs(a_HW - b_HW).max() <= np.ptp(b_HW) / 4000)


def alone(image: bytes, size_hw: tuple[int, int], predictor: Predictor) -> np.ndarray:
    image_BCHW, good = FramePipeline(1, 1, "cpu").run([image], size_hw)
    assert good == [True] and image_BCHW is not None
    return predictor(image_BCHW)[0][0].numpy()


def test_a_label_is_the_prediction_within_the_code_s_error(
    labels: tuple[LabelStore, list[LedgerEntry]], weights: str
) -> None:
    predictor = Predictor(weights, flip=True)
    sizes = {(48, 56): (28, 28), (70, 90): (28, 42), (56, 48): (28, 28), (90, 40): (56, 28)}  # rounded to 14
    found = read(labels[0], ["000000", "000001"])
    for i, (key, members) in enumerate(samples().items()):
        if key in BAD:
            continue
        size_hw = sizes[SIZES[i % len(SIZES)]]
        assert disparity(found[key]).shape == size_hw
        expected_HW = alone(members["jpg"], size_hw, predictor)
        assert np.ptp(expected_HW) > 1e-4
        error = np.abs(disparity(found[key]) - expected_HW).max()
        assert error <= np.ptp(expected_HW) / 8188 + 1e-5 * np.abs(expected_HW).max()


def test_a_second_run_gives_the_same_bytes(
    dataset: str, weights: str, labels: tuple[LabelStore, list[LedgerEntry]], tmp_path: Path
) -> None:
    _, again = label(config_of(dataset, weights), tmp_path / "again")
    assert [entry.sha256 for entry in again] == [entry.sha256 for entry in labels[1]]


def test_a_label_does_not_depend_on_its_neighbours(
    weights: str, labels: tuple[LabelStore, list[LedgerEntry]], tmp_path: Path
) -> None:
    """The same images in another order, without the bad ones, so in other places of other batches: rounding only."""
    good = {key: members for key, members in reversed(samples().items()) if key not in BAD}
    other = write_dataset(tmp_path / "other", [good], with_depth=False)
    store, _ = label(config_of(other, weights), tmp_path / "labels")
    found, expected = read(store, ["000000"]), read(labels[0], ["000000", "000001"])
    assert list(found) == list(good)
    assert all(rounding_only(found[key], expected[key]) for key in good)


def test_another_batch_size_changes_rounding_only(
    dataset: str, weights: str, labels: tuple[LabelStore, list[LedgerEntry]], tmp_path: Path
) -> None:
    store, _ = label(config_of(dataset, weights, batch=1), tmp_path / "one")
    found, expected = read(store, ["000000", "000001"]), read(labels[0], ["000000", "000001"])
    assert all(rounding_only(found[key], expected[key]) for key in expected if key not in BAD)


def test_a_shard_that_is_there_is_not_labelled_again(
    dataset: str, weights: str, labels: tuple[LabelStore, list[LedgerEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with labeller(config_of(dataset, weights), labels[0]) as worker:
        monkeypatch.setattr(worker, "predictor", None)
        assert worker.process("000000", grip("000000")) == {
            "outcome": "duplicate", "differs": False, "samples": 0, "failed": 0,
        }  # fmt: skip
    assert labels[0].entry("000000") == labels[1][0]


def test_a_shard_that_is_somebody_else_s_by_now_is_dropped(dataset: str, weights: str, tmp_path: Path) -> None:
    config = config_of(dataset, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(dataset)))
    with labeller(config, store) as worker:
        with pytest.raises(LeaseLost):
            worker.process("000000", grip("000000", lambda progress: False))
        beaten = grip("000000", lambda progress: False)
        beaten.beat()
        with pytest.raises(LeaseLost):
            worker.process("000000", beaten)
        assert store.committed() == []
        assert not store.clean()
        assert worker.process("000000", grip("000000"))["outcome"] == "written"


def test_one_image_at_a_time_a_label_is_a_function_of_its_image_alone(
    dataset: str, weights: str, tmp_path: Path
) -> None:
    """Bit for bit: in other shards, in another order, beside others or alone."""
    config = config_of(dataset, weights, batch=None)
    assert config.rows == 1
    expected = read(label(config, tmp_path / "labels")[0], ["000000", "000001"])
    good = {key: members for key, members in reversed(samples().items()) if key not in BAD}
    other = write_dataset(tmp_path / "other", [good], with_depth=False)
    found = read(label(config_of(other, weights, batch=None), tmp_path / "again")[0], ["000000"])
    assert {key: expected[key] for key in good} == found


def test_what_fails_leaves_the_others_as_they_are(weights: str, tmp_path: Path) -> None:
    """Bit for bit, in batches too: whoever cannot be decoded keeps a row."""
    items = {f"k{i}": unlabelled(i, 48, 56) for i in range(7)}
    broken = dict(items, k2={"jpg": items["k2"]["jpg"][:-400]})
    found = []
    for name, shard in (("whole", items), ("broken", broken)):
        data = write_dataset(tmp_path / name, [shard], with_depth=False)
        found.append(read(label(config_of(data, weights), tmp_path / f"labels-{name}")[0], ["000000"]))
    whole, without = found
    assert list(without["k2"]) == ["json"]
    assert {key: members for key, members in whole.items() if key != "k2"} == {
        key: members for key, members in without.items() if key != "k2"
    }


@pytest.mark.parametrize("batch", [None, 4])
def test_trying_again_labels_what_failed_and_nothing_else(
    weights: str, tmp_path: Path, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a repair the folder is as if nothing had ever been wrong."""
    items = {f"k{i}": unlabelled(i, *SIZES[i % len(SIZES)]) for i in range(12)}
    image = items["k2"]["jpg"]
    table = image.index(b"\xff\xc4") + 5  # how many Huffman codes have each length: too many
    damaged = image[:table] + b"\xff" * 16 + image[table + 16 :]  # of the same length: the fingerprint stays
    shards = [dict(list(items.items())[:8]), dict(list(items.items())[8:])]
    whole = write_dataset(tmp_path / "whole", shards, with_depth=False, name="photos")
    expected, _ = label(config_of(whole, weights, batch=batch), tmp_path / "expected")
    broken = write_dataset(
        tmp_path / "broken", [{**shards[0], "k2": {"jpg": damaged}}, shards[1]], with_depth=False, name="photos"
    )
    config = config_of(broken, weights, batch=batch)
    store, entries = label(config, tmp_path / "labels")
    assert entries[0].failures == {"bad_image": ["k2"]}
    tar = Path(broken) / "shards" / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(damaged, image))
    assert Dataset.open(broken).fingerprint == Dataset.open(whole).fingerprint
    for reasons, outcome in ((["missing_image"], "duplicate"), (None, "written"), (None, "duplicate")):
        with labeller(config, store, Retrier, reasons) as worker:
            decoded = []
            monkeypatch.setattr(worker.predictor, "_forward", counted(worker.predictor._forward, decoded))
            assert worker.process("000000", grip("000000"))["outcome"] == outcome
            assert len(decoded) == (2 if outcome == "written" else 0)  # one batch and its mirror image
    assert [entry.content() for entry in store.entries()] == [entry.content() for entry in expected.entries()]
    for stem in ("000000", "000001"):
        assert Path(store.tar(stem)).read_bytes() == Path(expected.tar(stem)).read_bytes()


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return call


def test_mirroring_is_averaged(weights: str, dataset: str, tmp_path: Path) -> None:
    both, single = Predictor(weights, flip=True), Predictor(weights)
    image_BCHW = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    mean_BHW, none = both(image_BCHW)
    first_BHW, _ = single(image_BCHW)
    mirrored_BHW = single(image_BCHW.flip(-1))[0].flip(-1)
    assert none is None
    assert torch.allclose(mean_BHW, (first_BHW + mirrored_BHW) / 2)
    assert not torch.allclose(mean_BHW, first_BHW)
    assert (both.passes, single.passes) == (2, 2)
    store, _ = label(config_of(dataset, weights, flip=False, quality="off"), tmp_path / "single")
    members = read(store, ["000000"])["k000"]
    assert "quality" not in json.loads(members["json"])
    expected_HW = alone(samples()["k000"]["jpg"], disparity(members).shape, single)  # type: ignore[arg-type]
    assert np.abs(disparity(members) - expected_HW).max() <= np.ptp(expected_HW) / 4000


def test_agreement_is_of_what_an_affine_invariant_network_says() -> None:
    torch.manual_seed(0)
    first_BHW, other_BHW = torch.rand(3, 28, 42), torch.rand(3, 28, 42)
    assert torch.allclose(agreement(first_BHW, 3 * first_BHW + 7), torch.ones(3), atol=1e-5)
    a, b = ((x - x.mean()) / (x - x.mean()).abs().mean() for x in (first_BHW[1], other_BHW[1]))
    assert torch.allclose(agreement(first_BHW, other_BHW)[1], 1 / (1 + (a - b).abs().mean()))
    assert (agreement(first_BHW, -first_BHW) < 0.34).all()
    assert (agreement(first_BHW, first_BHW) == 1).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 7.3, -1e4])
def test_a_map_that_says_nothing_agrees_with_none(value: float) -> None:
    """Not even with itself: of a dead teacher every map would pass every filter."""
    torch.manual_seed(0)
    flat_BHW = torch.full((2, 28, 42), value) * (1 + 1e-7 * torch.rand(2, 28, 42))
    assert (agreement(flat_BHW, flat_BHW) == 0).all()
    assert (agreement(flat_BHW, torch.rand(2, 28, 42)) == 0).all()
    assert (agreement(torch.rand(2, 28, 42), flat_BHW) == 0).all()


class Wave(torch.nn.Module):
    """Stands for a network that sees the same in a mirror, and, but for resampling, at any size: a smooth function of
    the image; `skew` and `coarse` make it see otherwise in a mirror, and in small images."""

    def __init__(self, skew: float = 0.0, coarse: float = 0.0) -> None:
        super().__init__()
        self.skew, self.coarse = skew, coarse

    def forward(self, image_BCHW: Tensor) -> Any:
        height, width = image_BCHW.shape[2:]
        ramp_HW = torch.linspace(0, 1, width).expand(height, width)
        fine_HW = torch.linspace(0, 1, height)[:, None].expand(height, width) * (height < 84)
        value_BHW = image_BCHW.mean(1) + self.skew * ramp_HW + self.coarse * fine_HW
        return SimpleNamespace(disparity_BHW=value_BHW, depth_m_BHW=None)


def waves(count: int = 2) -> Tensor:
    """Images that are no mirror image of themselves, upright or upside down."""
    y_HW, x_HW = torch.meshgrid(torch.linspace(0, 1, 84), torch.linspace(0, 1, 112), indexing="ij")
    plane_BHW = torch.stack([(i + 1) * x_HW + torch.sin(2 * y_HW) + 0.3 * x_HW * y_HW for i in range(count)])
    return plane_BHW[:, None].expand(-1, 3, -1, -1).contiguous()


def test_quality_is_that_of_the_same_places(weights: str) -> None:
    """The mirror image's prediction is mirrored back, and that of the small image brought to the same size, upright."""
    image_BCHW = waves()
    for skew, coarse in ((0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (1.0, 3.0)):
        network = Wave(skew, coarse)
        qualities = {}
        for level in ("flip", "flip+scale"):
            predictor = Predictor(weights, quality=level)
            predictor.network.forward = network.forward  # type: ignore[method-assign]
            qualities[level] = predictor(image_BCHW)[1]
        first_BHW = network(image_BCHW).disparity_BHW
        ramp_HW = torch.linspace(0, 1, 112)
        other_BHW = first_BHW - skew * ramp_HW + skew * ramp_HW.flip(0)
        assert torch.allclose(qualities["flip"], agreement(first_BHW, other_BHW), atol=1e-5)
        small_BHW = first_BHW + coarse * torch.linspace(0, 1, 84)[:, None]
        expected_B = torch.minimum(qualities["flip"], agreement(first_BHW, small_BHW))
        assert torch.allclose(qualities["flip+scale"], expected_B, atol=0.01), (skew, coarse)
        assert (qualities["flip"] > 0.999).all() == (skew == 0)


def test_precision_and_threads_are_those_that_were_asked_for(
    dataset: str, weights: str, labels: tuple[LabelStore, list[LedgerEntry]], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    config = config_of(dataset, weights, precision="bf16", cluster={"threads": 2})
    try:
        store, entries = label(config, tmp_path / "bf16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert entries[0].by["device"].endswith(", 2 threads") and entries[0].by["encoder"] == fingerprint("png")
    exact, rounded = (read(each, ["000000"]) for each in (labels[0], store))
    image = samples()["k000"]["jpg"]
    size_hw = disparity(exact["k000"]).shape
    network = Predictor(weights, flip=True, precision="bf16")
    expected_HW = alone(image, size_hw, network)  # type: ignore[arg-type]
    assert np.abs(disparity(rounded["k000"]) - expected_HW).max() <= np.ptp(expected_HW) / 100
    off = np.abs(disparity(rounded["k000"]) - disparity(exact["k000"])).max() / np.ptp(disparity(exact["k000"]))
    assert 1e-3 < off < 0.1, "eight bits of mantissa show"


def test_an_image_that_no_network_sees_in_time_fails_alone(weights: str, tmp_path: Path) -> None:
    items = {"k0": unlabelled(0, 48, 56), "k1": unlabelled(1, 20, 200), "k2": unlabelled(2, 160, 21)}
    data = write_dataset(tmp_path / "photos", [items], with_depth=False)
    _, entries = label(config_of(data, weights), tmp_path / "labels")
    assert entries[0].failures == {"too_large": ["k1"]}


def test_a_map_beyond_what_labels_hold_fails_alone(
    dataset: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dataset, weights, flip=False, quality="off", batch=1)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(dataset)))
    with labeller(config, store) as worker:
        seen: list[int] = []

        def predict(image_BCHW: Tensor) -> tuple[Tensor, None]:
            seen.append(0)
            value_BHW = torch.rand(image_BCHW[:, 0].shape)
            return (3e38 * (value_BHW - 0.5).sign() if len(seen) == 1 else value_BHW), None

        monkeypatch.setattr(worker, "predictor", predict)
        worker.process("000000", grip("000000"))
    assert store.entry("000000").failures["disparity_out_of_range"] == ["k000"]  # type: ignore[union-attr]


class Progress(Grip):
    """Keeps what it was told."""

    def __init__(self, stem: str) -> None:
        made = grip(stem)
        self.__dict__.update(made.__dict__)
        self.told: list[float] = []

    def progress(self, share: float) -> None:
        self.told.append(share)
        super().progress(share)


def test_it_is_seen_to_go_on_while_labels_wait(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a batch of a rare shape to fill, or, in a retry, for all that had failed: who stands still is ended."""
    items = {"k00": unlabelled(0, 90, 40), **{f"k{i:02d}": unlabelled(i, 48, 56) for i in range(1, 20)}}
    data = write_dataset(tmp_path / "photos", [items], with_depth=False)
    config = config_of(data, weights, batch=4, flip=False, quality="off")
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(data)))
    batches: list[int] = []
    at_batch: list[int] = []

    def spied(worker: Labeller, told: list[float]) -> None:
        predict = worker.predictor

        def call(image_BCHW: Tensor) -> Any:
            batches.append(len(image_BCHW))
            at_batch.append(len(told))
            return predict(image_BCHW)

        monkeypatch.setattr(worker, "predictor", call)

    with labeller(config, store) as worker:
        seen = Progress("000000")
        spied(worker, seen.told)
        worker.process("000000", seen)
    assert len(batches) == 6 and 0 < at_batch[1] < at_batch[5]
    assert len(seen.told) == 20 and seen.told == sorted(set(seen.told)) and seen.told[-1] < 1
    failing = [LabelSample.failed(key, "bad_image") for key in sorted(items)]
    store.replace("000000", failing, keys=sorted(items))
    batches.clear()
    at_batch.clear()
    with labeller(config, store, Retrier, None) as worker:
        seen = Progress("000000")
        spied(worker, seen.told)
        assert worker.process("000000", seen)["outcome"] == "written"
    assert len(batches) == 6 and at_batch[1] > 0 and len(seen.told) == 20 and seen.told == sorted(set(seen.told))


def test_a_retry_does_not_copy_what_has_rotted(weights: str, tmp_path: Path) -> None:
    """Its new checksum would vouch for it: the whole shard is made again."""
    data = write_dataset(tmp_path / "photos", [samples(6)], with_depth=False)
    config = config_of(data, weights, flip=False, quality="off")
    expected, _ = label(config, tmp_path / "expected")
    store, _ = label(config, tmp_path / "labels")
    tar = Path(store.tar("000000"))
    whole = tar.read_bytes()
    place = whole.index(b'"shift": ') + 9
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert tar.read_bytes() != whole and store.done("000000")
    with labeller(config, store, Retrier, None) as worker:
        assert worker.process("000000", grip("000000"))["samples"] == len(samples(6))
    assert tar.read_bytes() == Path(expected.tar("000000")).read_bytes()
    assert verify(store, Dataset.open(data)).ok


def test_a_retry_counts_what_it_has_tried(weights: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "photos", [samples(12)], with_depth=False)
    config = config_of(data, weights, flip=False, quality="off")
    store, _ = label(config, tmp_path / "labels")
    for reasons, tried in ((["bad_image"], 2), (None, 3), (["too_large"], 0)):
        with labeller(config, store, Retrier, reasons) as worker:
            told = worker.process("000000", grip("000000"))
            assert (told["samples"], told["failed"]) == (tried, tried)


@pytest.mark.parametrize("reason", sorted(OF_THE_TARGET))
def test_a_photograph_is_labelled_whatever_is_wrong_with_its_depth(weights: str, tmp_path: Path, reason: str) -> None:
    items = {f"k{i}": unlabelled(i, 48, 56) for i in range(3)}
    data = write_dataset(tmp_path / "photos", [items], with_depth=False)
    lines = [json.dumps({"key": key, "shard": "000000.tar", "reason": why}) for key, why in
             (("k0", reason), ("k1", "duplicate"))]  # fmt: skip
    (Path(data) / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    _, entries = label(config_of(data, weights), tmp_path / "labels")
    assert entries[0].failures == {"duplicate": ["k1"]}


@pytest.mark.parametrize(
    ("quality", "flip", "passes"), [("off", False, 1), ("flip", False, 2), ("flip", True, 2), ("flip+scale", True, 3)]
)
def test_a_level_of_quality_costs_the_passes_that_it_states(
    weights: str, quality: str, flip: bool, passes: int
) -> None:
    predictor = Predictor(weights, quality=quality, flip=flip)
    image_BCHW = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    sizes: list[Any] = []
    predictor._forward = counted(predictor._forward, sizes)  # type: ignore[method-assign]
    value_BHW, quality_B = predictor(image_BCHW)
    assert predictor.passes == passes == len(sizes)
    assert value_BHW.shape == (2, 56, 84)
    if quality == "off":
        assert quality_B is None
        return
    assert quality_B is not None and ((quality_B > 0) & (quality_B <= 1)).all()
    first_BHW = Predictor(weights)(image_BCHW)[0]
    assert torch.equal(value_BHW, first_BHW) != flip
    if quality == "flip+scale":
        assert sizes[-1][0].shape[2:] == (42, 56)  # 63 lies between two multiples of 14, and the even one has it
        assert (quality_B <= Predictor(weights, quality="flip")(image_BCHW)[1]).all()  # type: ignore[operator]
    config = config_of("d", weights, quality=quality, flip=flip)
    assert plan_passes(config) == pytest.approx(passes if quality != "flip+scale" else 2.56)


def test_quality_stands_beside_every_label(labels: tuple[LabelStore, list[LedgerEntry]]) -> None:
    for key, members in read(labels[0], ["000000", "000001"]).items():
        if key not in BAD:
            assert 0 < json.loads(members["json"])["quality"] <= 1


def test_exif_orientation_is_applied(weights: str, tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright = smooth(5, 40, 90)
    turned = {"jpg": jpeg(np.rot90(upright), exif=exif.tobytes())}
    data = write_dataset(tmp_path / "d", [{"plain": {"jpg": jpeg(upright)}, "turned": turned}], with_depth=False)
    store, _ = label(config_of(data, weights), tmp_path / "labels")
    found = read(store, ["000000"])
    plain_HW, turned_HW = disparity(found["plain"]), disparity(found["turned"])
    assert plain_HW.shape == turned_HW.shape
    assert np.abs(plain_HW - turned_HW).max() < 0.2 * np.ptp(plain_HW)


def test_the_digest_is_of_what_decides_the_labels(dataset: str, weights: str, tmp_path: Path) -> None:
    opened = Dataset.open(dataset)

    def digest(other: Dataset = opened, **changes: Any) -> str:
        return plan_digest(describe(config_of(other.path, **({"weights": weights} | changes)), other))

    base = digest()
    assert base == digest(out="/elsewhere", cluster={"workers": 4, "address": "ray://x", "lease_s": 5})
    items = samples(13)
    fewer = Dataset.open(write_dataset(tmp_path / "photos", [dict(list(items.items())[:5])], with_depth=False))
    changed = [
        digest(weights=save_network(tmp_path / "other", 4)),
        digest(flip=False),
        digest(input_size=42),
        digest(precision="bf16"),
        digest(batch=8),
        digest(quality="off"),
        digest(encoding="npy"),
        digest(compile=True),
        digest(cluster={"threads": 2}),
        digest(cluster={"use_gpu": True}),
        digest(fewer),
    ]
    assert len({base, *changed}) == len(changed) + 1


def test_a_teacher_of_metres_is_refused(dataset: str, tmp_path: Path) -> None:
    from model.presets import PRESETS

    preset = next(name for name, preset in PRESETS.items() if preset.head == "metric" and preset.width < 400)
    folder = save_network(tmp_path / "metric", 0, preset)
    with pytest.raises(ConfigError, match=r"^weights: .* predicts metres; .* name a relative network"):
        describe(config_of(dataset, folder), Dataset.open(dataset))


def test_a_short_batch_is_filled_up_to_one_of_few_sizes() -> None:
    assert [batch_size(frames, 16) for frames in (1, 2, 3, 4, 5, 8, 9, 16)] == [1, 2, 4, 4, 8, 8, 16, 16]
    assert [batch_size(frames, 6) for frames in (1, 3, 5, 6)] == [1, 4, 6, 6]
    image_BCHW: Tensor = torch.randn(2, 3, 4, 4)
    padded = in_places(image_BCHW, (0, 3), 5)
    assert torch.equal(padded[[0, 3]], image_BCHW)
    assert not padded[[1, 2, 4]].any()
    assert in_places(image_BCHW, (0, 1), 2) is image_BCHW


def test_the_usual_shapes_are_those_of_photographs() -> None:
    assert usual_shapes(518) == {
        (518, 518), (518, 686), (686, 518), (518, 784), (784, 518), (518, 924), (924, 518),
    }  # fmt: skip


def test_only_usual_shapes_are_compiled(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int, ...]] = []

    def stand_in(network: Callable[[Tensor], Any], **options: Any) -> Callable[[Tensor], Any]:
        assert options == {"dynamic": False}

        def run(image_BCHW: Tensor) -> Any:
            compiled.append(tuple(image_BCHW.shape[2:]))
            return network(image_BCHW)

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    predictor = Predictor(weights, compiled=usual_shapes(28))
    for shape in ((28, 42), (28, 98), (28, 28)):
        predictor(torch.zeros(1, 3, *shape))
    assert compiled == [(28, 42), (28, 28)]


@pytest.mark.slow
def test_compiled_or_not_predictions_are_the_same_to_rounding(weights: str) -> None:
    image_BCHW = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    plain_BHW, compiled_BHW = (Predictor(weights, compiled=shapes)(image_BCHW)[0] for shapes in ((), {(28, 42)}))
    assert torch.allclose(plain_BHW, compiled_BHW, rtol=1e-4, atol=1e-5)


def test_order_is_restored_as_soon_as_possible() -> None:
    def numbered(order: list[int]) -> Any:
        return iter([(i, LabelSample.failed(f"k{i}", "bad_image")) for i in order])

    assert [sample.key for sample in in_order(numbered([2, 0, 1, 4, 3]))] == ["k0", "k1", "k2", "k3", "k4"]
    given = numbered([0, 2, 1])
    assert next(in_order(given)).key == "k0"
    assert len(list(given)) == 2


def test_a_png_is_labelled_like_a_jpeg(weights: str, tmp_path: Path) -> None:
    from PIL import Image

    image = smooth(3, 60, 60)
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    data = write_dataset(tmp_path / "d", [{"a": {"png": out.getvalue()}, "b": {"jpg": jpeg(image)}}], with_depth=False)
    found = read(label(config_of(data, weights), tmp_path / "labels")[0], ["000000"])
    a_HW, b_HW = disparity(found["a"]), disparity(found["b"])
    assert np.abs(a_HW - b_HW).max() < 0.1 * np.ptp(a_HW)


def test_a_shard_without_samples_has_a_label_shard_without_labels(weights: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [{}, {f"k{i}": unlabelled(i, 48, 56) for i in range(3)}], with_depth=False)
    store, entries = label(config_of(folder, weights), tmp_path / "labels")
    assert [(entry.samples, entry.failed) for entry in entries] == [(0, 0), (3, 0)]
    store.complete_for(Dataset.open(folder))
    role = RoleSpec(datasets=(folder,), labels=(store.path,), batch=3, lanes=1)
    with Loader(
        DataSpec(roles={"r": role}, input_size=28), {"r": RoleNeeds(sidecar=True)}, views=("clean",), seed=0
    ) as it:
        assert next(it).weight_B.tolist() == [1, 1, 1]


def test_what_others_left_is_cleared_away_once_all_is_done(tmp_path: Path, dataset: str, weights: str) -> None:
    """By the run that finds everything done, too; but not while another is at work."""
    config = config_of(dataset, weights, out=str(tmp_path), cluster={"lease_s": 1.0})
    digest = plan_digest(describe(config, Dataset.open(dataset)))
    store, _ = label(config, tmp_path / digest)
    left = [".x.0badcafe.tmp", "shards/.x.0badcafe.tmp", "leases/.x.0badcafe.tmp", "telemetry/label-0-1-x.json"]
    before = sorted(path for path in Path(store.path).rglob("*.*"))
    other = Claims(storage.join(store.path, "leases"), "0badc0de", 1.0)
    other.claim([])
    for name in left:
        (Path(store.path) / name).parent.mkdir(exist_ok=True)
        (Path(store.path) / name).touch()
    with Renewed(other):
        outcome = run_labelling(config)
    assert outcome.shards == 2 and all((Path(store.path) / name).exists() for name in left)
    outcome = run_labelling(config)
    assert (outcome.shards, outcome.images, outcome.folder) == (2, 0, store.path)
    assert sorted(path for path in Path(store.path).rglob("*.*")) == before


class Renewed(Background):
    """The claims of another run, while it works."""

    def __init__(self, claims: Claims) -> None:
        super().__init__("claims", join_s=5)
        self._claims = claims

    def _run(self) -> None:
        while not self._closed.wait(0.05):
            self._claims.claim([])
