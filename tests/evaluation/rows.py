"""A few rows of each of the harness's sets, with the fields of local files."""

from __future__ import annotations

from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai_test.jsonl.gz": [
        {"text": 'She had a cat.\n\n"Where is the cat?" he asked. Nobody had seen the cat'},
        {"text": "One two three  two"},
        {"text": "Il pleut à Paris"},
    ],
    "hellaswag_val_1000.jsonl.gz": [
        {"query": "Cooking: A man cuts bread. He", "choices": ["eats it.", "flies.", "sings to it.", "é."], "gold": 0},
        {"query": "Chess: She opens with", "choices": ["e4.", "a pawn to the king.", "nothing.", "7"], "gold": 1},
    ],
    "piqa_valid.jsonl.gz": [
        {"goal": "How do I open a jar?", "sol1": "Turn the lid. ", "sol2": "Turn the jar's label over.", "label": 0},
        {"goal": "dresser", "sol1": "Use a 'comb'", "sol2": 'Use "wood"', "label": 1},
    ],
    "arc_easy_test.jsonl.gz": [
        {"id": "a", "question": "What melts?", "choices": ["ice", "stone", "fire"], "gold": 0},
        {"id": "b", "question": "How many legs has a spider?", "choices": ["2", "4", "6", "8", "10"], "gold": 3},
    ],
    "arc_challenge_test.jsonl.gz": [
        {"id": "c", "question": "Which is\nheavier?", "choices": ["a stone", "a feather"], "gold": 0},
        {"id": "d", "question": "Why?", "choices": ["Because.", "Since it is so."], "gold": 1},
    ],
    "winogrande_xl_dev.jsonl.gz": [
        {"sentence": "Ann taught Bea as _ knew more.", "option1": "Ann", "option2": "Bea", "answer": "1"},
        {"sentence": "The cup fell off the tray as the _ shook.", "option1": "cup", "option2": "tray", "answer": "2"},
    ],
}
WIKITEXT = ' \n = One thing = \n \n It is @-@ or so it seems @-@ a " thing " . \n = = More = = \n \n N <unk> . \n'
WIKITEXT += " \n = Another = \n \n It 's ( very ) short ; 1 @,@ 000 words . \n "
