"""Which backend computes, and that psyche works without a compiled one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import psyche
from psyche.errors import PsycheError
from psyche.numerics.backends.choice import available, best, named
from psyche.numerics.backends.sources import kernels_directory
from psyche.numerics.codecs.names import CODECS


def test_every_backend_speaks_every_codec_and_says_what_it_runs_on() -> None:
    for backend in available():
        assert backend.detail
        for name in CODECS:
            used = backend.codec(name)
            assert (used.name, used.backend) == (name, backend.name)
        with pytest.raises(KeyError):
            backend.codec("int9")


def test_the_definition_is_always_there_and_the_fastest_comes_first() -> None:
    assert available()[-1].name == "torch"
    assert best().name == available()[0].name
    assert named("torch").name == "torch"


def test_an_unknown_backend_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(PsycheError, match=r"abacus.*torch"):
        named("abacus")


def test_without_the_extension_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psyche._native", None)  # as where it was not compiled: importing it fails
    monkeypatch.delattr(psyche, "_native", raising=False)
    monkeypatch.delitem(sys.modules, "psyche.numerics.backends.native", raising=False)
    assert [backend.name for backend in available()] == ["torch"]
    assert best().name == "torch"


def test_the_extension_can_be_left_out() -> None:
    code = "from psyche.numerics.backends.choice import available; print([one.name for one in available()])"
    environment = os.environ | {"PSYCHE_NATIVE": "0"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "['torch']"


def test_the_sources_that_are_compiled_at_run_time_are_found() -> None:
    assert (kernels_directory() / "include" / "psyche_numerics.h").is_file()
