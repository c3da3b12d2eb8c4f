"""The paper's comparisons as studies, and their reports."""
