"""Predictions beside what is annotated, image by image, with a number that ranks them."""

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.evaluation.annotated import (
    AnnotatedImages,
    Classes,
    Record,
    as_rle,
    instance_shapes,
    read_pixels,
    read_segment_ids,
    segment_shapes,
)
from gn_practical.training.evaluation.matching import Matches, match_instances, match_segments
from gn_practical.training.evaluation.panels import Shape, draw_shapes, side_by_side
from gn_practical.training.evaluation.panoptic import panoptic_quality
from gn_practical.training.evaluation.result_files import Predictions

# What an image can be ranked by → whether more of it is worse.
MEASURES = {"PQ": False, "SQ": False, "RQ": False, "score": False, "missed": True, "wrong": True}

_STYLE = (
    "body{font:15px sans-serif;margin:1em;color-scheme:light dark}h1{font-size:1.2em}"
    "figure{margin:1.5em 0}figcaption{margin-bottom:.3em;overflow-wrap:anywhere}img{max-width:100%}"
)


class Result(NamedTuple):
    """An image, what is predicted for it, and how well."""

    record: Record
    found: list[Record]  # that were counted
    matches: Matches

    @property
    def values(self) -> dict[str, float]:
        """PQ, SQ and RQ in percent, counts, and the mean score in percent."""
        scores = [each["score"] for each in self.found if each.get("score") is not None]
        return {
            **self.matches.quality(),
            "right": len(self.matches.pairs),
            "wrong": len(self.matches.wrong),
            "missed": len(self.matches.missed),
            "score": 100 * sum(scores) / len(scores) if scores else math.nan,
        }


def measure(record: Record, predictions: Predictions, min_score: float) -> Result:
    """Compare the prediction of an image with its annotations.

    Args:
        record: with annotations of the predictions' kind.
        predictions: of the data set.
        min_score: instances below it, in [0, 1], are left out; panoptic segments never are.

    Raises:
        DatasetError: naming the file that cannot be used.
    """
    found = predictions.by_image[record["image_id"]]
    if predictions.panoptic:
        truth_ids = read_segment_ids(record["pan_seg_file_name"])
        ids = predictions.segment_ids(record)
        if ids.shape != truth_ids.shape:
            raise DatasetError(
                f"a panoptic PNG must have the size of its image, got "
                f"{record['pan_seg_file_name']} of {truth_ids.shape[1]}x{truth_ids.shape[0]}."
            )
        matches = match_segments(truth_ids, record["segments_info"], ids, found)
        return Result(record, found, matches)
    found = [each for each in found if each["score"] >= min_score]
    return Result(record, found, match_instances(_with_rle(record), found))


def check_kind(predictions: Predictions, images: AnnotatedImages) -> list[Record]:
    """Return the images that are compared, all of which have annotations of the right kind.

    Raises:
        DatasetError: if they have not.
    """
    records = [r for r in images.records if r["image_id"] in predictions.by_image]
    key = "pan_seg_file_name" if predictions.panoptic else "annotations"
    if not records or not all(key in record for record in records):
        kind = "panoptic annotations" if predictions.panoptic else "annotated instances"
        raise DatasetError(
            f"the data set must have images with {kind} for {predictions.path}, got "
            f"{images.name} without. Name another, or other predictions."
        )
    return records


def ranked(results: Iterable[Result], by: str) -> list[Result]:
    """Sort results, the worst first, those without a value last.

    Args:
        results: in any order.
        by: one of ``MEASURES``.
    """

    def key(result: Result) -> tuple:
        value = result.values[by]
        return math.isnan(value), -value if MEASURES[by] else value, result.record["file_name"]

    return sorted(results, key=key)


def whole_quality(results: Iterable[Result]) -> dict[str, float]:
    """PQ, SQ and RQ of all images together: PQ as an evaluation has it, of panoptic predictions."""
    sums: dict[Any, np.ndarray] = {}
    for result in results:
        for kind, tally in result.matches.tallies.items():
            sums[kind] = sums.get(kind, 0) + tally
    return panoptic_quality(np.array(list(sums.values())).reshape(-1, 4))


