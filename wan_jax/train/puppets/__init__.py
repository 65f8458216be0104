"""A procedural world of talking puppets: the data of the small model, and the truth that its scores need.

`world.draw` makes the plan of a clip from a random key, `world.render` makes picture and sound of a plan, and
`world.prompt` and `world.caption` put a plan into words.
"""
