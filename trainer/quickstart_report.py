"""The quickstart's report.html: table, what it shows, curves, and a sheet of image | truth | teacher | student."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image, ImageDraw

from dataio.dali_frames import FramePipeline
from dataio.dataset import Dataset
from dataio.frames import decode_frames, read_frames
from dataio.header import displayed
from dataio.show import colorize
from trainer.evaluate_truth import read_truth
from trainer.folder import RunFolder
from trainer.inference import Predictor, sizer
from trainer.metrics import align_scale_shift
from trainer.report import Page, loss_curves

if TYPE_CHECKING:
    from trainer.quickstart import Request, Results

SHEET_ROWS = 8
TILE = 168  # pixels


def write_quickstart_report(request: Request, results: Results, runs: Mapping[str, str]) -> str:
    """Write report.html (and the sheet beside it as sheet.png); returns the report's path."""
    from trainer.quickstart import stage_config, table, verdict

    page = Page("fathom quickstart: teacher, pseudo-labels, student")
    page.text(
        f"{request.sizes.labelled} labelled synthetic scenes trained the teacher; it labelled {request.sizes.wide} "
        "scenes of a different, wider domain; the student learned from both, 1 : 2, under colour distortion, blur and "
        "CutMix, its features held near a frozen encoder."
    )
    page.heading("Evaluation on the wide domain")
    page.table(*table(results))
    page.text(verdict(results, request.ladder))
    page.text(
        "AbsRel and delta1 without a note: least-squares scale and shift in disparity, compared as depth up to 20 m, "
        "sky left out; (disparity): the same alignment, compared as disparity, as in the tables of Depth Anything. The "
        "two cannot be compared with each other."
    )
    page.heading("Pictures")
    sheet = make_sheet(request, runs)
    sheet.save(os.path.join(request.out, "sheet.png"))
    page.picture(sheet, "held-out scenes of the wide domain; warm is near, grey has no depth (sky)")
    page.heading("Training curves")
    for name, folder in ({"encoder": stage_config(request, "encoder").folder} if results.stand_in else {}).items():
        page.curves(loss_curves({name: folder}), x="step", y="loss", caption="stand-in encoder: masked-patch error")
    page.curves(loss_curves(runs), x="step", y="loss", caption="depth networks: weighted sum of each task's own terms")
    page.heading("How it was made")
    page.table(["stage", "seconds"], [[name, seconds] for name, seconds in results.seconds.items()])
    if results.stand_in:
        page.text(
            "The frozen encoder is a stand-in for DINOv2: a tiny network trained on the unlabelled images by "
            "masked-patch prediction, without labels. Teacher and student start from it."
        )
    for name in runs:
        config = stage_config(request, name, "LABELS").model_dump(mode="json")
        page.details(f"configuration: {name}", yaml.safe_dump(config, sort_keys=False))
    page.details("results.json", json.dumps(results.rows, indent=1))
    path = os.path.join(request.out, "report.html")
    page.write(path)
    return path


def make_sheet(request: Request, runs: Mapping[str, str]) -> Image.Image:
    """image | truth | teacher | student for the first scenes of the evaluation set."""
    dataset = Dataset.open(os.path.join(request.out, "data", "evaluation-wide"))
    frames = []
    for frame in read_frames(dataset, dataset.shards[0], sizer(request.sizes.image)):
        frames.append(frame)
        if len(frames) == SHEET_ROWS:
            break
    image_BCHW, good, _ = decode_frames(FramePipeline(SHEET_ROWS, 1, "cpu"), frames)
    assert image_BCHW is not None  # we packed these images ourselves
    columns = ("teacher", "student")
    maps = {name: Predictor(RunFolder(runs[name]).weights)(image_BCHW)[0].numpy() for name in columns}
    strips = [title_strip(("image", "truth", *columns))]
    for row, frame in enumerate(good):
        truth = read_truth(frame)
        if isinstance(truth, str):
            continue
        depth_HW, valid_HW = truth
        near_HW = 1 / np.where(valid_HW, depth_HW, 1)
        tiles = [displayed(frame.sample.image), colorize(near_HW, valid_HW)]
        for name in columns:
            scale, shift = align_scale_shift(maps[name][row], near_HW, valid_HW)
            tiles.append(colorize(np.clip(scale * maps[name][row] + shift, 1 / 20, None), valid_HW))
        strips.append(np.concatenate([np.asarray(Image.fromarray(t).resize((TILE, TILE))) for t in tiles], 1))
    return Image.fromarray(np.concatenate(strips, 0))


def title_strip(names: tuple[str, ...]) -> np.ndarray:
    """Column titles, as wide as the tiles below."""
    strip = Image.new("RGB", (TILE * len(names), 18), "white")
    draw = ImageDraw.Draw(strip)
    for column, name in enumerate(names):
        draw.text((column * TILE + 4, 3), name, fill="black")
    return np.asarray(strip)
