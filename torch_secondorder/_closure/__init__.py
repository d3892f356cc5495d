"""Running a closure: capture of its graph, validation, replay, data-parallel averaging."""
