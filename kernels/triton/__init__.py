"""GPU kernels in Triton, compiled by it at first use. Nothing else in infopt imports Triton, and nothing imports this package
before a tensor lies on a GPU. Import `triton` absolutely: this package is `infopt.kernels.triton`.

Each launcher is a plain function of tensors whose meaning is in `kernels/reference.py`. The same functions run on tensors in
memory by Triton's interpreter, which is how the tests execute every line of them without a GPU; the rules below come from
that, and from the oldest GPU that is supported (compute capability 8.0):

* what is loaded becomes fp32 at once; arithmetic on bf16 is never left to the backend;
* E4M3 is converted by integer arithmetic (`numeric.py`), which gives the same bits on every GPU and in the interpreter;
* quotients that decide codes are correctly rounded (`div_rn`), and so is rounding to whole numbers (`nearest`);
* no inline assembly, no libdevice, no atomics: every result is the same from run to run, bit for bit;
* masked loads say what `other` is; every block has a power of two of elements, and what lies outside is masked.
"""
