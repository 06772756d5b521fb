"""The codecs this version speaks, and the error feedback each is made for.

No imports: configuration is checked without loading torch.
"""

KEPT = (32, 64, 128, 256, 512)
"""Densities of the sparse codecs, of 4096. 64 is the one their plain names mean."""

_SPARSE = tuple("topk2" if kept == 64 else f"topk2-{kept}" for kept in KEPT)

CODECS = ("fp32", "int8", "int4", "int4-32", "int2", *_SPARSE, *(name.replace("topk2", "topk2e") for name in _SPARSE))


def usual_error_feedback(name: str) -> float:
    """β where a configuration does not say: .95 for sparse codecs (SparseLoCo, arXiv 2508.15706), 1 for others."""
    return 0.95 if name.startswith("topk2") else 1.0


def usual_result_codec(name: str) -> str:
    """The codec of a sum of payloads of codec ``name``, which is sent without error feedback and must be finer."""
    if name.startswith("topk2"):
        return "topk2-512"
    return {"fp32": "fp32", "int2": "int4"}.get(name, "int8")
