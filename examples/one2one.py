"""One2One: one subject replaces one word of the prompt. Usage: python -m examples.one2one [OUT.png]"""

import sys

from PIL import Image

from realcustom import RealCustomPipeline, Subject
from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL

out = sys.argv[1] if len(sys.argv) > 1 else "one2one.png"
pipeline = RealCustomPipeline.from_pretrained(MINI_MODEL)
fox = Subject(image=Image.open(EXAMPLE_IMAGES / "fox.png"), target_phrase="fox")

output = pipeline("a fox in the jungle", subjects=[fox], seed=7)
output.images[0].save(out)
