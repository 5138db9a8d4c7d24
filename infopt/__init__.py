"""infopt compresses and converts large language models, and proves each result.

This package is the spine: numeric types, quantized tensors, checkpoints, model skeletons, recipes and errors. It imports
none of its siblings (`infopt.calibration`, `infopt.quantizers`, ...); `docs/architecture.md` says who may import whom.
"""

__version__ = "0.1.0"
