"""Parameters as one flat vector, on one process or sharded over several."""
