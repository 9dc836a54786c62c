"""The proof of a world model: it is given goal pictures in a simulator, beside policies that need none, and filmed."""
