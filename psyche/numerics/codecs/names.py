"""The codecs this version speaks, and the error feedback each is made for.

No imports: configuration is checked without loading torch.
"""

KEPT = (32, 64, 128, 256, 512)
"""Densities of the sparse codecs, of 4096. 64 is the one their plain names mean."""

_SPARSE = tuple("topk2" if kept == 64 else f"topk2-{kept}" for kept in KEPT)

CODECS = ("fp32", "int8", "int4", "int4-32", "int2", *_SPARSE, *(name.replace("topk2", "topk2e") for name in _SPARSE))


def is_sparse(name: str) -> bool:
    """Whether a codec leaves most values out."""
    return name.startswith("topk2")


def usual_error_feedback(name: str) -> float:
    """β where a configuration does not say: .95 for sparse codecs (SparseLoCo, arXiv 2508.15706), 1 for others."""
    return 0.95 if is_sparse(name) else 1.0


def usual_result_codec(name: str) -> str:
    """The codec of a sum of payloads of codec ``name``, which is sent without error feedback and must be finer.

    Held-out loss after 400 steps of 4 nodes against that of gather (139.6k parameters, H = 10, for topk2-256 5; one
    seed, for topk2 two, which differ by 2 %): topk2 with topk2-512 −.8 %, with topk2-256 −.6 %, with topk2-128 +4 %,
    with itself +9 %; topk2-256 with int2 +.4 %, with topk2-512 +3 %; int2 with int4 −.1 %, int8 with int8 −.1 %. Of a
    single sum topk2-512 loses more (.49 to .52, relative, at 4 to 32 nodes) than topk2-128 (.37): that says little
    about training.
    """
    if is_sparse(name):
        coded, _, kept = name.partition("-")
        return "int2" if kept in ("256", "512") else f"{coded}-512"
    return {"fp32": "fp32", "int2": "int4"}.get(name, "int8")
