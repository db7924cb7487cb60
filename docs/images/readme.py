"""Makes the README's film and parity picture from what `make demo` left: python docs/images/readme.py build/demo"""

import base64
import re
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

EPISODES, EVERY, SIZE, COLOURS, MILLISECONDS = 3, 3, 240, 128, 120
HERE = Path(__file__).parent


def film(run: Path) -> None:
    """The first episodes as reach.gif; each stands still for a moment at its end."""
    frames = []
    for episode in range(EPISODES):
        shown = iio.imread(run / f"episode_{episode:03d}.mp4")
        frames += [*shown[::EVERY], *[shown[-1]] * 4]
    small = [Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for frame in frames]
    pixels = np.concatenate([np.asarray(picture).reshape(-1, 3) for picture in small])
    red = pixels[(pixels[:, 0] > 110) & (pixels[:, 1:] < 90).all(axis=1)]  # the target: few pixels, not to be averaged
    sample = np.concatenate([pixels[::5], np.resize(red, (SIZE * SIZE, 3))])
    palette = Image.fromarray(sample[None]).quantize(COLOURS)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small]
    first.save(HERE / "reach.gif", save_all=True, append_images=others, duration=MILLISECONDS, loop=0, optimize=True)


def parity(report: Path) -> None:
    """The report's picture of the actions as parity.png."""
    found = re.search(r'<img alt="Actions[^"]*" src="data:image/png;base64,([^"]+)"', report.read_text("utf-8"))
    assert found is not None, report
    (HERE / "parity.png").write_bytes(base64.b64decode(found[1]))


if __name__ == "__main__":
    demo = Path(sys.argv[1])
    film(demo / "run")
    parity(demo / "bundle" / "parity.html")
