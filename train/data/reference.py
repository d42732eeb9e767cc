"""KEY.ref.json: the log-probabilities of a pair's answers under the reference model, as `train.shards reference` writes
them, with what they were computed by."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from .samples import REFERENCE_SUFFIX, parse_json
from .shard_reader import RawSample


class WrongReferenceError(ValueError):
    """References are missing or of another model: a fault of the shards, which stops a run at once."""


@dataclass(frozen=True)
class ReferenceModel:
    """What reference log-probabilities depend on.

    model: fingerprint of its weights.
    tiles: most tiles of an image; no record of a model without them says so.
    """

    model: str
    image_size: int
    fast_pixels: bool
    tiles: int = 0

    @property
    def record(self) -> dict[str, str | int | bool]:
        """As it stands beside log-probabilities."""
        return {key: value for key, value in asdict(self).items() if key != "tiles" or value}


def to_member(chosen: float, rejected: float, model: ReferenceModel) -> bytes:
    """The content of the member."""
    return json.dumps({"chosen": chosen, "rejected": rejected} | model.record).encode()


def read_member(raw: RawSample, expected: ReferenceModel) -> tuple[float, float]:
    """Log-probabilities of the chosen and of the rejected answer, in nats.

    Raises:
        WrongReferenceError: the sample has none, or those of another model.
    """
    if REFERENCE_SUFFIX not in raw:
        raise WrongReferenceError(
            f"it has no .{REFERENCE_SUFFIX}; make it (python -m train.shards reference), or set dpo.reference to model"
        )
    record = parse_json(raw[REFERENCE_SUFFIX], f"its .{REFERENCE_SUFFIX}")
    try:
        chosen, rejected = float(record["chosen"]), float(record["rejected"])
    except (TypeError, KeyError, ValueError) as error:
        raise WrongReferenceError(f"its .{REFERENCE_SUFFIX} has no `chosen` and `rejected` numbers") from error
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise WrongReferenceError(f"its .{REFERENCE_SUFFIX} holds {chosen} and {rejected}; expected finite numbers")
    for key, value in asdict(expected).items():
        recorded = record.get(key, 0 if key == "tiles" else None)
        if recorded != value:
            raise WrongReferenceError(
                f"its .{REFERENCE_SUFFIX} was made with {key} {recorded}, this run starts with {value}; make it again "
                "with this run's init_from.checkpoint, image_size, image.tiles and data.fast_pixels"
            )
    return chosen, rejected
