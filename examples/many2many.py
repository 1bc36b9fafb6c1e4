"""Many2Many: two subjects, each with its own reference image. Usage: python -m examples.many2many [OUT.png]"""

import sys

from PIL import Image

from realcustom import RealCustomPipeline, Subject
from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL

out = sys.argv[1] if len(sys.argv) > 1 else "many2many.png"
pipeline = RealCustomPipeline.from_pretrained(MINI_MODEL)
subjects = [
    Subject(image=Image.open(EXAMPLE_IMAGES / f"{name}.png"), target_phrase=name) for name in ("penguin", "robot")
]

output = pipeline("a penguin and a robot on the beach", subjects=subjects, seed=7)
output.images[0].save(out)
