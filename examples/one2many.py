"""One2Many: two subjects of the same reference image. Usage: python -m examples.one2many [OUT.png]"""

import sys

from PIL import Image

from realcustom import RealCustomPipeline, Subject
from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL

out = sys.argv[1] if len(sys.argv) > 1 else "one2many.png"
pipeline = RealCustomPipeline.from_pretrained(MINI_MODEL)
reference = Image.open(EXAMPLE_IMAGES / "cat_and_car.png")
subjects = [Subject(image=reference, target_phrase=phrase) for phrase in ("cat", "car")]

output = pipeline("a cat and a car in the snow", subjects=subjects, seed=7)
output.images[0].save(out)
