"""A few English texts of different lengths, for real models."""

TEXTS = [
    "Paris is the capital of France.",
    "capital of France",
    "A recipe for sourdough bread needs flour, water, salt and time.",
    "the",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. " * 3,
]
