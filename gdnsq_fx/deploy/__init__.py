"""From a fine-tuned graph to a file that a runtime can execute."""
