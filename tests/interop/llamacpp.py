"""Asks llama.cpp: run by a Python that has the package llama_cpp, and not this library.

It reads ``{"model": path, "texts": […], "continued": n}`` from the standard input, and writes for each text its ids,
the logits after the last of them, n ids written on by the highest logit, and the bytes that its ids stand for.
"""

import json
import sys


def main() -> None:
    from llama_cpp import Llama

    asked = json.load(sys.stdin)
    llama = Llama(asked["model"], n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    answers = []
    for text in asked["texts"]:
        ids = llama.tokenize(text.encode(), add_bos=True, special=False)
        llama.reset()
        llama.eval(ids)
        logits = llama.scores[len(ids) - 1].tolist()
        written = []
        while len(written) < asked["continued"]:
            written.append(int(llama.scores[len(ids) + len(written) - 1].argmax()))
            llama.eval(written[-1:])
        back = list(llama.detokenize(ids[1:]))
        answers.append({"ids": ids, "logits": logits, "written": written, "back": back})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
