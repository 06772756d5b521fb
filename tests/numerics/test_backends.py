"""Which backend computes, and that psyche works without a compiled one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import psyche
from psyche.numerics.backends.cuda_compile import kernels_directory
from psyche.numerics.backends.selection import available_backends, fastest_backend
from psyche.numerics.codecs.registry import CODECS


def test_every_backend_speaks_every_codec_and_says_what_it_runs_on() -> None:
    for backend in available_backends():
        assert backend.detail
        for name in CODECS:
            used = backend.codec(name)
            assert (used.name, used.backend) == (name, backend.name)
        with pytest.raises(KeyError):
            backend.codec("int9")


def test_the_definition_is_always_there_and_the_fastest_comes_first() -> None:
    assert available_backends()[-1].name == "torch"
    assert fastest_backend().name == available_backends()[0].name


def test_without_the_extension_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psyche._native", None)  # as where it was not compiled: importing it fails
    monkeypatch.delattr(psyche, "_native", raising=False)
    monkeypatch.delitem(sys.modules, "psyche.numerics.backends.native", raising=False)
    assert [backend.name for backend in available_backends()] == ["torch"]
    assert fastest_backend().name == "torch"


def test_the_extension_can_be_left_out() -> None:
    code = "from psyche.numerics.backends import selection as s; print([one.name for one in s.available_backends()])"
    environment = os.environ | {"PSYCHE_NATIVE": "0"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "['torch']"


def test_the_sources_that_are_compiled_at_run_time_are_found() -> None:
    assert (kernels_directory() / "include" / "psyche_numerics.h").is_file()
