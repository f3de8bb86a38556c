"""The names read from the libraries' files are those that the libraries list."""

import pytest

from brittle.models.zoo import zoo_names


def test_the_names_are_the_libraries_own():
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    assert set(zoo_names("torchvision")) == set(torchvision.models.list_models(module=torchvision.models))
    assert set(zoo_names("timm")) >= set(timm.list_models())


def test_a_library_that_is_not_there_has_none():
    assert zoo_names("no_library_of_that_name") == ()
