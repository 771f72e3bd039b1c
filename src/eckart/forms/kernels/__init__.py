"""How a quantised matrix multiplies: on a CPU by what torch does fastest there, and beside it the plain way.

`linear` is what `QuantizedMatrix.forward` calls. It keeps no dense copy. For many rows of activations it decodes a tile
of the matrix at a time; for few, or where integers can be multiplied, it reads codes in the order that one of torch's
kernels wants. Such a layout is made from the codes at first use and held beside them, outside the module: it is not
saved, copied, pickled or moved, and made anew when codes or scales change. There may be two, one for one row and one
for several. Each takes 8 bits a weight, 4 for codes of up to 4 bits unless they have one scale a row, plus about 3 %
and scales in float32: `cached_bytes` counts them, `forget` drops them.

| codes | one row | several rows |
| --- | --- | --- |
| uniform grid, one scale a row | embedding bag | oneDNN's integer product (`integers`), in bfloat16 up to 96 rows |
| uniform grid, groups, up to 4 bits, bfloat16 | torch's 4-bit kernel (`packed`) | the same up to 16 rows, then tiles |
| uniform grid, other groups | embedding bag (`bag`) | the same up to 4 rows, then tiles |
| any other grid, float64, other devices | tiles | tiles |

Other matrices of codes may keep a quantised one beside them, that is their layout and has its own (`Pyramid`).

Exact by default: weights are what `dense()` says, activations count to 24 bits, sums are of float32 or better.
`activations("int8")` allows activations of several rows to be rounded to 8 bits where that is faster. Gradients are
those of the matrix itself, and only packed tensors are saved for them.
"""

from eckart.forms.kernels.prepared import cached_bytes, forget, kept
from eckart.forms.kernels.product import activations, eager, linear, plain

__all__ = ["activations", "cached_bytes", "eager", "forget", "kept", "linear", "plain"]