def draw_result(result: Result, predictions: Predictions, classes: Classes) -> np.ndarray:
    """Draw prediction and ground truth side by side, and name what is wrong or missed.

    Raises:
        DatasetError: naming the file that cannot be used.
    """
    record, matches = result.record, result.matches
    pixels = read_pixels(record)
    if predictions.panoptic:
        found = _noted(result.found, matches.wrong, " - wrong")
        truth = _noted(record["segments_info"], matches.missed, " - missed")
        truth_ids = read_segment_ids(record["pan_seg_file_name"])
        shapes = segment_shapes(predictions.segment_ids(record), found, classes)
        true_shapes = segment_shapes(truth_ids, truth, classes)
    else:
        shapes = _found_shapes(result, classes)
        true_shapes = [
            shape._replace(text=f"{shape.text} - missed") if i in matches.missed else shape
            for i, shape in enumerate(instance_shapes(record, classes))
        ]
    values = result.values
    quality = "no segment" if math.isnan(values["PQ"]) else f"PQ {values['PQ']:.1f}"
    titles = [
        f"prediction: {quality}, {values['right']} right, {values['wrong']} wrong",
        f"ground truth: {values['missed']} missed",
    ]
    panels = [draw_shapes(pixels, each, classes.metadata) for each in (shapes, true_shapes)]
    return side_by_side(panels, titles)


def index_rows(results: Sequence[Result], pictures: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of values for each result in its order, with the picture of the first ones."""
    rows = []
    for rank, result in enumerate(results, start=1):
        values = {name: _rounded(value) for name, value in result.values.items()}
        picture = pictures[rank - 1] if rank <= len(pictures) else ""
        place = {"rank": rank, "image_id": result.record["image_id"]}
        rows.append({**place, "file": result.record["file_name"], **values, "picture": picture})
    return rows


def index_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def index_html(rows: Sequence[dict[str, Any]], title: str, remark: str) -> str:
    """Write rows as a page to scroll through, with the pictures, beside which it lies."""
    figures = []
    for row in rows:
        about = {"PQ": row["PQ"], "SQ": row["SQ"], "RQ": row["RQ"], "mean score": row["score"]}
        values = ", ".join(f"{name} {value}" for name, value in about.items() if value != "")
        caption = f"{row['rank']}. {row['file']} (id {row['image_id']!r}): {values}"
        url = quote(row["picture"])
        picture = f'<a href="{url}"><img loading="lazy" src="{url}" alt=""></a>' if url else ""
        figures.append(f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>")
    title, remark = html.escape(title), html.escape(remark)
    body = "\n".join(figures)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1><p>{remark} "
        f'<a href="index.csv">index.csv</a> has all values.</p>\n{body}\n</body></html>\n'
    )


def _with_rle(record: Record) -> list[Record]:
    """Return annotations with boxes of corner and size, and masks as RLE where there are any."""
    size, annotations = (record.get("height"), record.get("width")), []
    for each in record["annotations"]:
        box = BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYWH_ABS)
        outline = {"bbox": list(box)}
        if each.get("segmentation"):
            outline["rle"] = as_rle(each["segmentation"], size)
        annotations.append({**each, **outline, "isthing": True})
    return annotations


def _found_shapes(result: Result, classes: Classes) -> list[Shape]:
    shapes = []
    for index, each in enumerate(result.found):
        category = each["category_id"]
        note = " - wrong" if index in result.matches.wrong else ""
        text = f"{classes.name(category)} {100 * each['score']:.0f}%{note}"
        mask = mask_util.decode(each["rle"]) if "rle" in each else None
        x, y, width, height = each["bbox"]
        box = [x, y, x + width, y + height]
        shapes.append(Shape(text, classes.color(category), mask, box, each.get("keypoints")))
    return shapes


def _noted(segments: Sequence[Record], chosen: Sequence[int], note: str) -> list[Record]:
    return [{**s, "note": note} if i in chosen else s for i, s in enumerate(segments)]


def _rounded(value: float) -> float | int | str:
    if isinstance(value, int):
        return value
    return "" if math.isnan(value) else round(value, 2)
