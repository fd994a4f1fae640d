"""The trained model of the tests: a tiny Llama that tells stories. `scripts/make_test_models.py` makes it."""

from finetune_pipeline.settings import PROJECT_ROOT

STORIES = PROJECT_ROOT / "finetune_pipeline_tests" / "data" / "stories"
STORIES_GGUF = STORIES / "model.gguf"  # of the same weights, F16
STORY = (
    "Once upon a time, there was a girl named Lily. She lived in a small house near the park. One day, Lily found a "
    "big, red ball under a tree."
)
"""The beginning of its greedy text."""


def requests(count: int) -> list[dict[str, object]]:
    """Return training rows: requests about playlists, in characters that occur in the stories."""
    names = ("Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Rosa", "Max")
    songs = ("The red kite", "A small boat", "My old hat", "One warm day", "Behind the house", "Under a tree", "Soup")
    forms = ("Add {song} to the list of {name}", "Please put {song} on the list of {name}", "{song} is for {name}")
    all_rows = [(form, song, name) for name in names for song in songs for form in forms]
    spread = [all_rows[(number * 31) % len(all_rows)] for number in range(count)]  # 31 and 168 have no common factor
    return [
        {"prompt": form.format(song=song, name=name), "history": [], "completion": f"Add to the list of {name}."}
        for form, song, name in spread
    ]
