"""A live training script -> what it wastes and what is silently wrong: facts are recorded, and rules read them."""
