"""What a user is shown of a measured tokenizer: a table, a page, numbers for programs, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.atomic_files import replacing, write_text
from bitdance_scale.checkpoint.integrity import file_digest
from bitdance_scale.data.index.index import Index
from bitdance_scale.evaluation.frechet import USUAL_IMAGES
from bitdance_scale.evaluation.page import (
    DIFFERENCE_FACTOR,
    MAX_SHOWN_PX,
    Table,
    comparison,
    heading,
    histogram,
    page,
    paragraph,
)
from bitdance_scale.evaluation.pairs import Pairs, draw_pairs
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.tokenizer_measurement import Measuring, Shown, SizeResult
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.weights import find_autoencoder, weights_digest
from bitdance_scale.wording import first_few

NAME = "evaluation"
"""Of the files, which end in .json, .md and .html."""
# Measure -> its column, the format of its values, and the option that asks for it.
_COLUMNS = {
    "psnr_db": ("PSNR (dB)", ".2f", ""),
    "psnr_flipped_db": ("PSNR, 1% of bits flipped (dB)", ".2f", ""),
    "ssim": ("SSIM", ".4f", ""),
    "lpips_alex": ("LPIPS (alex)", ".4f", "--lpips-alex"),
    "lpips_vgg": ("LPIPS (vgg)", ".4f", "--lpips-vgg"),
    "rfid": ("rFID", ".3f", "--inception"),
}


class Report:
    """The results of measuring a tokenizer.

    Args:
        measuring: what was measured.
        index: the images.
        autoencoder: the tokenizer.
        results: by size.
        topology: the ranks that measured.
    """

    def __init__(
        self,
        measuring: Measuring,
        index: Index,
        autoencoder: Autoencoder,
        results: Sequence[SizeResult],
        topology: Topology,
    ) -> None:
        self._measuring, self._index, self._autoencoder = measuring, index, autoencoder
        self._results, self._topology = results, topology

    def text(self) -> str:
        """The table in Markdown, and what is to be known of it."""
        return "\n\n".join([self._table().markdown(), *self._notes()])

    def write(self) -> None:
        """Writes the files that were asked for."""
        out, picture = self._measuring.out, self._measuring.picture
        if out is not None:
            write_text(out / f"{NAME}.json", json.dumps(self.record(), indent=2) + "\n")
            write_text(out / f"{NAME}.md", f"# {self._title}\n\n{self.text()}\n")
            write_text(out / f"{NAME}.html", self._page())
        if picture is not None:
            crops = [result for result in self._results if result.size.crop_px is not None]
            with replacing(picture, is_durable=False) as aside:
                draw(crops).save(aside, format="PNG")

    def record(self) -> dict[str, Any]:
        """All numbers, and what decides them, as JSON values."""
        measuring = self._measuring
        weights, sizes = find_autoencoder(measuring.weights)
        networks: dict[str, Path] = {f"lpips_{name}": path for name, path in measuring.lpips.items()}
        if measuring.inception is not None:
            networks["inception"] = measuring.inception
        return {
            "weights": str(weights.resolve()),
            "weights_digest": weights_digest(weights),
            "tokenizer": sizes,
            "downsampling": self._downsampling,
            "compression": 24 * self._downsampling**2 / sizes["num_bits"],
            "shards": [*measuring.shards],
            "index": self._index.hash,
            "networks": {
                name: {"file": str(path.resolve()), "sha256": file_digest(path)} for name, path in networks.items()
            },
            "dtype": "float32",
            "device": self._topology.device_name,
            "ranks": self._topology.world_size,
            "sizes": {result.size.name: self._numbers(result) for result in self._results},
        }

    def _numbers(self, result: SizeResult) -> dict[str, Any]:
        return {
            "images": len(result.samples),
            "too_small": len(result.left_out),
            **result.means,
            "code_share": result.code_share.tolist(),
            "code_entropy_bits": result.code_entropy_bits.tolist(),
            "bit_share": result.bit_share.tolist(),
            "encode_ms": result.milliseconds[0],
            "decode_ms": result.milliseconds[1],
            "worst": [{"key": self._index.name(shown.sample)} | self._values(result, shown) for shown in result.worst],
        }

    @property
    def _title(self) -> str:
        return f"Tokenizer {self._measuring.weights}"

    @property
    def _downsampling(self) -> int:
        return 2 ** (len(self._autoencoder.encoder.down) - 1)

    def _table(self) -> Table:
        measured = [name for name in _COLUMNS if any(name in result.means for result in self._results)]
        titles = [_COLUMNS[name][0] for name in measured]
        header = ["size (px)", "images", *titles, "codes used", "code entropy (of 8 bits)", "share of +1 per bit"]
        rows = []
        for result in self._results:
            means, shares = result.means, result.bit_share
            values = [format(means[name], _COLUMNS[name][1]) if name in means else "" for name in measured]
            rows.append([
                result.size.name, str(len(result.samples)), *values, f"{result.code_share.mean():.1%}",
                f"{result.code_entropy_bits.mean():.2f}", f"{shares.min():.2f}..{shares.max():.2f}",
            ])  # fmt: skip
        return Table(header, rows)

    def _group_table(self) -> Table:
        header = ["group of 8 bits"]
        for result in self._results:
            header += [f"codes used, {result.size.name}", f"entropy (bits), {result.size.name}"]
        rows = []
        for group in range(len(self._results[0].code_counts)):
            cells = [str(group)]
            for result in self._results:
                cells += [f"{result.code_share[group]:.1%}", f"{result.code_entropy_bits[group]:.2f}"]
            rows.append(cells)
        return Table(header, rows)

    def _notes(self) -> list[str]:
        notes = ["Codes are those of a group of 8 bits; shares and entropies are means over the groups."]
        absent = [
            f"{title} ({option} FILE)"
            for name, (title, _, option) in _COLUMNS.items()
            if option and not any(name in result.means for result in self._results)
        ]
        if absent:
            notes.append(f"Not measured, as no weights were named: {', '.join(absent)}.")
        for result in self._results:
            name, number = result.size.name, len(result.samples)
            if len(result.left_out):
                keys = [self._index.name(sample) for sample in result.left_out.tolist()]
                notes.append(f"{name}: {len(keys)} images are too small and were left out: {first_few(keys)}.")
            if result.rfid is not None and number < USUAL_IMAGES:
                notes.append(
                    f"{name}: rFID is of {number} images, and is higher the fewer they are: compare it at equal "
                    f"numbers only ({USUAL_IMAGES:,} are usual)."
                )
            encode_ms, decode_ms = result.milliseconds
            where = self._topology.device_name
            notes.append(f"{name}: encode {encode_ms:.1f} ms, decode {decode_ms:.1f} ms an image, alone on {where}.")
        return notes

    def _page(self) -> str:
        parts = [self._table().html(), *map(paragraph, self._notes()), heading("Groups of bits")]
        parts.append(self._group_table().html())
        parts.append(
            paragraph(
                f"Below: original, reconstruction, and their difference times {DIFFERENCE_FACTOR} around grey; of "
                f"images above {MAX_SHOWN_PX} px the middle."
            )
        )
        for result in self._results:
            parts += [heading(f"{result.size.name}: PSNR of all images"), histogram(result.values["psnr_db"], "dB")]
            for title, found in (("lowest PSNR", result.worst), ("first images", result.first)):
                parts.append(heading(f"{result.size.name}: {title}"))
                parts += [comparison(self._caption(result, shown), shown.original, shown.decoded) for shown in found]
        return page(self._title, parts)

    def _caption(self, result: SizeResult, shown: Shown) -> str:
        values = self._values(result, shown)
        texts = [f"{_COLUMNS[name][0]} {value:{_COLUMNS[name][1]}}" for name, value in values.items()]
        return f"{self._index.name(shown.sample)}: {', '.join(texts)}"

    def _values(self, result: SizeResult, shown: Shown) -> dict[str, float]:
        place = int(np.searchsorted(result.samples, shown.sample))
        return {name: float(values[place]) for name, values in result.values.items()}


def draw(results: Sequence[SizeResult]) -> Image.Image:
    """Two rows per size of crop: originals, and below them what the bits give back."""
    return draw_pairs(
        [
            Pairs(
                f"{result.size.name} px",
                f"{result.means['psnr_db']:.1f} dB",
                [shown.original for shown in result.first],
                [shown.decoded for shown in result.first],
            )
            for result in results
        ]
    )
