"""Who reads and who writes a block's residual stream, as plain data.

`infopt.calibration.residual` finds it out by running the block; `infopt.rewriters.rotate` asks it what to rotate.
"""

from __future__ import annotations

from dataclasses import dataclass

from infopt.topology import Law


@dataclass(frozen=True)
class Residual:
    """Module paths inside the block. norms: each norm that reads the stream, with its law ("mul": it multiplies by its
    weight, "one_plus": by 1 + weight). readers: each layer that reads the stream, with the norm before it, None for a layer
    that reads it as it is. writers: the layers whose answers are added to the stream, at most scaled."""

    norms: dict[str, Law]
    readers: dict[str, str | None]
    writers: tuple[str, ...]


#: The value of a norm's weight that leaves the normed input as it is, by law.
NEUTRAL: dict[Law, float] = {"mul": 1.0, "one_plus": 0.0}
