"""The three tasks of the page, as data. They differ only in how many images and words a visitor can choose."""

from dataclasses import dataclass
from pathlib import Path

EXAMPLES_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "examples"
VISIBLE_SLOTS = 2  # image slots shown before "Add another subject" is clicked


@dataclass(frozen=True, kw_only=True)
class Example:
    """One click fills in the images, the prompt, and the target words.

    Attributes:
        images: file names in `assets/examples`, one per image slot; at most `VISIBLE_SLOTS`.
        prompt: text of the image.
        words: target words of each slot.
    """

    images: tuple[str, ...]
    prompt: str
    words: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.words) <= VISIBLE_SLOTS, self

    @property
    def paths(self) -> list[Path]:
        return [EXAMPLES_FOLDER / name for name in self.images]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One tab.

    Attributes:
        name: label of the tab; also the prefix of its element ids.
        text: one line of Markdown above the form.
        num_slots: number of image slots.
        multiple_words: whether one image may have several target words.
        examples: shown below the form.
    """

    name: str
    text: str
    num_slots: int
    multiple_words: bool
    examples: tuple[Example, ...] = ()


TASKS = (
    Task(
        name="One2One",
        text="**One image, one word.** The subject of the image replaces one word of the prompt.",
        num_slots=1,
        multiple_words=False,
        examples=(
            Example(images=("dog.png",), prompt="a dog on the beach", words=(("dog",),)),
            Example(images=("robot.png",), prompt="a robot in the jungle", words=(("robot",),)),
            Example(images=("penguin.png",), prompt="a penguin in the city", words=(("penguin",),)),
        ),
    ),
    Task(
        name="One2Many",
        text="**One image, several words.** Each selected word takes its subject from the same image. If the subjects "
        "mix, crop the image to each of them and use Many2Many.",
        num_slots=1,
        multiple_words=True,
        examples=(
            Example(
                images=("frog_and_robot.png",), prompt="a frog and a robot on the beach", words=(("frog", "robot"),)
            ),
        ),
    ),
    Task(
        name="Many2Many",
        text="**Several images, several words.** The subject of each image replaces its own word of the prompt.",
        num_slots=3,
        multiple_words=False,
        examples=(
            Example(
                images=("dog.png", "robot.png"),
                prompt="a dog and a robot on the beach",
                words=(("dog",), ("robot",)),
            ),
            Example(
                images=("penguin.png", "teapot.png"),
                prompt="a penguin and a teapot in the jungle",
                words=(("penguin",), ("teapot",)),
            ),
        ),
    ),
)
