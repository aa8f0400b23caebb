"""Write the embedded photographs (vae_export/assets/photos), from those that scikit-image ships.

    python tools/make_photos.py

Only photographs that are public domain or CC0, as the docstrings of skimage.data say. `coffee` is not among those that
the embedded model was trained on.
"""

from pathlib import Path

from PIL import Image
from skimage import data

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
OUT = Path(__file__).parent.parent / "vae_export" / "assets" / "photos"

if __name__ == "__main__":
    for name in PHOTOS:
        image = Image.fromarray(getattr(data, name)())
        width, height = (side - side % 8 for side in image.size)
        image.crop((0, 0, width, height)).save(OUT / f"{name}.jpg", quality=93, subsampling=0)
