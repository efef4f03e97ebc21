"""Planning: what a recipe takes on machines that are not here, and proof that its programs compile for them."""
