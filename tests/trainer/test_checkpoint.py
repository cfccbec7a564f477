"""Checkpoints: whole or passed over, whatever happened while they were written."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster import storage
from tests.trainer.batches import train_config
from tests.trainer.checkpoints import save_checkpoint
from tests.trainer.disks import small_disk
from trainer import checkpoint as module
from trainer.checkpoint import (
    WEIGHTS,
    About,
    CheckpointError,
    Moments,
    TrainState,
    clean,
    commit,
    find_checkpoint,
    fingerprint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    part_name,
    partial_folder,
    prune,
    verify_checkpoint,
)
from trainer.config_train import TrainConfig
from trainer.run import prepare_folder, with_earlier_skips

PARTS = [part_name(0, 2), part_name(1, 2)]
FILES = [*PARTS, "state.json", "weights.safetensors"]  # sorted, as the manifest's own name is not among them


def tensors(seed: int, megabytes: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    named = {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.randn(3, generator=generator)}
    if megabytes:
        named["large"] = torch.randn(int(megabytes * 2**18), generator=generator)
    return named


def save(root: Path, step: int, *, keep: int = 3, megabytes: float = 0.0, **about: Any) -> str:
    weights = tensors(step, megabytes)
    moments = {f"exp_avg/{name}": tensor * 2 for name, tensor in weights.items()}
    state = TrainState(
        step=step,
        applied_steps=step - 1,
        cursor={"labelled": step * 8},
        data={"plan_version": 1, "roles": {"labelled": {"lanes": 4}}},
        groups={"decoder": list(weights)},
    )
    return save_checkpoint(root, state, weights, moments, keep=keep, **about)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7, frozen="abc")
    assert path == str(tmp_path / "step_00000007")
    assert sorted(os.listdir(path)) == sorted([*FILES, "manifest.json"])
    found, passed = find_checkpoint(str(tmp_path))
    assert (found, passed) == (path, [])
    loaded = load_checkpoint(path)
    assert loaded.state == TrainState(
        step=7,
        applied_steps=6,
        cursor={"labelled": 56},
        data={"plan_version": 1, "roles": {"labelled": {"lanes": 4}}},
        groups={"decoder": ["a.weight", "a.bias"]},
    )
    assert loaded.about.frozen == "abc" and loaded.ema is None
    assert loaded.weights.keys() == tensors(7).keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in tensors(7).items())
    assert all(torch.equal(loaded.optimizer[f"exp_avg/{name}"], 2 * tensor) for name, tensor in tensors(7).items())
    assert sorted(loaded.optimizer) == ["exp_avg/a.bias", "exp_avg/a.weight"] and len(loaded.optimizer) == 2
    manifest = json.loads((Path(path) / "manifest.json").read_text())
    assert manifest["weights"] == loaded.fingerprint == fingerprint(loaded.weights)
    assert (tmp_path / "latest").read_text() == "step_00000007"


def test_a_checkpoint_without_an_update_has_no_moments(tmp_path: Path) -> None:
    state = TrainState(step=1, applied_steps=0, cursor={"labelled": 8})
    path = save_checkpoint(str(tmp_path), state, tensors(0), {}, keep=1)
    assert verify_checkpoint(path) is None
    assert dict(load_checkpoint(path).optimizer) == {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_stretch_of_a_moment_can_be_read_whoever_wrote_it(tmp_path: Path, ranks: int) -> None:
    whole = torch.arange(60.0).reshape(5, 12)
    state = TrainState(step=1, applied_steps=1, cursor={})
    path = save_checkpoint(tmp_path, state, tensors(0), {"exp_avg/w": whole}, ranks=ranks)
    moments = load_checkpoint(path).optimizer
    assert torch.equal(moments["exp_avg/w"], whole)
    for start in range(0, 60, 7):
        for stop in (start, start + 1, 31, 60):
            assert torch.equal(moments.part("exp_avg/w", start, max(start, stop)), whole.reshape(-1)[start:stop])
    with pytest.raises(KeyError, match=r"exp_avg/w: 5 of elements 50 to 65 are in no file"):
        moments.part("exp_avg/w", 50, 65)
    with pytest.raises(KeyError):
        moments.part("exp_avg_sq/w", 0, 1)
    with pytest.raises(KeyError, match="are in no file"):
        Moments([str(Path(path) / part_name(ranks - 1, ranks))]).part("exp_avg/w", 0, 60 if ranks > 1 else 61)


def test_the_average_is_saved_beside_the_weights(tmp_path: Path) -> None:
    state = TrainState(step=1, applied_steps=1, cursor={})
    path = save_checkpoint(tmp_path, state, tensors(0), {}, ema=tensors(1))
    ema = load_checkpoint(path).ema
    assert ema is not None and all(torch.equal(ema[name], tensor) for name, tensor in tensors(1).items())
    (Path(path) / "ema.safetensors").unlink()
    assert "ema.safetensors" in str(verify_checkpoint(path))


def test_the_manifest_is_written_last_and_the_rename_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    real_write, real_rename = storage.atomic_write, os.rename

    def write(path: str, data: bytes | str) -> None:
        seen.append((os.path.basename(path), sorted(os.listdir(os.path.dirname(path)))))
        real_write(path, data)

    def rename(source: str, target: str) -> None:
        seen.append((os.path.basename(target), sorted(os.listdir(source))))
        real_rename(source, target)

    monkeypatch.setattr(storage, "atomic_write", write)
    monkeypatch.setattr(module.os, "rename", rename)
    save(tmp_path, 1)
    whole = sorted([*FILES, "manifest.json"])
    assert seen == [
        ("state.json", sorted([*PARTS, "weights.safetensors"])),
        ("manifest.json", FILES),
        ("step_00000001", whole),
        ("latest", ["step_00000001"]),
    ]


def test_every_file_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []  # what was synced, and its size then
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(handle: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        events.append((name[1:].rsplit(".", 2)[0] if name.endswith(".tmp") else name, os.fstat(handle).st_size))
        fsync(handle)

    def recorded_rename(source: str, target: str) -> None:
        events.append(("rename", 0))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    path = Path(save(tmp_path, 1))
    renamed = events.index(("rename", 0))
    assert {(name, (path / name).stat().st_size) for name in os.listdir(path)} <= set(events[:renamed])
    assert f"{path.name}.partial" == events[renamed - 1][0]  # the names of its files
    assert tmp_path.name in [name for name, _ in events[renamed:]]  # its own name


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / PARTS[1]).read_bytes())
    data[-5] ^= 1
    (path / PARTS[1]).write_bytes(data)


def truncate(path: Path) -> None:
    data = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(data[:-1])


def remove_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def remove_a_rank(path: Path) -> None:
    (path / PARTS[0]).unlink()


def forget_a_rank(path: Path) -> None:
    """As if the manifest had been written before the other rank was done."""
    (path / PARTS[1]).unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][PARTS[1]], manifest["digest"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"digest": module._digest(manifest)}))


def change_the_manifest(path: Path) -> None:
    """Valid JSON with another fingerprint: one flipped bit in a digit."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["weights"] = ("1" if manifest["weights"][0] == "0" else "0") + manifest["weights"][1:]
    (path / "manifest.json").write_text(json.dumps(manifest))


