"""openpi's frames byte for byte, as openpi-client 0.1.2 packs them."""

import numpy as np
import pytest

from ki_runtime.remote.packing import pack, unpack

from .golden_values import values


@pytest.mark.parametrize("name", values())
def test_what_we_pack_is_openpis_to_the_byte_and_what_it_packs_comes_back(data, name):
    frame = (data / "openpi_frames" / f"{name}.msgpack").read_bytes()
    value = values()[name]
    assert pack(value) == frame
    found = unpack(frame, "the client")
    np.testing.assert_equal(found, value)
    assert pack(found) == frame


def test_every_frame_is_looked_at(data):
    assert {path.stem for path in (data / "openpi_frames").iterdir()} == set(values())
