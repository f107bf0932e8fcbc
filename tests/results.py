"""Records of results, for tests that write nuclei without a run."""

from __future__ import annotations

from typing import Any

import msgspec

from patchcl_qupath import __version__
from patchcl_qupath.config import Config, ResultConfig, to_dict
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.storage.records import FileSignature, ResultRecord, SlideProvenance

RESULT = ResultRecord(
    run="r",
    image="a slide",
    made="m",
    version=__version__,
    model="m",
    engine="torch",
    config=to_dict(Config()),
    within=[],
    tissue_mm2=2.0,
    slide=SlideProvenance(file=FileSignature(bytes=1, modified_ns=1), mpp=(0.5, 0.5)),
    stains=H_E,
    failed_tiles=(),
    nuclei=0,
    object_type="annotation",
    files=(),
)


def result_of(count: int, config: ResultConfig | None = None, **changes: Any) -> ResultRecord:
    """The record of a run with ``count`` nuclei."""
    config = config or ResultConfig()
    kind = config.kind(count)
    return msgspec.structs.replace(RESULT, nuclei=count, object_type=kind, **changes)