def remove_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": {}}')


def replace_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "optimizer-00001-of-00002.safetensors does not match its checksum"),
        (remove_a_rank, "optimizer-00000-of-00002.safetensors"),
        (forget_a_rank, "optimizer-00001-of-00002.safetensors"),
        (change_the_manifest, "manifest.json does not match its checksum"),
        (truncate, "weights.safetensors does not match its checksum"),
        (remove_a_file, "state.json"),
        (remove_the_manifest, "manifest.json"),
        (cut_the_manifest, "manifest.json is damaged"),
        (empty_the_manifest, "manifest.json does not match its checksum"),
        (replace_the_manifest, "manifest.json is damaged"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, damage: object, reason: str) -> None:
    older = save(tmp_path, 1)
    newer = Path(save(tmp_path, 2))
    damage(newer)  # type: ignore[operator]
    found, passed = find_checkpoint(str(tmp_path))
    assert found == older
    (line,) = passed
    assert line.startswith("step_00000002: ") and reason in line and "\n" not in line


def test_a_file_with_a_checkpoint_s_name_is_none(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    (tmp_path / "step_00000002").write_text("no folder")
    assert find_checkpoint(str(tmp_path)) == (older, [])


def test_nothing_whole(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path / "absent")) == (None, [])
    flip_a_byte(Path(save(tmp_path, 1)))
    found, passed = find_checkpoint(str(tmp_path))
    assert found is None and len(passed) == 1


def test_a_run_without_a_whole_checkpoint_does_not_start_again_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config("teacher", runs=str(tmp_path))
    assert prepare_folder(config, False) is None
    assert prepare_folder(config, True) is None  # stopped before its first checkpoint
    root = tmp_path / "test" / "checkpoints"
    older, newer = save(root, 1), save(root, 2)
    assert prepare_folder(config, True) == newer
    flip_a_byte(Path(newer))
    assert prepare_folder(config, True) == older
    assert "passed over step_00000002: optimizer-00001" in capsys.readouterr().err
    truncate(Path(older))
    with pytest.raises(CheckpointError, match=r"none of 2 is whole \(step_00000002: .*\); restore one, or"):
        prepare_folder(config, True)


