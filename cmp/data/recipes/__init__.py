"""Recipes: how the content of packages becomes images, labels and captions.

A recipe is a function `(recipe, archives) -> Samples`; `archives` maps the short names of the
packages to their files. To add a kind of source: write such a function, add its options to
`cmp.data.manifest`, and its row here.
"""

from cmp.data.recipes import arrays, emoji, flags, icons, photos, scenes

RECIPES = {
    "emoji": emoji.make,
    "flags": flags.make,
    "icons": icons.make,
    "icon-set": icons.whole_set,
    "digits": arrays.digits,
    "animals": arrays.animals,
    "scene": scenes.make,
    "tuxpaint": photos.tuxpaint,
    "gcompris": photos.gcompris,
}
