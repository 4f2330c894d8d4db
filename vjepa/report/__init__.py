"""What a person looks at: one-file pages and the pictures in them."""
