"""Everything that changes a graph: edits that keep it valid, weights untied, branches put in."""
