"""Writes `tests/data/openpi_frames` anew, with the real openpi-client: python golden_frames.py FOLDER

Made with openpi-client 0.1.2, msgpack 1.2.4, numpy 1.26.4.
"""

import sys
from pathlib import Path

from golden_values import values
from openpi_client import msgpack_numpy

for name, value in values().items():
    (Path(sys.argv[1]) / f"{name}.msgpack").write_bytes(msgpack_numpy.packb(value))