def test_stretches_passed_over_once_stay_so(tmp_path: Path) -> None:
    def skipping(*stretches: tuple[int, int]) -> TrainConfig:
        config = train_config("teacher", runs=str(tmp_path))
        return config.model_copy(update={"data": replace(config.data, skip_samples=stretches)})

    prepare_folder(skipping((10, 20)), False)
    added = with_earlier_skips(skipping((50, 60)))
    assert added.data.skip_samples == ((10, 20), (50, 60))
    prepare_folder(added, True)
    assert with_earlier_skips(skipping()).data.skip_samples == ((10, 20), (50, 60))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert list_checkpoints(str(tmp_path)) == ["step_00000004", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005"


def test_many_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert find_checkpoint(str(tmp_path))[0] == str(tmp_path / "step_100000000")


def test_a_damaged_later_one_does_not_push_out_what_was_just_written(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    flip_a_byte(Path(save(tmp_path, 9)))
    written = save(tmp_path, 2, keep=1)
    found, passed = find_checkpoint(str(tmp_path))
    assert found == written and len(passed) == 1
    assert not (tmp_path / "step_00000001").exists()


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    """Lower is better; one without a score is never among the best."""
    for step, score in enumerate([0.5, 0.2, None, 0.3, 0.4, 0.9], start=1):
        state = TrainState(step=step, applied_steps=step, cursor={})
        save_checkpoint(tmp_path, state, tensors(step), {}, keep=1, keep_best=2, score=score, metric="abs_rel")
    assert list_checkpoints(str(tmp_path)) == ["step_00000002", "step_00000004", "step_00000006"]
    assert prune(str(tmp_path), 6, keep=1, keep_best=1, metric="rmse") == [2, 4]  # of another metric none is best


def test_a_score_that_is_not_finite_is_none(tmp_path: Path) -> None:
    for step, score in enumerate([float("nan"), 0.3, 0.9, 0.8], start=1):
        state = TrainState(step=step, applied_steps=step, cursor={})
        save_checkpoint(tmp_path, state, tensors(step), {}, keep=1, keep_best=1, score=score, metric="abs_rel")
    assert list_checkpoints(str(tmp_path)) == ["step_00000002", "step_00000004"]
    assert prune(str(tmp_path), 4, keep=1, keep_best=1, metric="abs_rel", lower_is_better=False) == [2]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Writing a step again: the old folder has gone aside, the new one is not there yet."""
    path = Path(save(tmp_path, 3))
    path.rename(f"{path}.replaced.partial")
    clean(str(tmp_path))
    assert find_checkpoint(str(tmp_path)) == (str(path), [])


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = save(tmp_path, 3), os.rename

    def refuse(source: str, target: str) -> None:
        if str(source).endswith("3.partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(storage.StorageError, match="earlier checkpoints are kept"):
        save(tmp_path, 3)
    assert find_checkpoint(str(tmp_path)) == (path, [])


def test_half_written_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    whole = Path(save(tmp_path, 1))
    for name in ("step_00000005.partial", "step_00000002.partial", "step_00000001.replaced.partial"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step_notes.txt").write_text("mine")
    assert list_checkpoints(str(tmp_path)) == ["step_00000001"]
    clean(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", "step_notes.txt"]
    save(tmp_path, 2)
    clean(str(tmp_path / "absent"))


def test_files_of_another_number_of_ranks_do_not_get_into_a_checkpoint(tmp_path: Path) -> None:
    partial = tmp_path / "step_00000003.partial"
    partial.mkdir()
    (partial / part_name(2, 3)).write_bytes(b"of a run with three ranks that was killed")
    assert sorted(os.listdir(save(tmp_path, 3))) == sorted([*FILES, "manifest.json"])


def test_the_same_step_may_be_written_again(tmp_path: Path) -> None:
    truncate(Path(save(tmp_path, 3)))
    path = save(tmp_path, 3)
    assert verify_checkpoint(path) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000003"]


class Network(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a = nn.Linear(4, width)


def test_weights_of_the_same_network_fit(tmp_path: Path) -> None:
    network = Network()
    load_weights(network, load_checkpoint(save(tmp_path, 1)))
    assert torch.equal(network.a.weight, tensors(1)["a.weight"])


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            Network(5),
            "2 tensors of another shape: a.bias is [3] there and [5] here, a.weight is [3, 4] there and [5, 4] here;",
        ),
        (nn.Linear(4, 3), "2 tensors missing: bias, weight; 2 tensors unknown: a.bias, a.weight;"),
    ],
)
def test_another_network_is_refused_in_one_line(tmp_path: Path, network: nn.Module, words: str) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loaded = load_checkpoint(save(tmp_path, 1))
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, loaded)
    message = str(caught.value)
    assert "is of another network" in message and words in message and "model.preset" in message
    assert "\n" not in message and caught.value.exit_status == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("content", ['{"format": 99}', "[]", "{", '{"format": 2, "step": 1}'])
def test_a_state_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 1)
    (Path(path) / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="step_00000001"):
        load_checkpoint(path)


def test_a_fingerprint_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1) + 1e-7},
        {"a": torch.zeros(2, 3)},
    ]
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert len({fingerprint(named) for named in [base, *others]}) == 6
    assert fingerprint({"x": torch.tensor(1.0)}) != fingerprint({"x": torch.tensor(2.0)})


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(tmp_path, 1, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(storage.StorageError, match=r"a checkpoint needs .* 1 kB are free"):
        save(tmp_path, 2, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]
    assert find_checkpoint(str(tmp_path))[0] == older


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    with small_disk(tmp_path / "disk", 3) as folder:
        yield folder


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(disk, 1, keep=1)
    monkeypatch.setattr(storage, "require_free", lambda *args: None)  # another process took the space meanwhile
    with pytest.raises(storage.StorageError) as caught:
        save(disk, 2, keep=1, megabytes=2)
    message = str(caught.value)
    assert "cannot be written" in message and "No space left on device" in message
    assert "\n" not in message
    assert list_checkpoints(str(disk)) == ["step_00000001"]
    assert find_checkpoint(str(disk)) == (older, [])


def save_and_die(root: Path, where: str) -> None:
    """Writes a second checkpoint and ends without a word at one point of it."""
    save(root, 1, keep=1)
    save_file, write, rename = module.save_file, storage.atomic_write, os.rename

    def dying_save_file(tensors: dict[str, Tensor], path: str, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        if os.path.basename(path) == where:
            os._exit(9)

    def dying_write(path: str, data: bytes | str) -> None:
        if os.path.basename(path) == where:
            os._exit(9)
        write(path, data)

    def dying_rename(source: str, target: str) -> None:
        if where == "rename":
            os._exit(9)
        rename(source, target)
        os._exit(9 if where == "renamed" else 1)

    module.save_file, storage.atomic_write = dying_save_file, dying_write
    if where.startswith("rename"):
        os.rename = dying_rename
    save(root, 2, keep=1)


@pytest.mark.parametrize(
    ("where", "newest"),
    [
        ("weights.safetensors", 1),
        (part_name(1, 2), 1),
        ("manifest.json", 1),
        ("rename", 1),
        ("renamed", 2),
        ("latest", 2),
    ],
)
def test_killed_while_writing(tmp_path: Path, where: str, newest: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(tmp_path, where))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / f"step_{newest:08d}"), [])
    clean(str(tmp_path))
    save(tmp_path, 3, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000003"]


def test_what_is_no_damage_is_no_reason_to_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that cannot be read now, or another version's format: an older checkpoint would lose what is there."""
    older, newer = Path(save(tmp_path, 1)), Path(save(tmp_path, 2))
    manifest = (newer / "manifest.json").read_text()
    other = json.loads(manifest) | {"format": 3}
    (newer / "manifest.json").write_text(json.dumps(other))  # a flipped bit: the digest is the old one's
    assert find_checkpoint(str(tmp_path)) == (str(older), [f"{newer.name}: manifest.json does not match its checksum"])
    del other["digest"]
    for written in (other, other | {"digest": module._digest(other)}):
        (newer / "manifest.json").write_text(json.dumps(written))
        with pytest.raises(CheckpointError, match=r"2: was written in format 3, this version reads 2; go on with"):
            find_checkpoint(str(tmp_path))
    (newer / "manifest.json").write_text(manifest)

    def failing(path: str) -> str:
        raise storage.StorageError(f"{path}: the disk reports an input/output error")

    monkeypatch.setattr(storage, "sha256_file", failing)
    with pytest.raises(storage.StorageError, match=r"input/output error; or move .*step_00000002 away to go on from"):
        find_checkpoint(str(tmp_path))


def test_a_file_that_rank_0_cannot_see_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' machines have a `runs` each."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    older = save(tmp_path, 1)
    partial = Path(partial_folder(str(tmp_path), 2))
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(b"x")
    files = {WEIGHTS: "0" * 64, part_name(1, 2): "0" * 64}
    state = TrainState(step=2, applied_steps=2, cursor={})
    with pytest.raises(storage.StorageError, match=r"optimizer-00001-of-00002.* a folder that all machines share"):
        commit(str(tmp_path), state, files, "", About())
    assert find_checkpoint(str(tmp_path)) == (older, [])
